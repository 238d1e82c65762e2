"""Network heads: features to a distribution over actions, or to a value."""

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
    """Maps features to a distribution over ``action_space``.

    The log standard deviation of a Gaussian policy is one parameter per action dimension. It is
    independent of the observation, as in the PPO paper (section 6.1), and its initial value is 0.
    """

    action_space: Space
    squash: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch hidden"], mask: Shaped[Array, "*batch n"] | None = None
    ) -> Distribution:
        """``mask`` is the ``action_mask`` of the observation, or None."""
        match self.action_space:
            case Discrete(n):
                return Categorical(mask_logits(dense(n, POLICY_GAIN)(x), mask))
            case MultiDiscrete(sizes):
                logits = mask_logits(dense(sum(sizes), POLICY_GAIN)(x), mask)
                parts = jnp.split(logits, np.cumsum(sizes)[:-1].tolist(), axis=-1)
                return MultiCategorical(tuple(map(Categorical, parts)))
            case Box():
                size = int(np.prod(self.action_space.shape))
                mean = dense(size, POLICY_GAIN)(x)
                log_std = self.param("log_std", nn.initializers.zeros, (size,), mean.dtype)
                gaussian = TanhGaussian if self.squash else DiagonalGaussian
                return gaussian(mean, jnp.broadcast_to(log_std, mean.shape))
        raise ConfigError(
            f"{self.action_space!r} is not an action space: "
            "a policy needs a Discrete, a MultiDiscrete or a Box"
        )


def mask_logits(
    logits: Float[Array, "*batch n"], mask: Shaped[Array, "*batch n"] | None
) -> Float[Array, "*batch n"]:
    """Replace the logits of forbidden actions by the lowest finite number of their dtype.

    The probability of a forbidden action is then exactly 0, and its logit has gradient 0. With −∞,
    a difference of log-probabilities would be NaN.
    """
    if mask is None:
        return logits
    return jnp.where(mask.astype(bool), logits, jnp.finfo(logits.dtype).min)


class ValueHead(nn.Module):
    """Maps features to a value estimate."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch"]:
        return dense(1, VALUE_GAIN)(x)[..., 0]
