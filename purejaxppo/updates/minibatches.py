"""Cutting a batch into minibatches, for models with and without memory alike."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from purejaxppo.types import Batch, PRNGKey, PyTree


def as_sequences(batch: Batch) -> Batch:
    """The batch as sequences that must stay whole.

    A model with memory has B sequences of T steps. One without sees each step alone: [T, B] becomes [1, N], so that
    minibatches are subsets of axis 1 for every model.
    """
    if jax.tree.leaves(batch.carry):
        return batch
    return jax.tree.map(lambda x: x.reshape((1, -1, *x.shape[2:])), batch)


def shuffled_minibatches(key: PRNGKey, batch: Batch, num_minibatches: int, beside: PyTree = ()) -> tuple[Batch, PyTree]:
    """A random partition of the sequences: [T, B, ...] becomes [M, T, B / M, ...], the carry [M, B / M, ...].

    ``beside`` holds further arrays [T, B, ...], which are cut in the same way.
    """
    order = random_order(key, batch.mask.shape[1]).reshape(num_minibatches, -1)
    parts = jax.tree.map(lambda x: jnp.moveaxis(x[:, order], 1, 0), (batch._replace(carry=()), beside))
    return parts[0]._replace(carry=jax.tree.map(lambda x: x[order], batch.carry)), parts[1]


def random_order(key: PRNGKey, n: int) -> Int[Array, "n"]:
    """The numbers 0 … n − 1 in the order of random bits drawn for each: 16, or 32 above n = 2¹⁶.

    Equal bits keep their order, which moves no number by more than a few places. Up to 2¹⁶ the bits and the number
    share one integer, because XLA sorts integers two (JAX 0.11) to six times (0.9) faster on a CPU than pairs of them;
    `jax.random.permutation` sorts pairs, twice above 1,600.
    """
    bits = jax.random.bits(key, (n,), jnp.uint32)
    if n > 2**16:
        return jnp.argsort(bits)
    return (jnp.sort(bits >> 16 << 16 | jnp.arange(n, dtype=jnp.uint32)) & 0xFFFF).astype(jnp.int32)
