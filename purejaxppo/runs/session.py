"""One run of compiled programs, from its start or its newest checkpoint to its end, and what happens in between."""

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

EVALUATION = 0x5E7A1  # folded into an agent's key, it begins the keys of its evaluations


class Evaluation(NamedTuple):
    """How to evaluate during training."""

    every: int  # iterations
    episodes: int
    deterministic: bool


class Best(NamedTuple):
    """Of each agent the policy that had the highest mean return in an evaluation; `Policy.from_state` takes it."""

    params: PyTree
    normalizer: Normalizer
    iteration: Array  # [agents] after which it was evaluated; 0 before the first one
    score: Array  # [agents] its mean return; -∞ before the first one


class Progress(NamedTuple):
    """Where a run stands after a chunk."""

    iterations: int
    timesteps: int  # of one agent, with whole episodes of the one that is furthest behind
    timesteps_of_all: int  # agents together
    episode_return: (
        float  # of the episodes that finished in the chunk, all agents; NaN where none did
    )
    steps_per_second: float  # of all agents together


class SessionResult(NamedTuple):
    """What a session leaves."""

    state: AgentState
    best: Best | None  # None without evaluations
    metrics: Metrics  # [agents, iterations]
    evaluations: Table | None  # [agents, evaluations]
    interrupted: bool  # by Ctrl-C or SIGTERM, before the end
    resumed_at: int  # the iteration of the checkpoint that it went on from; 0 without one
    seconds: float


class CheckpointPolicy(NamedTuple):
    """Where a session's checkpoints and rows go."""

    checkpoints: Checkpoints
    seconds: float  # between two checkpoints
    resume: bool
    open_log: Callable[[Mapping[str, Table] | None], Logger]  # given the rows before a resume


class TableLog:
    """The rows of a session: all of them, and those that no checkpoint has yet."""

    def __init__(self, before: Mapping[str, Table], log: Logger | None):
        self.all: dict[str, list[Table]] = {kind: [table] for kind, table in before.items()}
        self.pending: dict[str, list[Table]] = {}
        self.log = log

    def add(self, kind: str, table: Table) -> None:
        for parts in (self.all, self.pending):
            parts.setdefault(kind, []).append(table)
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
    """Train the agents to their end, chunk by chunk: log, evaluate, save a checkpoint now and then, tell the progress.

    A checkpoint that cannot be written is told by a warning, and training goes on. The progress is that of the first
    ``counted`` agents; the others only fill the program up. Of several processes the first one logs, its clock says
    when a checkpoint is due, and any can be interrupted.
    """
    state = programs.init(keys, swept)
    best = None if evaluation is None else _no_best(state)
    saved = (
        checkpointing.checkpoints.restore((state, best))
        if checkpointing and checkpointing.resume
        else None
    )
    if saved:
        state, best = saved.arrays
    known = saved.tables if saved else {}
    log = (
        checkpointing.open_log(known if checkpointing.resume else None)
        if checkpointing and processes.is_main_process()
        else None
    )
    rows = TableLog(known, log)
    before = tables.to_metrics(known["metrics"]) if saved else None
    evaluate = _evaluator(programs, keys, swept, evaluation) if evaluation else None
    stop = False
    started = saved_at = time.perf_counter()
    with (
        contextlib.closing(log) if log else contextlib.nullcontext(),
        interruptible() as interrupted,
    ):
        for chunk in run_chunks(
            programs, swept, state, before, evaluation.every if evaluation else None
        ):
            state = chunk.state
            rows.add("metrics", tables.of_metrics(chunk.metrics, chunk.done, chunk.steps_before))
            if evaluation and evaluate and chunk.done % evaluation.every == 0:
                best, table = evaluate(best, chunk)
                rows.add("evaluation", table)
            if on_progress:
                on_progress(_progress(chunk, counted))
            due = (
                checkpointing is not None and time.perf_counter() - saved_at > checkpointing.seconds
            )
            wishes = processes.all_gather_objects((interrupted(), due))
            stop = any(pressed for pressed, _ in wishes)
            if checkpointing and (stop or wishes[0][1]):
                _save(checkpointing.checkpoints, chunk.done, (state, best), rows)
                saved_at = time.perf_counter()
                stop = any(
                    processes.all_gather_objects(interrupted())
                )  # while it was saved, perhaps
            if stop:
                break
    metrics = rows.joined("metrics")
    assert metrics is not None
    return SessionResult(
        state,
        best,
        tables.to_metrics(metrics),
        rows.joined("evaluation"),
        stop,
        saved.iteration if saved else 0,
        time.perf_counter() - started,
    )


