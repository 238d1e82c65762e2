"""Cutting a batch into minibatches, for models with and without memory alike."""

import jax
import jax.numpy as jnp

from purejaxppo.types import Batch, PRNGKey


def as_sequences(batch: Batch) -> Batch:
    """The batch as sequences that must stay whole.

    A model with memory has B sequences of T steps. One without sees each step alone: [T, B] becomes [1, N], so that
    minibatches are subsets of axis 1 for every model.
    """
    if jax.tree.leaves(batch.carry):
        return batch
    return jax.tree.map(lambda x: x.reshape((1, -1, *x.shape[2:])), batch)


def shuffled_minibatches(key: PRNGKey, batch: Batch, num_minibatches: int) -> Batch:
    """A random partition of the sequences: [T, B, ...] becomes [M, T, B / M, ...], the carry [M, B / M, ...].

    The order is that of 32 random bits for each sequence. `jax.random.permutation` sorts a second time where there are
    more than 1,600, against ties: here one pair in 2³² keeps its order, and the most expensive part costs half.
    """
    priority = jax.random.bits(key, batch.mask.shape[1:], jnp.uint32)
    order = jnp.argsort(priority).reshape(num_minibatches, -1)
    minibatches = jax.tree.map(lambda x: jnp.moveaxis(x[:, order], 1, 0), batch._replace(carry=()))
    return minibatches._replace(carry=jax.tree.map(lambda x: x[order], batch.carry))
