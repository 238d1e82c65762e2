"""Policy × environments → transitions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from purejaxppo.envs.vector import where_rows
from purejaxppo.keys import scan_keys
from purejaxppo.normalize import (
    ObsMoments,
    merge_obs,
    normalize_obs,
    obs_moments_of,
    pooled_obs,
)
from purejaxppo.shards import join_shards, split_shards
from purejaxppo.types import (
    Env,
    EpisodeSums,
    Model,
    PRNGKey,
    PyTree,
    Transition,
    VectorEnv,
    VectorState,
)

Rollout = Callable[
    [PRNGKey, PyTree, ObsMoments | None, VectorState, PyTree],
    tuple[Transition, VectorState, PyTree, ObsMoments | None],
]


def make_rollout(
    env: Env, vector_env: VectorEnv, model: Model, num_steps: int, whole_episodes: bool = False
) -> Rollout:
    """A function that plays ``num_steps`` steps in every environment under the policy:

        rollout(key, params, obs_moments, env_state, carry)
            -> (transitions, env_state, carry, rollout_moments)

    Observations are normalised with ``obs_moments``, which do not change. ``rollout_moments`` are the
    moments of the raw observations of the rollout; the caller merges them after the update.

    ``next_value[t]`` is the value of the true successor of step t. It equals value[t + 1], except
    where the episode was truncated. Truncations are ``max_episode_steps`` apart, so a rollout that
    is no longer than that has at most one per environment: its carry and final observation are
    stored and evaluated once. In a longer rollout, or without a bound, every successor is evaluated.

    With ``whole_episodes`` every environment is reset first, and only its first episode counts: later
    steps are played, but they are neither ``valid`` nor in the ``mask``, and no statistic includes
    them. The episodes that happen to end within a window are mostly short, and an average over them
    would be biased. After the last step the model is evaluated only at a truncation.
    """
    bound = env.max_episode_steps
    at_most_one_truncation = (
        env.truncates and bound is not None and (whole_episodes or num_steps <= bound)
    )
    bootstrap_every_step = env.truncates and not at_most_one_truncation

    def rollout(
        key: PRNGKey,
        params: PyTree,
        obs_moments: ObsMoments | None,
        env_state: VectorState,
        carry: PyTree,
    ) -> tuple[Transition, VectorState, PyTree, ObsMoments | None]:
        key_reset, key_steps = jax.random.split(key)
        if whole_episodes:
            env_state = vector_env.reset(key_reset)
            carry = model.initial_carry(env_state.reset.shape[0])
        else:
            env_state = vector_env.begin_rollout(env_state)
        no_reset = jnp.zeros_like(env_state.reset)

        def step(loop: tuple, keys: PRNGKey) -> tuple[tuple, Transition]:
            env_state, carry, truncated_successor, rollout_moments, first_episode_done = loop
            valid = ~first_episode_done
            key_action, key_env = keys
            obs = normalize_obs(obs_moments, env_state.obs)
            carry, distribution, value = model.step(params, carry, obs, env_state.reset)
            action = distribution.sample(key_action)
            next_env_state, timestep = vector_env.step(key_env, env_state, action)

            truncated = timestep.truncated & ~timestep.terminated
            next_value = jnp.zeros_like(value)
            successor = (carry, normalize_obs(obs_moments, timestep.obs))
            if bootstrap_every_step:
                _, _, next_value = model.step(params, *successor, no_reset)
            if at_most_one_truncation:
                truncated_successor = where_rows(truncated & valid, successor, truncated_successor)
            if rollout_moments is not None:
                counted = valid if whole_episodes else None
                met = obs_moments_of(rollout_moments, env_state.obs, counted)
                rollout_moments = merge_obs(rollout_moments, met)
            if whole_episodes:
                first_episode_done |= timestep.terminated | truncated

            transition = Transition(
                obs=obs,
                action=action,
                log_prob=distribution.log_prob(action),
                value=value,
                next_value=next_value,
                reward=timestep.reward,
                terminated=timestep.terminated,
                truncated=truncated,
                reset=env_state.reset,
                mask=jnp.asarray(timestep.mask) & valid,
                valid=valid,
            )
            return (
                next_env_state,
                carry,
                truncated_successor,
                rollout_moments,
                first_episode_done,
            ), transition

        truncated_successor = (
            (carry, normalize_obs(obs_moments, env_state.obs)) if at_most_one_truncation else ()
        )
        keys = jax.random.split(key_steps, (num_steps, 2))
        rollout_moments = None if obs_moments is None else jax.tree.map(jnp.zeros_like, obs_moments)
        start = (env_state, carry, truncated_successor, rollout_moments, no_reset)
        (env_state, carry, truncated_successor, rollout_moments, _), transitions = scan_keys(
            step, start, keys
        )
        if whole_episodes:
            env_state = env_state._replace(finished=_first_episodes(transitions))
        if bootstrap_every_step:
            return transitions, env_state, carry, rollout_moments

        # These two evaluations return a carry too, which is dropped: the next rollout continues
        # from `carry`.
        if whole_episodes:
            # The last step ended its episode or is not valid, so its successor has no value.
            last_value = jnp.zeros_like(transitions.value[-1])
        else:
            last_obs = normalize_obs(obs_moments, env_state.obs)
            _, _, last_value = model.step(params, carry, last_obs, env_state.reset)
        next_value = jnp.concatenate([transitions.value[1:], last_value[None]])
        if at_most_one_truncation:
            _, _, truncated_value = model.step(params, *truncated_successor, no_reset)
            next_value = jnp.where(transitions.truncated, truncated_value[None], next_value)
        return transitions._replace(next_value=next_value), env_state, carry, rollout_moments

    return rollout


def reset_shards(
    vector_env: VectorEnv, key: PRNGKey, num_shards: int
) -> tuple[VectorState, PyTree]:
    """The environments of all shards at their first observations, and these as [B, ...]."""
    if num_shards == 1:
        state = vector_env.reset(key)
        return state, state.obs
    state = jax.vmap(vector_env.reset)(jax.random.split(key, num_shards))
    return state, join_shards(state.obs)


def in_shards(rollout: Rollout, num_shards: int) -> Rollout:
    """The same rollout in each of S shards, as if it were one of B environments.

    Environments and keys have S in front, the model's memory and the transitions do not: there the shards stand one
    after the other along B. No shard needs anything from another one before the statistics are pooled at the end.
    """
    if num_shards == 1:
        return rollout

    def sharded_rollout(
        key: PRNGKey,
        params: PyTree,
        obs_moments: ObsMoments | None,
        env_state: VectorState,
        carry: PyTree,
    ) -> tuple[Transition, VectorState, PyTree, ObsMoments | None]:
        vmapped_rollout = jax.vmap(rollout, in_axes=(0, None, None, 0, 0), out_axes=(1, 0, 0, 0))
        transitions, env_state, carry, rollout_moments = vmapped_rollout(
            jax.random.split(key, num_shards),
            params,
            obs_moments,
            env_state,
            split_shards(carry, num_shards),
        )
        rollout_moments = None if rollout_moments is None else pooled_obs(rollout_moments)
        return join_shards(transitions, axis=1), env_state, join_shards(carry), rollout_moments

    return sharded_rollout


def _first_episodes(transitions: Transition) -> EpisodeSums:
    """The sums over the first episode of every row: no valid step comes after its end."""
    done = (transitions.terminated | transitions.truncated) & transitions.valid
    played = transitions.valid & done.any(axis=0)[None]
    returns = jnp.where(played, transitions.reward, 0).sum()
    return EpisodeSums(returns, played.sum(dtype=returns.dtype), done.sum(dtype=jnp.int32))