def _evaluator(
    programs: Programs, keys: PRNGKey, swept: Swept, evaluation: Evaluation
) -> Callable[[Best | None, Chunk], tuple[Best, Table]]:
    """``(best, chunk) -> (best, row)``: evaluates the policies of a chunk's state, with keys of their own.

    The keys depend on the agent and the iteration only, so that how often one evaluates changes nothing.
    """
    evaluate: Evaluate = make_evaluate(programs, evaluation.episodes, evaluation.deterministic)

    def key_of(key: PRNGKey, iteration: Array | int) -> PRNGKey:
        return jax.random.fold_in(jax.random.fold_in(key, EVALUATION), iteration)

    keys_of = jax.jit(key_of if programs.agents is None else jax.vmap(key_of, in_axes=(0, None)))

    @jax.jit
    def better(
        best: Best, state: AgentState, statistics: EpisodeStatistics
    ) -> tuple[Best, dict[str, Array]]:
        row = {
            "return_mean": statistics.returns.mean(axis=-1),
            "return_std": statistics.returns.std(axis=-1),
            "length_mean": statistics.lengths.mean(axis=-1),
        }
        higher = row["return_mean"] > best.score
        new = Best(
            state.params,
            Normalizer(state.normalizer.obs, None),
            state.iteration,
            row["return_mean"],
        )

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(
                higher.reshape(higher.shape + (1,) * (new.ndim - higher.ndim)), new, old
            )

        return jax.tree.map(choose, new, best), row

    def step(best: Best | None, chunk: Chunk) -> tuple[Best, Table]:
        statistics = evaluate(swept, chunk.state, keys_of(keys, chunk.done))
        best, row = better(best, chunk.state, statistics)
        row = processes.gather_to_host(row)
        timesteps = np.asarray(chunk.metrics.timesteps[:, -1:])
        columns = {name: np.asarray(x).reshape(-1, 1) for name, x in row.items()}
        return best, {
            "iteration": np.full(timesteps.shape, chunk.done),
            "timesteps": timesteps,
            **columns,
        }

    return step


def _no_best(state: AgentState) -> Best:
    """Before the first evaluation; copies, because the state is used up."""
    params, moments = jax.tree.map(jnp.copy, (state.params, state.normalizer.obs))
    # Made of the state, so that they are on its devices, where a checkpoint puts them back.
    nothing = jnp.where(state.iteration < 0, 0.0, -jnp.inf).astype(jnp.result_type(float))
    return Best(params, Normalizer(moments, None), state.iteration * 0, nothing)


def _save(checkpoints: Checkpoints, done: int, arrays: PyTree, rows: TableLog) -> None:
    """A checkpoint, or a warning: a full disk should not end a run, which may find room the next time."""
    try:
        checkpoints.save(
            done, arrays, {kind: tables.joined(parts) for kind, parts in rows.pending.items()}
        )
    except Exception as error:
        told = f"no checkpoint was saved after iteration {done}, training goes on: {type(error).__name__}: {error}"
        warnings.warn(told, stacklevel=2)
    else:
        rows.pending.clear()


def _progress(chunk: Chunk, counted: int | None) -> Progress:
    new, before = jax.tree.map(lambda x: x[:counted], (chunk.metrics, chunk.steps_before))
    episodes = new.episodes.sum()
    total = np.where(new.episodes > 0, new.episode_return * new.episodes, 0).sum()
    mean = total / episodes if episodes else float("nan")
    played = float((new.timesteps[:, -1] - before).sum(dtype=float))
    steps = new.timesteps[:, -1]
    return Progress(
        chunk.done,
        int(steps.min()),
        int(steps.sum(dtype=float)),
        float(mean),
        played / chunk.seconds,
    )


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM take effect between chunks, where the state is whole; a second one at once."""
    pressed: list[int] = []

    def note(signal_number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signal_number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(pressed)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
