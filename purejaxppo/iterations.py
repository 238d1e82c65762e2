"""The length of a run: counting its timesteps, and looping over its iterations."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from purejaxppo.config import Config
from purejaxppo.metrics import MetricsDescription
from purejaxppo.types import PyTree, undefined

StateT = TypeVar("StateT", bound=Any)


def zero_timesteps(config: Config) -> Array:
    """Zero, as int32, or as float32 if the count passes 2³¹; float32 is exact to 7 digits."""
    return jnp.zeros((), jnp.int32 if config.actual_timesteps < 2**31 else jnp.float32)


def timesteps_after(
    config: Config, iteration: Array, before: Array, mask: Bool[Array, "T B"]
) -> Array:
    """The environment steps up to this iteration; of whole episodes only those in the mask."""
    if config.whole_episodes:
        return before + mask.sum(dtype=before.dtype)
    return iteration.astype(before.dtype) * config.batch_size


def metrics_buffer(metrics: PyTree, *sizes: int) -> PyTree:
    """Zeros of the shape and type of ``metrics`` with leading axes ``sizes``."""
    return jax.tree.map(lambda x: jnp.zeros((*sizes, *x.shape), x.dtype), metrics)


def run_iterations(
    step: Callable[[StateT], tuple[StateT, PyTree]],
    state: StateT,
    buffer: PyTree,
    count: Int[Array, ""] | int,
    described: MetricsDescription,
    total: int | None = None,
) -> tuple[StateT, PyTree, Int[Array, ""]]:
    """Up to ``count`` iterations: the state, their metrics, and the number of iterations.

    The metrics of iteration i go to row i of ``buffer``. Without ``total`` all iterations run.
    Otherwise the loop ends once the progress reaches ``total`` or training has diverged, and the
    other rows repeat the last one (see `mark_padding`). The loop does not begin if the last row of
    ``buffer``, from the previous call, fulfils a condition; before the first call its progress is
    0.
    """

    def is_done(row: PyTree) -> Array:
        reached = described.progress_of(row) >= total
        return reached | ~described.is_finite(row)

    def not_done(loop: tuple[StateT, PyTree, Array, Array]) -> Array:
        _, _, i, done = loop
        return (i < count) if total is None else (i < count) & ~done

    def iteration(
        loop: tuple[StateT, PyTree, Array, Array],
    ) -> tuple[StateT, PyTree, Array, Array]:
        state, buffer, i, done = loop
        state, metrics = step(state)
        buffer = jax.tree.map(lambda row, x: row.at[i].set(x), buffer, metrics)
        return state, buffer, i + 1, done if total is None else is_done(metrics)

    done = jnp.asarray(False)
    if total is not None:
        last = jax.tree.map(lambda x: x[-1], buffer)
        done = (described.progress_of(last) > 0) & is_done(last)
    start = (state, buffer, jnp.zeros((), jnp.int32), done)
    state, buffer, completed, _ = jax.lax.while_loop(not_done, iteration, start)
    if total is not None:
        row = jnp.arange(jax.tree.leaves(buffer)[0].shape[0])
        # If this call did nothing, row −1 is the last row of the previous call.
        last = jnp.where(row < completed, row, completed - 1)
        buffer = jax.tree.map(lambda x: x[last], buffer)
    return state, buffer, completed


def mark_padding(described: MetricsDescription, metrics: PyTree, completed: Any) -> PyTree:
    """The metrics [..., n] with counts of 0 and undefined means after ``completed`` [...] rows.

    Works for arrays of JAX and of NumPy.
    """
    columns = described.columns(metrics)
    xp: Any = jnp if isinstance(columns[described.progress], jax.Array) else np
    is_row = xp.arange(columns[described.progress].shape[-1]) < xp.expand_dims(completed, -1)
    padding = dict.fromkeys(described.counts.values(), 0) | dict.fromkeys(
        described.counts, undefined()
    )
    padded = {
        name: xp.where(is_row, columns[name], xp.asarray(x, columns[name].dtype))
        for name, x in padding.items()
    }
    return described.from_columns(columns | padded, metrics)
