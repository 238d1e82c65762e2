"""Checkpoints of a run: atomic, verified on load, arrays only.

checkpoints/
    iteration_00000128/        the arrays, written by orbax
    iteration_00000128.json    written last: the files of this checkpoint, with their SHA-256
    rows_00000096_00000128.npz the rows of metrics and evaluations since the previous checkpoint

A checkpoint without its JSON file, or with a file that does not match it, is skipped for the
previous one. The two newest checkpoints and all rows are kept. The main process writes, and all
processes read the arrays.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from purejaxppo.runs.disk import atomic_write, to_disk
from purejaxppo.runs.processes import device_put_global, gather_to_host
from purejaxppo.runs.store import Store
from purejaxppo.runs.tables import Table
from purejaxppo.trees import named_leaves
from purejaxppo.types import ConfigError, PyTree

# Arrays keep their names on disk when their fields are renamed.
OLD_NAMES = {
    "0.agent_index": "0.number",
    "0.update.running_mean.total": "0.update.past.total",
    "0.update.running_mean.weight": "0.update.past.weight",
}

FORMAT_VERSION = 3
# Version 1 had a pool of fresh starts in the state of the environments. Versions 1 and 2 stored
# features instead of observations; the two are equal if an observation is one vector.
READABLE_VERSIONS = (2, 3)


class Checkpoint(NamedTuple):
    """The content of a checkpoint."""

    iteration: int
    arrays: PyTree
    tables: Mapping[str, Table]  # kind -> all rows up to the iteration


class Checkpoints:
    """The checkpoints of one run, in the order in which they are saved."""

    def __init__(self, store: Store):
        self.store = store
        # The files of rows up to the last checkpoint, with their SHA-256. Of the main process.
        self.parts: dict[str, str] = {}
        self.last = 0  # iteration of the last checkpoint

    def save(self, iteration: int, arrays: PyTree, rows: Mapping[str, Table]) -> None:
        """Save the arrays, and the ``rows`` since the last checkpoint.

        Any error is raised, and leaves the previous checkpoints unchanged.
        """
        named = {name: np.asarray(x) for name, x in gather_to_host(_named(arrays)).items()}
        self.store.write(self._write, iteration, named, rows)

    def _write(
        self, directory: Path, iteration: int, named: dict[str, Any], rows: Mapping[str, Table]
    ) -> None:
        import orbax.checkpoint as ocp

        directory.mkdir(exist_ok=True)
        name = f"iteration_{iteration:08d}"
        part = f"rows_{self.last:08d}_{iteration:08d}.npz"
        _remove(directory / name)  # a damaged checkpoint that a resume has skipped
        with _checkpointer() as checkpointer:
            checkpointer.save(directory.resolve() / name, args=ocp.args.StandardSave(named))
        flat = {
            f"{kind}/{column}": x for kind, table in rows.items() for column, x in table.items()
        }
        written = directory / f".{part}"
        with written.open("wb") as file:
            np.savez(file, **flat)  # type: ignore[arg-type]
        written.replace(directory / part)
        files = sorted(path for path in (directory / name).rglob("*") if path.is_file())
        for path in (*files, directory / part):
            to_disk(path)
        parts = self.parts | {part: _sha256(directory / part)}
        of_arrays = {str(path.relative_to(directory)): _sha256(path) for path in files}
        manifest = {
            "format_version": FORMAT_VERSION,
            "iteration": iteration,
            "rows": parts,
            "arrays": of_arrays,
        }
        atomic_write(
            directory / f"{name}.json",
            lambda path: path.write_text(json.dumps(manifest, indent=1) + "\n"),
        )
        _remove_all_but(directory, {name, f"iteration_{self.last:08d}"}, set(parts))
        self.parts = parts
        self.last = iteration

    def restore(self, like: PyTree) -> Checkpoint | None:
        """The newest intact checkpoint, with arrays on the devices of ``like``; None without one.

        A warning names each damaged checkpoint that is skipped.
        """
        newest = self.store.read(self._newest)
        return None if newest is None else self._read(newest, like)

    def _newest(self, directory: Path) -> int | None:
        """The iteration of the newest intact checkpoint."""
        for iteration in reversed(_iterations(directory)):
            name = f"iteration_{iteration:08d}"
            try:
                self.parts = _verified_rows(directory, name)
                self.last = iteration
                return iteration
            except _DamagedError as error:
                warnings.warn(
                    f"the checkpoint {directory / name} is damaged: {error}", stacklevel=4
                )
        return None

    def _read(self, iteration: int, like: PyTree) -> Checkpoint:
        import orbax.checkpoint as ocp

        directory = self.store.directory
        assert directory is not None
        name = f"iteration_{iteration:08d}"
        manifest = json.loads((directory / f"{name}.json").read_text())
        parts = manifest["rows"]
        named = _named(like)
        target = {key: np.zeros(x.shape, x.dtype) for key, x in named.items()}
        with _checkpointer() as checkpointer:
            stored = dict(checkpointer.metadata(directory.resolve() / name).item_metadata)
            kinds = [
                {key: (tuple(x.shape), np.dtype(x.dtype)) for key, x in tree.items()}
                for tree in (stored, target)
            ]
            if kinds[0] != kinds[1]:
                version = manifest["format_version"]
                if version < FORMAT_VERSION:
                    raise ConfigError(
                        f"{directory / name} has format version {version}, in which "
                        "observations were stored as features: resume it with the version that "
                        "wrote it"
                    )
                raise ConfigError(
                    f"{directory / name} was not written by this configuration: "
                    "its arrays have other shapes"
                )
            arrays = checkpointer.restore(
                directory.resolve() / name, args=ocp.args.StandardRestore(target)
            )
        arrays = {key: device_put_global(x, named[key].sharding) for key, x in arrays.items()}
        tables: dict[str, dict[str, list[NDArray[Any]]]] = {}
        for part in parts:
            for key, x in _numbers(directory / part).items():
                kind, column = key.split("/", 1)
                tables.setdefault(kind, {}).setdefault(column, []).append(x)
        joined = {
            kind: {c: np.concatenate(x, axis=1) for c, x in table.items()}
            for kind, table in tables.items()
        }
        return Checkpoint(iteration, _in_place(arrays, like), joined)


def _verified_rows(directory: Path, name: str) -> dict[str, str]:
    """Verify all files of a checkpoint. Returns its files of rows, with their SHA-256."""
    try:
        manifest = json.loads((directory / f"{name}.json").read_text())
        parts = manifest["rows"]
        files = manifest["arrays"]
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"{name}.json cannot be read ({error})") from None
    if version not in READABLE_VERSIONS:
        raise ConfigError(
            f"{directory / name} has format version {version}, and this version of purejaxppo "
            f"reads {' and '.join(map(str, READABLE_VERSIONS))}: "
            "resume it with the version that wrote it"
        )
    for file, digest in (files | parts).items():
        path = directory / file
        if not path.is_file():
            raise _DamagedError(f"{file} is missing")
        if _sha256(path) != digest:
            raise _DamagedError(f"{file} is not what was written")
    for part in parts:
        _numbers(directory / part)
    return parts


def _iterations(directory: Path) -> list[int]:
    numbers = (path.stem.removeprefix("iteration_") for path in directory.glob("iteration_*.json"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def _remove_all_but(directory: Path, names: set[str], parts: set[str]) -> None:
    """Remove all other checkpoints, complete or not, and all other files of rows."""
    for path in directory.glob("iteration_*"):
        if path.name.removesuffix(".json") not in names:
            _remove(path.with_name(path.name.removesuffix(".json")))
    for path in directory.glob("rows_*.npz"):
        if path.name not in parts:
            path.unlink()


def _remove(path: Path) -> None:
    # The JSON file first: without it the checkpoint is ignored.
    path.with_name(f"{path.name}.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _checkpointer() -> Any:
    """Orbax's checkpointer. With several processes it does not wait for the others."""
    import orbax.checkpoint as ocp

    process = jax.process_index()
    alone = {
        "primary_host": process,
        "active_processes": {process},
        "barrier_sync_key_prefix": f"process_{process}",
    }
    options = ocp.options.MultiprocessingOptions(**alone if jax.process_count() > 1 else {})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


class _DamagedError(ValueError):
    """A checkpoint has changed since it was written."""


def _numbers(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except ValueError:  # pickled objects, which are never loaded
        raise _DamagedError(f"{path.name} does not hold only numbers") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------- pytrees by name


def _named(tree: PyTree) -> dict[str, Any]:
    """The leaves by their paths, without empty arrays; random keys as integers."""
    return {name: _plain(x) for name, x in _leaves(tree).items() if x.size}


def _in_place(arrays: Mapping[str, Any], like: PyTree) -> PyTree:
    """The inverse of `_named`: a tree with the structure of ``like``."""

    def value(name: str, leaf: Any) -> Any:
        x = arrays.get(name, leaf)  # empty arrays are not stored
        return jax.random.wrap_key_data(x, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else x

    values = [value(name, leaf) for name, leaf in _leaves(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by their names on disk."""
    leaves = named_leaves(tree, ".").items()
    return {OLD_NAMES.get(name, name): leaf for name, leaf in leaves}


def _plain(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x) else x


def _is_key(x: Any) -> bool:
    return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
