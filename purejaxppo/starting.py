"""Where training starts from: fresh parameters, or those of a trained policy with its normaliser."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.config import Config
from purejaxppo.normalize import Normalizer
from purejaxppo.trees import named_leaves
from purejaxppo.types import Box, ConfigError, Dict, Env, ObservationSpace, PyTree

NETWORK = (
    "network",
    "hidden_sizes",
    "activation",
    "shared_trunk",
    "critic_obs",
)  # which network it is


class Start(NamedTuple):
    """What a run of one agent starts from."""

    params: PyTree
    normalizer: Normalizer | None  # None: nothing is known of it, as of parameters alone


def starting_point(given: Any) -> Start:
    """The parameters and the normaliser of what `make_train` and `fit` take as ``params``.

    A `Policy`, a `TrainState` and whatever else has ``params`` and ``normalizer`` bring their
    normaliser along. Parameters alone have none.
    """
    if hasattr(given, "params") and hasattr(given, "normalizer"):
        return Start(given.params, given.normalizer)
    return Start(given, None)


def start_from(given: Any, fresh: Start, config: Config, env: Env, own_model: bool) -> Start:
    """Training's first parameters and normaliser, where they are given and not ``fresh``.

    ``fresh`` has the shapes of the parameters and an empty normaliser. Of a given normaliser the
    moments are kept: those of observations, without which the policy would see other inputs than it
    was trained on, and of a training state those of returns, in whose units its value function is.
    Raises `ConfigError` for what does not fit.
    """
    agents = np.shape(getattr(given, "iteration", 0))
    if agents:
        raise ConfigError(
            f"this state holds {agents[0]} agents: start from one, Policy.from_state(config, state, index)"
        )
    if hasattr(given, "observation_space") and hasattr(given, "config"):
        _require_same_use(given, config, env, own_model)
    start = starting_point(given)
    _require_fitting(start.params, fresh.params)
    assert fresh.normalizer is not None
    if start.normalizer is None:
        return Start(start.params, fresh.normalizer)
    return Start(start.params, _continued(start.normalizer, fresh.normalizer))


def _continued(given: Normalizer, fresh: Normalizer) -> Normalizer:
    """The given moments; the running returns are those of fresh episodes."""
    if (given.obs is None) != (fresh.obs is None):
        had, instead = ("without", "False") if given.obs is None else ("with", "True")
        raise ConfigError(
            f"the policy to start from was trained {had} normalised observations: set "
            f"normalize_obs={instead}, or give its parameters alone, for which normalisation starts anew"
        )
    obs = fresh.obs
    reward = fresh.reward
    if given.obs is not None:
        _require_fitting(given.obs, fresh.obs)
        obs = _in_precision_of(fresh.obs, given.obs)
    if given.reward is not None and reward is not None:
        reward = reward._replace(moments=_in_precision_of(reward.moments, given.reward.moments))
    return Normalizer(obs, reward)


def _in_precision_of(like: PyTree, given: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), given, like)


def _require_same_use(policy: Any, config: Config, env: Env, own_model: bool) -> None:
    """A policy goes on with the spaces and the network that it has."""
    for what in ("observation", "action"):
        before = getattr(policy, f"{what}_space")
        now = getattr(env, f"{what}_space")
        if _kind(before) != _kind(now):
            raise ConfigError(
                f"the policy to start from was trained in {policy.config.env}, whose {what}s are {before}, "
                f"and those of {env.name} are {now}"
            )
    is_own = own_model or policy.has_own_model
    fields = ("squash_actions",) if is_own else (*NETWORK, "squash_actions")
    for name in fields:
        before = getattr(policy.config, name)
        now = getattr(config, name)
        if before != now:
            told = f"{name} = {before!r}, and this configuration has {now!r}"
            raise ConfigError(f"the policy to start from has {told}")


def _kind(space: ObservationSpace) -> Any:
    """A space without the bounds of its boxes, which may differ."""
    if isinstance(space, Dict):
        return [(name, _kind(part)) for name, part in space.spaces]
    return (Box, space.shape) if isinstance(space, Box) else space


def _require_fitting(given: PyTree, expected: PyTree) -> None:
    """Parameters to start from need the names and shapes of the model's own, or they could not be loaded again."""
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
