"""The host loop: it calls compiled training in chunks of a fraction of a second."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from purejaxppo.config import Config
from purejaxppo.metrics import with_nan, without_nan
from purejaxppo.runs.processes import broadcast_from_main, gather_to_host
from purejaxppo.runs.programs import AgentState, Programs, Swept
from purejaxppo.types import Metrics

CHUNK_SECONDS = 0.3  # target duration of a chunk


class Chunk(NamedTuple):
    """The result of a chunk of iterations."""

    state: AgentState  # the next chunk donates it
    metrics: Metrics  # NumPy [agents, iterations of the chunk], also for a single agent
    done: int  # iterations so far
    steps_before: NDArray[Any]  # [agents] environment steps before the chunk
    seconds: float


def run_chunks(
    programs: Programs,
    swept: Swept,
    state: AgentState,
    before: Metrics | None = None,
    every: int | None = None,
) -> Iterator[Chunk]:
    """Train to the end in chunks of about `CHUNK_SECONDS`.

    ``before`` holds the metrics [agents, n] of the n iterations before ``state``. A chunk ends at
    every multiple of ``every`` iterations. The loop stops early if every agent is finished
    (`is_finished`).
    """
    config = programs.config
    capacity = programs.buffer.timesteps.shape[-1]
    agent_index = programs.agent_index
    done = 0
    count = 1
    steps: NDArray[Any] = np.zeros(programs.agents or 1)
    buffer = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), programs.buffer)
    if before is not None and is_finished(config, before).all():
        return
    if before is not None:
        done = before.timesteps.shape[-1]
        steps = np.asarray(before.timesteps[:, -1])
        # Agents that have reached `total_timesteps` repeat the last row of the buffer.
        last = jax.tree.map(lambda x: x[:, -1:] if agent_index else x[0, -1:], without_nan(before))
        buffer = jax.tree.map(
            lambda row, x: np.broadcast_to(x, row.shape).astype(row.dtype), buffer, last
        )
    buffer = programs.put(buffer)
    while done < config.num_iterations:
        stop = config.num_iterations
        if every is not None:
            stop = min(stop, (done // every + 1) * every)
        count = min(count, capacity, stop - done)
        started = time.perf_counter()
        state, buffer = programs.chunk(swept, state, buffer, count)
        # This waits for the chunk. It copies, because the next chunk donates `buffer`.
        new = gather_to_host(jax.tree.map(lambda x, n=count: x[*agent_index, :n], buffer))
        new = with_nan(jax.tree.map(np.array, new))
        seconds = broadcast_from_main(time.perf_counter() - started)
        if not config.has_fixed_length:  # the agents may finish before `count` iterations
            completed = int(np.max(gather_to_host(state.iteration))) - done
            new = jax.tree.map(lambda x, n=completed: x[*agent_index, :n], new)
        new = new if agent_index else jax.tree.map(lambda x: x[None], new)
        done += new.timesteps.shape[-1]
        yield Chunk(state=state, metrics=new, done=done, steps_before=steps, seconds=seconds)
        steps = np.asarray(new.timesteps[:, -1])
        if is_finished(config, new).all():
            return
        count = max(1, int(count * CHUNK_SECONDS / seconds))


def is_finished(config: Config, new: Metrics) -> np.ndarray:
    """[agents] whether an agent has diverged or, with whole episodes, reached the last step."""
    has_diverged = ~np.isfinite(new.policy_loss + new.grad_norm)[:, -1]
    if config.has_fixed_length:
        return has_diverged
    return has_diverged | (new.timesteps[:, -1] >= config.total_timesteps)
