"""Checkpoints of a run: atomic, verified on load, arrays only.

checkpoints/
    iteration_00000128/        the arrays, written by orbax
    iteration_00000128.json    written last: which files belong to this checkpoint, and their SHA-256
    rows_00000096_00000128.npz the rows of metrics and evaluations since the checkpoint before

A checkpoint without its JSON file, or with a file that is not what it says, is passed over for the one before. The
two newest checkpoints are kept, and all rows. Of several processes the first one writes, and all of them read.
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
from purejaxppo.runs.processes import device_put_global, gather_to_host, on_main_process
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
# Version 1 had a pool of fresh starts in the state of the environments. Versions 1 and 2 had
# features in the place of observations, which are the same where an observation is one vector.
READABLE_VERSIONS = (2, 3)


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    iteration: int
    arrays: PyTree
    tables: Mapping[str, Table]  # all rows up to it, by kind


class Checkpoints:
    """The checkpoints of one run, in the order in which they are saved."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.parts: dict[
            str, str
        ] = {}  # files of rows up to the last checkpoint, and their SHA-256
        self.last = 0  # its iteration

    def save(self, iteration: int, arrays: PyTree, rows: Mapping[str, Table]) -> None:
        """Save the arrays, and the ``rows`` that came since the last checkpoint.

        What goes wrong raises whatever it is, and leaves the checkpoints that were there as they were.
        """
        named = _named(arrays)
        if jax.process_count() > 1:
            named = {name: np.asarray(gather_to_host(x)) for name, x in named.items()}
        on_main_process(lambda: self._write(iteration, named, rows))

    def _write(self, iteration: int, named: dict[str, Any], rows: Mapping[str, Table]) -> None:
        import orbax.checkpoint as ocp

        self.directory.mkdir(exist_ok=True)
        name = f"iteration_{iteration:08d}"
        part = f"rows_{self.last:08d}_{iteration:08d}.npz"
        self._remove(self.directory / name)  # a damaged one, which the run has gone back from
        with _checkpointer() as checkpointer:
            checkpointer.save(self.directory.resolve() / name, args=ocp.args.StandardSave(named))
        flat = {
            f"{kind}/{column}": x for kind, table in rows.items() for column, x in table.items()
        }
        written = self.directory / f".{part}"
        with written.open("wb") as file:
            np.savez(file, **flat)  # type: ignore[arg-type]
        written.replace(self.directory / part)
        files = sorted(path for path in (self.directory / name).rglob("*") if path.is_file())
        for path in (*files, self.directory / part):
            to_disk(path)
        parts = self.parts | {part: _sha256(self.directory / part)}
        of_arrays = {str(path.relative_to(self.directory)): _sha256(path) for path in files}
        manifest = {
            "format_version": FORMAT_VERSION,
            "iteration": iteration,
            "rows": parts,
            "arrays": of_arrays,
        }
        atomic_write(
            self.directory / f"{name}.json",
            lambda path: path.write_text(json.dumps(manifest, indent=1) + "\n"),
        )
        self._remove_all_but({name, f"iteration_{self.last:08d}"}, set(parts))
        self.parts = parts
        self.last = iteration

    def restore(self, like: PyTree) -> Checkpoint | None:
        """The newest checkpoint that is whole, as a tree like this one and on its devices; None without one.

        A warning names each damaged one that is skipped.
        """
        newest = on_main_process(self._newest)
        return None if newest is None else self._read(newest, like)

    def _newest(self) -> int | None:
        """The iteration of the newest checkpoint that is whole."""
        for iteration in reversed(self._iterations()):
            name = f"iteration_{iteration:08d}"
            try:
                self.parts = self._checked(name)
                self.last = iteration
                return iteration
            except _DamagedError as error:
                warnings.warn(
                    f"the checkpoint {self.directory / name} is damaged: {error}", stacklevel=4
                )
        return None

    def _checked(self, name: str) -> dict[str, str]:
        """The files of rows of a checkpoint, and their SHA-256, if all of its files are what was written."""
        try:
            manifest = json.loads((self.directory / f"{name}.json").read_text())
            parts = manifest["rows"]
            files = manifest["arrays"]
            version = manifest["format_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _DamagedError(f"{name}.json cannot be read ({error})") from None
        if version not in READABLE_VERSIONS:
            raise ConfigError(
                f"{self.directory / name} has format version {version}, and this version of purejaxppo reads "
                f"{' and '.join(map(str, READABLE_VERSIONS))}: resume it with the version that wrote it"
            )
        for file, digest in (files | parts).items():
            path = self.directory / file
            if not path.is_file():
                raise _DamagedError(f"{file} is missing")
            if _sha256(path) != digest:
                raise _DamagedError(f"{file} is not what was written")
        for part in parts:
            _numbers(self.directory / part)
        return parts

    def _read(self, iteration: int, like: PyTree) -> Checkpoint:
        import orbax.checkpoint as ocp

        name = f"iteration_{iteration:08d}"
        manifest = json.loads((self.directory / f"{name}.json").read_text())
        parts = manifest["rows"]
        target = named = _named(like)
        if jax.process_count() > 1:
            target = {key: np.zeros(x.shape, x.dtype) for key, x in named.items()}
        with _checkpointer() as checkpointer:
            stored = dict(checkpointer.metadata(self.directory.resolve() / name).item_metadata)
            kinds = [
                {key: (tuple(x.shape), np.dtype(x.dtype)) for key, x in tree.items()}
                for tree in (stored, target)
            ]
            if kinds[0] != kinds[1]:
                version = manifest["format_version"]
                if version < FORMAT_VERSION:
                    raise ConfigError(
                        f"{self.directory / name} has format version {version}, in which "
                        "observations were stored as features: resume it with the version that "
                        "wrote it"
                    )
                raise ConfigError(
                    f"{self.directory / name} was not written by this configuration: its arrays differ"
                )
            arrays = checkpointer.restore(
                self.directory.resolve() / name, args=ocp.args.StandardRestore(target)
            )
        if jax.process_count() > 1:
            arrays = {key: device_put_global(x, named[key].sharding) for key, x in arrays.items()}
        tables: dict[str, dict[str, list[NDArray[Any]]]] = {}
        for part in parts:
            for key, x in _numbers(self.directory / part).items():
                kind, column = key.split("/", 1)
                tables.setdefault(kind, {}).setdefault(column, []).append(x)
        joined = {
            kind: {c: np.concatenate(x, axis=1) for c, x in table.items()}
            for kind, table in tables.items()
        }
        return Checkpoint(iteration, _in_place(arrays, like), joined)

    def _iterations(self) -> list[int]:
        numbers = (
            path.stem.removeprefix("iteration_") for path in self.directory.glob("iteration_*.json")
        )
        return sorted(int(number) for number in numbers if number.isdecimal())

    def _remove_all_but(self, names: set[str], parts: set[str]) -> None:
        """Older checkpoints, damaged ones, what was begun and not ended, and rows that no checkpoint has."""
        for path in self.directory.glob("iteration_*"):
            if path.name.removesuffix(".json") not in names:
                self._remove(path.with_name(path.name.removesuffix(".json")))
        for path in self.directory.glob("rows_*.npz"):
            if path.name not in parts:
                path.unlink()

    @staticmethod
    def _remove(path: Path) -> None:
        path.with_name(f"{path.name}.json").unlink(
            missing_ok=True
        )  # first: without it the rest does not count
        shutil.rmtree(path, ignore_errors=True)


def _checkpointer() -> Any:
    """Orbax's; one of several processes waits for no other, since what they do together is agreed here."""
    import orbax.checkpoint as ocp

    own = jax.process_index()
    alone = {
        "primary_host": own,
        "active_processes": {own},
        "barrier_sync_key_prefix": f"process_{own}",
    }
    options = ocp.options.MultiprocessingOptions(**alone if jax.process_count() > 1 else {})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


class _DamagedError(ValueError):
    """A checkpoint is not what was written; the one before it may be."""


def _numbers(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except ValueError:  # pickled objects, which are never loaded
        raise _DamagedError(f"{path.name} holds something else than numbers") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------- pytrees by name


def _named(tree: PyTree) -> dict[str, Any]:
    """The leaves by their paths, without empty ones; random keys as the integers that they hold."""
    return {name: _plain(x) for name, x in _leaves(tree).items() if x.size}


def _in_place(arrays: Mapping[str, Any], like: PyTree) -> PyTree:
    """The arrays as the tree that they were named from."""

    def value(name: str, leaf: Any) -> Any:
        x = arrays.get(name, leaf)  # an empty one has nothing to restore
        return jax.random.wrap_key_data(x, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else x

    values = [value(name, leaf) for name, leaf in _leaves(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by the names that they have on disk."""
    leaves = named_leaves(tree, ".").items()
    return {OLD_NAMES.get(name, name): leaf for name, leaf in leaves}


def _plain(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x) else x


def _is_key(x: Any) -> bool:
    return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
