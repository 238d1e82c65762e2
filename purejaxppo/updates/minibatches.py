"""Minibatches of a batch, for models with and without memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from purejaxppo.shards import join_shards, split_shards
from purejaxppo.types import Batch, PRNGKey, PyTree


def as_sequences(batch: Batch, num_shards: int = 1) -> Batch:
    """The batch as sequences along axis 1, which minibatches must not split.

    A model with memory has B sequences of T steps, and the batch stays as it is. Without memory
    each step is a sequence: [T, B] becomes [1, T · B], shard after shard.
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
    """A random partition of the sequences into M minibatches.

    [T, B, ...] becomes [M, T, B / M, ...], and the carry [B, ...] becomes [M, B / M, ...]. Every
    minibatch has the same number of sequences from each shard. Each shard has its own random
    permutation, so that no sequence moves to another device. The extras of the batch are
    partitioned in the same way.
    """
    order = shard_permutations(key, batch.mask.shape[1], num_shards)
    indices = jnp.moveaxis(
        order.reshape(num_shards, num_minibatches, -1), 1, 0
    )  # [M, S, B / S / M]
    return jax.vmap(lambda indices: take_sequences(indices, batch))(indices)


def take_sequences(indices: Int[Array, "S k"], batch: Batch) -> Batch:
    """From shard s take the sequences ``indices[s]``: [T, B, ...] becomes [T, S · k, ...]."""

    def take_along(axis: int, arrays: PyTree) -> PyTree:
        def take(x: Array) -> Array:
            # On CPUs, XLA copies rows with one axis faster than rows with several axes.
            shards = split_shards(x, indices.shape[0], axis)
            flat = shards.reshape((*shards.shape[: axis + 2], -1))
            leading = (slice(None),) * axis
            take_rows = jax.vmap(
                lambda x, index: x[(*leading, index)], in_axes=(axis, 0), out_axes=axis
            )
            joined = join_shards(take_rows(flat, indices), axis)
            return joined.reshape((*joined.shape[: axis + 1], *x.shape[axis + 1 :]))

        return jax.tree.map(take, arrays)

    taken = take_along(1, batch._replace(carry=()))
    return taken._replace(carry=take_along(0, batch.carry))


def shard_permutations(key: PRNGKey, n: int, num_shards: int = 1) -> Int[Array, "S k"]:
    """An independent random permutation of 0 … n / S − 1 for each of S shards."""
    keys = key[None] if num_shards == 1 else jax.random.split(key, num_shards)
    return jax.vmap(lambda key: random_order(key, n // num_shards))(keys)


def random_order(key: PRNGKey, n: int) -> Int[Array, "n"]:
    """A random permutation of 0 … n − 1, sorted by random bits: 16 per number, 32 if n > 2¹⁶.

    Numbers with equal bits keep their order. This displaces a number by a few places at most. Up to
    n = 2¹⁶ one integer holds both the bits and the number, because XLA sorts integers on a CPU two
    (JAX 0.11) to six times (JAX 0.9) faster than pairs. `jax.random.permutation` sorts pairs, and
    does so twice for n > 1,600.
    """
    bits = jax.random.bits(key, (n,), jnp.uint32)
    if n > 2**16:
        return jnp.argsort(bits)
    return (jnp.sort(bits >> 16 << 16 | jnp.arange(n, dtype=jnp.uint32)) & 0xFFFF).astype(jnp.int32)
