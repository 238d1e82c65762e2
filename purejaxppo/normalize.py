"""Running moments of observations and of discounted returns (parallel Welford)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from purejaxppo.types import ACTION_MASK, Box, Dict, ObservationSpace, PyTree

EPSILON = 1e-8  # added to the variance
LIMIT = 10.0  # normalised values are clipped to ±LIMIT


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of samples."""

    samples: Float[Array, ""]
    mean: Float[Array, "..."]
    m2: Float[Array, "..."]

    @property
    def variance(self) -> Float[Array, "..."]:
        """The population variance; 1 without samples, so that nothing is scaled."""
        return jnp.where(self.samples > 0, self.m2 / jnp.maximum(self.samples, 1), 1.0)


ObsMoments = Moments | dict[str, Moments]  # of a Box; of the parts of other observations


class ReturnScale(NamedTuple):
    """The state of the reward normaliser."""

    discounted_return: Float[Array, "B"]  # of the current episode: R ← γ R + r
    moments: Moments  # of all R so far


class Normalizer(NamedTuple):
    """The normalisers of one agent. None: no normalisation."""

    obs: ObsMoments | None
    reward: ReturnScale | None


def init_normalizer(
    obs: PyTree, space: ObservationSpace, observations: bool, rewards: bool
) -> Normalizer:
    """The normalisers without samples; ``obs`` [B, ...] are observations in ``space``."""
    num_envs = jax.tree.leaves(obs)[0].shape[0]
    running = jnp.zeros(num_envs, jnp.result_type(float))
    return Normalizer(
        init_obs_moments(space) if observations else None,
        ReturnScale(running, no_moments(())) if rewards else None,
    )


def init_obs_moments(space: ObservationSpace) -> ObsMoments:
    """The moments without samples, of a `Box` or of the boxes among the parts of a `Dict`.

    Elements of finite sets and action masks are not normalised.
    """
    if isinstance(space, Dict):
        boxes = {name: x.shape for name, x in space.spaces if isinstance(x, Box)}
        return {name: no_moments(x) for name, x in boxes.items() if name != ACTION_MASK}
    return no_moments(space.shape) if isinstance(space, Box) else {}


def no_moments(shape: tuple[int, ...]) -> Moments:
    """The moments without samples, for samples of this shape."""
    dtype = jnp.result_type(float)
    return Moments(jnp.zeros((), dtype), jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def moments_of(
    x: Shaped[Array, "..."], valid: Bool[Array, "..."] | None = None, num_axes: int = 1
) -> Moments:
    """The moments over the first ``num_axes`` axes of samples, or of the valid ones.

    ``valid`` has those axes.
    """
    x = jnp.asarray(x, jnp.result_type(float))
    axes = tuple(range(num_axes))
    if valid is None:
        mean = x.mean(axis=axes, keepdims=True)
        samples = jnp.asarray(math.prod(x.shape[:num_axes]), mean.dtype)
        m2 = ((x - mean) ** 2).sum(axis=axes)
    else:
        samples = valid.sum(dtype=x.dtype)
        valid = valid.reshape(valid.shape + (1,) * (x.ndim - num_axes))
        total = jnp.where(valid, x, 0).sum(axis=axes, keepdims=True)
        mean = total / jnp.maximum(samples, 1)
        m2 = jnp.where(valid, (x - mean) ** 2, 0).sum(axis=axes)
    return Moments(samples, mean.reshape(m2.shape), m2)


def obs_moments_of(like: ObsMoments, obs: PyTree, valid: Bool[Array, "n"] | None) -> ObsMoments:
    """The moments of n observations, or of the valid ones, in the parts that ``like`` has."""
    if isinstance(like, dict):
        return {name: moments_of(obs[name], valid) for name in like}
    return moments_of(obs, valid)


def merge_obs(a: ObsMoments, b: ObsMoments) -> ObsMoments:
    """`merge` for each part of the observations."""
    return jax.tree.map(merge, a, b, is_leaf=lambda x: isinstance(x, Moments))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the union of two samples (Chan, Golub & LeVeque 1979), exact for any split."""
    samples = a.samples + b.samples
    share = b.samples / jnp.maximum(samples, 1)
    delta = b.mean - a.mean
    return Moments(samples, a.mean + delta * share, a.m2 + b.m2 + delta**2 * a.samples * share)


def pooled(parts: Moments) -> Moments:
    """The moments of the union of S samples, whose moments are along the first axis of ``parts``.

    This equals `merge` applied S − 1 times.
    """
    samples = parts.samples.sum()
    weight = parts.samples.reshape((-1,) + (1,) * (parts.mean.ndim - 1))
    mean = (parts.mean * weight).sum(axis=0) / jnp.maximum(samples, 1)
    return Moments(samples, mean, (parts.m2 + weight * (parts.mean - mean[None]) ** 2).sum(axis=0))


def pooled_obs(parts: ObsMoments) -> ObsMoments:
    """`pooled` for each part of the observations."""
    return jax.tree.map(pooled, parts, is_leaf=lambda x: isinstance(x, Moments))


def normalize_obs(moments: ObsMoments | None, obs: PyTree) -> PyTree:
    """(obs − mean) / deviation, clipped to ±10, in the parts that have moments."""
    if moments is None:
        return obs
    if isinstance(moments, dict):
        parts = {name: normalize_obs(moments[name], obs[name]) for name in moments}
        return obs | parts if parts else obs
    mean, variance = (jnp.broadcast_to(x, obs.shape) for x in (moments.mean, moments.variance))
    standardized = (obs - mean) / jnp.sqrt(variance + EPSILON)
    return jnp.clip(standardized, -LIMIT, LIMIT)


def normalize_reward(
    scale: ReturnScale | None,
    reward: Float[Array, "T B"],
    reset: Bool[Array, "T B"],
    gamma: Float[Array, ""] | float,
    valid: Bool[Array, "T B"] | None = None,
) -> tuple[Float[Array, "T B"], ReturnScale | None]:
    """Rewards divided by the standard deviation of the discounted return, clipped to ±10.

        R_t = γ R_{t−1} + r_t,     R_{t−1} = 0 where ``reset[t]``: a new episode begins

    So the return includes the last reward of an episode, and no reward of the previous one. Only
    the returns of ``valid`` steps count. The deviation includes the returns of this rollout:
    without them, the first rollout would have no scale. This adds no inconsistency, because rewards
    are used only after the rollout.

    Returns the scaled rewards and the new scale.
    """
    if scale is None:
        return reward, None

    def discount(running: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, reset = step
        total = gamma * jnp.where(reset, 0, running) + reward
        return total, total

    running, returns = jax.lax.scan(discount, scale.discounted_return, (reward, reset))
    moments = merge(scale.moments, moments_of(returns, valid, num_axes=2))
    scaled = jnp.clip(reward / jnp.sqrt(moments.variance + EPSILON), -LIMIT, LIMIT)
    return scaled, ReturnScale(running, moments)
