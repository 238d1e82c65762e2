"""One run of compiled programs: training with logs, evaluations, checkpoints and progress."""

import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from purejaxppo.normalize import Normalizer
from purejaxppo.policies.evaluate import EpisodeStatistics
from purejaxppo.runs import processes, tables
from purejaxppo.runs.checkpoints import Checkpoints
from purejaxppo.runs.chunks import Chunk, run_chunks
from purejaxppo.runs.loggers.base import Logger
from purejaxppo.runs.programs import AgentState, Evaluate, Programs, Swept, make_evaluate
from purejaxppo.runs.tables import Table
from purejaxppo.types import Metrics, PRNGKey, PyTree

EVALUATION = 0x5E7A1  # folded into an agent's key, it gives the base key of its evaluations


class Evaluation(NamedTuple):
    """How to evaluate during training."""

    every: int  # iterations
    episodes: int
    deterministic: bool


class Best(NamedTuple):
    """The policy with the highest mean return in an evaluation, for each agent.

    `Policy.from_state` accepts it.
    """

    params: PyTree
    normalizer: Normalizer
    iteration: Array  # [agents] of the evaluation; 0 before the first one
    score: Array  # [agents] mean return in the evaluation; -∞ before the first one


class Progress(NamedTuple):
    """The progress of a run after a chunk."""

    iterations: int
    timesteps: int  # of one agent; with whole episodes the minimum over the agents
    timesteps_of_all: int  # sum over the agents
    episode_return: float  # mean over the episodes finished in the chunk; NaN without any
    steps_per_second: float  # of all agents together


class SessionResult(NamedTuple):
    """The result of `run_session`."""

    state: AgentState
    best: Best | None  # None without evaluations
    metrics: Metrics  # [agents, iterations]
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
    evaluation: Evaluation | None = None,
    checkpointing: CheckpointPolicy | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    counted: int | None = None,
) -> SessionResult:
    """Train the agents in chunks; between chunks log, evaluate, report, and save if due.

    If a checkpoint cannot be written, a warning is issued and training continues. ``on_progress``
    gets the progress of the first ``counted`` agents; the others are padding. With several
    processes the main process logs and its clock decides when a checkpoint is due; a signal to any
    process stops all of them.
    """
    state = programs.init(keys, swept)
    best = None if evaluation is None else _initial_best(state)
    saved = None
    if checkpointing and checkpointing.resume:
        saved = checkpointing.checkpoints.restore((state, best))
    if saved:
        state, best = saved.arrays
    saved_tables = saved.tables if saved else {}
    log = None
    if checkpointing and processes.is_main_process():
        log = checkpointing.open_log(saved_tables if checkpointing.resume else None)
    table_log = TableLog(saved_tables, log)
    before = tables.to_metrics(saved_tables["metrics"]) if saved else None
    evaluate = _evaluator(programs, keys, swept, evaluation) if evaluation else None
    every = evaluation.every if evaluation else None
    stop = False
    started = time.perf_counter()
    saved_at = started
    with (
        contextlib.closing(log) if log else contextlib.nullcontext(),
        interruptible() as interrupted,
    ):
        for chunk in run_chunks(programs, swept, state, before, every):
            state = chunk.state
            rows = tables.of_metrics(chunk.metrics, chunk.done, chunk.steps_before)
            table_log.add("metrics", rows)
            if evaluation and evaluate and chunk.done % evaluation.every == 0:
                best, table = evaluate(best, chunk)
                table_log.add("evaluation", table)
            if on_progress:
                on_progress(_progress(chunk, counted))
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
        state=state,
        best=best,
        metrics=tables.to_metrics(metrics),
        evaluations=table_log.joined("evaluation"),
        interrupted=stop,
        resumed_at=saved.iteration if saved else 0,
        seconds=time.perf_counter() - started,
    )


