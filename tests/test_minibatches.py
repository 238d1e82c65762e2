"""Shuffling and cutting into minibatches: everything once, in a uniformly random order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxppo.types import Batch
from purejaxppo.updates.minibatches import random_order, shuffled_minibatches

KEY = jax.random.key(11)


@pytest.mark.parametrize("n", [1, 7, 512, 2**16, 2**16 + 1, 100_000])
def test_a_random_order_has_every_number_once(n):
    order = np.asarray(random_order(KEY, n))
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    assert n < 512 or (order == np.arange(n)).mean() < 0.02


def test_every_number_is_equally_likely_in_every_place():
    n, draws = 8, 40_000
    orders = np.asarray(jax.vmap(lambda key: random_order(key, n))(jax.random.split(KEY, draws)))
    frequency = np.stack([np.bincount(place, minlength=n) for place in orders.T]) / draws
    assert np.abs(frequency - 1 / n).max() < 5 * np.sqrt(1 / n * (1 - 1 / n) / draws)
    follows = (orders[:, 1:] == orders[:, :-1] + 1).any(axis=1).mean()
    expected = 1 - 16687 / 40320  # orders of 8 without a number followed by the next one: OEIS A000255(7)
    assert follows == pytest.approx(expected, abs=5 * np.sqrt(expected * (1 - expected) / draws))


def test_minibatches_are_a_partition_and_rows_stay_together():
    T, B, M = 3, 12, 4
    ids = jnp.arange(T * B).reshape(T, B)
    batch = Batch(*[ids] * 9, carry=(jnp.arange(B),))
    minibatches = shuffled_minibatches(KEY, batch, M)
    assert minibatches.obs.shape == (M, T, B // M) and minibatches.carry[0].shape == (M, B // M)
    columns = np.asarray(minibatches.carry[0])
    np.testing.assert_array_equal(np.sort(columns.ravel()), np.arange(B))
    for field in minibatches[:-1]:
        np.testing.assert_array_equal(field, np.arange(T)[None, :, None] * B + columns[:, None, :])
