"""Where the numbers of a run go while it trains: CSV files, TensorBoard, Weights & Biases.

With a directory there are always ``metrics.csv`` and ``evaluations.csv``: a row per member (agent of the run) and
iteration, whose order does not show how a run was cut into chunks. The other loggers are extras, and are imported only
when they are asked for. All of them write tables, which `tables` describes.
"""

import contextlib
import csv
import importlib
import json
import os
import secrets
import struct
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from purejaxppo import tables
from purejaxppo.checks import nearest
from purejaxppo.files import whole
from purejaxppo.tables import Table
from purejaxppo.types import ConfigError

Before = Mapping[str, Table] | None  # kind: rows that a resumed run goes on from; None for a new run

FILES = {"metrics": "metrics.csv", "evaluation": "evaluations.csv"}  # kind of table: file
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # imported only when asked for
MOST_WANDB_RUNS = 100  # each takes about half a second to open, and up to a millisecond whenever it logs


class Logger(NamedTuple):
    """Where tables go. A table's first steps come after, or are, the last ones written before."""

    write: Callable[[str, Table], None]  # kind, "metrics" or "evaluation", and rows
    close: Callable[[], None]


def open_loggers(
    names: Sequence[str],
    directory: Path | None,
    members: Sequence[str],
    description: dict[str, Any],
    before: Before = None,
    numbered: tuple[str, Sequence[int]] | None = None,
) -> Logger:
    """The loggers of these names as one; with a directory ``csv`` is always among them.

    ``before`` has the rows that a resumed run goes on from, so that what its killed predecessor wrote beyond them is
    forgotten; it is empty where the run starts from nothing once more. ``numbered`` is the name of the column that
    tells members apart in CSV files, and their numbers; if not given, they are the seeds 0, 1, …. A logger that fails
    never stops a run: one warning tells of it, and the others go on.
    """
    failed: set[str] = set()

    def attempt(name: str, action: Callable, *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except Exception as error:
            if name not in failed:
                failed.add(name)
                told = f"logger {name!r} failed and is left out from now on: {type(error).__name__}: {error}"
                warnings.warn(told, stacklevel=3)

    names = checked_names(names, directory, len(members))
    numbered = numbered or ("seed", range(len(members)))
    opening = _OPEN | {"csv": partial(_OPEN["csv"], numbered=numbered)}
    opened = {name: attempt(name, opening[name], directory, members, description, before) for name in names}

    def write(kind: str, table: Table) -> None:
        for name, logger in opened.items():
            if name not in failed:
                attempt(name, logger.write, kind, table)

    def close() -> None:
        for name, logger in opened.items():
            if logger:
                attempt(name, logger.close)

    return Logger(write, close)


def checked_names(names: Sequence[str], directory: Path | None, num_members: int) -> tuple[str, ...]:
    """The loggers that will write, or one sentence on why they cannot; with a directory ``csv`` is the first."""
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in _OPEN:
            hint = nearest(name, _OPEN) or f"; there are {', '.join(_OPEN)}"
            raise ConfigError(f"logger {name!r} is not known{hint}")
        if directory is None:
            raise ConfigError(f"logger {name!r} needs a place to write to: give the run a directory")
        if name in PACKAGES:
            _import(name, PACKAGES[name])
        if name == "wandb" and num_members > MOST_WANDB_RUNS:
            raise ConfigError(
                f"logger 'wandb' opens a run for each agent, {MOST_WANDB_RUNS} at most, and there are {num_members}: "
                "use 'tensorboard', or metrics.csv in the directory of the run"
            )
    return () if directory is None else tuple(dict.fromkeys(["csv", *names]))


def _import(name: str, package: str) -> None:
    try:
        importlib.import_module(package)
    except Exception as error:  # an installed package may fail in its own ways
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            told = f"needs the package {package}: pip install 'purejaxppo[{name}]'"
        else:
            told = f"cannot import the package {package}: {type(error).__name__}: {error}"
        raise ConfigError(f"logger {name!r} {told}") from None


# ---------------------------------------------------------------------------------------------- csv


def _open_csv(
    directory: Path,
    members: Sequence[str],
    description: dict[str, Any],
    before: Before,
    numbered: tuple[str, Sequence[int]],
) -> Logger:
    """A row per member and iteration; a killed process leaves a cut last line at most."""
    files: dict[str, IO[str]] = {}
    columns: dict[str, list[str]] = {}

    def begin(kind: str, path: Path, table: Table, mode: str) -> IO[str]:
        columns[kind] = tables.columns(table)
        file = path.open(mode, encoding="utf-8", newline="")
        csv.writer(file, lineterminator="\n").writerow([numbered[0], *columns[kind]])
        return file

    def write_whole(kind: str, table: Table, path: Path) -> None:
        with begin(kind, path, table, "w") as file:
            file.writelines(tables.lines(table, numbered[1]))

    for kind, name in FILES.items() if before is not None else ():
        table = (before or {}).get(kind)
        if table is None or not tables.existing(table).any():
            (directory / name).unlink(missing_ok=True)
        else:
            whole(directory / name, partial(write_whole, kind, table))
            files[kind] = (directory / name).open("a", encoding="utf-8", newline="")

    def write(kind: str, table: Table) -> None:
        if kind not in files:
            files[kind] = begin(kind, directory / FILES[kind], table, "x")  # a run never overwrites
        if tables.columns(table) != columns[kind]:
            raise ValueError(f"{FILES[kind]} has the columns {columns[kind]}, but now {tables.columns(table)} came")
        files[kind].writelines(tables.lines(table, numbered[1]))
        files[kind].flush()

    def close() -> None:
        for file in files.values():
            file.close()

    return Logger(write, close)


# -------------------------------------------------------------------------------------- tensorboard


def _open_tensorboard(directory: Path, members: Sequence[str], description: dict[str, Any], before: Before) -> Logger:
    """A stream per member in ``tensorboard/MEMBER``, against environment steps.

    The writers of tensorboardX hold files, threads and pipes for each stream: a thousand agents would not get as many.
    Here its events are appended to files that are open while something is written only.
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import masked_crc32c

    file_name = f"events.out.tfevents.{time.time_ns()}"  # TensorBoard reads a stream's files in the order of names
    paths = [directory / "tensorboard" / member / file_name for member in members]

    def append(path: Path, events: Sequence[Any]) -> None:
        data = bytearray()
        for event in events:
            body = event.SerializeToString()
            length = struct.pack("<Q", len(body))
            data += length + struct.pack("<I", masked_crc32c(length)) + body + struct.pack("<I", masked_crc32c(body))
        with path.open("ab") as file:
            file.write(data)

    def write(kind: str, table: Table) -> None:
        now = time.time()
        for path, points in zip(paths, tables.points(kind, table), strict=True):
            events = []
            for step, values in points:
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=x) for tag, x in values.items()])
                events.append(Event(wall_time=now, step=step, summary=summary))
            if events:
                append(path, events)

    now = time.time()
    for path, step in zip(paths, tables.next_steps(before or {}, len(members)), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, [Event(wall_time=now, file_version="brain.Event:2")])
        if before is not None:  # what stands in earlier files from this step on is forgotten
            append(path, [Event(wall_time=now, step=step, session_log=SessionLog(status=SessionLog.START))])
    return Logger(write, lambda: None)


# -------------------------------------------------------------------------------------------- wandb


def _open_wandb(directory: Path, members: Sequence[str], description: dict[str, Any], before: Before) -> Logger:
    """A run per member, all in one group; ``wandb.json`` holds what their ids begin with, for a run that is resumed.

    A call of `log` can take as long as an iteration: of the metrics in a table each member logs the mean.
    """
    import wandb

    path = directory / "wandb.json"
    if not path.exists():
        described = json.dumps({"id": secrets.token_hex(4)}) + "\n"
        whole(path, lambda path: path.write_text(described))
    shared_id = json.loads(path.read_text())["id"]
    with contextlib.ExitStack() as stack:  # where one cannot be opened, those that were are finished
        runs = []
        for index, member in enumerate(members):
            quiet = {"silent": True, "x_disable_stats": True} if index else {}  # the first one tells where the group is
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "purejaxppo",
                dir=directory,
                id=f"{shared_id}-{index}",
                name=f"{directory.name}-{member}",
                group=f"{directory.name}-{shared_id}",
                config=description,
                resume="allow",
                reinit="create_new",
                settings={"console": "off", "quiet": True, **quiet},
            )
            stack.callback(run.finish)
            runs.append(run)
        opened = stack.pop_all()
    starts = [run.starting_step for run in runs]  # a resumed run has all before it, and takes nothing there

    def write(kind: str, table: Table) -> None:
        table = tables.averaged(table) if kind == "metrics" else table
        for run, start, points in zip(runs, starts, tables.points(kind, table), strict=True):
            for step, values in points:
                if step >= start:
                    run.log(values, step=step)

    return Logger(write, opened.close)


_OPEN: dict[str, Callable] = {"csv": _open_csv, "tensorboard": _open_tensorboard, "wandb": _open_wandb}
