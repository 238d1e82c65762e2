"""Fresh starts are independent draws: unbiased whatever the lengths of the episodes are, and never used twice."""

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

LENGTHS = ((1, 10), (1, 2), (2, 3), (1, 50))  # of the two kinds of episodes
STARTS = 100_000
LANES = 256  # environments that are watched side by side, in groups of B


class Kind(NamedTuple):
    kind: Any  # 0 or 1, each with probability one half
    t: Any  # steps taken


def two_kinds(short=1, long=50, reward=lambda kind, t, action: jnp.zeros(())) -> Env:
    """An episode lasts ``short`` steps or ``long`` ones; the observation says only whether it has just begun."""

    def observe(state):
        return jax.nn.one_hot(jnp.minimum(state.t, 1), 2)

    def reset(key):
        state = Kind(jax.random.bernoulli(key).astype(jnp.int32), jnp.int32(0))
        return state, observe(state)

    def step(key, state, action):
        after = state._replace(t=state.t + 1)
        ends = after.t >= jnp.where(state.kind == 1, long, short)
        no = jnp.asarray(False)
        return Step(after, observe(after), reward(state.kind, state.t, action), ends, no)

    return Env("two kinds", reset, step, Box((2,), 0.0, 1.0), Discrete(2), None, False)


@pytest.mark.parametrize("num_envs", [1, 2, 4, 8, 16, 64])
def test_both_kinds_of_episodes_begin_equally_often(num_envs):
    """A share of starts, up to a time, has expectation one half (Wald): the last start is counted, ended or not.

    A pool of starts that was run through again gave 0.578 for B = 2 and lengths 1 and 10.
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

    keys = jax.random.split(jax.random.key(num_envs), LANES // num_envs)
    for lengths in LENGTHS:
        num_steps = math.ceil(1.05 * STARTS * np.mean(lengths) / LANES)
        count, kinds = (int(x.sum()) for x in starts(jnp.asarray(lengths), num_steps, keys))
        assert count >= STARTS
        standard_error = 0.5 / math.sqrt(count)
        assert abs(kinds / count - 0.5) <= 4 * standard_error, (lengths, kinds / count)


def numbered(length) -> Env:
    """Episodes of ``length`` steps; the observation is a start's 64 random bits, in four numbers, and the time."""

    def reset(key):
        bits = jax.random.bits(key, (4,), jnp.uint16).astype(jnp.float32)
        state = jnp.concatenate([bits, jnp.zeros(1)])
        return state, state

    def step(key, state, action):
        state = state.at[4].add(1)
        return Step(state, state, jnp.zeros(()), state[4] >= length, jnp.asarray(False))

    return Env("numbered", reset, step, Box((5,), 0.0, 65536.0), Discrete(3), None, False)


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize(("num_envs", "num_steps"), [(4, 128), (64, 128), (2048, 32)])
def test_no_two_episodes_begin_alike(num_envs, num_steps, length, num_shards):
    """In two rollouts, one after the other, of two vmapped agents: all starts that a policy saw are different."""
    env, model = numbered(length), linear_model()
    block = num_envs // num_shards
    vector_env = vectorize(env, block, None if num_shards == 1 else block)
    rollout = in_shards(make_rollout(env, vector_env, model, num_steps), num_shards)

    @jax.jit
    @jax.vmap
    def two_rollouts(key):
        key_reset, key_params, *keys = jax.random.split(key, 4)
        state, obs = reset_shards(vector_env, key_reset, num_shards)
        params, seen = model.init(key_params, obs), []
        for key in keys:
            transitions, state, _, _ = rollout(key, params, None, state, ())
            seen.append((transitions.obs, transitions.reset))
        return seen

    seen = two_rollouts(jax.random.split(jax.random.key(0), 2))
    starts = np.concatenate([np.asarray(obs)[np.asarray(reset)] for obs, reset in seen])
    per_environment = 1 + (2 * num_steps - 1) // length
    assert starts.shape == (2 * num_envs * per_environment, 5)
    assert len(np.unique(starts, axis=0)) == len(starts)


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 8])
def test_the_rows_that_are_done_are_drawn_and_the_others_stay(at_once):
    """Any number at once gives what drawing each row alone gives, whichever rows are done; also under vmap."""
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
def test_states_with_random_keys_pass_the_check_of_keys(at_once):
    """Without a loop, too, as with one environment or in shards; ``jnp.where`` would count as a use of the keys."""

    def reset(key):
        key_state, key_obs = jax.random.split(key)
        return key_state, jax.random.normal(key_obs, (2,))

    def step(key, state, action):
        key_state, key_obs = jax.random.split(state)
        obs = jax.random.normal(key_obs, (2,))
        return Step(key_state, obs, obs[0], obs[1] > 1, jnp.asarray(False))

    env = vectorize(
        Env("keys", reset, step, Box((2,), -np.inf, np.inf), Discrete(2), None, False), 3, at_once
    )

    @jax.jit
    def run(key):
        key_reset, key_step = jax.random.split(key)
        return env.step(key_step, env.reset(key_reset), jnp.zeros(3, jnp.int32))[0].obs

    with jax.debug_key_reuse(True):
        assert np.isfinite(run(jax.random.key(0))).all()


def losing_bet(kind, t, action):
    """Action 1 at the first step pays 0.9 in a long episode and −1.1 in a short one: −0.1 on average, against 0."""
    pays = jnp.where(kind == 1, 0.9, -1.1)
    return jnp.where((t == 0) & (action == 1), pays, 0.0)


@pytest.mark.learning
def test_ppo_declines_a_bet_that_loses_where_starts_are_unbiased():
    """The kind is hidden. With a pool that favours long episodes all of these seeds learnt to take the bet."""
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
    """With 128 starts for 8,192 one-step episodes the accuracy was 0.865 to 0.903; with fresh ones it is above 0.95."""
    weights = jax.random.normal(jax.random.key(7), (10, 6))

    def reset(key):
        context = jax.random.normal(key, (10,))
        return context, context

    def step(key, context, action):
        right = jnp.argmax(context @ weights) == action
        no = jnp.asarray(False)
        return Step(context, context, right.astype(jnp.float32), ~no, no)

    env = Env("bandit", reset, step, Box((10,), -np.inf, np.inf), Discrete(6), 1, False)
    config = Config(num_envs=64, total_timesteps=20 * 8192, lr=1e-3)
    result = jax.jit(jax.vmap(make_train(config, env)))(jax.random.split(jax.random.key(0), 4))
    contexts = jax.random.normal(jax.random.key(8), (10_000, 10))
    right = jnp.argmax(contexts @ weights, axis=1)
    policies = [Policy.from_state(config, result.state, i, env) for i in range(4)]
    accuracy = [float((policy.act(contexts) == right).mean()) for policy in policies]
    assert min(accuracy) > 0.94, accuracy
