"""Actor-critic networks: `Model`s made of an encoder and two heads."""

from collections.abc import Callable
from functools import cache

import jax
from jaxtyping import Array

from purejaxppo.config import Config
from purejaxppo.keys import scan_keys
from purejaxppo.networks.encoders import MLP, features_of
from purejaxppo.networks.heads import PolicyHead, ValueHead
from purejaxppo.types import (
    ACTION_MASK,
    Distribution,
    Model,
    ObservationSpace,
    PRNGKey,
    PyTree,
    Space,
)


def make_model(config: Config, observation_space: ObservationSpace, action_space: Space) -> Model:
    """The network that the config names.

    Asked twice it is the same object, so that what was compiled for one policy serves the next.
    """
    return mlp_actor_critic(
        observation_space,
        action_space,
        hidden_sizes=tuple(config.hidden_sizes),
        activation=config.activation,
        shared_trunk=config.shared_trunk,
        squash=config.squash_actions,
        critic_obs=config.critic_obs,
    )


@cache
def mlp_actor_critic(
    observation_space: ObservationSpace,
    action_space: Space,
    *,
    hidden_sizes: tuple[int, ...] = (64, 64),
    activation: str = "tanh",
    shared_trunk: bool = False,
    squash: bool = False,
    critic_obs: str = "",
) -> Model:
    """A feed-forward `Model` over the features of observations (`features_of`).

    Policy and value have hidden layers of their own, or one ``trunk`` where ``shared_trunk`` is set.
    The two losses then meet in it, and c1 weighs them (Schulman et al. 2017, eq. 9). The part of the
    observation named ``critic_obs`` is a feature of the value function only. The part named
    ``action_mask`` is none; it forbids actions.
    """
    trunk = MLP(hidden_sizes, activation)
    policy = PolicyHead(action_space, squash)
    value = ValueHead()
    unseen = (critic_obs,) if critic_obs else ()

    def init(key: PRNGKey, obs: PyTree) -> PyTree:
        key_trunk, key_policy, key_value = jax.random.split(key, 3)
        features = features_of(obs, observation_space)
        seen = features_of(obs, observation_space, unseen)
        if unseen:
            key_policy_trunk, key_value_trunk = jax.random.split(key_trunk)
            policy_trunk = trunk.init(key_policy_trunk, seen)
            value_trunk = trunk.init(key_value_trunk, features)
        else:
            policy_trunk, value_trunk = init_trunks(key_trunk, features)
        policy_head = policy.init(key_policy, trunk.apply(policy_trunk, seen))
        value_head = value.init(key_value, trunk.apply(value_trunk, features))
        if shared_trunk:
            return {
                "trunk": policy_trunk,
                "policy": {"head": policy_head},
                "value": {"head": value_head},
            }
        return {
            "policy": {"trunk": policy_trunk, "head": policy_head},
            "value": {"trunk": value_trunk, "head": value_head},
        }

    def init_trunks(key: PRNGKey, features: Array) -> tuple[PyTree, PyTree]:
        """Those of policy and value, or one trunk twice.

        A loop, not two calls: XLA takes half a second for every orthogonal matrix in a program.
        """
        keys = jax.random.split(key, 1 if shared_trunk else 2)
        _, trunks = scan_keys(lambda _, key: (None, trunk.init(key, features)), None, keys)
        return jax.tree.map(lambda x: x[0], trunks), jax.tree.map(lambda x: x[-1], trunks)

    def forward(params: PyTree, obs: PyTree) -> tuple[Distribution, Array]:
        features = features_of(obs, observation_space)
        mask = obs.get(ACTION_MASK) if isinstance(obs, dict) else None
        if shared_trunk:
            for_policy = for_value = trunk.apply(params["trunk"], features)
        else:
            seen = features_of(obs, observation_space, unseen) if unseen else features
            for_policy = trunk.apply(params["policy"]["trunk"], seen)
            for_value = trunk.apply(params["value"]["trunk"], features)
        distribution = policy.apply(params["policy"]["head"], for_policy, mask)
        return distribution, value.apply(params["value"]["head"], for_value)  # type: ignore

    return feed_forward(init, forward)


def feed_forward(
    init: Callable[[PRNGKey, PyTree], PyTree],
    forward: Callable[[PyTree, PyTree], tuple[Distribution, Array]],
) -> Model:
    """The `Model` of a network without memory, from ``forward(params, obs) -> (distribution, value)``."""

    def initial_carry(batch_size: int) -> PyTree:
        return ()

    def step(
        params: PyTree, carry: PyTree, obs: PyTree, reset: Array
    ) -> tuple[PyTree, Distribution, Array]:
        return carry, *forward(params, obs)

    def unroll(
        params: PyTree, carry: PyTree, obs: PyTree, reset: Array
    ) -> tuple[Distribution, Array]:
        # One matrix product over all N rows: XLA's CPU back end is half as fast on the gradient of a [T, B, ...] one.
        rows = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), obs)
        outputs = forward(params, rows)
        shape = jax.tree.leaves(obs)[0].shape[:2]
        return jax.tree.map(lambda x: x.reshape(shape + x.shape[1:]), outputs)

    return Model(init, initial_carry, step, unroll)
