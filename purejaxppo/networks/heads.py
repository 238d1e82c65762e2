"""From features to a distribution over actions, or to a value."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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
    def __call__(self, x: Float[Array, "*batch hidden"]) -> Distribution:
        match self.action_space:
            case Discrete(n):
                return Categorical(dense(n, POLICY_GAIN)(x))
            case MultiDiscrete(sizes):
                logits = jnp.split(
                    dense(sum(sizes), POLICY_GAIN)(x), np.cumsum(sizes)[:-1].tolist(), axis=-1
                )
                return MultiCategorical(tuple(map(Categorical, logits)))
            case Box():
                size = int(np.prod(self.action_space.shape))
                mean = dense(size, POLICY_GAIN)(x)
                log_std = self.param("log_std", nn.initializers.zeros, (size,), mean.dtype)
                gaussian = TanhGaussian if self.squash else DiagonalGaussian
                return gaussian(mean, jnp.broadcast_to(log_std, mean.shape))
        raise ConfigError(f"{self.action_space!r} is not a space that a policy can act in")


class ValueHead(nn.Module):
    """From features to one number."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch"]:
        return dense(1, VALUE_GAIN)(x)[..., 0]
