"""`Policy`: the trained policy of a run, from observations to actions."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

import purejaxppo.envs as envs
from purejaxppo.config import Config
from purejaxppo.envs.wrappers import into_box
from purejaxppo.networks.actor_critic import make_model
from purejaxppo.networks.temperature import tempered
from purejaxppo.normalize import Normalizer, ObsMoments, normalize_obs
from purejaxppo.types import (
    Box,
    ConfigError,
    Dict,
    Env,
    Model,
    ObservationSpace,
    PRNGKey,
    PyTree,
    Space,
    Trained,
)


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """Maps raw observations to actions of the environment, with normalisation and action bounds.

    Any batch axes come before ``observation_space.shape``. A policy is a pytree, so it can be used
    inside `jax.jit` and `jax.vmap` and passed through them.
    """

    config: Config
    params: PyTree
    obs_moments: ObsMoments | None  # None without observation normalisation
    model: Model = _static()
    observation_space: ObservationSpace = _static()
    action_space: Space = _static()

    @classmethod
    def from_state(
        cls,
        config: Config,
        state: Trained,
        index: int | None = None,
        env: Env | None = None,
        model: Model | None = None,
    ) -> "Policy":
        """The policy of a training state; a vmapped state requires the ``index`` of an agent.

        ``env`` and ``model`` must be passed if training used custom ones. Raises `ConfigError` for
        an ``index`` that is missing, superfluous or out of range.
        """
        env = envs.of_config(config) if env is None else env
        config = dataclasses.replace(config, env=env.name, env_settings=env.settings)
        agents = np.shape(state.iteration)
        if agents and index is None:
            raise ConfigError(
                f"this state holds {agents[0]} agents: say which one by index=0 … {agents[0] - 1}"
            )
        if index is not None and not agents:
            raise ConfigError("this state holds one agent: leave index out")
        if index is not None and not 0 <= index < agents[0]:
            raise ConfigError(
                f"index = {index}: this state holds {agents[0]} agents, 0 … {agents[0] - 1}"
            )
        params = state.params
        moments = state.normalizer.obs
        if index is not None:
            params, moments = jax.tree.map(lambda x: x[index], (params, moments))
        if model is None:
            model = make_model(config, env.observation_space, env.action_space)
        return cls(
            config=config,
            params=params,
            obs_moments=moments,
            model=model,
            observation_space=env.observation_space,
            action_space=env.action_space,
        )

    @property
    def has_own_model(self) -> bool:
        """Whether the model was given by the caller, and is not the one that the config names."""
        return self.model is not make_model(self.config, self.observation_space, self.action_space)

    @property
    def normalizer(self) -> Normalizer:
        """The normaliser of a run that starts from this policy."""
        return Normalizer(self.obs_moments, None)

    def initial_carry(self, batch_size: int) -> PyTree:
        """The memory at the start of ``batch_size`` episodes; empty for a policy without any."""
        return self.model.initial_carry(batch_size)

    def step(
        self, carry: PyTree, obs: PyTree, reset: ArrayLike, key: PRNGKey | None = None
    ) -> tuple[PyTree, Array]:
        """``(carry, action)`` for a batch: the mode of the distribution, or with ``key`` a sample.

        ``carry`` is the memory and ``obs`` is [B, ...]; where ``reset`` [B] is true, the memory is
        cleared first.
        """
        return _step(
            self.params,
            self.obs_moments,
            carry,
            jax.tree.map(jnp.asarray, obs),
            jnp.asarray(reset),
            key,
            model=self.model,
            action_space=self.action_space,
            squash=self.config.squash_actions,
            temperature=self.config.temperature,
        )

    def act(self, obs: PyTree, key: PRNGKey | None = None) -> Array:
        """The action for an observation, or a batch: the mode, or with ``key`` a sample.

        Raises `ConfigError` for a policy with memory, which needs `step`, and for a wrong shape.
        """
        if jax.tree.leaves(self.initial_carry(1)):
            raise ConfigError("this policy has a memory: use policy.step(carry, obs, reset, key)")
        batch, rows = _as_rows(self.observation_space, obs)
        _, action = self.step((), rows, jnp.zeros(math.prod(batch), bool), key)
        return action.reshape(batch + action.shape[1:])


def _as_rows(space: ObservationSpace, obs: PyTree) -> tuple[tuple[int, ...], PyTree]:
    """The batch axes of observations, and the observations with one axis in their place."""
    if isinstance(space, Dict):
        names = [name for name, _ in space.spaces]
        if not isinstance(obs, dict) or sorted(obs) != names:
            kind = f"a dict of {', '.join(names)}"
            raise ConfigError(f"an observation is {kind}; this one is a {type(obs).__name__}")
        pairs = {name: _as_rows(part, obs[name]) for name, part in space.spaces}
        batches = {name: batch for name, (batch, _) in pairs.items()}
        if len(set(batches.values())) > 1:
            raise ConfigError(f"the parts of the observation have other batch axes: {batches}")
        return batches[names[0]], {name: rows for name, (_, rows) in pairs.items()}
    obs = jnp.asarray(obs)
    batch = obs.shape[: obs.ndim - len(space.shape)]
    if obs.shape[len(batch) :] != space.shape:
        raise ConfigError(
            f"an observation has shape {space.shape} after any batch axes; this one has {obs.shape}"
        )
    return batch, obs.reshape((math.prod(batch), *space.shape))


@partial(jax.jit, static_argnames=("model", "action_space", "squash"))
def _step(
    params: PyTree,
    moments: ObsMoments | None,
    carry: PyTree,
    obs: PyTree,
    reset: Array,
    key: PRNGKey | None,
    *,
    model: Model,
    action_space: Space,
    squash: bool,
    temperature: ArrayLike,
) -> tuple[PyTree, Array]:
    """`Policy.step` with the fields of the policy as arguments.

    It is at module level, so that policies that differ only in their arrays share one compilation.
    """
    carry, distribution, _ = model.step(params, carry, normalize_obs(moments, obs), reset)
    distribution = tempered(distribution, temperature)
    action = distribution.mode() if key is None else distribution.sample(key)
    if isinstance(action_space, Box):
        action = into_box(action, action_space, squash)
    return carry, action
