"""Fresh starts are independent draws, unbiased for any episode lengths and never reused."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_envs import linear_model

from purejaxppo import Config, Policy, make_train
from purejaxppo.envs.vector import restart, vectorize
from purejaxppo.rollout import in_shards, make_rollout, reset_shards
from purejaxppo.types import Box, Discrete, Env, Step

LENGTHS = ((1, 10), (1, 2), (2, 3), (1, 50))  # (short, long) episodes
STARTS = 100_000
COPIES = 256  # environments that are stepped in parallel, in groups of num_envs


class Kind(NamedTuple):
    kind: Any  # 0 or 1, with equal probability
    t: Any  # steps taken


def two_kinds(short=1, long=50, reward=lambda kind, t, action: jnp.zeros(())) -> Env:
    """Episodes of ``short`` or ``long`` steps; the observation shows only the first step."""

    def observe(state):
        return jax.nn.one_hot(jnp.minimum(state.t, 1), 2)

    def reset(key):
        state = Kind(jax.random.bernoulli(key).astype(jnp.int32), jnp.int32(0))
        return state, observe(state)

    def step(key, state, action):
        after = state._replace(t=state.t + 1)
        ends = after.t >= jnp.where(state.kind == 1, long, short)
        no = jnp.asarray(False)
        return Step(
            state=after,
            obs=observe(after),
            reward=reward(state.kind, state.t, action),
            terminated=ends,
            truncated=no,
        )

    return Env(
        name="two kinds",
        reset=reset,
        step=step,
        observation_space=Box((2,), 0.0, 1.0),
        action_space=Discrete(2),
        max_episode_steps=None,
        truncates=False,
    )


@pytest.mark.parametrize("num_envs", [1, 2, 4, 8, 16, 64])
def test_both_kinds_of_episodes_begin_equally_often(num_envs):
    """The share of each kind among all starts has expectation one half (Wald's identity).

    Every start is counted, whether its episode has finished or not. A pool of starts that was
    reused gave 0.578 for B = 2 and lengths 1 and 10.
    """

    @jax.jit
    @partial(jax.vmap, in_axes=(None, None, 0))
    def starts(lengths, num_steps, key):
        env = vectorize(two_kinds(lengths[0], lengths[1]), num_envs)
        key_reset, key_steps = jax.random.split(key)

        def step(i, loop):
            state, count, kinds = loop
            key = jax.random.fold_in(key_steps, i)
            state, _ = env.step(key, state, jnp.zeros(num_envs, jnp.int32))
            count += state.reset.sum()
            kinds += jnp.where(state.reset, state.env.kind, 0).sum()
            return state, count, kinds

        state = env.reset(key_reset)
        before = (state, jnp.int32(num_envs), state.env.kind.sum())
        return jax.lax.fori_loop(0, num_steps, step, before)[1:]

    keys = jax.random.split(jax.random.key(num_envs), COPIES // num_envs)
    for lengths in LENGTHS:
        num_steps = math.ceil(1.05 * STARTS * np.mean(lengths) / COPIES)
        count, kinds = (int(x.sum()) for x in starts(jnp.asarray(lengths), num_steps, keys))
        assert count >= STARTS
        standard_error = 0.5 / math.sqrt(count)
        assert abs(kinds / count - 0.5) <= 4 * standard_error, (lengths, kinds / count)


def numbered(length) -> Env:
    """Episodes of ``length`` steps; observations are a start's 64 random bits and the time."""

    def reset(key):
        bits = jax.random.bits(key, (4,), jnp.uint16).astype(jnp.float32)
        state = jnp.concatenate([bits, jnp.zeros(1)])
        return state, state

    def step(key, state, action):
        state = state.at[4].add(1)
        return Step(
            state=state,
            obs=state,
            reward=jnp.zeros(()),
            terminated=state[4] >= length,
            truncated=jnp.asarray(False),
        )

    return Env(
        name="numbered",
        reset=reset,
        step=step,
        observation_space=Box((5,), 0.0, 65536.0),
        action_space=Discrete(3),
        max_episode_steps=None,
        truncates=False,
    )


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize(("num_envs", "num_steps"), [(4, 128), (64, 128), (2048, 32)])
def test_no_two_episodes_begin_alike(num_envs, num_steps, length, num_shards):
    """All starts in two consecutive rollouts of two vmapped agents are different."""
    env = numbered(length)
    model = linear_model()
    block = num_envs // num_shards
    vector_env = vectorize(env, block, None if num_shards == 1 else block)
    rollout = in_shards(make_rollout(env, vector_env, model, num_steps), num_shards)

    @jax.jit
    @jax.vmap
    def two_rollouts(key):
        key_reset, key_params, *keys = jax.random.split(key, 4)
        state, obs = reset_shards(vector_env, key_reset, num_shards)
        params = model.init(key_params, obs)
        observed = []
        for key in keys:
            transitions, state, _, _ = rollout(key, params, None, state, ())
            observed.append((transitions.obs, transitions.reset))
        return observed

    observed = two_rollouts(jax.random.split(jax.random.key(0), 2))
    starts = np.concatenate([np.asarray(obs)[np.asarray(reset)] for obs, reset in observed])
    per_environment = 1 + (2 * num_steps - 1) // length
    assert starts.shape == (2 * num_envs * per_environment, 5)
    assert len(np.unique(starts, axis=0)) == len(starts)


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 8])
def test_done_rows_are_redrawn_and_the_others_are_kept(at_once):
    """The result is that of drawing each row alone, for any ``at_once``; also under vmap."""
    done = np.array([[0] * 8, [1] * 8, [0, 1, 0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1]], bool)
    keys = jax.random.split(jax.random.key(1), len(done))
    old = {
        "x": np.arange(64.0, dtype=np.float32).reshape(4, 8, 2),
        "key": jax.random.split(jax.random.key(2), (4, 8)),
    }

    def draw(key):
        key_x, key_state = jax.random.split(key)
        return {"x": jax.random.uniform(key_x, (2,)), "key": key_state}

    new = jax.jit(jax.vmap(lambda key, done, old: restart(draw, key, done, old, at_once)))(
        keys, done, old
    )
    for agent in range(len(done)):
        for row in range(8):
            alone = draw(jax.random.fold_in(keys[agent], row))
            expected = (
                alone if done[agent, row] else jax.tree.map(lambda x, i=(agent, row): x[i], old)
            )
            np.testing.assert_array_equal(new["x"][agent, row], expected["x"])
            got = jax.random.key_data(new["key"][agent, row])
            np.testing.assert_array_equal(got, jax.random.key_data(expected["key"]))


