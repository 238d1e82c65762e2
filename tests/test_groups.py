"""GRPO, RLOO, the reductions of the loss and the asymmetric clip, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentences import sentence_of
from small_envs import LINEAR, clock, counter, linear_model

from purejaxppo import Config, losses, make_train
from purejaxppo.advantages import ADVANTAGES, group_relative, leave_one_out
from purejaxppo.types import Transition

seeds = st.integers(0, 2**32 - 1)
jitted_grpo = jax.jit(group_relative, static_argnums=(2, 3))
jitted_rloo = jax.jit(leave_one_out, static_argnums=2)


def numpy_grpo(returns, is_member, group_size, scale):
    """Episode by episode (Shao et al. 2024, section 4.1.2; Liu et al. 2025 without division)."""
    result = np.zeros(len(returns))
    for i in range(len(returns)):
        first = i // group_size * group_size
        group = [returns[j] for j in range(first, first + group_size) if is_member[j]]
        if is_member[i]:
            result[i] = returns[i] - np.mean(group)
            if scale:
                result[i] /= np.std(group) + 1e-4
    return result


def numpy_rloo(returns, is_member, group_size, _=None):
    """Episode by episode (Ahmadian et al. 2024, eq. 6)."""
    result = np.zeros(len(returns))
    for i in range(len(returns)):
        first = i // group_size * group_size
        members = [j for j in range(first, first + group_size) if is_member[j]]
        others = [returns[j] for j in members if j != i]
        if is_member[i] and others:
            result[i] = returns[i] - np.mean(others)
    return result


@given(seeds, st.sampled_from([(12, 2), (12, 3), (12, 4), (12, 12), (12, 1)]), st.booleans())
def test_groups_with_missing_members(seed, sizes, scale):
    """Episodes without a chosen action, whose return is arbitrary, are left out."""
    n, group_size = sizes
    rng = np.random.default_rng(seed)
    returns = 10 * rng.normal(size=n) + 100
    is_member = rng.random(n) < rng.choice([0.2, 0.7, 1.0])
    expected = numpy_grpo(returns, is_member, group_size, scale)
    expected_rloo = numpy_rloo(returns, is_member, group_size)
    for other in (returns, 1e9, np.nan, np.inf, -np.inf):
        given_returns = np.where(is_member, returns, other)
        with jax.enable_x64(True):
            result = jitted_grpo(given_returns, is_member, group_size, scale)
            result_rloo = jitted_rloo(given_returns, is_member, group_size)
        np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(result_rloo, expected_rloo, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("value", [0.1, 0.7, -1 / 3, 1e8, 0.0, 123456.789])
def test_a_group_of_equal_returns_has_advantage_0(x64, value):
    """Exactly, though the rounded mean of equal numbers is often another number."""
    with jax.enable_x64(x64):
        for size in (3, 7, 24):
            returns = np.full(2 * size, value, np.float64 if x64 else np.float32)
            is_member = np.arange(2 * size) != 1
            for scale in (False, True):
                assert not np.any(jitted_grpo(returns, is_member, size, scale))
            assert not np.any(jitted_rloo(returns, is_member, size))


def test_by_hand():
    returns = jnp.asarray([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 1.0])
    everyone = jnp.ones(8, bool)
    undivided = [0.5, -0.5, -0.5, 0.5, 1, 1, 1, -3]
    np.testing.assert_allclose(jitted_grpo(returns, everyone, 4, False), undivided)
    deviation = np.repeat([0.5, np.sqrt(3)], 4)  # with the divisor n
    divided = np.array(undivided) / (deviation + 1e-4)
    np.testing.assert_allclose(jitted_grpo(returns, everyone, 4, True), divided, rtol=1e-6)
    left_out = [2 / 3, -2 / 3, -2 / 3, 2 / 3, 4 / 3, 4 / 3, 4 / 3, -4]
    np.testing.assert_allclose(jitted_rloo(returns, everyone, 4), left_out, rtol=1e-6)


def random_transitions(seed, T=5, B=12):
    """Whole episodes with forced first steps; everything after their end is NaN."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, T + 1, B)
    forced = np.minimum(rng.integers(0, T, B), length)  # some have no chosen action
    t = np.arange(T)[:, None]
    valid = t < length
    reward = np.where(valid, rng.normal(size=(T, B)), np.nan)
    fields = dict.fromkeys(Transition._fields, np.full((T, B), np.nan))
    fields |= {
        "mask": valid & (t >= forced),
        "valid": valid,
        "terminated": t == length - 1,
        "truncated": np.zeros((T, B), bool),
    }
    return Transition(**fields), reward


