"""A directory with a description and named arrays, the form of files of trained models.

``NAME.json`` holds the description with a format version and a checksum; ``params.npz`` holds plain
arrays. Reading never executes code from the files.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from purejaxppo.trees import as_stored, is_extended, named_leaves
from purejaxppo.types import ConfigError, PyTree


def write_arrays(
    directory: str | os.PathLike, name: str, description: dict[str, Any], tree: PyTree
) -> Path:
    """Write a new directory with ``name.json`` and the leaves of ``tree``, and return its path.

    Dtypes that NumPy lacks, such as bfloat16, are stored as float32, and the description records
    them. The write is atomic. Raises `ConfigError` if the directory exists or cannot be written.
    """
    arrays = {leaf: np.asarray(x) for leaf, x in named_leaves(tree).items()}
    stored = {leaf: as_stored(x) for leaf, x in arrays.items()}
    with new_directory(directory, name) as temporary:
        np.savez(temporary / "params.npz", **stored)  # type: ignore[arg-type]
        checksum = hashlib.sha256((temporary / "params.npz").read_bytes()).hexdigest()
        description = description | {
            "dtypes": {leaf: str(x.dtype) for leaf, x in arrays.items() if is_extended(x.dtype)},
            "params_sha256": checksum,
        }
        (temporary / f"{name}.json").write_text(json.dumps(description, indent=2) + "\n")
    return Path(directory)


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike, name: str) -> Iterator[Path]:
    """A temporary directory that becomes ``directory`` when the block ends without an error.

    ``name`` says what is written. Raises `ConfigError` if the directory exists or cannot be made.
    """
    directory = Path(directory)
    if directory.exists():
        raise ConfigError(f"{directory} exists already; choose another directory for the {name}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise ConfigError(f"cannot write to {directory.parent}: {error.strerror}") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_arrays(
    directory: str | os.PathLike,
    name: str,
    file_format: str,
    versions: Collection[int],
    required: Collection[str],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The description and the arrays, with format, version, checksum and dtypes verified.

    ``required`` are the entries of the description besides the checksum. Raises `ConfigError` for
    a directory with another or a damaged content.
    """
    directory = Path(directory)
    not_ours = ConfigError(
        f"{directory} is not a {name} of purejaxppo: "
        f"it needs a {name}.json and a params.npz of its own"
    )
    try:
        description = json.loads((directory / f"{name}.json").read_text())
        npz_bytes = (directory / "params.npz").read_bytes()
    except (OSError, ValueError, RecursionError):
        raise not_ours from None
    if not isinstance(description, dict) or description.get("format") != file_format:
        raise not_ours
    if description.get("format_version") not in versions:
        raise ConfigError(
            f"{directory} has format version {description.get('format_version')}, and this version "
            f"of purejaxppo reads {' and '.join(map(str, versions))}: load it with the "
            "version that wrote it"
        )
    missing = {*required, "params_sha256"} - description.keys()
    if missing:
        raise ConfigError(
            f"{directory / f'{name}.json'} is damaged: it lacks {', '.join(sorted(missing))}"
        )
    if hashlib.sha256(npz_bytes).hexdigest() != description["params_sha256"]:
        raise ConfigError(
            f"{directory / 'params.npz'} is damaged: its checksum is not the one that was saved"
        )
    try:
        with np.load(io.BytesIO(npz_bytes), allow_pickle=False) as file:
            arrays = dict(file)
    except ValueError:  # pickled objects are never loaded
        raise ConfigError(
            f"{directory / 'params.npz'} is damaged: it holds something else than numbers"
        ) from None
    try:
        dtypes = {leaf: jnp.dtype(dtype) for leaf, dtype in description.get("dtypes", {}).items()}
        extended = {leaf: arrays[leaf].astype(dtype) for leaf, dtype in dtypes.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        path = directory / f"{name}.json"
        raise ConfigError(f"{path} is damaged: its dtypes are not those of the arrays") from None
    return description, arrays | extended
