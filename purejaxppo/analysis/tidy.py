"""The settings of a sweep in its tidy tables: which there are, which are best, and what to call them.

``scores`` has a row for each run, with a column for each field that was swept, and ``seed`` and ``score`` (NaN of a run
that diverged). A setting is a combination of the values of some fields.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from purejaxppo.analysis.statistics import interquartile_mean
from purejaxppo.types import ConfigError

NOT_FIELDS = {"member", "seed", "score", "timesteps", "diverged_at", "episode_return"}
SettingValues = tuple[Any, ...]  # a value for each of the fields


def swept(table: pd.DataFrame, *asked: str) -> list[str]:
    """The fields that were swept; an error if one that is asked for is not among them."""
    fields = [str(column) for column in table.columns if column not in NOT_FIELDS]
    for field in asked:
        if field not in fields:
            raise ConfigError(f"{field!r} was not swept; swept: {', '.join(fields) or 'nothing'}")
    return fields


def by_setting(table: pd.DataFrame, fields: Sequence[str]) -> dict[SettingValues, pd.DataFrame]:
    """The rows of each setting of some fields, in the order of the table."""
    if not fields:
        return {(): table}
    groups = table.groupby(list(fields), sort=False, dropna=False)
    return {
        tuple(None if pd.api.types.is_scalar(x) and pd.isna(x) else x for x in key): rows
        for key, rows in groups
    }


def best(
    scores: pd.DataFrame, fields: Sequence[str], most: int
) -> dict[SettingValues, pd.DataFrame]:
    """The settings of the highest interquartile mean, the best first; a run that diverged is worse than any other."""
    settings = by_setting(scores, fields)
    middle = {
        setting: interquartile_mean(rows["score"].fillna(-np.inf))
        for setting, rows in settings.items()
    }
    ranked = sorted(settings, key=lambda setting: -middle[setting])
    return {setting: settings[setting] for setting in ranked[:most]}


def by_task(scores: pd.DataFrame, fields: Sequence[str]) -> NDArray[np.floating]:
    """The scores [runs, settings of the fields]; [runs] of all where some settings have more runs than others."""
    columns = [rows["score"].to_numpy(float) for rows in by_setting(scores, fields).values()]
    return (
        np.stack(columns, axis=1) if len(set(map(len, columns))) == 1 else np.concatenate(columns)
    )


def is_number(column: pd.Series) -> bool:
    """Whether a field's values have a place on an axis: numbers, and no switches."""
    return (
        pd.api.types.is_numeric_dtype(column)
        and not pd.api.types.is_bool_dtype(column)
        and not column.isna().any()
    )


def positions(column: pd.Series) -> dict[Any, float]:
    """Where on an axis each value of a field stands: numbers where they belong, others side by side in their order."""
    values = [value for (value,) in by_setting(column.to_frame("value"), ["value"])]
    if is_number(column):
        return {value: float(value) for value in sorted(values)}
    return {value: float(place) for place, value in enumerate(values)}


def text(value: Any) -> str:
    """A field's value as a label says it."""
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def name(fields: Sequence[str], setting: SettingValues) -> str:
    """A setting as a legend says it."""
    return (
        ", ".join(f"{field} {text(value)}" for field, value in zip(fields, setting, strict=True))
        or "all runs"
    )