def _evaluator(
    programs: Programs, keys: PRNGKey, swept: Swept, evaluation: Evaluation
) -> Callable[[Best | None, Chunk], tuple[Best, Table]]:
    """``(best, chunk) -> (best, row)``: evaluate the policies after a chunk and update the best.

    The keys depend on the agent and the iteration only, so a different ``every`` changes neither
    training nor the other evaluations.
    """
    evaluate: Evaluate = make_evaluate(programs, evaluation.episodes, evaluation.deterministic)

    def key_of(key: PRNGKey, iteration: Array | int) -> PRNGKey:
        return jax.random.fold_in(jax.random.fold_in(key, EVALUATION), iteration)

    keys_of = jax.jit(key_of if programs.agents is None else jax.vmap(key_of, in_axes=(0, None)))

    @jax.jit
    def update_best(
        best: Best, state: AgentState, statistics: EpisodeStatistics
    ) -> tuple[Best, dict[str, Array]]:
        row = {
            "return_mean": statistics.returns.mean(axis=-1),
            "return_std": statistics.returns.std(axis=-1),
            "length_mean": statistics.lengths.mean(axis=-1),
        }
        is_better = row["return_mean"] > best.score
        new = Best(
            state.params,
            Normalizer(state.normalizer.obs, None),
            state.iteration,
            row["return_mean"],
        )

        def choose(new: Array, old: Array) -> Array:
            padding = (1,) * (new.ndim - is_better.ndim)
            return jnp.where(is_better.reshape(is_better.shape + padding), new, old)

        return jax.tree.map(choose, new, best), row

    def step(best: Best | None, chunk: Chunk) -> tuple[Best, Table]:
        statistics = evaluate(swept, chunk.state, keys_of(keys, chunk.done))
        best, row = update_best(best, chunk.state, statistics)
        row = processes.gather_to_host(row)
        timesteps = np.asarray(chunk.metrics.timesteps[:, -1:])
        columns = {name: np.asarray(x).reshape(-1, 1) for name, x in row.items()}
        return best, {
            "iteration": np.full(timesteps.shape, chunk.done),
            "timesteps": timesteps,
            **columns,
        }

    return step


def _initial_best(state: AgentState) -> Best:
    """`Best` before the first evaluation; a copy, because the first chunk donates the state."""
    params, moments = jax.tree.map(jnp.copy, (state.params, state.normalizer.obs))
    # Computed from the state, so that they have its sharding, which a restored checkpoint keeps.
    score = jnp.where(state.iteration < 0, 0.0, -jnp.inf).astype(jnp.result_type(float))
    return Best(params, Normalizer(moments, None), state.iteration * 0, score)


def _save(checkpoints: Checkpoints, done: int, arrays: PyTree, table_log: TableLog) -> None:
    """Save a checkpoint, or warn: a full disk should not end a run, and the next save may work."""
    try:
        pending = {kind: tables.joined(parts) for kind, parts in table_log.pending.items()}
        checkpoints.save(done, arrays, pending)
    except Exception as error:
        message = (
            f"no checkpoint was saved after iteration {done}, training goes on: "
            f"{type(error).__name__}: {error}"
        )
        warnings.warn(message, stacklevel=2)
    else:
        table_log.pending.clear()


def _progress(chunk: Chunk, counted: int | None) -> Progress:
    new, steps_before = jax.tree.map(lambda x: x[:counted], (chunk.metrics, chunk.steps_before))
    episodes = new.episodes.sum()
    total = np.where(new.episodes > 0, new.episode_return * new.episodes, 0).sum()
    mean = total / episodes if episodes else float("nan")
    steps = new.timesteps[:, -1]
    new_steps = float((steps - steps_before).sum(dtype=float))
    return Progress(
        iterations=chunk.done,
        timesteps=int(steps.min()),
        timesteps_of_all=int(steps.sum(dtype=float)),
        episode_return=float(mean),
        steps_per_second=new_steps / chunk.seconds,
    )


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
