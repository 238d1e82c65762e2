"""Actor-critic networks: `Model`s with an encoder, a policy head and a value head."""

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
    """The network that the config describes.

    Equal arguments return the same object, so that policies share their compiled functions.
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
    """A feed-forward `Model` on the features of observations (`features_of`).

    Policy and value function have separate hidden layers unless ``shared_trunk`` is set. A shared
    trunk gets the gradients of both losses, and c1 weighs them (Schulman et al. 2017, eq. 9). Only
    the value function receives the observation part named ``critic_obs``. The part named
    ``action_mask`` is not a feature; it forbids actions.
    """
    trunk = MLP(hidden_sizes, activation)
    policy_head = PolicyHead(action_space, squash)
    value_head = ValueHead()
    critic_only = (critic_obs,) if critic_obs else ()

    def init(key: PRNGKey, obs: PyTree) -> PyTree:
        key_trunk, key_policy, key_value = jax.random.split(key, 3)
        features = features_of(obs, observation_space)
        policy_features = features_of(obs, observation_space, critic_only)
        if critic_only:
            key_policy_trunk, key_value_trunk = jax.random.split(key_trunk)
            policy_trunk_params = trunk.init(key_policy_trunk, policy_features)
            value_trunk_params = trunk.init(key_value_trunk, features)
        else:
            policy_trunk_params, value_trunk_params = init_trunks(key_trunk, features)
        policy_head_params = policy_head.init(
            key_policy, trunk.apply(policy_trunk_params, policy_features)
        )
        value_head_params = value_head.init(key_value, trunk.apply(value_trunk_params, features))
        if shared_trunk:
            return {
                "trunk": policy_trunk_params,
                "policy": {"head": policy_head_params},
                "value": {"head": value_head_params},
            }
        return {
            "policy": {"trunk": policy_trunk_params, "head": policy_head_params},
            "value": {"trunk": value_trunk_params, "head": value_head_params},
        }

    def init_trunks(key: PRNGKey, features: Array) -> tuple[PyTree, PyTree]:
        """The trunks of policy and value function; with ``shared_trunk`` the same trunk twice.

        A loop, not two calls: XLA needs half a second for each orthogonal matrix in a program.
        """
        keys = jax.random.split(key, 1 if shared_trunk else 2)
        _, trunks = scan_keys(lambda _, key: (None, trunk.init(key, features)), None, keys)
        return jax.tree.map(lambda x: x[0], trunks), jax.tree.map(lambda x: x[-1], trunks)

    def forward(params: PyTree, obs: PyTree) -> tuple[Distribution, Array]:
        features = features_of(obs, observation_space)
        mask = obs.get(ACTION_MASK) if isinstance(obs, dict) else None
        if shared_trunk:
            policy_hidden = value_hidden = trunk.apply(params["trunk"], features)
        else:
            policy_features = (
                features_of(obs, observation_space, critic_only) if critic_only else features
            )
            policy_hidden = trunk.apply(params["policy"]["trunk"], policy_features)
            value_hidden = trunk.apply(params["value"]["trunk"], features)
        distribution = policy_head.apply(params["policy"]["head"], policy_hidden, mask)
        return distribution, value_head.apply(params["value"]["head"], value_hidden)  # type: ignore

    return feed_forward(init, forward)


def feed_forward(
    init: Callable[[PRNGKey, PyTree], PyTree],
    forward: Callable[[PyTree, PyTree], tuple[Distribution, Array]],
) -> Model:
    """The memoryless `Model` with this ``forward(params, obs) -> (distribution, value)``."""

    def initial_carry(batch_size: int) -> PyTree:
        return ()

    def step(
        params: PyTree, carry: PyTree, obs: PyTree, reset: Array
    ) -> tuple[PyTree, Distribution, Array]:
        return carry, *forward(params, obs)

    def unroll(
        params: PyTree, carry: PyTree, obs: PyTree, reset: Array
    ) -> tuple[Distribution, Array]:
        # One matrix product on all T · B rows: on CPUs, XLA takes twice as long for the gradient of
        # a product on [T, B, ...].
        rows = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), obs)
        outputs = forward(params, rows)
        shape = jax.tree.leaves(obs)[0].shape[:2]
        return jax.tree.map(lambda x: x.reshape(shape + x.shape[1:]), outputs)

    return Model(init, initial_carry, step, unroll)
