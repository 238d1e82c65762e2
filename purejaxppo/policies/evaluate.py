"""How good a policy is: whole fresh episodes, apart from training and its keys."""

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

    returns: Float[Array, "n"]  # sum of the rewards of each episode, undiscounted
    lengths: Int[Array, "n"]  # steps of each episode


class _Episodes(NamedTuple):
    key: PRNGKey
    state: PyTree
    obs: Array
    carry: PyTree
    running: Bool[Array, "n"]
    statistics: EpisodeStatistics


def evaluate(
    policy: Policy,
    env: Env | None,
    key: PRNGKey,
    num_episodes: int,
    deterministic: bool = True,
    *,
    max_steps: int | None = None,
) -> EpisodeStatistics:
    """``num_episodes`` whole episodes of ``policy`` in ``env``, side by side.

    ``env=None`` is the environment that the policy was trained in, settings included; one of the
    caller's own that is not registered must be given. Deterministic takes the most probable action,
    else actions are sampled. The normaliser stays as training left it. An episode counts once and
    ends by termination or by the environment's time limit, so short episodes are not preferred.

    After ``max_steps`` steps the episodes that still run count as they stand: with the return so
    far and the length ``max_steps``. Where the environment has no bound on the length of an
    episode, ``max_steps`` is required, because a policy may never end one.

    It compiles itself, once for an environment, a configuration and a number of episodes, and can
    be used inside `jax.jit` and `jax.vmap`.
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
        first = now.statistics.lengths == 0
        carry, action = policy.step(
            now.carry, now.obs, first, None if deterministic else key_action
        )
        out = jax.vmap(env.step)(jax.random.split(key_env, num_episodes), now.state, action)
        returns = now.statistics.returns + jnp.where(now.running, out.reward, 0)
        lengths = now.statistics.lengths + now.running
        running = now.running & ~(out.terminated | out.truncated)
        if max_steps is not None:
            running &= lengths < max_steps
        return _Episodes(
            key_next, out.state, out.obs, carry, running, EpisodeStatistics(returns, lengths)
        )

    key_reset, key_run = jax.random.split(key)
    state, obs = fresh_starts(env, key_reset, num_episodes)
    nothing = EpisodeStatistics(
        jnp.zeros(num_episodes, jnp.result_type(float)), jnp.zeros(num_episodes, jnp.int32)
    )
    start = _Episodes(
        key_run,
        state,
        obs,
        policy.initial_carry(num_episodes),
        jnp.ones(num_episodes, bool),
        nothing,
    )
    return jax.lax.while_loop(lambda now: now.running.any(), step, start).statistics
