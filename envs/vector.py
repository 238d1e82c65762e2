"""B environments in parallel, with one auto-reset for every suite."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from purejaxppo.types import Box, Env, EpisodeSums, PRNGKey, PyTree, Step, VectorEnv, VectorState

# In a typical step of CartPole 1 of 32 episodes ends: one pass of `restart` then resets them all.
SHARE_AT_ONCE = 32


def vectorize(
    env: Env, num_envs: int, at_once: int | None = None, group_size: int = 1
) -> VectorEnv:
    """``num_envs`` copies of ``env`` with auto-reset.

    Every step has a fresh random key for each environment. If an episode ends in the step, the next
    one begins at ``env.reset`` of that key, so initial states are independent draws whatever the
    lengths and the order of the episodes. Resetting all environments at every step would give the
    same episodes but discard nearly all resets. Therefore only the environments whose episode ended
    are reset, ``at_once`` of them at a time (`restart`).

    After ``reset`` each start is shared by ``group_size`` consecutive environments. ``step``
    returns the `Step` before the reset: ``obs`` is the final observation of an episode that ended.
    """
    B = num_envs
    at_once = max(1, B // SHARE_AT_ONCE) if at_once is None else at_once

    def reset(key: PRNGKey) -> VectorState:
        starts = fresh_starts(env, key, B // group_size)
        group = jnp.arange(B) // group_size
        states, obs = starts if group_size == 1 else jax.tree.map(lambda x: x[group], starts)
        return VectorState(
            env=states,
            obs=obs,
            reset=jnp.ones(B, bool),
            episode_return=jnp.zeros(B, jnp.result_type(float)),
            episode_length=jnp.zeros(B, jnp.int32),
            finished=_nothing_finished(),
        )

    def begin_rollout(state: VectorState) -> VectorState:
        return state._replace(finished=_nothing_finished())

    def step(key: PRNGKey, state: VectorState, action: Array) -> tuple[VectorState, Step]:
        keys = jax.random.split(key, B + 1)  # one for each environment, and one for all resets
        timestep = jax.vmap(env.step)(keys[:B], state.env, action)
        reward = jnp.asarray(timestep.reward, jnp.result_type(float))
        timestep = timestep._replace(reward=reward, mask=jnp.broadcast_to(timestep.mask, (B,)))
        done = timestep.terminated | timestep.truncated
        draw = _reset_with_dtypes_of_step(env)
        states, obs = restart(draw, keys[B], done, (timestep.state, timestep.obs), at_once)

        episode_return = state.episode_return + reward
        episode_length = state.episode_length + 1
        finished = EpisodeSums(
            returns=state.finished.returns + jnp.where(done, episode_return, 0).sum(),
            lengths=state.finished.lengths + jnp.where(done, episode_length, 0).sum(),
            episodes=state.finished.episodes + done.sum(dtype=jnp.int32),
        )
        return VectorState(
            env=states,
            obs=obs,
            reset=done,
            episode_return=jnp.where(done, 0, episode_return),
            episode_length=jnp.where(done, 0, episode_length),
            finished=finished,
        ), timestep

    return VectorEnv(reset, begin_rollout, step)


def restart(
    draw: Callable[[PRNGKey], PyTree],
    key: PRNGKey,
    done: Bool[Array, "B"],
    current: PyTree,
    at_once: int,
) -> PyTree:
    """``current`` [B, ...] with each row b that is ``done`` replaced by ``draw(key_b)``.

    Invariant: ``key_b = fold_in(key, b)``, so a new row depends only on the key and on b, and the
    result is the same for any ``at_once``. A loop draws the rows that are done, ``at_once`` of them
    in each pass. With ``at_once=B`` there is no loop: all rows are drawn and those that are not
    done are discarded, which needs no communication between rows.
    """
    B = done.shape[0]

    def draw_rows(key: PRNGKey, rows: Array) -> PyTree:
        return jax.vmap(lambda b: draw(jax.random.fold_in(key, b)))(rows)

    if at_once >= B:
        return where_rows(done, draw_rows(key, jnp.arange(B)), current)

    @jax.custom_jvp
    def restart_in_passes(key: PRNGKey, done: Array, current: PyTree) -> PyTree:
        def one_pass(loop: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
            pending, current = loop
            # Row B does not exist: nothing is written there.
            (rows,) = jnp.nonzero(pending, size=at_once, fill_value=B)
            current = jax.tree.map(
                lambda old, new: old.at[rows].set(new, mode="drop"), current, draw_rows(key, rows)
            )
            return pending.at[rows].set(False, mode="drop"), current

        return jax.lax.while_loop(lambda loop: loop[0].any(), one_pass, (done, current))[1]

    @restart_in_passes.defjvp
    def derivative(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
        """New rows are constant and the others are copied.

        JAX cannot differentiate a loop of unknown length in reverse mode.
        """

        def of_leaf(x: Array) -> Array:
            is_constant = x.dtype == jax.dtypes.float0
            return x if is_constant else where_rows(primals[1], jnp.zeros_like(x), x)

        return restart_in_passes(*primals), jax.tree.map(of_leaf, tangents[2])

    return restart_in_passes(key, done, current)


def where_rows(condition: Bool[Array, "B"], new: PyTree, old: PyTree) -> PyTree:
    """`jnp.where` by row: ``condition`` is [B], the leaves of ``new`` and ``old`` are [B, ...]."""

    def choose(new: Array, old: Array) -> Array:
        if jnp.issubdtype(new.dtype, jax.dtypes.prng_key):
            # jax_debug_key_reuse would count jnp.where as a use of both keys.
            data = choose(jax.random.key_data(new), jax.random.key_data(old))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(new))
        return jnp.where(condition.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, new, old)


def fresh_starts(env: Env, key: PRNGKey, count: int) -> tuple[PyTree, PyTree]:
    """``count`` independent initial ``(state, obs)``, each [count, ...]."""
    return jax.vmap(_reset_with_dtypes_of_step(env))(jax.random.split(key, count))


def _reset_with_dtypes_of_step(env: Env) -> Callable[[PRNGKey], tuple[PyTree, PyTree]]:
    """``env.reset`` cast to the dtypes of a step, because a loop over steps needs equal dtypes."""

    def reset(key: PRNGKey) -> tuple[PyTree, PyTree]:
        state, obs = env.reset(key)
        dtype = jnp.result_type(float) if isinstance(env.action_space, Box) else jnp.int32
        action = jax.ShapeDtypeStruct(env.action_space.shape, dtype)
        timestep = jax.eval_shape(env.step, key, state, action)
        target = (timestep.state, timestep.obs)
        return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), (state, obs), target)

    return reset


def _nothing_finished() -> EpisodeSums:
    zero = jnp.zeros((), jnp.result_type(float))
    return EpisodeSums(zero, zero, jnp.zeros((), jnp.int32))
