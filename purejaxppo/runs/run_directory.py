"""What a run leaves on disk, and reading it back.

config.json          the configuration, seeds, key and versions
metrics.csv          one row per iteration and seed, written as it trains
evaluations.csv      one row per evaluation during training and seed, where they were asked for
learning_curve.png   return against environment steps
policy/              the trained policy, or one in policy/seed_0, policy/seed_1, … for several seeds
best_policy/         likewise, those of the highest mean in an evaluation during training
checkpoints/         while the run is not at its end: what it can be resumed from
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
from purejaxppo.types import ConfigError
from purejaxppo.validation import jit_is_disabled
from purejaxppo.version import __version__


@contextlib.contextmanager
def open_run_directory(
    directory: str | os.PathLike | None, asked: dict[str, Any], key: Any, resume: bool
) -> Iterator[Path | None]:
    """The directory of a run, which no other run may use meanwhile: a new one, or one to go on with; None without one.

    A mistake shows before hours of training: a directory that exists and is not to be resumed, a run that has ended,
    one of which something else was asked, one that not all processes of the run can see, or another one of whose
    processes was asked for something else.
    """
    if processes.connected() and jit_is_disabled():
        raise ConfigError(
            "jax.disable_jit works with one process only: compile, or train in a process by itself"
        )
    described = _with_key(asked, key)
    processes.require_same({**described, "resume": resume, "directory": directory is not None})
    if directory is None:
        if resume:
            raise ConfigError("resume needs the directory of what is to go on")
        yield None
        return
    directory = Path(directory)
    with contextlib.ExitStack() as stack:

        def take() -> None:
            if not (resume and directory.exists()):
                reserve(directory, described, "checkpoints")
            stack.enter_context(locked(directory))
            if resume:
                _require_same(directory, described)

        processes.on_main_process(take)
        if not all(processes.all_gather_objects((directory / "config.json").exists())):
            raise ConfigError(
                f"{directory} is not there for all processes: give a directory that all of them share"
            )
        yield directory


def reserve(directory: str | os.PathLike, described: dict[str, Any], *inside: str) -> Path:
    """Make the directory, which must be new, ``config.json`` and directories ``inside`` in it: whole or not at all."""
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
    """Mark a run as being at its end: its checkpoints are gone, and with them what it could be resumed from.

    They go under another name first: with half of them it would be one that can go on from nothing but its start.
    """
    gone = directory / ".checkpoints"
    shutil.rmtree(gone, ignore_errors=True)
    (directory / "checkpoints").rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _require_same(directory: Path, asked: dict[str, Any]) -> None:
    """A run goes on as what it was begun as."""
    try:
        begun = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        raise ConfigError(
            f"{directory} is not a run that could go on: it has no config.json of ours"
        ) from None
    if not (directory / "checkpoints").is_dir():
        raise ConfigError(f"the run in {directory} has come to its end: there is nothing to resume")
    then = _flat(begun)
    now = _flat(json.loads(json.dumps(asked)))
    differing = [name for name in now if then.get(name) != now[name]]
    if differing:
        words = ", ".join(
            f"{name} = {then.get(name)!r} there and {now[name]!r} here" for name in differing
        )
        raise ConfigError(f"the run in {directory} was begun with other settings: {words}")
    if begun["jax"] != jax.__version__:
        warnings.warn(
            f"the run in {directory} was begun with JAX {begun['jax']} and goes on with {jax.__version__}: its numbers "
            "may differ in their last digits from those of one that had not stopped",
            stacklevel=4,
        )


def unfinished(root: Path, pattern: str, asked: dict[str, Any], key: Any) -> Path | None:
    """The newest run in a directory of which this was asked and that has not come to its end."""
    wanted = _flat(json.loads(json.dumps(_with_key(asked, key))))
    for directory in sorted(
        root.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True
    ):
        with contextlib.suppress(OSError, ValueError):
            begun = _flat(json.loads((directory / "config.json").read_text()))
            if (directory / "checkpoints").is_dir() and wanted.items() <= begun.items():
                return directory
    return None


def _with_key(asked: dict[str, Any], key: Any) -> dict[str, Any]:
    """Where the random numbers come from, beside what was asked for."""
    return {**asked, "key": key, "prng_impl": default_prng_impl()}


def _flat(described: dict[str, Any]) -> dict[str, Any]:
    """The fields of the configuration beside the rest.

    A field that an older run does not know has its default. Older runs do not name their
    implementation of random keys, which was threefry's.
    """
    rest = {name: x for name, x in described.items() if name != "config"}
    fields = Config().to_dict() | described["config"] if "config" in described else {}
    return {"prng_impl": "threefry2x32"} | rest | fields
