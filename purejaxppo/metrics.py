"""The `Metrics` of one iteration, and their conversion for tables and files."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

import purejaxppo.losses as losses
from purejaxppo.trees import named_leaves
from purejaxppo.types import Batch, EpisodeSums, Metrics, PyTree, nan_where_undefined, undefined

# Extra metrics of a population: SWEPT + name for each hyper-parameter of the iteration, and the
# index of the agent whose state each agent continues with.
SWEPT = "swept/"
PARENT = f"{SWEPT}parent"


def iteration_metrics(
    timesteps: Array, finished: EpisodeSums, batch: Batch, measured: dict[str, Array]
) -> Metrics:
    """The metrics of one iteration; ``measured`` are those of the update and the reward function.

    A reward function that measures a score of its own as ``episode_return`` replaces the returns
    of the environment. Measurements without a field in `Metrics` are ``extra``. A field that the
    algorithm does not measure is `undefined`, and so is a mean over no finished episodes.
    """

    def mean(total: Array) -> Array:
        return jnp.where(
            finished.episodes > 0, total / jnp.maximum(finished.episodes, 1), undefined()
        )

    common = {
        "timesteps": timesteps,
        "episode_return": measured.get("episode_return", mean(finished.returns)),
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


def with_nan(metrics: PyTree) -> PyTree:
    """The metrics with NaN stored in place of every `undefined` value, for output and files."""
    return jax.tree.map(nan_where_undefined, metrics)


def without_nan(metrics: PyTree) -> PyTree:
    """NumPy metrics with `undefined` stored in place of NaN, as in a compiled program.

    This is the inverse of `with_nan`.
    """

    def stored(x: NDArray[Any]) -> NDArray[Any]:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return np.where(np.isnan(x), x.dtype.type(undefined()), x)

    return jax.tree.map(stored, metrics)


# ------------------------------------------------------------------------------- their description


class MetricsDescription(NamedTuple):
    """The metrics of a `Trainer`, as far as compiling, checkpointing and logging depend on them.

    The metrics of a trainer are a pytree of scalars: a dict, or `Metrics`.
    """

    progress: str  # metric that counts the progress of training, such as environment steps
    plotted: str  # metric of the learning curve
    # metrics -> whether training has not diverged, of the shape of the metrics. It gets traced
    # scalars and NumPy arrays [members, n], in which NaN stands for undefined values.
    is_finite: Callable[[Any], Array]
    # {metric that is a mean: metric that counts its samples}, for means over several iterations
    counts: Mapping[str, str] = MappingProxyType({})
    # {metric: group}; a tag in TensorBoard and W&B is group/metric
    groups: Mapping[str, str] = MappingProxyType({})
    not_averaged: tuple[str, ...] = ()  # an index, for example: a mean of it has no meaning

    def columns(self, metrics: PyTree) -> dict[str, Any]:
        """The metrics by name; those in ``extra`` have no prefix."""
        return {
            name.removeprefix("extra/"): leaf for name, leaf in named_leaves(metrics, "/").items()
        }

    def from_columns(self, columns: Mapping[str, Any], like: PyTree) -> PyTree:
        """The inverse of `columns`: metrics with the structure of ``like``."""
        leaves = [columns[name] for name in self.columns(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def progress_of(self, metrics: PyTree) -> Any:
        """The progress that the metrics report."""
        return self.columns(metrics)[self.progress]


def is_finite(metrics: Metrics) -> Any:
    """Whether the losses and the gradient of each iteration are finite: an agent has not diverged.

    If value loss and explained variance are both NaN, no value function is fitted, and the value
    loss is ignored. The result has the shape of a metric.
    """
    xp: Any = jnp if isinstance(metrics.policy_loss, jax.Array) else np
    is_unmeasured = xp.isnan(metrics.value_loss) & xp.isnan(metrics.explained_variance)
    value_loss = xp.where(is_unmeasured, 0, metrics.value_loss)
    return (
        xp.isfinite(metrics.policy_loss) & xp.isfinite(value_loss) & xp.isfinite(metrics.grad_norm)
    )


def finite_so_far(metrics: Metrics) -> NDArray[np.bool_]:
    """[..., iterations] whether an agent has not diverged up to each iteration (`is_finite`).

    In a population, where an agent can be replaced by another, each iteration is judged alone.
    """
    finite = is_finite(jax.tree.map(np.asarray, metrics))
    return finite if PARENT in metrics.extra else np.logical_and.accumulate(finite, axis=-1)


AGENT_METRICS = MetricsDescription(
    progress="timesteps",
    plotted="episode_return",
    is_finite=is_finite,
    counts=MappingProxyType({"episode_return": "episodes", "episode_length": "episodes"}),
    groups=MappingProxyType(
        {
            **dict.fromkeys(("episode_return", "episode_length", "episodes"), "train"),
            **dict.fromkeys(("policy_loss", "value_loss", "entropy"), "loss"),
            **dict.fromkeys(
                (
                    "approx_kl",
                    "clip_fraction",
                    "explained_variance",
                    "grad_norm",
                    "first_ratio_deviation",
                ),
                "update",
            ),
        }
    ),
    not_averaged=(PARENT,),
)