@functools.partial(jax.jit, static_argnums=0)
def estimate(name, config, transitions, reward):
    return ADVANTAGES[name](config, transitions, reward)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["grpo", "rloo"])
@pytest.mark.parametrize("group_size", [3, 12])
def test_the_estimators_of_rollouts(seed, name, group_size):
    """One advantage for all chosen actions of an episode, from the sum of all its rewards."""
    transitions, reward = random_transitions(seed)
    has_action = transitions.mask.any(axis=0)
    assert not has_action.all()
    returns = np.nansum(reward, axis=0)
    for scale in (False, True):
        config = Config(
            advantage=name, group_size=group_size, normalize_group=scale, num_envs=12, gamma=1.0
        )
        with jax.enable_x64(True):
            advantage, target = estimate(name, config, transitions, reward)
        by_hand = numpy_grpo if name == "grpo" else numpy_rloo
        expected = by_hand(returns, has_action, group_size, scale)
        np.testing.assert_allclose(
            advantage, np.where(transitions.mask, expected, 0), rtol=1e-10, atol=1e-12
        )
        assert np.isfinite(target).all()


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_a_run_without_differences_in_reward_does_not_move(name):
    """Every return is 0.1 + 0.1 + …: all gradients are exactly 0, and no value is fitted."""
    config = Config(advantage=name, group_size=4, num_envs=8, num_steps=5, gamma=1.0)
    config = config.replace(total_episodes=16, num_epochs=1, num_minibatches=1)
    config = config.replace(normalize_advantage=False)
    train = make_train(
        config, clock(limit=5), linear_model(actions=2), lambda t, *_: 0.1 * t.reward
    )
    metrics = jax.jit(train)(jax.random.key(0)).metrics
    assert (metrics.grad_norm == 0).all() and (metrics.episode_return == 5).all()
    assert np.isnan(metrics.value_loss).all() and np.isnan(metrics.explained_variance).all()


# ------------------------------------------------------------------------------------- reductions


def numpy_reduction(name, x, mask):
    """The loss of sequences, token by token."""
    T, B = x.shape
    tokens = [[x[t, b] for t in range(T) if mask[t, b]] for b in range(B)]
    if name == "token":
        flat = [value for sequence in tokens for value in sequence]
        return sum(flat) / len(flat) if flat else 0.0
    if name == "sequence":
        means = [np.mean(sequence) for sequence in tokens if sequence]
        return np.mean(means) if means else 0.0
    return sum(sum(sequence) for sequence in tokens) / (T * B)


@functools.partial(jax.jit, static_argnums=0)
def reduced(name, x, mask):
    return jax.value_and_grad(losses.REDUCTIONS[name])(x, mask)


