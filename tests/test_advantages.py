"""GAE against its definition, a double loop, on random data with terminations and truncations."""

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from purejaxppo.advantages import gae

jitted_gae = jax.jit(gae)
shapes = st.sampled_from([(1, 1), (2, 3), (7, 2), (12, 3)])
fractions = st.floats(0, 1)


def random_data(seed, shape, end_rate=0.3):
    """reward, value, next_value, terminated, truncated: [T, B].

    ``next_value[t]`` is ``value[t + 1]`` wherever no episode ends.
    """
    rng = np.random.default_rng(seed)
    reward, value, next_value = rng.normal(size=(3, *shape))
    terminated, truncated = rng.random((2, *shape)) < end_rate / 2
    truncated &= ~terminated
    is_inside = ~(terminated | truncated)[:-1]
    next_value[:-1] = np.where(is_inside, value[1:], next_value[:-1])
    return reward, value, next_value, terminated, truncated


def td_errors(reward, value, next_value, terminated, gamma):
    return reward + gamma * np.where(terminated, 0, next_value) - value


def gae64(*arguments):
    with jax.enable_x64(True):
        advantage, target = jitted_gae(*arguments)
    assert advantage.dtype == np.float64
    return np.asarray(advantage), np.asarray(target)


@given(st.integers(0, 2**32 - 1), shapes, fractions, fractions)
def test_gae_equals_the_double_loop(seed, shape, gamma, lambda_):
    data = random_data(seed, shape)
    reward, value, next_value, terminated, truncated = data
    delta = td_errors(reward, value, next_value, terminated, gamma)
    expected = np.zeros(shape)
    for b in range(shape[1]):
        for t in range(shape[0]):
            for k in range(t, shape[0]):
                expected[t, b] += (gamma * lambda_) ** (k - t) * delta[k, b]
                if terminated[k, b] or truncated[k, b]:
                    break

    advantage, target = gae64(*data, gamma, lambda_)

    np.testing.assert_allclose(advantage, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(target, expected + value, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**32 - 1), shapes, fractions)
def test_lambda_0_is_the_td_error(seed, shape, gamma):
    data = random_data(seed, shape)
    advantage, _ = gae64(*data, gamma, 0.0)
    np.testing.assert_allclose(advantage, td_errors(*data[:4], gamma), rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**32 - 1), shapes, fractions)
def test_lambda_1_is_the_return_with_bootstrap_minus_the_value(seed, shape, gamma):
    data = random_data(seed, shape)
    reward, value, next_value, terminated, truncated = data
    expected = np.zeros(shape)
    for b in range(shape[1]):
        for t in range(shape[0]):
            for k in range(t, shape[0]):
                expected[t, b] += gamma ** (k - t) * reward[k, b]
                last = terminated[k, b] or truncated[k, b] or k == shape[0] - 1
                if last:
                    expected[t, b] += gamma ** (k - t + 1) * (
                        0 if terminated[k, b] else next_value[k, b]
                    )
                    break
    advantage, target = gae64(*data, gamma, 1.0)
    np.testing.assert_allclose(advantage, expected - value, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(target, expected, rtol=1e-12, atol=1e-12)


def test_advantages_in_a_literal_example():
    """Two steps, the second truncated at a successor of value 4; then a step that terminates.

    The value of the terminal successor, 100, has no effect.
    """
    reward = np.array([[1.0], [2.0], [3.0]])
    value = np.array([[0.5], [1.0], [2.0]])
    next_value = np.array([[1.0], [4.0], [100.0]])
    terminated = np.array([[False], [False], [True]])
    truncated = np.array([[False], [True], [False]])
    advantage, target = gae64(reward, value, next_value, terminated, truncated, 0.5, 0.5)
    # δ = 1 + .5·1 − .5 = 1;  2 + .5·4 − 1 = 3;  3 − 2 = 1.  Â = 1 + .25·3, 3, 1.
    np.testing.assert_allclose(advantage[:, 0], [1.75, 3.0, 1.0], rtol=1e-15)
    np.testing.assert_allclose(target[:, 0], [2.25, 4.0, 3.0], rtol=1e-15)


def test_advantages_do_not_cross_episodes_or_environments():
    """Data after a boundary change nothing before it. PufferLib 2024, Stoix issue 142: they do."""
    end = 4
    for ending in ("terminated", "truncated"):
        reward, value, next_value, terminated, truncated = random_data(3, (9, 3), end_rate=0.0)
        (terminated if ending == "terminated" else truncated)[end, 1] = True
        before, _ = gae64(reward, value, next_value, terminated, truncated, 0.99, 0.95)
        reward[end + 1 :, 1] += 1e6
        value[end + 1 :, 1] -= 1e6
        after, _ = gae64(reward, value, next_value, terminated, truncated, 0.99, 0.95)
        np.testing.assert_array_equal(after[: end + 1], before[: end + 1])
        np.testing.assert_array_equal(after[:, [0, 2]], before[:, [0, 2]])
        assert np.abs(after[end + 1 :, 1] - before[end + 1 :, 1]).min() > 1e5
