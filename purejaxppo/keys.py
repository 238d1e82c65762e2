"""Random keys in operations that `jax_debug_key_reuse` would count as a use of them, though no number is drawn.

The checker knows what split, slices and reshapes do to a key. `select` and the transposition that `vmap` makes of what
a `scan` runs over it takes for a second use. Here keys go through these as the integers that they are made of.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from purejaxppo.types import PRNGKey, PyTree

Carry = TypeVar("Carry")


def is_typed(x: Any) -> bool:
    """Whether it is an array of `jax.random.key`s, and not the plain integers of `jax.random.PRNGKey`."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def select(condition: Bool[Array, "..."], new: Shaped[Array, "..."], old: Shaped[Array, "..."]) -> Array:
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
