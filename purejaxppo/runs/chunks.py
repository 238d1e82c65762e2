"""The host loop: it calls compiled training in chunks of a fraction of a second."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from purejaxppo.iterations import mark_padding
from purejaxppo.metrics import with_nan, without_nan
from purejaxppo.runs.processes import broadcast_from_main, gather_to_host
from purejaxppo.runs.programs import Job, Programs, Swept
from purejaxppo.types import PyTree

CHUNK_SECONDS = 0.3  # target duration of a chunk


class Chunk(NamedTuple):
    """The result of a chunk of iterations."""

    state: PyTree  # the next chunk donates it
    metrics: PyTree  # NumPy [agents, iterations of the chunk], also for a single agent
    done: int  # iterations so far
    completed: NDArray[Any]  # [agents] iterations in the chunk; later metrics are padding
    progress_before: NDArray[Any]  # [agents] progress before the chunk
    seconds: float


def run_chunks(
    programs: Programs,
    swept: Swept,
    state: PyTree,
    before: PyTree | None = None,
    every: int | None = None,
) -> Iterator[Chunk]:
    """Train to the end in chunks of about `CHUNK_SECONDS`.

    ``before`` holds the metrics [agents, n] of the n iterations before ``state``. A chunk ends at
    every multiple of ``every`` iterations. The loop stops early if every agent is finished
    (`is_finished`).
    """
    job = programs.job
    agent_index = programs.agent_index
    done = 0
    count = 1
    progress: NDArray[Any] = np.zeros(programs.agents or 1)
    buffer = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), programs.buffer)
    if before is not None and is_finished(job, before).all():
        return
    if before is not None:
        progress_so_far = np.asarray(job.metrics.progress_of(before))
        done = progress_so_far.shape[-1]
        progress = progress_so_far[:, -1]
        # The buffer holds the last row, which tells `run_iterations` whether an agent is finished.
        last = jax.tree.map(lambda x: x[:, -1:] if agent_index else x[0, -1:], without_nan(before))
        buffer = jax.tree.map(
            lambda row, x: np.broadcast_to(x, row.shape).astype(row.dtype), buffer, last
        )
    buffer = programs.put(buffer)
    while done < job.num_iterations:
        stop = job.num_iterations
        if every is not None:
            stop = min(stop, (done // every + 1) * every)
        count = min(count, programs.capacity, stop - done)
        started = time.perf_counter()
        state, buffer, completed_of_each = programs.chunk(swept, state, buffer, count)
        # This waits for the chunk. It copies, because the next chunk donates `buffer`.
        new = gather_to_host(jax.tree.map(lambda x, n=count: x[*agent_index, :n], buffer))
        new = jax.tree.map(np.array, new)
        seconds = broadcast_from_main(time.perf_counter() - started)
        completed = np.atleast_1d(np.asarray(gather_to_host(completed_of_each)))
        if job.total is not None:  # the agents may finish before `count` iterations
            most = int(completed.max())
            new = jax.tree.map(lambda x, n=most: x[*agent_index, :n], new)
        new = new if agent_index else jax.tree.map(lambda x: x[None], new)
        new = with_nan(mark_padding(job.metrics, new, completed))
        new_progress = np.asarray(job.metrics.progress_of(new))
        done += new_progress.shape[-1]
        yield Chunk(
            state=state,
            metrics=new,
            done=done,
            completed=completed,
            progress_before=progress,
            seconds=seconds,
        )
        progress = new_progress[:, -1]
        if is_finished(job, new).all():
            return
        count = max(1, int(count * CHUNK_SECONDS / seconds))


def is_finished(job: Job, new: PyTree) -> np.ndarray:
    """[agents] whether an agent has diverged or has reached the total progress of the job."""
    last = jax.tree.map(lambda x: x[:, -1], new)
    has_diverged = ~np.asarray(job.metrics.is_finite(last))
    if job.total is None:
        return has_diverged
    return has_diverged | (np.asarray(job.metrics.progress_of(last)) >= job.total)
