"""Running moments and the reward normaliser against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from small_envs import counter

from purejaxppo import Config, make_trainer
from purejaxppo.normalize import (
    EPSILON,
    init_normalizer,
    merge,
    moments_of,
    no_moments,
    normalize_obs,
    normalize_reward,
)
from purejaxppo.types import Box, Reward, Rewards

SPACE = Box((1,), -np.inf, np.inf)

merge_jit = jax.jit(merge)
moments_jit = jax.jit(moments_of)


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from([1, 2, 7]), min_size=1, max_size=6),
    st.integers(0, 6),
)
def test_moments_over_any_split_equal_numpys(seed, sizes, magnitude):
    """For any offset: Σx² − (Σx)² / n would lose every digit."""
    rng = np.random.default_rng(seed)
    parts = [rng.normal(10.0**magnitude, 3.0, (n, 2)) for n in sizes]
    with jax.enable_x64(True):
        total = no_moments((2,))
        for part in parts:
            total = merge_jit(total, moments_jit(jnp.asarray(part)))
        variance = np.asarray(total.variance)
    x = np.concatenate(parts)
    assert total.samples == len(x)
    np.testing.assert_allclose(total.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, x.var(0), rtol=1e-7, atol=1e-12)


def test_empty_moments_change_neither_other_moments_nor_observations():
    moments = moments_of(jnp.asarray([[1.0, 2.0], [3.0, 6.0]]))
    for merged in (merge(moments, no_moments((2,))), merge(no_moments((2,)), moments)):
        jax.tree.map(np.testing.assert_array_equal, merged, moments)
    obs = jnp.asarray([[1.5, -2.0]])
    np.testing.assert_allclose(normalize_obs(no_moments((2,)), obs), obs, rtol=1e-6)
    assert normalize_obs(None, obs) is obs


def test_observations_are_standardised_and_clipped_at_10_deviations():
    moments = moments_of(jnp.asarray([[1.0], [3.0]]))  # mean 2, deviation 1
    out = normalize_obs(moments, jnp.asarray([[2.0], [3.5], [1e6], [-1e6]]))
    np.testing.assert_allclose(out[:, 0], [0.0, 1.5, 10.0, -10.0], rtol=1e-5)


def test_the_reward_normaliser_equals_a_loop():
    """The terminal reward is part of the return, which is reset after it.

    PureJaxRL and rejax reset the return before it.
    """
    rng = np.random.default_rng(0)
    gamma = 0.9
    T = 12
    B = 3
    running = np.zeros(B)
    returns = []
    last_done = np.ones(B, bool)
    normalize = jax.jit(normalize_reward)
    with jax.enable_x64(True):
        scale = init_normalizer(jnp.zeros((B, 1)), SPACE, False, True).reward
        for _ in range(3):
            reward = rng.normal(1.0, 2.0, (T, B))
            done = rng.random((T, B)) < 0.3
            for t in range(T):
                for b in range(B):
                    running[b] = gamma * running[b] + reward[t, b]
                    returns.append(running[b])
                    running[b] = 0.0 if done[t, b] else running[b]
            scaled, scale = normalize(
                scale, reward, np.concatenate([last_done[None], done[:-1]]), gamma
            )
            last_done = done[-1]
            expected = np.clip(reward / np.sqrt(np.var(returns) + EPSILON), -10, 10)
            np.testing.assert_allclose(scaled, expected, rtol=1e-10)
            # The return of a finished episode is reset only when the next episode begins.
            continuing = ~done[-1]
            np.testing.assert_allclose(
                scale.discounted_return[continuing], running[continuing], rtol=1e-12, atol=1e-12
            )
            np.testing.assert_allclose(scale.moments.mean, np.mean(returns), rtol=1e-12)


def test_a_terminal_reward_counts_in_its_own_episode_only():
    """Reward 5 at the end of an episode, then 1: the returns are 5 and 1, not 0 and 1 + γ · 5."""
    _, scale = normalize_reward(
        init_normalizer(jnp.zeros((1, 1)), SPACE, False, True).reward,
        jnp.asarray([[5.0], [1.0]]),
        jnp.asarray([[True], [True]]),
        0.9,
    )
    np.testing.assert_allclose(scale.moments.mean, 3.0, rtol=1e-6)
    np.testing.assert_allclose(scale.moments.variance, 4.0, rtol=1e-6)
    np.testing.assert_allclose(scale.discounted_return, [1.0], rtol=1e-6)


def test_returns_of_invalid_steps_do_not_count():
    """Rewards 1, 2 | 100, 100 with an end at |, and 3, 4, 5, 6 in an episode that continues."""
    reward = jnp.asarray([[1.0, 3.0], [2.0, 4.0], [100.0, 5.0], [100.0, 6.0]])
    reset = jnp.asarray([[True, True], [False, False], [True, False], [False, False]])
    valid = jnp.asarray([[True, True], [True, True], [False, True], [False, True]])
    _, scale = normalize_reward(
        init_normalizer(jnp.zeros((2, 1)), SPACE, False, True).reward, reward, reset, 1.0, valid
    )
    returns = [1.0, 3.0, 3.0, 7.0, 12.0, 18.0]
    np.testing.assert_allclose(scale.moments.samples, 6)
    np.testing.assert_allclose(scale.moments.mean, np.mean(returns), rtol=1e-6)
    np.testing.assert_allclose(scale.moments.variance, np.var(returns), rtol=1e-5)


def test_moments_are_merged_after_the_update_and_equal_those_of_the_raw_observations():
    """`Transition.obs` is normalised with the moments of earlier rollouts only.

    The state after the iteration has the moments of all rollouts.
    """

    def report_obs(state, transitions, config, frozen):
        return Rewards(transitions.reward, state, {"obs": transitions.obs}, {})

    config = Config(
        num_envs=3,
        num_steps=6,
        num_minibatches=2,
        num_epochs=1,
        hidden_sizes=(4,),
        normalize_obs=True,
    )
    trainer = make_trainer(config, env=counter(), reward_fn=Reward(lambda config: (), report_obs))
    step = jax.jit(trainer.step, compiler_options={"xla_backend_optimization_level": 0})
    state = jax.jit(trainer.init)(jax.random.key(0))
    raw = []
    for _ in range(3):
        before = state.normalizer.obs
        state, metrics = step(state)
        obs = np.asarray(metrics.extra["obs"]).reshape(-1, 3)
        deviation = np.sqrt(np.asarray(before.variance) + EPSILON)
        raw.append(obs * deviation + np.asarray(before.mean))
        all_obs = np.concatenate(raw)
        assert state.normalizer.obs.samples == len(all_obs)
        np.testing.assert_allclose(state.normalizer.obs.mean, all_obs.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            state.normalizer.obs.variance, all_obs.var(0), rtol=1e-3, atol=1e-5
        )
    times = raw[0][:, 1]
    # The first rollout is not normalised, and the raw time of every other one is an integer.
    np.testing.assert_allclose(times, np.round(times), atol=1e-5)
    assert np.abs(raw[-1][:, 1] - np.round(raw[-1][:, 1])).max() < 1e-3
