"""Starting point of training: fresh parameters, or a trained policy and its normaliser."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.config import Config
from purejaxppo.normalize import Normalizer
from purejaxppo.trees import named_leaves
from purejaxppo.types import Box, ConfigError, Dict, Env, ObservationSpace, PyTree

# The fields of `Config` that determine the network.
NETWORK_FIELDS = ("network", "hidden_sizes", "activation", "shared_trunk", "critic_obs")


class Start(NamedTuple):
    """Starting point of a run of one agent."""

    params: PyTree
    normalizer: Normalizer | None  # None: parameters alone were given


def starting_point(given: Any) -> Start:
    """Parameters and normaliser from the argument ``params`` of `make_train` and `fit`.

    A `Policy`, a `TrainState` and any object with ``params`` and ``normalizer`` have a normaliser.
    Parameters alone have none.
    """
    if hasattr(given, "params") and hasattr(given, "normalizer"):
        return Start(given.params, given.normalizer)
    return Start(given, None)


def start_from(given: Any, fresh: Start, config: Config, env: Env, own_model: bool) -> Start:
    """The initial parameters and normaliser of a run that starts from ``given``.

    ``fresh`` has the shapes of the parameters and an empty normaliser. The moments of a given
    normaliser are kept. Without the observation moments the policy would see other inputs than in
    training. The return moments, which only a training state has, set the unit of its value
    function. Raises `ConfigError` if ``given`` does not match the configuration, the environment or
    the model.
    """
    agents = np.shape(getattr(given, "iteration", 0))
    if agents:
        raise ConfigError(
            f"this state holds {agents[0]} agents: "
            "start from one, Policy.from_state(config, state, index)"
        )
    if hasattr(given, "observation_space") and hasattr(given, "config"):
        _require_same_spaces_and_network(given, config, env, own_model)
    start = starting_point(given)
    _require_same_shapes(start.params, fresh.params)
    assert fresh.normalizer is not None
    if start.normalizer is None:
        return Start(start.params, fresh.normalizer)
    return Start(start.params, _with_moments_of(start.normalizer, fresh.normalizer))


def _with_moments_of(given: Normalizer, fresh: Normalizer) -> Normalizer:
    """The ``fresh`` normaliser with the given moments; its running returns stay at zero."""
    was_normalized = given.obs is not None
    if was_normalized != (fresh.obs is not None):
        had = "with" if was_normalized else "without"
        raise ConfigError(
            f"the policy to start from was trained {had} normalised observations: "
            f"set normalize_obs={was_normalized}, or give its parameters alone, "
            "for which normalisation starts anew"
        )
    obs = fresh.obs
    reward = fresh.reward
    if given.obs is not None:
        _require_same_shapes(given.obs, fresh.obs)
        obs = _with_dtypes_of(fresh.obs, given.obs)
    if given.reward is not None and reward is not None:
        reward = reward._replace(moments=_with_dtypes_of(reward.moments, given.reward.moments))
    return Normalizer(obs, reward)


def _with_dtypes_of(like: PyTree, given: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), given, like)


def _require_same_spaces_and_network(
    policy: Any, config: Config, env: Env, own_model: bool
) -> None:
    """Raise `ConfigError` if a policy was trained with other spaces or another network."""
    for kind in ("observation", "action"):
        before = getattr(policy, f"{kind}_space")
        now = getattr(env, f"{kind}_space")
        if _without_bounds(before) != _without_bounds(now):
            raise ConfigError(
                f"the policy to start from was trained in {policy.config.env}, "
                f"whose {kind}s are {before}, and those of {env.name} are {now}"
            )
    is_own = own_model or policy.has_own_model
    fields = ("squash_actions",) if is_own else (*NETWORK_FIELDS, "squash_actions")
    for name in fields:
        before = getattr(policy.config, name)
        now = getattr(config, name)
        if before != now:
            raise ConfigError(
                f"the policy to start from has {name} = {before!r}, "
                f"and this configuration has {now!r}"
            )


def _without_bounds(space: ObservationSpace) -> Any:
    """A space without the bounds of its boxes, which may differ."""
    if isinstance(space, Dict):
        return [(name, _without_bounds(part)) for name, part in space.spaces]
    return (Box, space.shape) if isinstance(space, Box) else space


def _require_same_shapes(given: PyTree, expected: PyTree) -> None:
    """Raise `ConfigError` unless the leaves have the expected names and shapes.

    Other parameters could not be loaded again.
    """
    shapes = {name: np.shape(x) for name, x in named_leaves(given).items()}
    needed = {name: np.shape(x) for name, x in named_leaves(expected).items()}
    for name in (*needed, *shapes):
        if name not in shapes:
            raise ConfigError(f"params do not fit the model: they lack {name!r}")
        if name not in needed:
            raise ConfigError(f"params do not fit the model: it has no {name!r}")
        if shapes[name] != needed[name]:
            raise ConfigError(
                f"params do not fit the model: {name!r} has the shape {shapes[name]}, "
                f"and the model needs {needed[name]}"
            )
