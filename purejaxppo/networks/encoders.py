"""From observations to features."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": nn.tanh,
    "relu": nn.relu,
    "elu": nn.elu,
    "gelu": nn.gelu,
    "silu": nn.silu,
}
HIDDEN_GAIN = float(np.sqrt(2))


def dense(width: int, gain: float) -> nn.Dense:
    """A layer with orthogonal weights of this gain and zero bias (Andrychowicz et al. 2021, section 3.2)."""
    # jnp.result_type(float) is float64 where jax_enable_x64 is set, and float32 otherwise.
    return nn.Dense(
        width, kernel_init=nn.initializers.orthogonal(gain), param_dtype=jnp.result_type(float)
    )


class MLP(nn.Module):
    """Hidden layers: x ← activation(W x + b), once for each width."""

    hidden_sizes: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, x: Shaped[Array, "*batch features"]) -> Float[Array, "*batch hidden"]:
        x = jnp.asarray(x, jnp.result_type(float))
        for width in self.hidden_sizes:
            x = ACTIVATIONS[self.activation](dense(width, HIDDEN_GAIN)(x))
        return x
