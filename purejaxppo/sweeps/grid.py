"""What a sweep goes over: its settings, and which of them one compiled program can run."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from purejaxppo.config import FIELDS, LEAVES, Config, validate
from purejaxppo.types import ConfigError
from purejaxppo.validation import nearest


class Uniform(NamedTuple):
    """Numbers between two, each as likely."""

    low: float
    high: float

    def sample(self, random: np.random.Generator) -> float:
        return float(random.uniform(self.low, self.high))


class LogUniform(NamedTuple):
    """Numbers between two positive ones, whose logarithms are each as likely."""

    low: float
    high: float

    def sample(self, random: np.random.Generator) -> float:
        return float(np.exp(random.uniform(np.log(self.low), np.log(self.high))))


DRAWN = (Uniform, LogUniform)
Setting = dict[str, Any]  # a value for each of the fields


class CompilationGroup(NamedTuple):
    """Settings that differ in traced hyper-parameters only: one compiled program runs them all."""

    config: Config  # with the static fields that the settings have in common
    traced: tuple[str, ...]  # the fields in which they may differ
    settings: tuple[int, ...]  # where they stand in the list of all


def settings_of(
    config: Config, grid: Mapping[str, Any], samples: int, random: np.random.Generator
) -> list[Setting]:
    """Every combination of the listed values; with distributions, ``samples`` draws of them with each combination.

    Each is checked as a whole configuration.
    """
    drawn = {name: _bounded(name, x) for name, x in grid.items() if isinstance(x, DRAWN)}
    listed = {name: _listed(name, values) for name, values in grid.items() if name not in drawn}
    if drawn and samples < 1:
        raise ConfigError(f"{next(iter(drawn))} is drawn at random: say how many draws by samples")
    draws = (
        [{name: x.sample(random) for name, x in drawn.items()} for _ in range(samples)]
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
        raise ConfigError("a setting stands in the grid twice: give each value once")
    return settings


def groups_of(config: Config, settings: Sequence[Setting]) -> list[CompilationGroup]:
    """As few groups as there are combinations of static values (None, too, cannot be traced)."""
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
    """The lowest and the highest value of each field."""
    return {
        name: (x.low, x.high) if isinstance(x, DRAWN) else (min(x), max(x))
        for name, x in grid.items()
    }


def _is_traced(name: str, value: Any) -> bool:
    return name in LEAVES and value is not None


def _listed(name: str, values: Any) -> list[Any]:
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


def _bounded(name: str, values: Uniform | LogUniform) -> Uniform | LogUniform:
    if name not in LEAVES:
        known = nearest(name, LEAVES) if name not in FIELDS else ""
        raise ConfigError(
            f"{name!r} cannot be drawn from a distribution{known}; what can: {', '.join(LEAVES)}"
        )
    least = 0.0 if isinstance(values, LogUniform) else -np.inf
    numbers = all(isinstance(x, int | float) and np.isfinite(x) for x in values)
    if not numbers or not least < values.low < values.high:
        wants = "0 < low < high" if isinstance(values, LogUniform) else "low < high"
        raise ConfigError(f"{name} = {values!r}: it must have {wants}")
    return values
