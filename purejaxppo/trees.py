"""Pytrees as arrays with names, which is how files hold them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from purejaxppo.types import ConfigError, PyTree


def named_leaves(tree: PyTree, separator: str = "/") -> dict[str, Any]:
    """The leaves by their paths, such as ``policy/head/bias``, in the order of `jax.tree.leaves`.

    Empty containers have no leaves and so no names: `from_named` takes them from a tree of the same
    structure. Where two paths read the same, as in ``{"a": {"b": x}, "a/b": y}``, a prime is added to the
    name of the later leaf.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=separator)
        while name in named:
            name += "'"
        named[name] = leaf
    return named


def from_named(named: Mapping[str, Any], like: PyTree, separator: str = "/") -> PyTree:
    """The leaves of these names as a tree of the structure of ``like``."""
    leaves = [named[name] for name in named_leaves(like, separator)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def require_trainable(params: PyTree) -> None:
    """Raise `ConfigError` unless these are floating-point arrays: others have no gradient and are not saved."""
    named = named_leaves(params)
    if not named:
        raise ConfigError("the model has no parameters: there is nothing to train")
    for name, x in named.items():
        dtype = jnp.result_type(x)
        if not jnp.issubdtype(dtype, np.floating):
            raise ConfigError(
                f"the parameter {name!r} has the type {dtype}: parameters must be floating-point arrays"
            )


def is_extended(dtype: Any) -> bool:
    """Whether NumPy has this type from elsewhere, as it has bfloat16, and files cannot tell it."""
    return np.dtype(dtype).isbuiltin != 1


def as_stored(x: Any) -> NDArray[Any]:
    """The array in a type of NumPy's own: bfloat16 and narrower floats as float32, which is exact."""
    array = np.asarray(x)
    return array.astype(np.float32) if is_extended(array.dtype) else array
