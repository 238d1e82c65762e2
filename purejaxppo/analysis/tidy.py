"""The settings in the tidy tables of a sweep: their fields, their ranking and their labels.

``scores`` has a row for each run, with a column for each swept field, ``seed`` and ``score`` (NaN
for a run that diverged). A setting is a combination of values of some fields.
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


def swept_fields(table: pd.DataFrame, *required: str) -> list[str]:
    """The fields that were swept. Raises `ConfigError` if a required one is not among them."""
    fields = [str(column) for column in table.columns if column not in NOT_FIELDS]
    for field in required:
        if field not in fields:
            raise ConfigError(f"{field!r} was not swept; swept: {', '.join(fields) or 'nothing'}")
    return fields


def by_setting(table: pd.DataFrame, fields: Sequence[str]) -> dict[SettingValues, pd.DataFrame]:
    """The rows of each setting of ``fields``, in the order of the table."""
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
    """The ``most`` settings with the highest interquartile mean of the score, best first.

    A run that diverged ranks below all others.
    """
    settings = by_setting(scores, fields)
    score = {
        setting: interquartile_mean(rows["score"].fillna(-np.inf))
        for setting, rows in settings.items()
    }
    ranked = sorted(settings, key=lambda setting: -score[setting])
    return {setting: settings[setting] for setting in ranked[:most]}


def scores_by_setting(scores: pd.DataFrame, fields: Sequence[str]) -> NDArray[np.floating]:
    """The scores [runs, settings of ``fields``], or [runs] if the settings differ in runs."""
    columns = [rows["score"].to_numpy(float) for rows in by_setting(scores, fields).values()]
    return (
        np.stack(columns, axis=1) if len(set(map(len, columns))) == 1 else np.concatenate(columns)
    )


def is_number(column: pd.Series) -> bool:
    """Whether the values of a field are numbers, which an axis shows to scale, and not switches."""
    return (
        pd.api.types.is_numeric_dtype(column)
        and not pd.api.types.is_bool_dtype(column)
        and not column.isna().any()
    )


def axis_positions(column: pd.Series) -> dict[Any, float]:
    """The position of each value of a field on an axis: numbers to scale, others side by side."""
    values = [value for (value,) in by_setting(column.to_frame("value"), ["value"])]
    if is_number(column):
        return {value: float(value) for value in sorted(values)}
    return {value: float(index) for index, value in enumerate(values)}


def format_value(value: Any) -> str:
    """The value of a field as a label shows it."""
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def setting_label(fields: Sequence[str], setting: SettingValues) -> str:
    """A setting as a legend shows it."""
    pairs = zip(fields, setting, strict=True)
    return ", ".join(f"{field} {format_value(value)}" for field, value in pairs) or "all runs"
