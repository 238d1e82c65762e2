"""The files of a run, opening its directory, and comparing it with the run to resume.

config.json          the configuration, seeds, key and versions
metrics.csv          one row per iteration and seed, written during training
evaluations.csv      one row per evaluation during training and seed, if there are evaluations
learning_curve.png   return against environment steps
policy/              the final policy; policy/seed_0, policy/seed_1, … for several seeds
best_policy/         likewise, the policies with the highest mean return in an evaluation
checkpoints/         the state to resume from, until the run has ended
"""

import contextlib
import json
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from purejaxppo.config import Config
from purejaxppo.keys import default_prng_impl
from purejaxppo.runs import processes
from purejaxppo.runs.disk import atomic_write, locked
from purejaxppo.runs.store import Store
from purejaxppo.types import ConfigError
from purejaxppo.validation import jit_is_disabled
from purejaxppo.version import __version__


@contextlib.contextmanager
def open_run_directory(
    directory: str | os.PathLike | None, identity: dict[str, Any], key: Any, resume: bool
) -> Iterator[Store]:
    """Make the directory of a run, or open that of the run to resume, and lock it.

    ``identity`` is the part of ``config.json`` that must be equal for a run to be resumed. Without
    a directory the `Store` stores nothing. Raises `ConfigError` before any training if the
    directory exists and is not to be resumed, if the run in it has ended or has another identity,
    or if the processes do not share the directory or were given other arguments.
    """
    if processes.connected() and jit_is_disabled():
        raise ConfigError(
            "jax.disable_jit works with one process only: enable jit, or train in a single process"
        )
    described = _with_key(identity, key)
    processes.require_same({**described, "resume": resume, "directory": directory is not None})
    if directory is None:
        if resume:
            raise ConfigError("resume needs the directory of the run to continue")
        yield Store(None)
        return
    store = Store(Path(directory))
    with contextlib.ExitStack() as stack:

        def open_directory(directory: Path) -> None:
            if not (resume and directory.exists()):
                reserve(directory, described, "checkpoints")
            stack.enter_context(locked(directory))
            if resume:
                _require_same_run(directory, described)

        store.write(open_directory)
        if not all(processes.all_gather_objects((Path(directory) / "config.json").exists())):
            raise ConfigError(
                f"{directory} does not exist for all processes: give a directory that they share"
            )
        yield store


def reserve(directory: str | os.PathLike, described: dict[str, Any], *inside: str) -> Path:
    """Make a new directory, atomically, with ``config.json`` and the directories ``inside``."""
    directory = Path(directory)
    description = {
        **described,
        "purejaxppo": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    text = json.dumps(description, indent=2) + "\n"
    try:
        if directory.exists():
            raise ConfigError(
                f"{directory} exists already, and a run never overwrites: choose another directory"
            )
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        temporary.chmod(0o755)
        for name in inside:
            (temporary / name).mkdir()
        atomic_write(temporary / "config.json", lambda path: path.write_text(text))
        temporary.rename(directory)
    except OSError as error:
        raise ConfigError(f"cannot make the run directory {directory}: {error.strerror}") from None
    return directory


def end(directory: Path) -> None:
    """Remove the checkpoints of a run that has ended, so that it cannot be resumed.

    They are renamed first: if half of them were removed, the run would be resumed from its start.
    """
    gone = directory / ".checkpoints"
    shutil.rmtree(gone, ignore_errors=True)
    (directory / "checkpoints").rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _require_same_run(directory: Path, described: dict[str, Any]) -> None:
    """Raise `ConfigError` unless the directory holds an unfinished run with this description."""
    try:
        before = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        raise ConfigError(
            f"{directory} is not a run that can be resumed: it has no valid config.json"
        ) from None
    if not (directory / "checkpoints").is_dir():
        raise ConfigError(f"the run in {directory} has ended: there is nothing to resume")
    then = _flat(before)
    now = _flat(json.loads(json.dumps(described)))
    differing = [name for name in now if then.get(name) != now[name]]
    if differing:
        words = ", ".join(
            f"{name} = {then.get(name)!r} there and {now[name]!r} here" for name in differing
        )
        raise ConfigError(f"the run in {directory} was started with other settings: {words}")
    if before["jax"] != jax.__version__:
        message = (
            f"the run in {directory} was started with JAX {before['jax']} and continues with "
            f"{jax.__version__}: its numbers may differ in the last digits from those of an "
            "uninterrupted run"
        )
        warnings.warn(message, stacklevel=4)


def unfinished(root: Path, pattern: str, identity: dict[str, Any], key: Any) -> Path | None:
    """The newest unfinished run with this identity in a directory; None if there is none."""
    wanted = _flat(json.loads(json.dumps(_with_key(identity, key))))
    for directory in sorted(
        root.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True
    ):
        with contextlib.suppress(OSError, ValueError):
            found = _flat(json.loads((directory / "config.json").read_text()))
            if (directory / "checkpoints").is_dir() and wanted.items() <= found.items():
                return directory
    return None


def _with_key(identity: dict[str, Any], key: Any) -> dict[str, Any]:
    """The identity with the source of the random numbers."""
    return {**identity, "key": key, "prng_impl": default_prng_impl()}


def _flat(described: dict[str, Any]) -> dict[str, Any]:
    """A description with the fields of its configuration at the top level.

    Fields that an older version did not have get their defaults. Older versions did not store the
    implementation of random keys, which was threefry.
    """
    rest = {name: x for name, x in described.items() if name != "config"}
    fields = described.get("config", {})
    if described.get("kind") in ("fit", "sweep"):
        fields = Config().to_dict() | fields
    return {"prng_impl": "threefry2x32"} | rest | fields
