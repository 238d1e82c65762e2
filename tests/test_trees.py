"""Any pytree of floating-point arrays becomes named arrays, and can be rebuilt from them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from purejaxppo.trees import as_stored, from_named, is_extended, named_leaves, require_trainable
from purejaxppo.types import ConfigError


class Layer(NamedTuple):
    w: object
    b: object


KEYS = st.sampled_from(["a", "b", "a/b", "a.b", "a'", "", "/", "0"])
TREES = st.recursive(
    st.integers(0, 99),
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(st.integers(0, 2), inner, max_size=3),
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(Layer, inner, st.none() | inner),
    ),
    max_leaves=12,
)


@given(TREES, st.sampled_from([".", "/"]))
def test_every_tree_is_rebuilt_from_its_named_leaves(tree, separator):
    named = named_leaves(tree, separator)
    assert list(named.values()) == jax.tree.leaves(tree)
    shuffled = dict(sorted(named.items(), key=lambda pair: pair[0][::-1]))
    assert from_named(shuffled, tree, separator) == tree


def test_names_are_paths_and_equal_paths_get_different_names():
    tree = {"policy": {"head": [1, Layer(2, {})]}, "value": (), "policy/head": {"0": 3}, 7: 4}
    tree = {str(key): x for key, x in tree.items()}
    assert named_leaves(tree) == {
        "7": 4,
        "policy/head/0": 1,
        "policy/head/1/w": 2,
        "policy/head/0'": 3,
    }
    assert named_leaves({"a": {"b": 1}, "a.b": 2}, ".") == {"a.b": 1, "a.b'": 2}
    assert named_leaves({"a": {"b": 1}, "a/b": 2, "a/b'": 3}) == {"a/b": 1, "a/b'": 2, "a/b''": 3}
    assert named_leaves(5) == {"": 5} and from_named({"": 5}, 6) == 5


EXTENDED = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"]


@pytest.mark.parametrize("name", EXTENDED)
def test_a_type_that_numpy_lacks_is_stored_exactly(name):
    dtype = np.dtype(getattr(ml_dtypes, name))
    width = np.uint16 if dtype.itemsize == 2 else np.uint8
    values = np.arange(2 ** (8 * dtype.itemsize)).astype(width).view(dtype)
    stored = as_stored(jnp.asarray(values))
    assert stored.dtype == np.float32 and is_extended(dtype)
    with np.errstate(invalid="ignore"):  # NaN
        back = stored.astype(dtype)
    numbers = ~np.isnan(values.astype(np.float32))
    np.testing.assert_array_equal(back.view(width)[numbers], values.view(width)[numbers])
    np.testing.assert_array_equal(np.isnan(back.astype(np.float32)), ~numbers)


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_a_type_of_numpy_is_stored_unchanged(name):
    x = np.arange(3.0).astype(name)
    assert as_stored(x) is x and not is_extended(x.dtype)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": {"steps": np.int32(3)}}, "the parameter 'a/steps' has the type int32"),
        ([jnp.zeros(2), jnp.zeros(2, bool)], "the parameter '1' has the type bool"),
        ([1j], "the parameter '0' has the type complex"),
        ({"key": jax.random.key(0)}, "the parameter 'key' has the type key<fry>"),
        ({"a": {}, "b": ()}, "the model has no parameters: there is nothing to train"),
    ],
)
def test_parameters_that_cannot_be_trained_are_refused_in_one_sentence(params, message):
    with pytest.raises(ConfigError) as error:
        require_trainable(params)
    assert str(error.value).startswith(message)
    require_trainable({"a": jnp.zeros(2, jnp.bfloat16), "b": [1.5, np.zeros(0)], "c": {}})