@pytest.mark.parametrize("at_once", [1, 3])
def test_states_with_random_keys_pass_the_key_reuse_check(at_once):
    """Also without a loop (at_once = B), where ``jnp.where`` would count as a use of the keys."""

    def reset(key):
        key_state, key_obs = jax.random.split(key)
        return key_state, jax.random.normal(key_obs, (2,))

    def step(key, state, action):
        key_state, key_obs = jax.random.split(state)
        obs = jax.random.normal(key_obs, (2,))
        return Step(
            state=key_state,
            obs=obs,
            reward=obs[0],
            terminated=obs[1] > 1,
            truncated=jnp.asarray(False),
        )

    env = vectorize(
        Env(
            name="keys",
            reset=reset,
            step=step,
            observation_space=Box((2,), -np.inf, np.inf),
            action_space=Discrete(2),
            max_episode_steps=None,
            truncates=False,
        ),
        3,
        at_once,
    )

    @jax.jit
    def run(key):
        key_reset, key_step = jax.random.split(key)
        return env.step(key_step, env.reset(key_reset), jnp.zeros(3, jnp.int32))[0].obs

    with jax.debug_key_reuse(True):
        assert np.isfinite(run(jax.random.key(0))).all()


def losing_bet(kind, t, action):
    """Action 1 at the first step: 0.9 in a long episode, −1.1 in a short one, −0.1 on average."""
    pays = jnp.where(kind == 1, 0.9, -1.1)
    return jnp.where((t == 0) & (action == 1), pays, 0.0)


@pytest.mark.learning
def test_ppo_declines_a_losing_bet_because_starts_are_unbiased():
    """The kind is hidden. With a pool that favoured long episodes all seeds took the bet."""
    config = Config(
        num_envs=2,
        num_steps=128,
        num_minibatches=4,
        num_epochs=4,
        total_timesteps=400_000,
        lr=1e-3,
        hidden_sizes=(16,),
        gamma=1.0,
    )
    env = two_kinds(reward=losing_bet)
    keys = jax.random.split(jax.random.key(0), 8)
    result = jax.jit(jax.vmap(make_train(config, env)))(keys)
    first = jnp.asarray([1.0, 0.0])
    actions = [int(Policy.from_state(config, result.state, i, env).act(first)) for i in range(8)]
    assert actions == [0] * 8


@pytest.mark.learning
def test_a_contextual_bandit_sees_enough_different_contexts():
    """Fresh starts give an accuracy above 0.95.

    With 128 starts for 8,192 one-step episodes it was 0.865 to 0.903.
    """
    weights = jax.random.normal(jax.random.key(7), (10, 6))

    def reset(key):
        context = jax.random.normal(key, (10,))
        return context, context

    def step(key, context, action):
        right = jnp.argmax(context @ weights) == action
        no = jnp.asarray(False)
        return Step(
            state=context,
            obs=context,
            reward=right.astype(jnp.float32),
            terminated=~no,
            truncated=no,
        )

    env = Env(
        name="bandit",
        reset=reset,
        step=step,
        observation_space=Box((10,), -np.inf, np.inf),
        action_space=Discrete(6),
        max_episode_steps=1,
        truncates=False,
    )
    config = Config(num_envs=64, total_timesteps=20 * 8192, lr=1e-3)
    result = jax.jit(jax.vmap(make_train(config, env)))(jax.random.split(jax.random.key(0), 4))
    contexts = jax.random.normal(jax.random.key(8), (10_000, 10))
    right = jnp.argmax(contexts @ weights, axis=1)
    policies = [Policy.from_state(config, result.state, i, env) for i in range(4)]
    accuracy = [float((policy.act(contexts) == right).mean()) for policy in policies]
    assert min(accuracy) > 0.94, accuracy
