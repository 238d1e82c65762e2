"""Random keys: made from what a user gives, and moved around without `jax_debug_key_reuse` counting it as a use.

The checker knows what split, slices and reshapes do to a key. `select`, and the transposition that `vmap` makes of the
keys that a `scan` runs over, it takes for a second use, although no number is drawn. Here keys go through these as the
integers that they are made of.
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
    """A key of JAX from an integer, a key or the integers of `jax.random.PRNGKey`; and what describes it.

    It is of the kind that ``jax_default_prng_impl`` says: of two integers with threefry, of four with rbg.
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
    """The implementation of random keys that ``jax_default_prng_impl`` says."""
    return jax.config.jax_default_prng_impl  # type: ignore[attr-defined]


def is_typed(x: Any) -> bool:
    """Whether it is an array of `jax.random.key`s, and not the plain integers of `jax.random.PRNGKey`."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def select(
    condition: Bool[Array, "..."], new: Shaped[Array, "..."], old: Shaped[Array, "..."]
) -> Array:
    """``jnp.where`` for arrays of any kind; ``condition`` has the shape of both, or is one number."""
    if not is_typed(new):
        return jnp.where(condition, new, old)
    data = jnp.where(condition[..., None], jax.random.key_data(new), jax.random.key_data(old))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(new))


def first_key(keys: PRNGKey) -> PRNGKey:
    """``keys[0]``, to fold numbers into while the keys are used for something else."""
    if not is_typed(keys):
        return keys[0]
    return jax.random.wrap_key_data(jax.random.key_data(keys)[0], impl=jax.random.key_impl(keys))


def scan_keys(
    body: Callable[[Carry, PRNGKey], tuple[Carry, PyTree]], start: Carry, keys: PRNGKey
) -> tuple[Carry, PyTree]:
    """``jax.lax.scan(body, start, keys)``, the first axis of the keys first."""
    if not is_typed(keys):
        return jax.lax.scan(body, start, keys)
    implementation = jax.random.key_impl(keys)

    def body_of_data(carry: Carry, data: Array) -> tuple[Carry, PyTree]:
        return body(carry, jax.random.wrap_key_data(data, impl=implementation))

    return jax.lax.scan(body_of_data, start, jax.random.key_data(keys))
