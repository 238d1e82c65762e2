"""B environments at once, with one auto-reset for every suite."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from purejaxppo.types import Box, Env, EpisodeSums, PRNGKey, PyTree, Step, VectorEnv, VectorState

SMALLEST_POOL = 64


def vectorize(env: Env, num_envs: int) -> VectorEnv:
    """``num_envs`` copies of ``env`` that start again by themselves.

    Fresh starts come from a pool that ``refill`` draws once per rollout, because resetting every environment at every
    step only to throw nearly all of it away costs more than the steps themselves. A step offers its environments
    ``num_envs`` consecutive rows of the pool, and the next step's rows begin as many further on as episodes ended: so
    environments that finish together start differently, and one that finishes twice starts differently again. The
    `Step` that comes back is from before the reset: its ``obs`` is the final observation of an episode that ended.
    """
    B, pool_size = num_envs, max(num_envs, SMALLEST_POOL)

    def reset(key: PRNGKey) -> VectorState:
        pool = fresh_starts(env, key, pool_size)  # a rollout draws another one before any of it is used again
        states, obs = jax.tree.map(lambda x: x[:B], pool)
        return VectorState(
            env=states,
            obs=obs,
            reset=jnp.ones(B, bool),
            pool=pool,
            pool_row=jnp.zeros((), jnp.int32),
            episode_return=jnp.zeros(B, jnp.result_type(float)),
            episode_length=jnp.zeros(B, jnp.int32),
            finished=_nothing_finished(),
        )

    def refill(key: PRNGKey, state: VectorState) -> VectorState:
        return state._replace(pool=fresh_starts(env, key, pool_size), finished=_nothing_finished())

    def step(key: PRNGKey, state: VectorState, action: Array) -> tuple[VectorState, Step]:
        out = jax.vmap(env.step)(jax.random.split(key, B), state.env, action)
        reward = jnp.asarray(out.reward, jnp.result_type(float))
        out = out._replace(reward=reward, mask=jnp.broadcast_to(out.mask, (B,)))
        done = out.terminated | out.truncated

        rows = (state.pool_row + jnp.arange(B)) % pool_size
        starts = jax.tree.map(lambda x: x[rows], state.pool)
        states, obs = jax.tree.map(
            lambda new, old: jnp.where(done.reshape((B,) + (1,) * (old.ndim - 1)), new, old),
            starts,
            (out.state, out.obs),
        )

        ended = done.sum(dtype=jnp.int32)
        episode_return, episode_length = state.episode_return + reward, state.episode_length + 1
        finished = EpisodeSums(
            returns=state.finished.returns + jnp.where(done, episode_return, 0).sum(),
            lengths=state.finished.lengths + jnp.where(done, episode_length, 0).sum(),
            episodes=state.finished.episodes + ended,
        )
        return VectorState(
            env=states,
            obs=obs,
            reset=done,
            pool=state.pool,
            pool_row=(state.pool_row + ended) % pool_size,
            episode_return=jnp.where(done, 0, episode_return),
            episode_length=jnp.where(done, 0, episode_length),
            finished=finished,
        ), out

    return VectorEnv(reset, refill, step)


def _nothing_finished() -> EpisodeSums:
    zero = jnp.zeros((), jnp.result_type(float))
    return EpisodeSums(zero, zero, jnp.zeros((), jnp.int32))


def fresh_starts(env: Env, key: PRNGKey, count: int) -> tuple[PyTree, Array]:
    """``count`` initial (state, obs), in the types that a step has: a loop over steps needs them to be the same."""
    states, obs = jax.vmap(env.reset)(jax.random.split(key, count))
    state = jax.tree.map(lambda x: x[0], states)
    dtype = jnp.result_type(float) if isinstance(env.action_space, Box) else jnp.int32
    action = jax.ShapeDtypeStruct(env.action_space.shape, dtype)
    out = jax.eval_shape(env.step, key, state, action)
    return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), (states, obs), (out.state, out.obs))
