"""One run of compiled programs: training with logs, evaluations, checkpoints and progress."""

import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from purejaxppo.runs import processes, tables
from purejaxppo.runs.checkpoints import Checkpoints
from purejaxppo.runs.chunks import Chunk, run_chunks
from purejaxppo.runs.loggers.base import Logger
from purejaxppo.runs.programs import Programs, Swept
from purejaxppo.runs.tables import Table
from purejaxppo.types import PRNGKey, PyTree


class Evaluator(NamedTuple):
    """Evaluations between chunks.

    Their results so far, ``best``, are a pytree of JAX arrays, which is stored in checkpoints. With
    several processes, the state and ``best`` may be divided among them.
    """

    every: int  # iterations
    init: Callable[[PyTree], PyTree]  # state -> best before the first evaluation
    step: Callable[[PyTree, Chunk], tuple[PyTree, Table]]  # best, chunk -> best, rows


class SessionResult(NamedTuple):
    """The result of `run_session`."""

    programs: Programs
    state: PyTree
    best: PyTree  # None without evaluations
    metrics: PyTree  # [agents, iterations]
    evaluations: Table | None  # [agents, evaluations]
    interrupted: bool  # by Ctrl-C or SIGTERM
    resumed_at: int  # iteration of the checkpoint that it resumed from; 0 without one
    seconds: float


class CheckpointPolicy(NamedTuple):
    """Checkpoints and logs of a session."""

    checkpoints: Checkpoints
    seconds: float  # between two checkpoints
    resume: bool
    open_log: Callable[[Mapping[str, Table] | None], Logger]  # gets the rows before a resume


class TableLog:
    """The rows of a session, by kind."""

    def __init__(self, before: Mapping[str, Table], log: Logger | None):
        self.all: dict[str, list[Table]] = {kind: [table] for kind, table in before.items()}
        self.pending: dict[str, list[Table]] = {}  # in no checkpoint yet
        self.log = log

    def add(self, kind: str, table: Table) -> None:
        for tables_of in (self.all, self.pending):
            tables_of.setdefault(kind, []).append(table)
        if self.log:
            self.log.write(kind, table)

    def joined(self, kind: str) -> Table | None:
        return tables.joined(self.all[kind]) if kind in self.all else None


def run_session(
    programs: Programs,
    keys: PRNGKey,
    swept: Swept,
    *,
    evaluator: Evaluator | None = None,
    checkpointing: CheckpointPolicy | None = None,
    on_chunk: Callable[[Chunk], None] | None = None,
) -> SessionResult:
    """Train the agents in chunks; between chunks log, evaluate, report, and save if due.

    If a checkpoint cannot be written, a warning is issued and training continues. With several
    processes the main process logs and its clock decides when a checkpoint is due; a signal to any
    process stops all of them.
    """
    described = programs.job.metrics
    state = programs.init(keys, swept)
    best = evaluator.init(state) if evaluator else None
    saved = None
    if checkpointing and checkpointing.resume:
        saved = checkpointing.checkpoints.restore((state, best))
    if saved:
        state, best = saved.arrays
    saved_tables = saved.tables if saved else {}
    log = _open_log(checkpointing, saved_tables) if checkpointing else None
    table_log = TableLog(saved_tables, log)
    before = described.from_columns(saved_tables["metrics"], programs.buffer) if saved else None
    stop = False
    started = time.perf_counter()
    saved_at = started
    with (
        contextlib.closing(log) if log else contextlib.nullcontext(),
        interruptible() as interrupted,
    ):
        every = evaluator.every if evaluator else None
        for chunk in run_chunks(programs, swept, state, before, every):
            state = chunk.state
            rows = tables.of_metrics(described, chunk.metrics, chunk.done, chunk.completed)
            table_log.add("metrics", rows)
            if evaluator and chunk.done % evaluator.every == 0:
                best, rows = evaluator.step(best, chunk)
                table_log.add("evaluation", rows)
            if on_chunk:
                on_chunk(chunk)
            is_due = (
                checkpointing is not None and time.perf_counter() - saved_at > checkpointing.seconds
            )
            requests = processes.all_gather_objects((interrupted(), is_due))
            stop = any(is_interrupted for is_interrupted, _ in requests)
            if checkpointing and (stop or requests[0][1]):
                _save(checkpointing.checkpoints, chunk.done, (state, best), table_log)
                saved_at = time.perf_counter()
                # A signal may have arrived while the checkpoint was written.
                stop = any(processes.all_gather_objects(interrupted()))
            if stop:
                break
    metrics = table_log.joined("metrics")
    assert metrics is not None
    return SessionResult(
        programs=programs,
        state=state,
        best=best,
        metrics=described.from_columns(metrics, programs.buffer),
        evaluations=table_log.joined("evaluation"),
        interrupted=stop,
        resumed_at=saved.iteration if saved else 0,
        seconds=time.perf_counter() - started,
    )


def _open_log(checkpointing: CheckpointPolicy, saved_tables: Mapping[str, Table]) -> Logger | None:
    """The logger of the main process; None in the others."""
    opened: list[Logger] = []

    def open_log(directory: Path) -> None:
        opened.append(checkpointing.open_log(saved_tables if checkpointing.resume else None))

    checkpointing.checkpoints.store.write(open_log)
    return opened[0] if opened else None


def _save(checkpoints: Checkpoints, done: int, arrays: PyTree, table_log: TableLog) -> None:
    """Save a checkpoint, or warn: a full disk should not end a run, and the next save may work."""
    try:
        pending = {kind: tables.joined(parts) for kind, parts in table_log.pending.items()}
        checkpoints.save(done, arrays, pending)
    except ConnectionError:  # another process has ended
        raise
    except Exception as error:
        message = (
            f"no checkpoint was saved after iteration {done}, training goes on: "
            f"{type(error).__name__}: {error}"
        )
        warnings.warn(message, stacklevel=2)
    else:
        table_log.pending.clear()


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that is true after Ctrl-C or SIGTERM; a second signal raises at once.

    The caller stops between chunks, where the state is complete.
    """
    received: list[int] = []

    def handle(signal_number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal_number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
