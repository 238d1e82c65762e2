"""From one iteration's data to one number per field of `Metrics`."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from purejaxppo import losses
from purejaxppo.config import Config
from purejaxppo.types import Batch, EpisodeSums, Metrics


def iteration_metrics(
    config: Config, iterations_done: Array, finished: EpisodeSums, batch: Batch, measured: dict[str, Array]
) -> Metrics:
    """The metrics of an iteration: ``measured`` are the update's and the reward function's own.

    What `Metrics` has a field for goes there, NaN where the algorithm does not measure it; the rest is ``extra``.
    """
    # The count passes 2³¹ in long runs on large machines; float32 then holds it to 7 digits.
    exact = jnp.int32 if config.actual_timesteps < 2**31 else jnp.float32
    common = {
        "timesteps": iterations_done.astype(exact) * config.batch_size,
        "episode_return": finished.returns / finished.episodes,  # 0 / 0 is NaN, as it should be
        "episode_length": finished.lengths / finished.episodes,
        "episodes": finished.episodes,
        "explained_variance": losses.explained_variance(batch.value, batch.target, batch.valid),
    }
    own = {name: measured.get(name, jnp.asarray(jnp.nan)) for name in Metrics._fields if name not in {*common, "extra"}}
    extra = {name: x for name, x in measured.items() if name not in Metrics._fields}
    return Metrics(**common, **own, extra=extra)


def finite_so_far(metrics: Metrics) -> NDArray[np.bool_]:
    """[..., iterations] whether the losses and the gradient were finite up to and with this iteration."""
    fine = np.isfinite([metrics.policy_loss, metrics.value_loss, metrics.grad_norm]).all(axis=0)
    return np.logical_and.accumulate(fine, axis=-1)
