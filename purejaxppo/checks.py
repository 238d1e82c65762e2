"""Checks of single values: what stands in a field of `Config`, or one clear sentence on what should."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from purejaxppo.types import ConfigError, EnvSettings, plain, plain_settings


@dataclasses.dataclass(frozen=True)
class Check:
    """What may stand in a field: a predicate for one number, and the words for it."""

    ok: Callable[[Any], bool]
    words: str


POSITIVE_INT = Check(lambda x: 1 <= x < 2**62, "an integer of at least 1")
POSITIVE = Check(lambda x: x > 0, "a finite number above 0")
NONE_OR_POSITIVE = Check(lambda x: x > 0, "None or a finite number above 0")
NOT_NEGATIVE = Check(lambda x: x >= 0, "a finite number of at least 0")
UNIT = Check(lambda x: 0 <= x <= 1, "a number between 0 and 1")
INSIDE_UNIT = Check(lambda x: 0 < x < 1, "a number between 0 and 1, both excluded")


def checked_int(name: str, value: Any, check: Check) -> int:
    """The value as an integer; an integral float such as 5e7 is one."""
    if isinstance(value, np.generic) and _is_numeric(value):
        value = value.item()
    if isinstance(value, float) and abs(value) < 2**62 and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or not _is_numeric(value) or not check.ok(value):
        raise wrong(name, value, check.words)
    return int(value)


def integer(name: str, value: Any, least: int, bits: int = 32) -> int:
    """An argument that is an integer within bounds, as it is."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**bits:
        raise ConfigError(f"{name} = {value!r}: it must be an integer of at least {least} and below 2**{bits}")
    return value


def seconds_of(name: str, value: Any) -> float:
    """An argument that is a time."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise wrong(name, value, "a number of seconds of at least 0")
    return float(value)


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


def jit_is_disabled() -> bool:
    """Whether `jax.disable_jit` is on, under which nothing can be compiled ahead of time."""
    return jax.config.jax_disable_jit  # type: ignore[attr-defined]


def checked_sizes(name: str, value: Any) -> tuple[int, ...]:
    """The value as a tuple of positive integers."""
    if not isinstance(value, list | tuple):
        raise wrong(name, value, "a sequence of positive integers, such as (64, 64)")
    return tuple(checked_int(f"{name}[{i}]", size, POSITIVE_INT) for i, size in enumerate(value))


def checked_settings(name: str, value: Any) -> EnvSettings | None:
    """The settings of an environment as sorted pairs; None says that they were not recorded."""
    settings = plain_settings(value)
    if settings is not None or value is None:
        return settings
    if not isinstance(value, Mapping):
        raise wrong(name, value, "a mapping of names to values, such as {'max_steps_in_episode': 50}")
    for key, x in value.items():
        if not isinstance(key, str):
            raise wrong(f"a name in {name}", key, "a string")
        try:
            plain(x)
        except ValueError:
            allowed = "a finite number, a string, True, False, None or a tuple of these"
            raise wrong(f"{name}[{key!r}]", x, allowed) from None
    raise wrong(name, value, "a mapping of names to values")


def _is_numeric(value: Any) -> bool:
    """Integers and reals; a time span or a random key is neither, whatever NumPy derives it from."""
    dtype = getattr(value, "dtype", np.dtype(float))
    return not isinstance(value, bool) and isinstance(dtype, np.dtype) and dtype.kind in "iuf"


def checked_leaf(name: str, value: Any, check: Check) -> Any:
    """A continuous value: a number as a float, an array as it is with every element checked, a traced one unseen."""
    if isinstance(value, jax.core.Tracer):
        return value
    if not isinstance(value, int | float | np.ndarray | np.generic | jax.Array) or not _is_numeric(value):
        raise wrong(name, value, check.words)
    if not np.size(value):
        raise wrong(name, value, check.words)
    array = np.asarray(value)
    try:
        elements = [float(element) for element in array.ravel()]
    except OverflowError:
        raise wrong(name, value, check.words) from None
    for element in elements:
        if not math.isfinite(element) or not check.ok(element):
            raise wrong(name, element, check.words)
    return float(value) if array.ndim == 0 and not isinstance(value, jax.Array) else value


def wrong(name: str, value: Any, allowed: str, hint: str = "") -> ConfigError:
    """The error that says what stands there and what should."""
    shown = " ".join(repr(value).split())  # that of an array has several lines
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ConfigError(f"{name} = {shown}: it must be {allowed}{hint}")


def nearest(word: Any, choices: Any) -> str:
    """What was probably meant, as the end of a sentence; empty where nothing is close."""
    close = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
