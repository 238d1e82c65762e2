"""The `Metrics` of one iteration, and their conversion for tables and files."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

import purejaxppo.losses as losses
from purejaxppo.types import Batch, EpisodeSums, Metrics, undefined

# Extra metrics of a population: SWEPT + name for each hyper-parameter of the iteration, and the
# index of the agent whose state each agent continues with.
SWEPT = "swept/"
PARENT = f"{SWEPT}parent"


def iteration_metrics(
    timesteps: Array, finished: EpisodeSums, batch: Batch, measured: dict[str, Array]
) -> Metrics:
    """The metrics of one iteration; ``measured`` are those of the update and the reward function.

    Measurements without a field in `Metrics` are ``extra``. A field that the algorithm does not
    measure is `undefined`, and so is a mean over no finished episodes.
    """

    def mean(total: Array) -> Array:
        return jnp.where(
            finished.episodes > 0, total / jnp.maximum(finished.episodes, 1), undefined()
        )

    common = {
        "timesteps": timesteps,
        "episode_return": mean(finished.returns),
        "episode_length": mean(finished.lengths),
        "episodes": finished.episodes,
    }
    if "value_loss" in measured:  # otherwise no value function is fitted
        common["explained_variance"] = losses.explained_variance(
            batch.value, batch.target, batch.valid, undefined()
        )
    missing = jnp.asarray(undefined())
    fields = {
        name: measured.get(name, missing)
        for name in Metrics._fields
        if name not in {*common, "extra"}
    }
    extra = {name: x for name, x in measured.items() if name not in Metrics._fields}
    return jax.tree.map(_at_least_float32, Metrics(**common, **fields, extra=extra))


def _at_least_float32(x: Array) -> Array:
    """Floats narrower than float32, as of a model in bfloat16, as float32 for tables and files."""
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if is_float else x


def with_nan(metrics: Metrics) -> Metrics:
    """The metrics with NaN stored in place of every `undefined` value, for output and files."""
    return Metrics(**metrics._asdict())


def without_nan(metrics: Metrics) -> Metrics:
    """NumPy metrics with `undefined` stored in place of NaN, as in a compiled program.

    This is the inverse of `with_nan`.
    """

    def stored(x: Any) -> Any:
        return (
            np.where(np.isnan(x), x.dtype.type(undefined()), x)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else x
        )

    return metrics._replace(
        **{name: stored(x) for name, x in metrics._asdict().items() if name != "extra"}
    )


def finite_so_far(metrics: Metrics) -> NDArray[np.bool_]:
    """[..., iterations] whether the losses and the gradient are finite up to each iteration.

    If value loss and explained variance are NaN throughout, no value function is fitted, and the
    value loss is ignored. In a population, where an agent can be replaced by another, each
    iteration is judged alone.
    """
    value_loss = np.asarray(metrics.value_loss)
    explained = np.asarray(metrics.explained_variance)
    unmeasured = (np.isnan(value_loss) & np.isnan(explained)).all(axis=-1, keepdims=True)
    value_loss = np.where(unmeasured, 0, value_loss)
    measured = np.asarray([metrics.policy_loss, value_loss, metrics.grad_norm])
    is_finite = np.isfinite(measured).all(axis=0)
    if PARENT in metrics.extra:
        return is_finite
    return np.logical_and.accumulate(is_finite, axis=-1)
