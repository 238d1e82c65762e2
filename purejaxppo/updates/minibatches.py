"""Cutting a batch into minibatches, for models with and without memory alike."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from purejaxppo.shards import join_shards, split_shards
from purejaxppo.types import Batch, PRNGKey, PyTree


def as_sequences(batch: Batch, num_shards: int = 1) -> Batch:
    """The batch as sequences that must stay whole, shard after shard.

    A model with memory has B sequences of T steps. One without sees each step alone: [T, B] becomes [1, N], so that
    minibatches are subsets of axis 1 for every model.
    """
    if jax.tree.leaves(batch.carry):
        return batch
    shards = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0), split_shards(batch, num_shards, axis=1)
    )  # [S, T, B / S]
    return jax.tree.map(lambda x: x.reshape((1, -1, *x.shape[3:])), shards)


def shuffled_minibatches(
    key: PRNGKey, batch: Batch, num_minibatches: int, num_shards: int = 1
) -> Batch:
    """A random partition of the sequences: [T, B, ...] becomes [M, T, B / M, ...], the carry [M, B / M, ...].

    Every minibatch has equally many sequences of each shard, in a random order of that shard's own, so that none has
    to go to another device. The extras of the batch are cut in the same way.
    """
    order = shard_permutations(key, batch.mask.shape[1], num_shards)
    rows = jnp.moveaxis(order.reshape(num_shards, num_minibatches, -1), 1, 0)  # [M, S, B / S / M]
    return jax.vmap(lambda rows: take_sequences(rows, batch))(rows)


def take_sequences(rows: Int[Array, "S k"], batch: Batch) -> Batch:
    """The sequences of each shard with the numbers in its row: [T, B, ...] becomes [T, S · k, ...]."""

    def along(axis: int, arrays: PyTree) -> PyTree:
        def take(x: Array) -> Array:
            # XLA's CPU back end copies a row with one axis faster than the same row with several.
            shards = split_shards(x, rows.shape[0], axis)
            flat = shards.reshape((*shards.shape[: axis + 2], -1))
            index = (slice(None),) * axis
            taken = jax.vmap(lambda x, row: x[(*index, row)], in_axes=(axis, 0), out_axes=axis)
            joined = join_shards(taken(flat, rows), axis)
            return joined.reshape((*joined.shape[: axis + 1], *x.shape[axis + 1 :]))

        return jax.tree.map(take, arrays)

    chosen = along(1, batch._replace(carry=()))
    return chosen._replace(carry=along(0, batch.carry))


def shard_permutations(key: PRNGKey, n: int, num_shards: int = 1) -> Int[Array, "S k"]:
    """For each shard a random order of its own of 0 … n / S − 1."""
    keys = key[None] if num_shards == 1 else jax.random.split(key, num_shards)
    return jax.vmap(lambda key: random_order(key, n // num_shards))(keys)


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
