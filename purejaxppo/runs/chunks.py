"""The loop that calls compiled training, a fraction of a second at a time, and looks at it in between."""

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

CHUNK_SECONDS = 0.3  # how often the host looks at a run


class Chunk(NamedTuple):
    """Some iterations that were run; the state is used up by the next chunk."""

    state: AgentState
    metrics: Metrics  # NumPy [agents, iterations of the chunk]; one agent has an axis too
    done: int  # iterations so far
    steps_before: NDArray[Any]  # [agents] that each had taken before
    seconds: float


def run_chunks(
    programs: Programs,
    swept: Swept,
    state: AgentState,
    before: Metrics | None = None,
    every: int | None = None,
) -> Iterator[Chunk]:
    """Train up to the end, `CHUNK_SECONDS` at a time, with a pause after every multiple of ``every`` iterations.

    ``before`` are the metrics [agents, n] of the n iterations that the state has behind it. It ends early when every
    agent has diverged, or has counted its steps.
    """
    config, capacity, agent_index = (
        programs.config,
        programs.buffer.timesteps.shape[-1],
        programs.agent_index,
    )
    done, count = 0, 1
    steps: NDArray[Any] = np.zeros(programs.agents or 1)
    buffer = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), programs.buffer)
    if before is not None and is_finished(config, before).all():
        return
    if before is not None:  # agents that have counted their steps repeat their last row
        done, steps = before.timesteps.shape[-1], np.asarray(before.timesteps[:, -1])
        last = jax.tree.map(lambda x: x[:, -1:] if agent_index else x[0, -1:], without_nan(before))
        buffer = jax.tree.map(
            lambda row, x: np.broadcast_to(x, row.shape).astype(row.dtype), buffer, last
        )
    buffer = programs.put(buffer)
    while done < config.num_iterations:
        stop = (
            config.num_iterations
            if every is None
            else min(config.num_iterations, (done // every + 1) * every)
        )
        count = min(count, capacity, stop - done)
        started = time.perf_counter()
        state, buffer = programs.chunk(swept, state, buffer, count)
        # This waits for the chunk; it copies, since `buffer` is given away to the next one.
        new = gather_to_host(jax.tree.map(lambda x, n=count: x[*agent_index, :n], buffer))
        new = with_nan(jax.tree.map(np.array, new))
        seconds = broadcast_from_main(time.perf_counter() - started)
        if config.whole_episodes:  # the last chunk may have room for more
            played = int(np.max(gather_to_host(state.iteration))) - done
            new = jax.tree.map(lambda x, n=played: x[*agent_index, :n], new)
        new = new if agent_index else jax.tree.map(lambda x: x[None], new)
        done, steps, steps_before = (
            done + new.timesteps.shape[-1],
            np.asarray(new.timesteps[:, -1]),
            steps,
        )
        yield Chunk(state, new, done, steps_before, seconds)
        if is_finished(config, new).all():
            return
        count = max(1, int(count * CHUNK_SECONDS / seconds))


def is_finished(config: Config, new: Metrics) -> np.ndarray:
    """[agents] which of them have diverged, or counted their steps."""
    is_finished_ = ~np.isfinite(new.policy_loss + new.grad_norm)[:, -1]
    return (
        is_finished_ | (new.timesteps[:, -1] >= config.total_timesteps)
        if config.whole_episodes
        else is_finished_
    )
