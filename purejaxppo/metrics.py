"""From one iteration's data to one number per field of `Metrics`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

import purejaxppo.losses as losses
from purejaxppo.types import Batch, EpisodeSums, Metrics, undefined

SWEPT = "swept/"  # in a population the hyper-parameters of an iteration are extra metrics of this name and theirs
PARENT = f"{SWEPT}parent"  # and the agent whose state each went on with after it


def iteration_metrics(
    timesteps: Array, finished: EpisodeSums, batch: Batch, measured: dict[str, Array]
) -> Metrics:
    """The metrics of an iteration: ``measured`` are the update's and the reward function's own.

    What `Metrics` has a field for goes there, `undefined` where the algorithm does not measure it; the rest is
    ``extra``. A mean over no finished episode is `undefined` too.
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
    if "value_loss" in measured:  # or there is no value function that is fitted
        common["explained_variance"] = losses.explained_variance(
            batch.value, batch.target, batch.valid, undefined()
        )
    missing = jnp.asarray(undefined())
    own = {
        name: measured.get(name, missing)
        for name in Metrics._fields
        if name not in {*common, "extra"}
    }
    extra = {name: x for name, x in measured.items() if name not in Metrics._fields}
    return jax.tree.map(_in_full_precision, Metrics(**common, **own, extra=extra))


def _in_full_precision(x: Array) -> Array:
    """At least float32, also of a model in bfloat16: tables and files have no narrower numbers."""
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if is_float else x


def with_nan(metrics: Metrics) -> Metrics:
    """The metrics with NaN stored wherever a value is `undefined`, for people and files."""
    return Metrics(**metrics._asdict())


def without_nan(metrics: Metrics) -> Metrics:
    """NumPy metrics with `undefined` stored where they have NaN, as a compiled program has them: undoes `with_nan`."""

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
    """[..., iterations] whether the losses and the gradient were finite up to and with this iteration.

    Where value loss and explained variance are NaN throughout, there is no value function that is fitted. In a
    population, whose agents begin anew as others, it is said of each iteration alone.
    """
    value_loss = np.asarray(metrics.value_loss)
    explained = np.asarray(metrics.explained_variance)
    unmeasured = (np.isnan(value_loss) & np.isnan(explained)).all(axis=-1, keepdims=True)
    value_loss = np.where(unmeasured, 0, value_loss)
    fine = np.isfinite(np.asarray([metrics.policy_loss, value_loss, metrics.grad_norm])).all(axis=0)
    return fine if PARENT in metrics.extra else np.logical_and.accumulate(fine, axis=-1)
