"""Actor-critic networks, and the `Model`s made of them."""

from collections.abc import Callable
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from purejaxppo.config import Config
from purejaxppo.distributions import Categorical, DiagonalGaussian, MultiCategorical, TanhGaussian
from purejaxppo.keys import scan_keys
from purejaxppo.types import Box, ConfigError, Discrete, Distribution, Model, MultiDiscrete, PRNGKey, PyTree, Space

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": nn.tanh,
    "relu": nn.relu,
    "elu": nn.elu,
    "gelu": nn.gelu,
    "silu": nn.silu,
}
SMALL, UNIT, HIDDEN = 0.01, 1.0, float(np.sqrt(2))  # gains of the orthogonal initialisation: policy, value, hidden


def dense(width: int, gain: float) -> nn.Dense:
    """A layer with orthogonal weights of this gain and zero bias (Andrychowicz et al. 2021, section 3.2)."""
    # jnp.result_type(float) is float64 where jax_enable_x64 is set, and float32 otherwise.
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(gain), param_dtype=jnp.result_type(float))


class MLP(nn.Module):
    """Hidden layers: x ← activation(W x + b), once for each width."""

    hidden_sizes: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, x: Shaped[Array, "*batch features"]) -> Float[Array, "*batch hidden"]:
        x = jnp.asarray(x, jnp.result_type(float))
        for width in self.hidden_sizes:
            x = ACTIVATIONS[self.activation](dense(width, HIDDEN)(x))
        return x


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
                return Categorical(dense(n, SMALL)(x))
            case MultiDiscrete(sizes):
                logits = jnp.split(dense(sum(sizes), SMALL)(x), np.cumsum(sizes)[:-1].tolist(), axis=-1)
                return MultiCategorical(tuple(map(Categorical, logits)))
            case Box():
                size = int(np.prod(self.action_space.shape))
                mean = dense(size, SMALL)(x)
                log_std = self.param("log_std", nn.initializers.zeros, (size,), mean.dtype)
                gaussian = TanhGaussian if self.squash else DiagonalGaussian
                return gaussian(mean, jnp.broadcast_to(log_std, mean.shape))
        raise ConfigError(f"{self.action_space!r} is not a space that a policy can act in")


class ValueHead(nn.Module):
    """From features to one number."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch"]:
        return dense(1, UNIT)(x)[..., 0]


def make_model(config: Config, action_space: Space) -> Model:
    """The network that the config names, for flat observations.

    Asked twice it is the same object, so that what was compiled for one policy serves the next.
    """
    return mlp_actor_critic(
        action_space, tuple(config.hidden_sizes), config.activation, config.shared_trunk, config.squash_actions
    )


@cache
def mlp_actor_critic(
    action_space: Space,
    hidden_sizes: tuple[int, ...] = (64, 64),
    activation: str = "tanh",
    shared_trunk: bool = False,
    squash: bool = False,
) -> Model:
    """A feed-forward `Model` over flat observations ``[..., features]``.

    Policy and value have hidden layers of their own, or one ``trunk`` where ``shared_trunk`` is set, in which case
    the two losses meet in it and c1 weighs them (Schulman et al. 2017, eq. 9).
    """
    trunk, policy, value = MLP(hidden_sizes, activation), PolicyHead(action_space, squash), ValueHead()

    def init(key: PRNGKey, obs: Array) -> PyTree:
        key_trunk, key_policy, key_value = jax.random.split(key, 3)
        # A loop over the two trunks, not two calls: XLA takes half a second for every orthogonal matrix in a program.
        keys = jax.random.split(key_trunk, 1 if shared_trunk else 2)
        _, trunks = scan_keys(lambda _, key: (None, trunk.init(key, obs)), None, keys)
        first, last = jax.tree.map(lambda x: x[0], trunks), jax.tree.map(lambda x: x[-1], trunks)
        features = trunk.apply(first, obs)
        heads = policy.init(key_policy, features), value.init(key_value, features)
        if shared_trunk:
            return {"trunk": first, "policy": {"head": heads[0]}, "value": {"head": heads[1]}}
        return {"policy": {"trunk": first, "head": heads[0]}, "value": {"trunk": last, "head": heads[1]}}

    def forward(params: PyTree, obs: Array) -> tuple[Distribution, Array]:
        if shared_trunk:
            for_policy = for_value = trunk.apply(params["trunk"], obs)
        else:
            for_policy = trunk.apply(params["policy"]["trunk"], obs)
            for_value = trunk.apply(params["value"]["trunk"], obs)
        distribution = policy.apply(params["policy"]["head"], for_policy)
        return distribution, value.apply(params["value"]["head"], for_value)  # type: ignore

    return feed_forward(init, forward)


def feed_forward(
    init: Callable[[PRNGKey, Array], PyTree], forward: Callable[[PyTree, Array], tuple[Distribution, Array]]
) -> Model:
    """The `Model` of a network without memory, from ``forward(params, obs) -> (distribution, value)``."""

    def initial_carry(batch_size: int) -> PyTree:
        return ()

    def step(params: PyTree, carry: PyTree, obs: Array, reset: Array) -> tuple[PyTree, Distribution, Array]:
        return carry, *forward(params, obs)

    def unroll(params: PyTree, carry: PyTree, obs: Array, reset: Array) -> tuple[Distribution, Array]:
        # One matrix product over all N rows: XLA's CPU back end is half as fast on the gradient of a [T, B, ...] one.
        outputs = forward(params, obs.reshape((-1, *obs.shape[2:])))
        return jax.tree.map(lambda x: x.reshape(obs.shape[:2] + x.shape[1:]), outputs)

    return Model(init, initial_carry, step, unroll)
