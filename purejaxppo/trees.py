"""Pytrees as named arrays, the form in which files store them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from purejaxppo.types import ConfigError, PyTree


def named_leaves(tree: PyTree, separator: str = "/") -> dict[str, Any]:
    """The leaves by path, such as ``policy/head/bias``, in the order of `jax.tree.leaves`.

    Empty containers have no leaves and therefore no names; `from_named` takes them from a tree of
    the same structure. If two paths have the same name, as in ``{"a": {"b": x}, "a/b": y}``, a
    prime is appended to the name of the later leaf.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=separator)
        while name in named:
            name += "'"
        named[name] = leaf
    return named


def from_named(named: Mapping[str, Any], like: PyTree, separator: str = "/") -> PyTree:
    """The inverse of `named_leaves`: a tree with the structure of ``like`` and these leaves."""
    leaves = [named[name] for name in named_leaves(like, separator)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def all_finite(tree: PyTree, num_axes: int = 0) -> Array:
    """Whether all numbers are finite, for each element of the first ``num_axes`` axes."""
    leaves = [
        jnp.isfinite(x).all(axis=tuple(range(num_axes, x.ndim))) for x in jax.tree.leaves(tree)
    ]
    return jnp.stack(leaves).all(axis=0)


def require_trainable(params: PyTree) -> None:
    """Raise `ConfigError` unless all leaves are floating-point arrays, and there is at least one.

    Other arrays have no gradient and are not saved.
    """
    named = named_leaves(params)
    if not named:
        raise ConfigError("the model has no parameters: there is nothing to train")
    for name, x in named.items():
        dtype = jnp.result_type(x)
        if not jnp.issubdtype(dtype, np.floating):
            raise ConfigError(
                f"the parameter {name!r} has the type {dtype}: "
                "parameters must be floating-point arrays"
            )


def is_extended(dtype: Any) -> bool:
    """Whether the type is not NumPy's own (bfloat16, for example), so files cannot identify it."""
    return np.dtype(dtype).isbuiltin != 1


def as_stored(x: Any) -> NDArray[Any]:
    """The array in a native NumPy type: bfloat16 and narrower floats as float32, exactly."""
    array = np.asarray(x)
    return array.astype(np.float32) if is_extended(array.dtype) else array