@given(seeds, st.sampled_from(["token", "sequence", "constant"]), st.sampled_from([0, 0.3, 0.8, 1]))
def test_reductions_equal_loops(seed, name, share):
    """The value and gradient see the mask only, whatever the other entries are."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4, 3))
    mask = rng.random((4, 3)) < share
    expected = numpy_reduction(name, x, mask)
    step = 1e-6
    expected_gradient = np.zeros_like(x)
    for i in np.ndindex(4, 3):
        change = np.zeros_like(x)
        change[i] = step
        expected_gradient[i] = (
            numpy_reduction(name, x + change, mask) - numpy_reduction(name, x - change, mask)
        ) / (2 * step)
    with jax.enable_x64(True):
        for other in (0.0, 1e300, np.nan, np.inf):
            value, gradient = reduced(name, np.where(mask, x, other), mask)
            np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(gradient, expected_gradient, atol=1e-8)


def test_the_reductions_by_hand():
    """Sequences of 1 and 3 tokens, and one without any."""
    x = jnp.asarray([[8.0, 1, 9], [9, 2, 9], [9, 6, 9]])
    mask = jnp.asarray([[1, 1, 0], [0, 1, 0], [0, 1, 0]], bool)
    assert set(losses.REDUCTIONS) == {"token", "sequence", "constant"}
    for name, value in (("token", 17 / 4), ("sequence", (8 + 3) / 2), ("constant", 17 / 9)):
        np.testing.assert_allclose(losses.REDUCTIONS[name](x, mask), value, rtol=1e-6)


def numpy_clipped(ratio, advantage, low, high):
    """Schulman et al. 2017, eq. 7, with two bounds (Yu et al. 2025, section 3.1)."""
    clipped = max(min(ratio, 1 + high), 1 - low)
    return min(ratio * advantage, clipped * advantage)


@functools.partial(jax.jit, static_argnums=0)
def clipped(name, ratio, advantage, mask, low, high):
    def surrogate(ratio):
        mean = losses.REDUCTIONS[name]
        value = losses.clipped_surrogate(ratio, advantage, mask, low, high, mean)
        return value, losses.clip_fraction(ratio, mask, low, high)

    (value, fraction), gradient = jax.value_and_grad(surrogate, has_aux=True)(ratio)
    return (value, fraction), gradient


@given(
    seeds, st.sampled_from(["token", "sequence", "constant"]), st.sampled_from([None, 0.05, 0.6])
)
def test_the_clipped_surrogate(seed, name, high):
    rng = np.random.default_rng(seed)
    ratio = np.exp(0.5 * rng.normal(size=(4, 3)))
    advantage = rng.normal(size=(4, 3))
    mask = rng.random((4, 3)) < 0.7
    upper = 0.2 if high is None else high
    terms = np.vectorize(numpy_clipped)(ratio, advantage, 0.2, upper)
    outside = (ratio > 1 + upper) | (ratio < 0.8)
    # The gradient is the advantage, except where the clip makes the term constant.
    is_clipped = np.where(advantage > 0, ratio > 1 + upper, ratio < 0.8)
    weights = np.array(
        [numpy_reduction(name, np.eye(12)[i].reshape(4, 3), mask) for i in range(12)]
    ).reshape(4, 3)
    with jax.enable_x64(True):
        (value, fraction), gradient = clipped(
            name, ratio, np.where(mask, advantage, np.nan), mask, 0.2, high
        )
    np.testing.assert_allclose(value, numpy_reduction(name, terms, mask), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(gradient, weights * advantage * ~is_clipped, atol=1e-12)
    np.testing.assert_allclose(fraction, numpy_reduction("token", 1.0 * outside, mask), rtol=1e-12)


# ------------------------------------------------------------------------------------------ errors


GROUPS = {"advantage": "grpo", "group_size": 4, "num_envs": 8, "gamma": 1.0}
GROUPS |= {"num_steps": 8, "num_minibatches": 1, "num_epochs": 1}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"group_size": 1}, ["group_size = 1", "'grpo'", "at least 2"]),
        ({"group_size": 1, "advantage": "rloo"}, ["group_size = 1", "'rloo'", "at least 2"]),
        ({"gamma": 0.99}, ["gamma = 0.99", "'grpo'", "gamma=1"]),
        ({"gamma": 0.99, "advantage": "rloo"}, ["gamma = 0.99", "'rloo'", "gamma=1"]),
        ({"gamma": np.array([1.0, 0.9])}, ["gamma", "gamma=1"]),
        ({"group_size": 3}, ["group_size = 3 does not divide num_envs = 8"]),
        ({"algorithm": "trpo", "loss_reduction": "sequence"}, ["loss_reduction", "ppo only"]),
        ({"algorithm": "reinforce", "loss_reduction": "constant"}, ["loss_reduction", "ppo only"]),
        ({"algorithm": "trpo", "clip_eps_high": 0.3}, ["clip_eps_high = 0.3", "ppo only"]),
        ({"loss_reduction": "sequence"}, ["loss_reduction = 'sequence'", "memory", "'token'"]),
        ({"loss_reduction": "constant"}, ["loss_reduction = 'constant'", "memory", "'token'"]),
        ({"loss_reduction": "tokens"}, ["loss_reduction = 'tokens'", "did you mean 'token'?"]),
        ({"algorithm": "reinforce", "baseline": "none"}, ["baseline = 'none'", "baseline"]),
        ({"num_steps": 3}, ["num_steps = 3", "num_steps=5"]),
    ],
)
def test_errors_are_one_sentence(changes, parts):
    config = Config(**GROUPS).replace(**changes)
    sentence = sentence_of(lambda: make_train(config, counter(), LINEAR))
    assert all(part in sentence for part in parts), sentence


def test_the_settings_without_the_mistakes_are_accepted():
    for changes in ({}, {"advantage": "rloo"}, {"group_size": 8}, {"algorithm": "trpo"}):
        make_train(Config(**GROUPS).replace(**changes), counter(), LINEAR)
