"""From features to a distribution over actions, or to a value."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from purejaxppo.networks.distributions import (
    Categorical,
    DiagonalGaussian,
    MultiCategorical,
    TanhGaussian,
)
from purejaxppo.networks.encoders import dense
from purejaxppo.types import Box, ConfigError, Discrete, Distribution, MultiDiscrete, Space

POLICY_GAIN = 0.01
VALUE_GAIN = 1.0


class PolicyHead(nn.Module):
    """From features to a distribution over ``action_space``.

    Continuous actions have a Gaussian whose log standard deviation is one parameter per dimension, independent of
    the observation and 0 at first, as in the PPO paper (section 6.1).
    """

    action_space: Space
    squash: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch hidden"], mask: Shaped[Array, "*batch n"] | None = None
    ) -> Distribution:
        """``mask`` is the observation's ``action_mask``, if there is one."""
        match self.action_space:
            case Discrete(n):
                return Categorical(masked(dense(n, POLICY_GAIN)(x), mask))
            case MultiDiscrete(sizes):
                logits = masked(dense(sum(sizes), POLICY_GAIN)(x), mask)
                parts = jnp.split(logits, np.cumsum(sizes)[:-1].tolist(), axis=-1)
                return MultiCategorical(tuple(map(Categorical, parts)))
            case Box():
                size = int(np.prod(self.action_space.shape))
                mean = dense(size, POLICY_GAIN)(x)
                log_std = self.param("log_std", nn.initializers.zeros, (size,), mean.dtype)
                gaussian = TanhGaussian if self.squash else DiagonalGaussian
                return gaussian(mean, jnp.broadcast_to(log_std, mean.shape))
        raise ConfigError(f"{self.action_space!r} is not a space that a policy can act in")


def masked(
    logits: Float[Array, "*batch n"], mask: Shaped[Array, "*batch n"] | None
) -> Float[Array, "*batch n"]:
    """The logits, those of forbidden actions replaced by the lowest number of their type.

    A forbidden action then has probability 0 exactly, its logit has gradient 0, and no infinity
    appears, from which a difference of log-probabilities would make a NaN.
    """
    if mask is None:
        return logits
    return jnp.where(mask.astype(bool), logits, jnp.finfo(logits.dtype).min)


class ValueHead(nn.Module):
    """From features to one number."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch"]:
        return dense(1, VALUE_GAIN)(x)[..., 0]
