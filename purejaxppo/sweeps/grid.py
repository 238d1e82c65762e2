"""The settings of a sweep, and the groups of settings that share a compiled program."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from purejaxppo.config import FIELDS, LEAVES, Config, validate
from purejaxppo.types import ConfigError
from purejaxppo.validation import nearest


class Uniform(NamedTuple):
    """The uniform distribution between two numbers."""

    low: float
    high: float

    def sample(self, random: np.random.Generator) -> float:
        return float(random.uniform(self.low, self.high))


class LogUniform(NamedTuple):
    """The distribution of a positive number whose logarithm is uniform."""

    low: float
    high: float

    def sample(self, random: np.random.Generator) -> float:
        return float(np.exp(random.uniform(np.log(self.low), np.log(self.high))))


DISTRIBUTIONS = (Uniform, LogUniform)
Setting = dict[str, Any]  # a value for each swept field


class CompilationGroup(NamedTuple):
    """Settings that differ only in traced hyper-parameters and share one compiled program."""

    config: Config  # with the values of the swept static fields
    traced: tuple[str, ...]  # the fields in which the settings may differ
    settings: tuple[int, ...]  # indices in the list of all settings


def settings_of(
    config: Config, grid: Mapping[str, Any], samples: int, rng: np.random.Generator
) -> list[Setting]:
    """Every combination of the listed values, each with ``samples`` draws from the distributions.

    Raises `ConfigError` if a setting does not give a valid configuration, or occurs twice.
    """
    drawn = {
        name: _require_bounds(name, x) for name, x in grid.items() if isinstance(x, DISTRIBUTIONS)
    }
    listed = {name: _value_list(name, values) for name, values in grid.items() if name not in drawn}
    if drawn and samples < 1:
        raise ConfigError(
            f"{next(iter(drawn))} has a distribution: set samples to the number of draws"
        )
    draws = (
        [{name: x.sample(rng) for name, x in drawn.items()} for _ in range(samples)]
        if drawn
        else [{}]
    )
    combinations = [
        dict(zip(listed, values, strict=True)) for values in itertools.product(*listed.values())
    ]
    settings = [
        {name: (combination | draw)[name] for name in grid}
        for combination in combinations
        for draw in draws
    ]
    for setting in settings:
        checked = validate(config.replace(**setting))
        setting.update({name: getattr(checked, name) for name in setting})
    distinct = {tuple(map(str, setting.values())) for setting in settings}
    if len(distinct) < len(settings):
        raise ConfigError("the grid contains a setting twice: list each value once")
    return settings


def groups_of(config: Config, settings: Sequence[Setting]) -> list[CompilationGroup]:
    """A group of settings for each combination of static values. None is static in any field."""
    grouped: dict[str, list[int]] = {}
    for index, setting in enumerate(settings):
        static = {name: x for name, x in setting.items() if not _is_traced(name, x)}
        grouped.setdefault(repr(static), []).append(index)
    groups = []
    for indices in grouped.values():
        first = settings[indices[0]]
        static = {name: x for name, x in first.items() if not _is_traced(name, x)}
        traced = tuple(name for name in first if name not in static)
        groups.append(CompilationGroup(config.replace(**static), traced, tuple(indices)))
    return groups


def bounds_of(grid: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The lowest and the highest value of each field in the grid."""
    return {
        name: (x.low, x.high) if isinstance(x, DISTRIBUTIONS) else (min(x), max(x))
        for name, x in grid.items()
    }


def _is_traced(name: str, value: Any) -> bool:
    return name in LEAVES and value is not None


def _value_list(name: str, values: Any) -> list[Any]:
    if name not in FIELDS:
        raise ConfigError(
            f"{name!r} is not a setting{nearest(name, FIELDS) or '; known: ' + ', '.join(FIELDS)}"
        )
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray) or not len(values):
        raise ConfigError(
            f"{name} is swept over a list of values, Uniform or LogUniform, not over {values!r}"
        )
    return [
        x.item() if isinstance(x, np.generic | np.ndarray | jax.Array) and not x.shape else x
        for x in values
    ]


def _require_bounds(name: str, values: Uniform | LogUniform) -> Uniform | LogUniform:
    if name not in LEAVES:
        hint = nearest(name, LEAVES) if name not in FIELDS else ""
        raise ConfigError(
            f"{name!r} cannot be drawn from a distribution{hint}; "
            f"fields that can be: {', '.join(LEAVES)}"
        )
    lower_limit = 0.0 if isinstance(values, LogUniform) else -np.inf
    are_numbers = all(isinstance(x, int | float) and np.isfinite(x) for x in values)
    if not are_numbers or not lower_limit < values.low < values.high:
        requirement = "0 < low < high" if isinstance(values, LogUniform) else "low < high"
        raise ConfigError(f"{name} = {values!r}: it must have {requirement}")
    return values
