"""Spaces accept numbers of any type and hold plain ones; errors are one sentence."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentences import sentence_of

from purejaxppo.policies.files import _space_from_json, _space_to_json
from purejaxppo.types import Box, Discrete, MultiDiscrete

INF = float("inf")


SAME = [
    (
        Discrete(3),
        [
            3,
            3.0,
            np.int64(3),
            np.uint8(3),
            np.float32(3),
            np.array(3),
            jnp.int32(3),
            jnp.asarray(3.0, jnp.bfloat16),
        ],
        Discrete,
    ),
    (
        MultiDiscrete((3, 2)),
        [
            (3, 2),
            [3, 2],
            np.array([3, 2]),
            jnp.array([3, 2]),
            (np.int64(3), jnp.int32(2)),
            range(3, 1, -1),
        ],
        MultiDiscrete,
    ),
    (
        Box((2,), 0.0, 1.0),
        [2, (2,), [2], [np.int64(2)], np.array([2]), jnp.array([2]), (2.0,)],
        lambda shape: Box(shape, 0, 1),
    ),
    (
        Box((2,), -1.0, INF),
        [
            -1,
            np.float32(-1),
            jnp.int8(-1),
            [-1, -1.0],
            (-1, np.int64(-1)),
            np.full(2, -1.0),
            jnp.full(2, -1),
        ],
        lambda low: Box((2,), low, np.full(2, np.inf)),
    ),
    (
        Box((2, 2), (0.0, 1.0, 2.0, 3.0), 9.0),
        [
            [[0, 1], [2, 3]],
            ((0, 1), (2, 3)),
            [0, 1, 2, 3],
            [np.arange(2), jnp.array([2, 3])],
            np.arange(4),
            np.arange(4.0).reshape(2, 2),
            jnp.arange(4).reshape(2, 2),
        ],
        lambda low: Box((2, 2), low, [[9, 9], [9, 9]]),
    ),
    (Box((), 0.0, 2.0), [0, -0.0, np.array(0), [0]], lambda low: Box((), low, 2)),
    (Box((1,), -1e30, 1e30), [-(10**30), [-(10**30)]], lambda low: Box([1], low, 10**30)),
]


@pytest.mark.parametrize(
    ("space", "spellings", "make"),
    SAME,
    ids=lambda x: repr(x) if dataclasses.is_dataclass(x) else "",
)
def test_equal_numbers_of_any_type_make_equal_spaces_of_plain_numbers(space, spellings, make):
    for spelling in spellings:
        made = make(spelling)
        assert made == space and hash(made) == hash(space) and repr(made) == repr(space)
        assert _space_from_json(json.loads(json.dumps(_space_to_json(made)))) == space
        flat = [
            x
            for value in vars(made).values()
            for x in (value if isinstance(value, tuple) else (value,))
        ]
        assert {type(x) for x in flat} <= {int, float}
        assert type(made.shape) is tuple and all(type(n) is int for n in made.shape)
    assert dataclasses.replace(space) == space


def test_the_limits_of_a_box_are_arrays_of_its_shape():
    low, high = Box((2, 2), [[0, 1], [2, 3]], jnp.asarray([4, 5, 6, 7])).limits
    np.testing.assert_array_equal(low, [[0, 1], [2, 3]])
    np.testing.assert_array_equal(high, [[4, 5], [6, 7]])
    low, high = Box((1, 2), -np.inf, 0.5).limits
    np.testing.assert_array_equal(low, [[-np.inf, -np.inf]])
    np.testing.assert_array_equal(high, [[0.5, 0.5]])


def test_spaces_with_different_meanings_differ():
    spaces = [
        Discrete(3),
        Discrete(2),
        MultiDiscrete([3]),
        MultiDiscrete([3, 3]),
        Box((3,), 0, 1),
        Box((3, 1), 0, 1),
    ]
    spaces += [Box((3,), 0, 2), Box((3,), -1, 1), Box((3,), [0, 0, -1], 1), Box((), 0, 1)]
    assert len(set(spaces)) == len(spaces)


NAN = float("nan")
WRONG = [
    *[
        (lambda n=n: Discrete(n), "Discrete.n = ")
        for n in (0, -1, 2.5, True, np.True_, NAN, INF, 2**31, 10**30)
    ],
    *[
        (lambda n=n: Discrete(n), "Discrete.n = ")
        for n in ("3", None, 3j, [3], np.timedelta64(3, "s"), np.zeros(2))
    ],
    *[
        (lambda x=x: MultiDiscrete(x), "MultiDiscrete.sizes = ")
        for x in ([], (), 3, [[3, 2]], [3, 0], [3, 2.5], "32")
    ],
    *[
        (lambda x=x: MultiDiscrete(x), "MultiDiscrete.sizes = ")
        for x in ([[1], [2, 3]], {3, 2}, [True], None)
    ],
    *[
        (lambda x=x: Box(x, 0, 1), "Box.shape = ")
        for x in (0, (0,), (2, 0), (-1,), (2.5,), "ab", None, [[2]], True)
    ],
    *[
        (lambda x=x: Box((2,), x, 1), "Box.low = ")
        for x in (NAN, [0, NAN], "a", None, [None, 0], 1j, [[0], [0, 0]])
    ],
    *[
        (lambda x=x: Box((2,), 0, x), "Box.high = ")
        for x in (NAN, [NAN, 1], "a", 10**400, {}, False)
    ],
    *[
        (lambda x=x: Box((2,), x, 1), "Box.low has the shape ")
        for x in ([0], [0, 0, 0], [[0, 0]], np.zeros((2, 2)))
    ],
    (lambda: Box((2, 2), 0, [1, 1]), "Box.high has the shape (2,): "),
    (lambda: Box((2,), 1, 0), "Box has an element with low = 1.0 and high = 0.0: "),
    (lambda: Box((2,), [0, 3], [1, 2]), "Box has an element with low = 3.0 and high = 2.0: "),
    (lambda: Box((2,), INF, INF), "Box has an element with low = inf and high = inf: "),
    (lambda: Box((2,), -INF, [1, -INF]), "Box has an element with low = -inf and high = -inf: "),
    (
        lambda: dataclasses.replace(Box((2,), 0, 1), high=-1),
        "Box has an element with low = 0.0 and high = -1.0: ",
    ),
]


@pytest.mark.parametrize(("make", "start"), WRONG)
def test_an_invalid_space_is_refused_in_one_sentence(make, start):
    assert sentence_of(make).startswith(start)


def test_a_long_value_is_shortened_in_the_message():
    assert len(sentence_of(lambda: Box((1000,), np.full(1000, np.nan), 1))) < 200


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Discrete, "Discrete.n"),
        (lambda x: MultiDiscrete([2, x]), "MultiDiscrete.sizes"),
        (lambda x: Box((2,), x, 9), "Box.low"),
        (lambda x: Box((2,), 0, (9, x)), "Box.high"),
    ],
)
def test_a_traced_number_is_refused_and_a_concrete_one_works_inside_jit(make, name):
    expected = f"{name} is traced by JAX: a space must be made of concrete numbers"
    for transform in (jax.jit, jax.vmap):
        argument = jnp.arange(3) if transform is jax.vmap else 3

        def traced(x):
            make(x)
            return x

        assert sentence_of(lambda transform=transform, x=argument: transform(traced)(x)) == expected
    concrete = jnp.int32(3)

    def inside(x):
        assert make(concrete) == make(3)
        return x

    jax.eval_shape(jax.jit(inside), 0.0)
