"""Evaluation of a policy on fresh, complete episodes, with keys independent of training."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import purejaxppo.envs as envs
from purejaxppo.envs.consistency import require_consistent
from purejaxppo.envs.vector import fresh_starts
from purejaxppo.policies.policy import Policy
from purejaxppo.types import ConfigError, Env, PRNGKey, PyTree
from purejaxppo.validation import integer


class EpisodeStatistics(NamedTuple):
    """One entry for each of n episodes."""

    returns: Float[Array, "n"]  # undiscounted sum of the rewards of an episode
    lengths: Int[Array, "n"]  # steps of an episode


class _Episodes(NamedTuple):
    key: PRNGKey
    state: PyTree  # [n, ...] states of the environments
    obs: Array  # [n, ...]
    carry: PyTree  # [n, ...] memory of the policy
    running: Bool[Array, "n"]  # the episode has not ended
    statistics: EpisodeStatistics  # so far


def evaluate(
    policy: Policy,
    env: Env | None,
    key: PRNGKey,
    num_episodes: int,
    deterministic: bool = True,
    *,
    max_steps: int | None = None,
) -> EpisodeStatistics:
    """Play ``num_episodes`` complete episodes of ``policy`` in ``env``, in parallel.

    ``env=None`` means the environment and settings of training; an environment that is not
    registered must be passed. ``deterministic`` takes the mode of the action distribution,
    otherwise actions are sampled. The normaliser stays fixed. Each of the ``num_episodes``
    environments plays one episode, until termination or truncation, so the statistics are not
    biased towards short episodes.

    ``max_steps`` cuts off episodes that are still running after ``max_steps`` steps: they count
    with their return so far and this length. It is required if the environment has no time limit,
    because an episode may then never end.

    The function is compiled once for each environment, configuration and number of episodes, and
    works inside `jax.jit` and `jax.vmap`. Raises `ConfigError` for invalid numbers, and for an
    environment whose spaces are not those of the policy.
    """
    if num_episodes < 1:
        raise ConfigError(f"num_episodes = {num_episodes}: it must be an integer of at least 1")
    if max_steps is not None:
        integer("max_steps", max_steps, 1, bits=31)
    env = envs.of_config(policy.config) if env is None else env
    require_consistent(env)
    if (env.observation_space, env.action_space) != (policy.observation_space, policy.action_space):
        raise ConfigError(
            f"this policy was trained in {policy.config.env}, and {env.name} has other spaces"
        )
    if env.max_episode_steps is None and max_steps is None:
        raise ConfigError(
            f"{env.name} has no bound on the length of an episode, and a policy may never end one: "
            "say by max_steps after how many steps an episode counts as it stands"
        )
    return _evaluate(policy, env, key, num_episodes, deterministic, max_steps)


@partial(jax.jit, static_argnames=("env", "num_episodes", "deterministic"))
def _evaluate(
    policy: Policy,
    env: Env,
    key: PRNGKey,
    num_episodes: int,
    deterministic: bool,
    max_steps: int | Array | None,
) -> EpisodeStatistics:
    def step(now: _Episodes) -> _Episodes:
        key_action, key_env, key_next = jax.random.split(now.key, 3)
        reset = now.statistics.lengths == 0
        carry, action = policy.step(
            now.carry, now.obs, reset, None if deterministic else key_action
        )
        timestep = jax.vmap(env.step)(jax.random.split(key_env, num_episodes), now.state, action)
        returns = now.statistics.returns + jnp.where(now.running, timestep.reward, 0)
        lengths = now.statistics.lengths + now.running
        running = now.running & ~(timestep.terminated | timestep.truncated)
        if max_steps is not None:
            running &= lengths < max_steps
        return _Episodes(
            key=key_next,
            state=timestep.state,
            obs=timestep.obs,
            carry=carry,
            running=running,
            statistics=EpisodeStatistics(returns, lengths),
        )

    key_reset, key_run = jax.random.split(key)
    state, obs = fresh_starts(env, key_reset, num_episodes)
    zeros = EpisodeStatistics(
        jnp.zeros(num_episodes, jnp.result_type(float)), jnp.zeros(num_episodes, jnp.int32)
    )
    start = _Episodes(
        key=key_run,
        state=state,
        obs=obs,
        carry=policy.initial_carry(num_episodes),
        running=jnp.ones(num_episodes, bool),
        statistics=zeros,
    )
    return jax.lax.while_loop(lambda now: now.running.any(), step, start).statistics
