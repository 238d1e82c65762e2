"""How long a run is: counting its steps, and running its iterations."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from purejaxppo.config import Config
from purejaxppo.types import Metrics, PyTree, undefined

StateT = TypeVar(
    "StateT", bound=Any
)  # of one agent; of a population, where each number in the metrics is one for each


def zero_timesteps(config: Config) -> Array:
    """Zero, in int32; where the count passes 2³¹, in float32, which then holds it to 7 digits."""
    return jnp.zeros((), jnp.int32 if config.actual_timesteps < 2**31 else jnp.float32)


def timesteps_after(
    config: Config, iteration: Array, before: Array, mask: Bool[Array, "T B"]
) -> Array:
    """The environment steps of all iterations up to this one; of whole episodes those where the mask is true."""
    if config.whole_episodes:
        return before + mask.sum(dtype=before.dtype)
    return iteration.astype(before.dtype) * config.batch_size


def metrics_buffer(metrics: PyTree, *sizes: int) -> PyTree:
    """Room for metrics in front of whose shapes stand these sizes: how many iterations, or agents and iterations."""
    return jax.tree.map(lambda x: jnp.zeros((*sizes, *x.shape), x.dtype), metrics)


def run_iterations(
    config: Config,
    step: Callable[[StateT], tuple[StateT, Metrics]],
    state: StateT,
    buffer: Metrics,
    count: Int[Array, ""] | int,
) -> tuple[StateT, Metrics]:
    """Up to ``count`` iterations; the metrics of the i-th go to row i.

    With whole episodes nobody knows beforehand how many iterations ``total_timesteps`` take. They end when so many
    steps are counted, or when loss or gradient are no longer finite, and the rows that were not reached repeat the last
    one, but for the episodes, of which they have none. (It is known from the ``buffer`` of the call before.)
    """

    def not_done(loop: tuple[StateT, Metrics, Array, Array]) -> Array:
        state, _, i, finite = loop
        if config.has_fixed_length:
            return i < count
        return (i < count) & (state.timesteps < config.total_timesteps) & finite

    def iteration(
        loop: tuple[StateT, Metrics, Array, Array],
    ) -> tuple[StateT, Metrics, Array, Array]:
        state, buffer, i, _ = loop
        state, metrics = step(state)
        finite = jnp.isfinite(metrics.policy_loss + metrics.grad_norm)
        return state, jax.tree.map(lambda row, x: row.at[i].set(x), buffer, metrics), i + 1, finite

    finite = jnp.isfinite(
        buffer.policy_loss[-1] + buffer.grad_norm[-1]
    )  # of the call before; room that is empty is 0
    start = (state, buffer, jnp.zeros((), jnp.int32), finite)
    state, buffer, done, _ = jax.lax.while_loop(not_done, iteration, start)
    if config.has_fixed_length:
        return state, buffer
    row = jnp.arange(buffer.timesteps.shape[0])
    # Row −1 stands for row done − 1 where nothing was done: the call before has repeated its last row up to the end.
    buffer = jax.tree.map(lambda x: x[jnp.where(row < done, row, done - 1)], buffer)
    padding = {"episodes": 0, "episode_return": undefined(), "episode_length": undefined()}
    stored: dict[str, Any] = dict(zip(Metrics._fields, buffer, strict=True))
    return state, buffer._replace(
        **{name: jnp.where(row < done, stored[name], x) for name, x in padding.items()}
    )
