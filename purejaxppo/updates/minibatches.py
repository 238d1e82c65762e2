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
    """A random partition of the sequences: [T, B, ...] becomes [M, T, B / M, ...], the carry [M, B / M, ...]."""
    order = jax.random.permutation(key, batch.mask.shape[1]).reshape(num_minibatches, -1)
    minibatches = jax.tree.map(lambda x: jnp.moveaxis(x[:, order], 1, 0), batch._replace(carry=()))
    return minibatches._replace(carry=jax.tree.map(lambda x: x[order], batch.carry))
