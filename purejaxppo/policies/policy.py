"""A trained policy: taken out of a run, used, saved and loaded without running code from the file."""

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
from purejaxppo.envs.wrappers import into_box, into_features
from purejaxppo.networks.actor_critic import make_model
from purejaxppo.normalize import Moments, Normalizer, normalize_obs
from purejaxppo.types import Box, ConfigError, Env, Model, PRNGKey, PyTree, Space, Trained


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """From the environment's own observations to its own actions, normalisation and bounds included.

    One observation or any batch of them: the batch axes come before ``observation_space.shape``. It is a pytree of its
    parameters, so it can be used inside `jax.jit` and `jax.vmap` and passed through them. ``flatten`` says that the
    model sees observations as one vector.
    """

    config: Config
    params: PyTree
    obs_moments: Moments | None
    model: Model = _static()
    observation_space: Space = _static()
    action_space: Space = _static()
    flatten: bool = _static()

    @classmethod
    def from_state(
        cls,
        config: Config,
        state: Trained,
        index: int | None = None,
        env: Env | None = None,
        model: Model | None = None,
    ) -> "Policy":
        """The policy of a training state; of a vmapped one, that of agent ``index``, which is then required."""
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
        params, moments = state.params, state.normalizer.obs
        if index is not None:
            params, moments = jax.tree.map(lambda x: x[index], (params, moments))
        flatten = model is None
        model = make_model(config, env.action_space) if model is None else model
        return cls(config, params, moments, model, env.observation_space, env.action_space, flatten)

    @property
    def normalizer(self) -> Normalizer:
        """What a run that starts from this policy goes on with, as a training state has it."""
        return Normalizer(self.obs_moments, None)

    def initial_carry(self, batch_size: int) -> PyTree:
        """The memory at the start of ``batch_size`` episodes; empty for a policy without memory."""
        return self.model.initial_carry(batch_size)

    def step(
        self, carry: PyTree, obs: ArrayLike, reset: ArrayLike, key: PRNGKey | None = None
    ) -> tuple[PyTree, Array]:
        """``(carry, action)`` for a batch obs [B, ...], reset [B] (memory is cleared first): the mode, or with a key a
        sample."""
        obs, reset = jnp.asarray(obs), jnp.asarray(reset)
        return _step(
            self.params,
            self.obs_moments,
            carry,
            obs,
            reset,
            key,
            model=self.model,
            observation_space=self.observation_space,
            action_space=self.action_space,
            flatten=self.flatten,
            squash=self.config.squash_actions,
        )

    def act(self, obs: ArrayLike, key: PRNGKey | None = None) -> Array:
        """The action for one observation or a batch of them: the mode, or with a key a sample.

        A policy with memory needs `step`.
        """
        if jax.tree.leaves(self.initial_carry(1)):
            raise ConfigError("this policy has a memory: use policy.step(carry, obs, reset, key)")
        obs, shape = jnp.asarray(obs), self.observation_space.shape
        batch = obs.shape[: obs.ndim - len(shape)]
        if obs.shape[len(batch) :] != shape:
            raise ConfigError(
                f"an observation has shape {shape} after any batch axes; this one has {obs.shape}"
            )
        rows = obs.reshape((math.prod(batch), *shape))
        _, action = self.step((), rows, jnp.zeros(rows.shape[0], bool), key)
        return action.reshape(batch + action.shape[1:])


@partial(
    jax.jit, static_argnames=("model", "observation_space", "action_space", "flatten", "squash")
)
def _step(
    params: PyTree,
    moments: Moments | None,
    carry: PyTree,
    obs: Array,
    reset: Array,
    key: PRNGKey | None,
    *,
    model: Model,
    observation_space: Space,
    action_space: Space,
    flatten: bool,
    squash: bool,
) -> tuple[PyTree, Array]:
    """A function of the module, so that policies that differ in their numbers only share one program."""
    obs = into_features(obs, observation_space) if flatten else obs
    carry, distribution, _ = model.step(params, carry, normalize_obs(moments, obs), reset)
    action = distribution.mode() if key is None else distribution.sample(key)
    return carry, into_box(action, action_space, squash) if isinstance(
        action_space, Box
    ) else action


# ------------------------------------------------------------------------------------------ files
