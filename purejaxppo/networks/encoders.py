"""Encoders: observations to features, and the hidden layers on them."""

from collections.abc import Callable, Collection

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from purejaxppo.types import (
    ACTION_MASK,
    Box,
    Dict,
    Discrete,
    MultiDiscrete,
    ObservationSpace,
    PyTree,
)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": nn.tanh,
    "relu": nn.relu,
    "elu": nn.elu,
    "gelu": nn.gelu,
    "silu": nn.silu,
}
HIDDEN_GAIN = float(np.sqrt(2))


def features_of(
    obs: PyTree, space: ObservationSpace, exclude: Collection[str] = ()
) -> Shaped[Array, "*batch features"]:
    """Observations as vectors.

    Discrete observations become one-hot vectors. Boxes are flattened in row-major order. The parts
    of a `Dict` are concatenated in the order of their names, without ``action_mask`` and the parts
    named in ``exclude``.
    """
    if isinstance(space, Dict):
        names = [name for name, _ in space.spaces if name not in {ACTION_MASK, *exclude}]
        parts = dict(space.spaces)
        features = [features_of(obs[name], parts[name]) for name in names]
        return jnp.concatenate(features, axis=-1) if len(features) > 1 else features[0]
    batch = obs.shape[: obs.ndim - len(space.shape)]
    match space:
        case Discrete(n):
            return jax.nn.one_hot(obs, n)
        case MultiDiscrete(sizes):
            one_hot = [jax.nn.one_hot(obs[..., i], n) for i, n in enumerate(sizes)]
            return jnp.concatenate(one_hot, axis=-1)
        case Box():
            return obs.reshape((*batch, int(np.prod(space.shape))))


def dense(width: int, gain: float) -> nn.Dense:
    """A layer whose initial weights are orthogonal with this gain, and whose initial bias is 0.

    Source: Andrychowicz et al. 2021, section 3.2.
    """
    # jnp.result_type(float) is float64 if jax_enable_x64 is set, and float32 otherwise.
    return nn.Dense(
        width, kernel_init=nn.initializers.orthogonal(gain), param_dtype=jnp.result_type(float)
    )


class MLP(nn.Module):
    """Hidden layers x ← activation(W x + b), one per entry of ``hidden_sizes``."""

    hidden_sizes: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, x: Shaped[Array, "*batch features"]) -> Float[Array, "*batch hidden"]:
        x = jnp.asarray(x, jnp.result_type(float))
        for width in self.hidden_sizes:
            x = ACTIVATIONS[self.activation](dense(width, HIDDEN_GAIN)(x))
        return x
