"""Creation of random keys, and operations on keys that `jax_debug_key_reuse` accepts.

The key-reuse checker understands split, slices and reshapes. It counts `select`, and the transpose
that `vmap` applies to the keys of a `scan`, as a second use, although no number is drawn. The
functions below therefore apply these operations to the integers of the keys.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

from purejaxppo.types import PRNGKey, PyTree
from purejaxppo.validation import integer, wrong

Carry = TypeVar("Carry")


def random_key(key: Any) -> tuple[jax.Array, Any]:
    """A typed key from an integer, a key or the integers of `jax.random.PRNGKey`.

    Also returns its description for JSON: the integer, or the key data as a list. The key has the
    implementation ``jax_default_prng_impl``: two integers for threefry, four for rbg. Raises
    `ConfigError` for anything else.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        number = integer("key", int(key), 0)
        return jax.random.key(number), number
    if isinstance(key, jax.Array | np.ndarray):
        like = jax.eval_shape(lambda: jax.random.key(0))
        integers = jax.eval_shape(jax.random.key_data, like)
        if key.dtype == integers.dtype and key.shape == integers.shape:
            key = jax.random.wrap_key_data(jax.numpy.asarray(key))
        if key.dtype == like.dtype and key.shape == ():
            return key, np.asarray(jax.random.key_data(key)).tolist()
    kind = f"JAX's default kind, {default_prng_impl()}"
    raise wrong("key", key, f"an integer of at least 0, or one random key of {kind}")


def default_prng_impl() -> str:
    """The implementation of random keys that ``jax_default_prng_impl`` names."""
    return jax.config.jax_default_prng_impl  # type: ignore[attr-defined]


def is_typed(x: Any) -> bool:
    """Whether ``x`` is an array of `jax.random.key`s, not the integers of `jax.random.PRNGKey`."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def select(
    condition: Bool[Array, "..."], new: Shaped[Array, "..."], old: Shaped[Array, "..."]
) -> Array:
    """``jnp.where`` that also accepts keys; ``condition`` has their shape or is a scalar."""
    if not is_typed(new):
        return jnp.where(condition, new, old)
    data = jnp.where(condition[..., None], jax.random.key_data(new), jax.random.key_data(old))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(new))


def first_key(keys: PRNGKey) -> PRNGKey:
    """``keys[0]``, into which numbers can be folded while ``keys`` are used elsewhere."""
    if not is_typed(keys):
        return keys[0]
    return jax.random.wrap_key_data(jax.random.key_data(keys)[0], impl=jax.random.key_impl(keys))


def scan_keys(
    body: Callable[[Carry, PRNGKey], tuple[Carry, PyTree]], start: Carry, keys: PRNGKey
) -> tuple[Carry, PyTree]:
    """``jax.lax.scan(body, start, keys)`` over the first axis of the keys."""
    if not is_typed(keys):
        return jax.lax.scan(body, start, keys)
    implementation = jax.random.key_impl(keys)

    def body_of_data(carry: Carry, data: Array) -> tuple[Carry, PyTree]:
        return body(carry, jax.random.wrap_key_data(data, impl=implementation))

    return jax.lax.scan(body_of_data, start, jax.random.key_data(keys))
