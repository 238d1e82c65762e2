"""Policy × environments → transitions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from purejaxppo.envs.vector import where_rows
from purejaxppo.keys import scan_keys
from purejaxppo.networks.distributions import Categorical
from purejaxppo.normalize import (
    ObsMoments,
    merge_obs,
    normalize_obs,
    obs_moments_of,
    pooled_obs,
)
from purejaxppo.shards import join_shards, split_shards
from purejaxppo.types import (
    ConfigError,
    Discrete,
    Distribution,
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


class RolloutState(NamedTuple):
    """The state of a rollout between two steps."""

    env: VectorState
    carry: PyTree  # [B, ...] of the model
    # Carry and final observation [B, ...] of the last truncated episode of each environment; () if
    # they are not needed.
    truncated_successor: PyTree
    moments: ObsMoments | None  # of the raw observations so far
    first_episode_done: Bool[Array, "B"]  # false without whole episodes


def make_rollout(
    env: Env, vector_env: VectorEnv, model: Model, num_steps: int, whole_episodes: bool = False
) -> Rollout:
    """A function that plays ``num_steps`` steps in every environment under the policy:

        rollout(key, params, obs_moments, env_state, carry)
            -> (transitions, env_state, carry, rollout_moments)

    Observations are normalised with ``obs_moments``, which do not change. ``rollout_moments`` are
    the moments of the raw observations of the rollout; the caller merges them after the update.

    ``next_value[t]`` is the value of the true successor of step t. It equals value[t + 1] inside an
    episode; at a truncation it is the value of the final observation. At a termination it is
    arbitrary, and estimators must not use it. Two truncations of an environment are at least
    ``max_episode_steps`` steps apart, so a rollout of at most that length has at most one for each
    environment. The carry and the final observation there are stored, and evaluated once after the
    loop. In a longer rollout, or without a bound, every successor is evaluated.

    With ``whole_episodes`` every environment is reset first, and only its first episode counts.
    Later steps are played, but they are neither ``valid`` nor in the ``mask``, and no statistic
    includes them. Averages over the episodes that end within a fixed number of steps would
    over-represent short ones. There is no bootstrap at the end of the rollout, because every first
    episode has ended; the model is evaluated only at the final observation of truncated episodes.
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

        def step(state: RolloutState, keys: PRNGKey) -> tuple[RolloutState, Transition]:
            key_action, key_env = keys
            valid = ~state.first_episode_done
            obs = normalize_obs(obs_moments, state.env.obs)
            carry, distribution, value = model.step(params, state.carry, obs, state.env.reset)
            _require_same_actions(env, distribution)
            action = distribution.sample(key_action)
            env_state, timestep = vector_env.step(key_env, state.env, action)

            truncated = timestep.truncated & ~timestep.terminated
            successor = (carry, normalize_obs(obs_moments, timestep.obs))
            transition = Transition(
                obs=obs,
                action=action,
                log_prob=distribution.log_prob(action),
                value=value,
                next_value=value_of(*successor) if bootstrap_every_step else jnp.zeros_like(value),
                reward=timestep.reward,
                terminated=timestep.terminated,
                truncated=truncated,
                reset=state.env.reset,
                mask=jnp.asarray(timestep.mask) & valid,
                valid=valid,
            )
            first_episode_done = state.first_episode_done
            if whole_episodes:
                first_episode_done |= timestep.terminated | truncated
            truncated_successor = state.truncated_successor
            if at_most_one_truncation:
                truncated_successor = where_rows(truncated & valid, successor, truncated_successor)
            return RolloutState(
                env=env_state,
                carry=carry,
                truncated_successor=truncated_successor,
                moments=merged(state.moments, state.env.obs, valid),
                first_episode_done=first_episode_done,
            ), transition

        def value_of(carry: PyTree, obs: PyTree) -> Array:
            """The value of the successor of a step; the carry that follows it is not needed."""
            return model.step(params, carry, obs, no_reset)[2]

        def merged(moments: ObsMoments | None, obs: PyTree, valid: Array) -> ObsMoments | None:
            if moments is None:
                return None
            valid_rows = valid if whole_episodes else None
            return merge_obs(moments, obs_moments_of(moments, obs, valid_rows))

        def next_values(transitions: Transition, end: RolloutState) -> Array:
            """The values of the successors of all steps."""
            if whole_episodes:
                # The last step ended its episode or is not valid: its successor has no value.
                last_value = jnp.zeros_like(transitions.value[-1])
            else:
                last_obs = normalize_obs(obs_moments, end.env.obs)
                _, _, last_value = model.step(params, end.carry, last_obs, end.env.reset)
            next_value = jnp.concatenate([transitions.value[1:], last_value[None]])
            if not at_most_one_truncation:
                return next_value
            truncated_value = value_of(*end.truncated_successor)
            return jnp.where(transitions.truncated, truncated_value[None], next_value)

        first_obs = normalize_obs(obs_moments, env_state.obs)
        start = RolloutState(
            env=env_state,
            carry=carry,
            truncated_successor=(carry, first_obs) if at_most_one_truncation else (),
            moments=None if obs_moments is None else jax.tree.map(jnp.zeros_like, obs_moments),
            first_episode_done=no_reset,
        )
        end, transitions = scan_keys(step, start, jax.random.split(key_steps, (num_steps, 2)))
        if not bootstrap_every_step:
            transitions = transitions._replace(next_value=next_values(transitions, end))
        env_state = end.env
        if whole_episodes:
            env_state = env_state._replace(finished=_first_episodes(transitions))
        return transitions, env_state, end.carry, end.moments

    return rollout


def _require_same_actions(env: Env, distribution: Distribution) -> None:
    """Raise `ConfigError` for a model with another number of discrete actions."""
    if isinstance(env.action_space, Discrete) and isinstance(distribution, Categorical):
        given = distribution.logits.shape[-1]
        if given != env.action_space.n:
            raise ConfigError(
                f"the model has {given} actions, and {env.name} has {env.action_space.n}: "
                "make a model for as many"
            )


def reset_shards(
    vector_env: VectorEnv, key: PRNGKey, num_shards: int
) -> tuple[VectorState, PyTree]:
    """The initial state of the environments of all shards, and their observations [B, ...]."""
    if num_shards == 1:
        state = vector_env.reset(key)
        return state, state.obs
    state = jax.vmap(vector_env.reset)(jax.random.split(key, num_shards))
    return state, join_shards(state.obs)


def in_shards(rollout: Rollout, num_shards: int) -> Rollout:
    """``rollout`` in each of S shards, with the signature of one rollout of B environments.

    The states of the environments have a first axis S. The carry and the transitions have no such
    axis: there the shards are concatenated along B. The shards do not communicate before their
    moments are pooled at the end.
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
    """The sums over the first episodes, to which all valid steps belong."""
    done = (transitions.terminated | transitions.truncated) & transitions.valid
    in_finished_episode = transitions.valid & done.any(axis=0)[None]
    returns = jnp.where(in_finished_episode, transitions.reward, 0).sum()
    return EpisodeSums(
        returns, in_finished_episode.sum(dtype=returns.dtype), done.sum(dtype=jnp.int32)
    )
