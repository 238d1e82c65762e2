"""The loop that calls compiled training, a fraction of a second at a time, and looks at it in between."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from purejaxppo.config import Config
from purejaxppo.metrics import with_nan, without_nan
from purejaxppo.runs.processes import agreed, whole
from purejaxppo.runs.programs import Programs, State, Swept
from purejaxppo.types import Metrics

CHUNK_SECONDS = 0.3  # how often the host looks at a run


class Chunk(NamedTuple):
    """Some iterations that were run; the state is used up by the next chunk."""

    state: State
    metrics: Metrics  # NumPy [agents, iterations of the chunk]; one agent has an axis too
    done: int  # iterations so far
    steps_before: NDArray[Any]  # [agents] that each had taken before
    seconds: float


def run_chunks(
    programs: Programs, swept: Swept, state: State, before: Metrics | None = None, every: int | None = None
) -> Iterator[Chunk]:
    """Train up to the end, `CHUNK_SECONDS` at a time, with a pause after every multiple of ``every`` iterations.

    ``before`` are the metrics [agents, n] of the n iterations that the state has behind it. It ends early when every
    agent has diverged, or has counted its steps.
    """
    config, capacity, ahead = programs.config, programs.rows.timesteps.shape[-1], programs.ahead
    done, count = 0, 1
    steps: NDArray[Any] = np.zeros(programs.agents or 1)
    rows = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), programs.rows)
    if before is not None and _over(config, before).all():
        return
    if before is not None:  # agents that have counted their steps repeat their last row
        done, steps = before.timesteps.shape[-1], np.asarray(before.timesteps[:, -1])
        last = jax.tree.map(lambda x: x[:, -1:] if ahead else x[0, -1:], without_nan(before))
        rows = jax.tree.map(lambda row, x: np.broadcast_to(x, row.shape).astype(row.dtype), rows, last)
    rows = programs.put(rows)
    while done < config.num_iterations:
        stop = config.num_iterations if every is None else min(config.num_iterations, (done // every + 1) * every)
        count = min(count, capacity, stop - done)
        started = time.perf_counter()
        state, rows = programs.chunk(swept, state, rows, count)
        # This waits for the chunk; it copies, since `rows` is given away to the next one.
        new = whole(jax.tree.map(lambda x, n=count: x[*ahead, :n], rows))
        new = with_nan(jax.tree.map(np.array, new))
        seconds = agreed(time.perf_counter() - started)
        if config.whole_episodes:  # the last chunk may have room for more
            played = int(np.max(whole(state.iteration))) - done
            new = jax.tree.map(lambda x, n=played: x[*ahead, :n], new)
        new = new if ahead else jax.tree.map(lambda x: x[None], new)
        done, steps, steps_before = done + new.timesteps.shape[-1], np.asarray(new.timesteps[:, -1]), steps
        yield Chunk(state, new, done, steps_before, seconds)
        if _over(config, new).all():
            return
        count = max(1, int(count * CHUNK_SECONDS / seconds))


def _over(config: Config, new: Metrics) -> np.ndarray:
    """[agents] which of them have diverged, or counted their steps."""
    over = ~np.isfinite(new.policy_loss + new.grad_norm)[:, -1]
    return over | (new.timesteps[:, -1] >= config.total_timesteps) if config.whole_episodes else over
