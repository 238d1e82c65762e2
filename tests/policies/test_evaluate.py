"""Evaluation plays complete fresh episodes, counts each once, and does not affect training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_envs import clock, counter, linear_model

from purejaxppo import (
    Config,
    ConfigError,
    Policy,
    envs,
    evaluate,
    load_policy,
    make_train,
    make_trainer,
    save_policy,
)
from purejaxppo.envs.vector import fresh_starts
from purejaxppo.normalize import Moments
from purejaxppo.types import Box, Discrete, Env, Step

TINY = Config(
    num_envs=2, num_steps=8, num_minibatches=1, num_epochs=1, total_timesteps=32, hidden_sizes=(4,)
)


@pytest.fixture(autouse=True, scope="module")
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def walk() -> Env:
    """A walk from a random place by three moves; steps are deterministic.

    An episode terminates to the right of 4 and is truncated after 9 steps.
    """

    def observe(state):
        place, t = state
        return jnp.stack([place, 0.1 * t, jnp.sin(3 * place)])

    def reset(key):
        state = (jax.random.uniform(key, minval=-2.0, maxval=2.0), jnp.int32(0))
        return state, observe(state)

    def step(key, state, action):
        place, t = state
        state = (place + jnp.asarray([-0.5, 0.25, 1.0])[action], t + 1)
        return Step(
            state=state,
            obs=observe(state),
            reward=jnp.cos(state[0]) + 0.1 * action,
            terminated=state[0] > 4,
            truncated=state[1] >= 9,
        )

    return Env(
        name="walk",
        reset=reset,
        step=step,
        observation_space=Box((3,), -np.inf, np.inf),
        action_space=Discrete(3),
        max_episode_steps=9,
        truncates=True,
    )


@pytest.fixture(scope="module")
def trained():
    """Two agents trained on the walk: (config, jitted training, keys, result)."""
    config = TINY.replace(lr=0.03, normalize_obs=True)
    train = jax.jit(jax.vmap(make_train(config, walk())))
    keys = jax.random.split(jax.random.key(5), 2)
    return config, train, keys, train(keys)


@pytest.fixture(scope="module")
def policy(trained):
    config, _, _, result = trained
    return Policy.from_state(config, result.state, 1, walk())


@pytest.fixture(scope="module")
def linear():
    """An untrained policy that compiles quickly, with episodes of random lengths."""
    env = counter(limit=6, longest=9)
    model = linear_model()
    state = jax.jit(make_trainer(TINY, env, model).init)(jax.random.key(0))
    return Policy.from_state(TINY, state, env=env, model=model), env


def test_returns_and_lengths_equal_a_plain_python_loop(policy):
    env = walk()
    key = jax.random.key(7)
    count = 6
    got = evaluate(policy, env, key, count)
    states, all_obs = fresh_starts(env, jax.random.split(key)[0], count)
    step = jax.jit(env.step)
    returns = []
    lengths = []
    for i in range(count):
        state, obs = jax.tree.map(lambda x, i=i: x[i], (states, all_obs))
        total = 0.0
        done = False
        t = 0
        while not done:
            timestep = step(jax.random.key(0), state, policy.act(obs))
            state = timestep.state
            obs = timestep.obs
            t += 1
            total += float(timestep.reward)
            done = bool(timestep.terminated) or bool(timestep.truncated)
        returns.append(total)
        lengths.append(t)
    np.testing.assert_allclose(got.returns, returns, rtol=1e-5)
    np.testing.assert_array_equal(got.lengths, lengths)
    assert len(set(returns)) == count  # every episode starts at another place


def test_deterministic_and_sampled_actions_differ_and_are_reproducible(policy):
    key = jax.random.key(7)
    results = [evaluate(policy, walk(), key, 64, deterministic) for deterministic in (True, False)]
    assert (np.asarray(results[0].returns) != np.asarray(results[1].returns)).mean() > 0.5
    again = evaluate(policy, walk(), key, 64, False)
    np.testing.assert_array_equal(again.returns, results[1].returns)


@pytest.mark.parametrize("count", [1, 17])
def test_the_number_of_episodes_is_the_requested_one(linear, count):
    policy, env = linear
    got = evaluate(policy, env, jax.random.key(0), count)
    assert got.returns.shape == got.lengths.shape == (count,)
    # The reward of step t is t, so the return of an episode of n steps is n (n + 1) / 2.
    np.testing.assert_array_equal(got.returns, got.lengths * (got.lengths + 1) / 2)


@pytest.mark.parametrize("count", [0, -1])
def test_no_episodes_is_an_error(linear, count):
    policy, env = linear
    with pytest.raises(ConfigError) as error:
        evaluate(policy, env, jax.random.key(0), count)
    assert str(error.value) == f"num_episodes = {count}: it must be an integer of at least 1"


def test_an_episode_counts_once_so_short_ones_are_not_preferred(linear):
    """Lengths are uniform on 1 … 9 and truncated at 6: P(1) = … = P(5) = 1/9, and P(6) = 4/9."""
    policy, env = linear
    lengths = np.asarray(evaluate(policy, env, jax.random.key(1), 9000).lengths)
    shares = np.bincount(lengths, minlength=7)[1:] / 9000
    np.testing.assert_allclose(shares, [1 / 9] * 5 + [4 / 9], atol=0.015)


def test_an_episode_ends_by_termination_or_by_the_time_limit():
    for terminates in (True, False):
        env = clock(10, terminates)
        model = linear_model(actions=2)
        state = jax.jit(make_trainer(TINY, env, model).init)(jax.random.key(0))
        policy = Policy.from_state(TINY, state, env=env, model=model)
        got = evaluate(policy, env, jax.random.key(0), 3)
        np.testing.assert_array_equal(got.returns, [10.0] * 3)
        np.testing.assert_array_equal(got.lengths, [10] * 3)


def test_evaluating_does_not_change_training(trained):
    config, train, keys, before = trained
    copies = jax.tree.map(np.array, (before.state.params, before.state.normalizer))
    evaluate(Policy.from_state(config, before.state, 0, walk()), walk(), keys[0], 3)
    jax.tree.map(
        np.testing.assert_array_equal, (before.state.params, before.state.normalizer), copies
    )
    after = train(keys)
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.state.params, after.metrics),
        (before.state.params, before.metrics),
    )


def test_it_can_be_vmapped_over_policies_and_keys(trained, policy):
    config, _, _, result = trained
    keys = jax.random.split(jax.random.key(7), 2)

    def evaluate_one(state, key):
        return evaluate(Policy.from_state(config, state, env=walk()), walk(), key, 5)

    both = jax.jit(jax.vmap(evaluate_one))(result.state, keys)
    assert both.returns.shape == both.lengths.shape == (2, 5)
    alone = evaluate(policy, walk(), keys[1], 5)
    np.testing.assert_allclose(both.returns[1], alone.returns, rtol=1e-4)
    np.testing.assert_array_equal(both.lengths[1], alone.lengths)


def test_the_normaliser_is_used_and_stays_frozen():
    """Observations leave the range of training: moments that were updated would change actions."""
    config = TINY.replace(normalize_obs=True)

    def reset(key):
        return jnp.float32(0), jnp.zeros(1)

    def step(key, t, action):
        return Step(
            state=t + 1,
            obs=jnp.full(1, t + 1),
            reward=1.0 * action,
            terminated=t >= 7,
            truncated=jnp.asarray(False),
        )

    env = Env(
        name="ramp",
        reset=reset,
        step=step,
        observation_space=Box((1,), 0.0, 10.0),
        action_space=Discrete(2),
        max_episode_steps=8,
        truncates=False,
    )
    # Action 1 where the normalised observation is above 1. With the mean 3 and the standard
    # deviation 1 that is where t > 3 + 1 · 1 = 4.
    params = {
        "policy": {"w": jnp.asarray([[0.0, 1.0]]), "b": jnp.asarray([1.0, 0.0])},
        "value": {"w": jnp.zeros(1), "b": jnp.zeros(())},
    }
    moments = Moments(jnp.asarray(100.0), jnp.asarray([3.0]), jnp.asarray([100.0]))
    before = jax.tree.map(np.array, moments)
    policy = Policy(
        config=config,
        model=linear_model(actions=2),
        params=params,
        obs_moments=moments,
        observation_space=env.observation_space,
        action_space=env.action_space,
    )
    got = evaluate(policy, env, jax.random.key(0), 2)
    np.testing.assert_array_equal(got.returns, [3.0, 3.0])  # t = 5, 6, 7
    jax.tree.map(np.testing.assert_array_equal, policy.obs_moments, before)


def test_without_an_environment_the_one_of_the_config_is_used():
    config = TINY.replace(env="Catch-bsuite")
    policy = Policy.from_state(config, jax.jit(make_trainer(config).init)(jax.random.key(0)))
    got = evaluate(policy, None, jax.random.key(0), 4)
    np.testing.assert_array_equal(got.lengths, [9] * 4)  # the ball falls through nine rows
    assert set(np.abs(np.asarray(got.returns))) == {1.0}


# --------------------------------------------------------------------------------- without a bound


def endless() -> Env:
    """The clock with no declared bound, although its episodes end after 10 steps."""
    return clock(10, True)._replace(name="endless", max_episode_steps=None, truncates=False)


@pytest.fixture(scope="module")
def unbounded():
    env = endless()
    model = linear_model(actions=2)
    state = jax.jit(make_trainer(TINY, env, model).init)(jax.random.key(0))
    return Policy.from_state(TINY, state, env=env, model=model), env


def test_where_an_episode_has_no_bound_one_is_required(unbounded):
    policy, env = unbounded
    with pytest.raises(ConfigError) as error:
        evaluate(policy, env, jax.random.key(0), 2)
    assert str(error.value) == (
        "endless has no bound on the length of an episode, and a policy may never end one: "
        "say by max_steps after how many steps an episode counts as it stands"
    )


def test_unfinished_episodes_at_the_bound_count_with_their_return_so_far(unbounded, linear):
    policy, env = unbounded
    for max_steps, expected in ((1, 1), (7, 7), (10, 10), (11, 10), (2**31 - 1, 10)):
        got = evaluate(policy, env, jax.random.key(0), 3, max_steps=max_steps)
        np.testing.assert_array_equal(got.lengths, [expected] * 3)
        np.testing.assert_array_equal(got.returns, [expected] * 3)
    policy, env = linear  # episodes of 1 to 6 steps; the n-th reward is n
    complete = evaluate(policy, env, jax.random.key(0), 50)
    truncated = evaluate(policy, env, jax.random.key(0), 50, max_steps=4)
    np.testing.assert_array_equal(truncated.lengths, np.minimum(complete.lengths, 4))
    np.testing.assert_array_equal(
        truncated.returns, truncated.lengths * (truncated.lengths + 1) / 2
    )


def test_a_policy_that_never_ends_an_episode_is_stopped(unbounded):
    policy, env = unbounded
    never = env._replace(
        step=lambda *state: endless().step(*state)._replace(terminated=jnp.asarray(False))
    )
    np.testing.assert_array_equal(
        evaluate(policy, never, jax.random.key(0), 3, max_steps=12).lengths, [12] * 3
    )


@pytest.mark.parametrize("max_steps", [0, -1, True, 2**31])
def test_the_bound_is_a_number_of_steps(unbounded, max_steps):
    with pytest.raises(
        ConfigError, match=f"max_steps = {max_steps}: it must be an integer of at least 1"
    ):
        evaluate(*unbounded, jax.random.key(0), 2, max_steps=max_steps)


# ----------------------------------------------------------------------------------- compiled once


def test_without_an_environment_evaluation_compiles_once(monkeypatch, tmp_path):
    """The environment's step is traced in the first call only, also for newly loaded policies."""
    traced = []

    def factory(limit):
        env = counter(limit=limit, longest=0)

        def step(key, state, action):
            traced.append(limit)
            return env.step(key, state, action)

        return env._replace(step=step)

    monkeypatch.setitem(envs._registered, "counted", factory)
    config = TINY.replace(env="counted", env_settings={"limit": 3})
    state = jax.eval_shape(make_trainer(config).init, jax.random.key(0))
    state = state._replace(params=jax.tree.map(lambda x: jnp.zeros(x.shape), state.params))
    directory = save_policy(tmp_path / "policy", Policy.from_state(config, state))
    policies = [Policy.from_state(config, state), Policy.from_state(config, state)]
    policies += [load_policy(directory), load_policy(directory)]
    counts = []
    for key, policy in enumerate(2 * policies):
        np.testing.assert_array_equal(
            evaluate(policy, None, jax.random.key(key), 5).lengths, [3] * 5
        )
        counts.append(len(traced))
    assert counts == counts[:1] * 8
    other = Policy.from_state(config.replace(env_settings={"limit": 4}), state)
    np.testing.assert_array_equal(evaluate(other, None, jax.random.key(0), 5).lengths, [4] * 5)
    assert len(traced) > counts[0]


def test_acting_is_compiled_once_for_policies_with_different_parameters(linear):
    """Also for separate policy objects, as the agents of a vmapped state are."""
    policy, _ = linear
    traced = []

    def step(params, carry, obs, reset):
        traced.append(obs.shape)
        return policy.model.step(params, carry, obs, reset)

    model = policy.model._replace(step=step)
    policies = [
        dataclasses.replace(
            policy, model=model, params=jax.tree.map(lambda x, i=i: x + i, policy.params)
        )
        for i in range(4)
    ]
    logits = [one.params["policy"]["w"][0] * 2.0 + one.params["policy"]["b"] for one in policies]
    for one, expected in zip(policies, logits, strict=True):
        assert one.act(jnp.array([2.0, 0.0, 0.0])) == expected.argmax()
    assert traced == [(1, 3)]


def test_an_environment_with_other_spaces_is_refused(linear):
    policy, _ = linear
    with pytest.raises(ConfigError, match="clock"):
        evaluate(policy, clock(), jax.random.key(0), 2)
