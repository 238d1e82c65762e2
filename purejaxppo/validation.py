"""Validation of single values and of combinations of values in a `Config`.

Every failed check raises a `ConfigError`, whose message is one sentence.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from purejaxppo.types import ConfigError, EnvSettings, plain, plain_settings


@dataclasses.dataclass(frozen=True)
class Check:
    """The allowed numbers of a field: a predicate, and its description in error messages."""

    ok: Callable[[Any], bool]
    words: str


POSITIVE_INT = Check(lambda x: 1 <= x < 2**62, "an integer of at least 1")
NONE_OR_POSITIVE_INT = Check(POSITIVE_INT.ok, "None or an integer of at least 1")
POSITIVE = Check(lambda x: x > 0, "a finite number above 0")
NONE_OR_POSITIVE = Check(lambda x: x > 0, "None or a finite number above 0")
NOT_NEGATIVE_INT = Check(lambda x: 0 <= x < 2**62, "an integer of at least 0")
NOT_NEGATIVE = Check(lambda x: x >= 0, "a finite number of at least 0")
UNIT = Check(lambda x: 0 <= x <= 1, "a number between 0 and 1")
INSIDE_UNIT = Check(lambda x: 0 < x < 1, "a number between 0 and 1, both excluded")


def checked_int(name: str, value: Any, check: Check) -> int:
    """The value as an integer; an integral float such as 5e7 is accepted."""
    if isinstance(value, np.generic) and _is_numeric(value):
        value = value.item()
    if isinstance(value, float) and abs(value) < 2**62 and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or not _is_numeric(value) or not check.ok(value):
        raise wrong(name, value, check.words)
    return int(value)


def integer(name: str, value: Any, least: int, bits: int = 32) -> int:
    """The argument unchanged, if it is an integer of at least ``least`` and below 2**bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**bits:
        raise ConfigError(
            f"{name} = {value!r}: it must be an integer of at least {least} and below 2**{bits}"
        )
    return value


def seconds_of(name: str, value: Any) -> float:
    """The argument, a duration in seconds, as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise wrong(name, value, "a number of seconds of at least 0")
    return float(value)


def jit_is_disabled() -> bool:
    """Whether `jax.disable_jit` is on, which prevents ahead-of-time compilation."""
    return jax.config.jax_disable_jit  # type: ignore[attr-defined]


def checked_sizes(name: str, value: Any) -> tuple[int, ...]:
    """The value as a tuple of positive integers."""
    if not isinstance(value, list | tuple):
        raise wrong(name, value, "a sequence of positive integers, such as (64, 64)")
    return tuple(checked_int(f"{name}[{i}]", size, POSITIVE_INT) for i, size in enumerate(value))


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """The value, if it is one of ``choices``; the error suggests the nearest one."""
    if not isinstance(value, str) or value not in choices:
        raise wrong(name, value, f"one of {', '.join(choices)}", nearest(value, choices))
    return value


def checked_env_settings(name: str, value: Any) -> EnvSettings | None:
    """The settings of an environment as sorted pairs; None means that they were not recorded."""
    settings = plain_settings(value)
    if settings is not None or value is None:
        return settings
    if not isinstance(value, Mapping):
        raise wrong(
            name, value, "a mapping of names to values, such as {'max_steps_in_episode': 50}"
        )
    for key, setting in value.items():
        if not isinstance(key, str):
            raise wrong(f"a name in {name}", key, "a string")
        try:
            plain(setting)
        except ValueError:
            allowed = "a finite number, a string, True, False, None or a tuple of these"
            raise wrong(f"{name}[{key!r}]", setting, allowed) from None
    raise wrong(name, value, "a mapping of names to values")


def _is_numeric(value: Any) -> bool:
    """Whether the value has an integer or real type. NumPy time spans and random keys do not."""
    dtype = getattr(value, "dtype", np.dtype(float))
    return not isinstance(value, bool) and isinstance(dtype, np.dtype) and dtype.kind in "iuf"


def checked_leaf(name: str, value: Any, check: Check) -> Any:
    """A continuous value: a number as a float, an array unchanged after a check of every element.

    Traced values are returned without a check.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    if not isinstance(value, int | float | np.ndarray | np.generic | jax.Array) or not _is_numeric(
        value
    ):
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


def checked_number(name: str, value: Any, check: Check) -> float:
    """The value, a single number, as a float."""
    if isinstance(value, jax.core.Tracer) or np.ndim(value):
        raise wrong(name, value, check.words)
    return float(checked_leaf(name, value, check))


def wrong(name: str, value: Any, allowed: str, hint: str = "") -> ConfigError:
    """The error for an invalid value; it shows the value and the allowed values."""
    shown = " ".join(repr(value).split())  # the repr of an array has several lines
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ConfigError(f"{name} = {shown}: it must be {allowed}{hint}")


def nearest(word: Any, choices: Any) -> str:
    """A suggestion for a misspelt word, as the end of a sentence; empty if no choice is close."""
    close = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


# ------------------------------------------------------------------------------------ combinations


