"""The random order of an epoch is a uniform permutation. test_ppo.py tests the minibatches."""

import jax
import numpy as np
import pytest

from purejaxppo.updates.minibatches import random_order

KEY = jax.random.key(11)


@pytest.mark.parametrize("n", [1, 7, 512, 2**16, 2**16 + 1, 100_000])
def test_a_random_order_has_every_number_once(n):
    order = np.asarray(random_order(KEY, n))
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    assert n < 512 or (order == np.arange(n)).mean() < 0.02


def test_every_number_is_equally_likely_in_every_place():
    n = 8
    draws = 40_000
    orders = np.asarray(jax.vmap(lambda key: random_order(key, n))(jax.random.split(KEY, draws)))
    frequency = np.stack([np.bincount(place, minlength=n) for place in orders.T]) / draws
    assert np.abs(frequency - 1 / n).max() < 5 * np.sqrt(1 / n * (1 - 1 / n) / draws)
    follows = (orders[:, 1:] == orders[:, :-1] + 1).any(axis=1).mean()
    # 16687 of the 8! orders have no number followed by the next one: OEIS A000255(7).
    expected = 1 - 16687 / 40320
    assert follows == pytest.approx(expected, abs=5 * np.sqrt(expected * (1 - expected) / draws))
