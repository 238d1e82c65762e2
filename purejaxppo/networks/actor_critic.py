"""Actor-critic networks: `Model`s made of an encoder and two heads."""

from collections.abc import Callable
from functools import cache

import jax
from jaxtyping import Array

from purejaxppo.config import Config
from purejaxppo.keys import scan_keys
from purejaxppo.networks.encoders import MLP
from purejaxppo.networks.heads import PolicyHead, ValueHead
from purejaxppo.types import Distribution, Model, PRNGKey, PyTree, Space


def make_model(config: Config, action_space: Space) -> Model:
    """The network that the config names, for flat observations.

    Asked twice it is the same object, so that what was compiled for one policy serves the next.
    """
    return mlp_actor_critic(
        action_space,
        tuple(config.hidden_sizes),
        config.activation,
        config.shared_trunk,
        config.squash_actions,
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
    trunk, policy, value = (
        MLP(hidden_sizes, activation),
        PolicyHead(action_space, squash),
        ValueHead(),
    )

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
        return {
            "policy": {"trunk": first, "head": heads[0]},
            "value": {"trunk": last, "head": heads[1]},
        }

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
    init: Callable[[PRNGKey, Array], PyTree],
    forward: Callable[[PyTree, Array], tuple[Distribution, Array]],
) -> Model:
    """The `Model` of a network without memory, from ``forward(params, obs) -> (distribution, value)``."""

    def initial_carry(batch_size: int) -> PyTree:
        return ()

    def step(
        params: PyTree, carry: PyTree, obs: Array, reset: Array
    ) -> tuple[PyTree, Distribution, Array]:
        return carry, *forward(params, obs)

    def unroll(
        params: PyTree, carry: PyTree, obs: Array, reset: Array
    ) -> tuple[Distribution, Array]:
        # One matrix product over all N rows: XLA's CPU back end is half as fast on the gradient of a [T, B, ...] one.
        outputs = forward(params, obs.reshape((-1, *obs.shape[2:])))
        return jax.tree.map(lambda x: x.reshape(obs.shape[:2] + x.shape[1:]), outputs)

    return Model(init, initial_carry, step, unroll)