def require_compatible(config: Any) -> None:
    """Raise `ConfigError` for the first unsupported combination of individually valid fields."""
    if config.batch_size >= 2**31:
        raise ConfigError(
            f"num_envs * num_steps = {config.batch_size}: "
            "one iteration must have fewer than 2**31 steps"
        )
    if config.num_envs % config.num_shards:
        raise ConfigError(
            f"num_shards = {config.num_shards} does not divide num_envs = {config.num_envs}: "
            "shards are equally large"
        )
    if config.batch_size % config.num_minibatches:
        candidates = (
            config.num_minibatches + sign * i for i in range(1, 10_000) for sign in (-1, 1)
        )
        closest = next((m for m in candidates if m >= 1 and config.batch_size % m == 0), 1)
        raise ConfigError(
            f"num_minibatches = {config.num_minibatches} does not divide num_envs * num_steps = "
            f"{config.batch_size}; the nearest number that does is {closest}"
        )
    if config.batch_size % (config.num_minibatches * config.num_shards):
        samples = config.batch_size // config.num_shards
        raise ConfigError(
            f"num_minibatches = {config.num_minibatches} does not divide the {samples} "
            f"samples of each of {config.num_shards} shards: "
            "every minibatch has an equal part of every shard"
        )
    if config.total_episodes is not None and not config.whole_episodes:
        raise ConfigError(
            f"total_episodes = {config.total_episodes}: a run counts whole episodes only: "
            "set episodic=True, or total_timesteps instead"
        )
    if config.whole_episodes and config.actual_timesteps >= 2**31:
        total = "total_timesteps" if config.total_episodes is None else "total_episodes"
        raise ConfigError(
            f"{total} = {getattr(config, total)}: whole episodes are counted up to 2**31 steps"
        )
    if config.group_size > 1 and not config.whole_episodes:
        raise ConfigError(
            f"group_size = {config.group_size}: environments share a start in whole episodes only: "
            "set episodic=True, or group_size=1"
        )
    if config.num_envs % (config.group_size * config.num_shards):
        shards = f" / num_shards = {config.num_shards}" if config.num_shards > 1 else ""
        raise ConfigError(
            f"group_size = {config.group_size} does not divide num_envs = {config.num_envs}{shards}"
        )
    if config.compares_groups:
        _require_groups(config)
    if config.ref_kl_target is not None and _any_element(np.equal, config.ref_kl_coef):
        raise ConfigError(
            "ref_kl_coef = 0: ref_kl_target multiplies it in every iteration, so it must start "
            "above 0"
        )
    if config.ref_kl_loss != "none" and config.ref_kl_target is not None:
        raise ConfigError(
            f"ref_kl_loss = {config.ref_kl_loss!r}: ref_kl_target adapts the coefficient of the "
            "reward only: leave one of them out"
        )
    if config.critic_obs and config.shared_trunk:
        raise ConfigError(
            "critic_obs is for the value function only, and with a shared trunk the policy would "
            "see it: set shared_trunk=False"
        )
    _require_supported_by_algorithm(config)


def _require_groups(config: Any) -> None:
    """Raise `ConfigError` for settings that contradict a group-relative estimator."""
    if config.group_size < 2:
        raise ConfigError(
            f"group_size = {config.group_size}: advantage = {config.advantage!r} compares the "
            "episodes of a group: set group_size to at least 2"
        )
    if _any_element(lambda gamma, _: gamma != 1, config.gamma):
        raise ConfigError(
            f"gamma = {config.gamma}: advantage = {config.advantage!r} compares sums of rewards "
            "without discount: set gamma=1"
        )
    if config.algorithm == "reinforce" and config.baseline != "value":
        raise ConfigError(
            f"baseline = {config.baseline!r}: advantage = {config.advantage!r} has a baseline of "
            "its own: leave baseline out"
        )


def _require_supported_by_algorithm(config: Any) -> None:
    """Raise `ConfigError` for settings that contradict the algorithm or its objective.

    Fields of other algorithms may have any plain value. Leaves, which may be traced, are checked
    only if their value changes the computation.
    """
    algorithm = config.algorithm
    if config.objective == "adaptive_kl" and _any_element(np.equal, config.kl_coef):
        raise ConfigError(
            "kl_coef = 0: adaptive_kl halves and doubles it, so it must start above 0"
        )
    if algorithm == "trpo" and config.shared_trunk:
        raise ConfigError(
            "trpo bounds the policy's change, a shared trunk's value fit does not: "
            "set shared_trunk=False"
        )
    if algorithm == "trpo" and _any_element(np.not_equal, config.ent_coef):
        raise ConfigError("trpo has no entropy bonus: ent_coef=0, or algorithm='ppo'")
    if algorithm == "reinforce":
        _require_supported_by_reinforce(config)


def _require_supported_by_reinforce(config: Any) -> None:
    if (config.num_epochs, config.num_minibatches) != (1, 1):
        raise ConfigError(
            f"num_epochs = {config.num_epochs}, num_minibatches = {config.num_minibatches}: "
            "reinforce takes one step on each batch, because its gradient holds for the policy "
            "that played it: set num_epochs=1 and num_minibatches=1, or start from "
            "Config.for_env(env, algorithm='reinforce')"
        )
    if config.baseline == "leave_one_out" and config.num_envs < 2:
        raise ConfigError(
            "baseline = 'leave_one_out' is the mean of the other episodes: "
            "set num_envs to at least 2"
        )
    if config.estimator == "gae" and config.baseline != "value":
        raise ConfigError(
            "advantage = 'gae' bootstraps from the value function, which "
            f"baseline = {config.baseline!r} does not train: "
            "set baseline='value' or advantage='returns'"
        )


def _any_element(compare: Callable[..., Any], value: Any) -> bool:
    """Whether ``compare(element, 0)`` holds for any element of a leaf; False if it is traced."""
    return not isinstance(value, jax.core.Tracer) and bool(np.any(compare(np.asarray(value), 0)))
