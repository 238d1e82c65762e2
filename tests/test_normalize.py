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
    """Whatever the offset: Σx² − (Σx)² / n would lose every digit."""
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


def test_merging_nothing_changes_nothing_and_nothing_seen_leaves_observations_alone():
    seen = moments_of(jnp.asarray([[1.0, 2.0], [3.0, 6.0]]))
    for merged in (merge(seen, no_moments((2,))), merge(no_moments((2,)), seen)):
        jax.tree.map(np.testing.assert_array_equal, merged, seen)
    obs = jnp.asarray([[1.5, -2.0]])
    np.testing.assert_allclose(normalize_obs(no_moments((2,)), obs), obs, rtol=1e-6)
    assert normalize_obs(None, obs) is obs


def test_observations_are_standardised_and_cut_at_10_deviations():
    seen = moments_of(jnp.asarray([[1.0], [3.0]]))  # mean 2, deviation 1
    out = normalize_obs(seen, jnp.asarray([[2.0], [3.5], [1e6], [-1e6]]))
    np.testing.assert_allclose(out[:, 0], [0.0, 1.5, 10.0, -10.0], rtol=1e-5)


def test_the_reward_normaliser_equals_a_loop():
    """The terminal reward counts in the return, which is forgotten after it and not before (PureJaxRL, rejax)."""
    rng = np.random.default_rng(0)
    gamma = 0.9
    T = 12
    B = 3
    running = np.zeros(B)
    returns = []
    ended = np.ones(B, bool)
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
                scale, reward, np.concatenate([ended[None], done[:-1]]), gamma
            )
            ended = done[-1]
            expected = np.clip(reward / np.sqrt(np.var(returns) + EPSILON), -10, 10)
            np.testing.assert_allclose(scaled, expected, rtol=1e-10)
            going = ~done[-1]  # of an ended episode it is forgotten when the next one begins
            np.testing.assert_allclose(
                scale.discounted_return[going], running[going], rtol=1e-12, atol=1e-12
            )
            np.testing.assert_allclose(scale.moments.mean, np.mean(returns), rtol=1e-12)


def test_a_terminal_reward_counts_in_its_own_episode_only():
    """Reward 5 at the end of an episode, then 1 in the next: the returns are 5 and 1, not 0 and 1 + γ · 5."""
    _, scale = normalize_reward(
        init_normalizer(jnp.zeros((1, 1)), SPACE, False, True).reward,
        jnp.asarray([[5.0], [1.0]]),
        jnp.asarray([[True], [True]]),
        0.9,
    )
    np.testing.assert_allclose(scale.moments.mean, 3.0, rtol=1e-6)
    np.testing.assert_allclose(scale.moments.variance, 4.0, rtol=1e-6)
    np.testing.assert_allclose(scale.discounted_return, [1.0], rtol=1e-6)


def test_returns_of_steps_that_do_not_exist_do_not_count():
    """Rewards 1, 2 | 100, 100 of which the last two come after the end, and a row of 3, 4, 5, 6 that goes on."""
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


def test_statistics_are_merged_after_the_update_and_equal_those_of_what_was_seen():
    """`Transition.obs` has the moments of the earlier rollouts; the state after it has those of all of them."""

    def show(state, transitions, config, frozen):
        return Rewards(transitions.reward, state, {"obs": transitions.obs}, {})

    config = Config(
        num_envs=3,
        num_steps=6,
        num_minibatches=2,
        num_epochs=1,
        hidden_sizes=(4,),
        normalize_obs=True,
    )
    trainer = make_trainer(config, env=counter(), reward_fn=Reward(lambda config: (), show))
    step = jax.jit(trainer.step, compiler_options={"xla_backend_optimization_level": 0})
    state = jax.jit(trainer.init)(jax.random.key(0))
    raw = []
    for _ in range(3):
        before = state.normalizer.obs
        state, metrics = step(state)
        obs = np.asarray(metrics.extra["obs"]).reshape(-1, 3)
        deviation = np.sqrt(np.asarray(before.variance) + EPSILON)
        raw.append(obs * deviation + np.asarray(before.mean))
        everything = np.concatenate(raw)
        assert state.normalizer.obs.samples == len(everything)
        np.testing.assert_allclose(
            state.normalizer.obs.mean, everything.mean(0), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            state.normalizer.obs.variance, everything.var(0), rtol=1e-3, atol=1e-5
        )
    times = raw[0][:, 1]
    np.testing.assert_allclose(
        times, np.round(times), atol=1e-5
    )  # before anything was seen, nothing is normalised
    assert (
        np.abs(raw[-1][:, 1] - np.round(raw[-1][:, 1])).max() < 1e-3
    )  # undone by the old moments, a whole number
