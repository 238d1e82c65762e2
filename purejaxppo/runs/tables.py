"""Metrics and evaluations of several members as columns, and their formats for loggers.

A table maps the name of a column to an array [members, n]: ``iteration``, ``timesteps`` and the
measurements. If there is a column ``valid``, it marks the rows that exist; after the last row of a
member that finished early no row is valid.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purejaxppo.metrics import PARENT
from purejaxppo.types import Metrics

Table = Mapping[str, NDArray[Any]]

BLOCK_ROWS = 2**16  # maximum number of rows held as text

_NOT_MEASUREMENTS = ("iteration", "timesteps", "valid")
_GROUPS = {
    **dict.fromkeys(("episode_return", "episode_length", "episodes"), "train"),
    **dict.fromkeys(("policy_loss", "value_loss", "entropy"), "loss"),
    **dict.fromkeys(
        ("approx_kl", "clip_fraction", "explained_variance", "grad_norm", "first_ratio_deviation"),
        "update",
    ),
}


def valid_rows(table: Table) -> NDArray[np.bool_]:
    """[members, n] whether each row exists."""
    return np.asarray(table.get("valid", np.ones(table["iteration"].shape)), bool)


def columns(table: Table) -> list[str]:
    """The names of the columns in files, in order."""
    return ["iteration", "timesteps", *(name for name in table if name not in _NOT_MEASUREMENTS)]


def lines(table: Table, member_indices: Sequence[int]) -> Iterator[str]:
    """The valid rows as comma-separated text, in blocks: the index of the member, then `columns`.

    Rows are sorted by iteration, then by member. NaN becomes an empty cell. Numbers are read back
    exactly: nine digits identify a float32, and printing them is three times as fast as finding
    the shortest exact form.
    """
    valid = valid_rows(table)
    member = np.broadcast_to(np.asarray(member_indices)[:, None], valid.shape)
    data = [member, *(np.asarray(table[name]) for name in columns(table))]
    line = ",".join(_cell_format(x.dtype) for x in data) + "\n"
    block_size = max(1, BLOCK_ROWS // len(valid))
    for start in range(0, valid.shape[1], block_size):
        block = slice(start, start + block_size)
        cells = [x[:, block].T[valid[:, block].T].tolist() for x in data]
        yield "".join([line % row for row in zip(*cells, strict=True)]).replace("nan", "")


def _cell_format(dtype: np.dtype) -> str:
    if dtype.kind in "biu":
        return "%d"
    return "%.9g" if dtype.itemsize <= 4 else "%r"


def points(kind: str, table: Table) -> Iterator[list[tuple[int, dict[str, float]]]]:
    """The valid rows of each member as (environment steps, {tag: value}), without NaN.

    For the ``kind`` "metrics" a tag starts with its group (`_GROUPS`), for "evaluation" with that
    word.
    """
    names = [name for name in table if name not in _NOT_MEASUREMENTS]
    tags = [f"{_GROUPS.get(name, 'extra') if kind == 'metrics' else kind}/{name}" for name in names]
    values = np.stack([np.asarray(table[name], float) for name in names], axis=-1)
    for rows, steps, valid in zip(
        values, np.asarray(table["timesteps"]), valid_rows(table), strict=True
    ):
        yield [
            (int(step), {tag: x for tag, x in zip(tags, row, strict=True) if x == x})
            for step, row in zip(steps[valid].tolist(), rows[valid].tolist(), strict=True)
        ]


def averaged(table: Table) -> Table:
    """One row per member: the mean over its valid rows, at the steps of the last valid row.

    Returns and lengths are averaged over episodes.
    """
    valid = valid_rows(table)
    if not valid.size:
        return table
    last = np.arange(len(valid)), valid.shape[1] - 1 - valid[:, ::-1].argmax(axis=1)
    result = {name: np.asarray(table[name])[last][:, None] for name in ("iteration", "timesteps")}
    for name in columns(table)[len(result) :]:
        if name == PARENT:  # the index of an agent has no mean
            result[name] = np.asarray(table[name])[last][:, None]
            continue
        is_episode_mean = name in ("episode_return", "episode_length")
        weight = np.where(valid, table["episodes"] if is_episode_mean else 1, 0)
        x = np.asarray(table[name], float)
        weight = np.where(np.isnan(x), 0, weight)
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: there is no measurement
            total = np.where(weight > 0, x * weight, 0).sum(axis=1, keepdims=True)
            result[name] = total / weight.sum(axis=1, keepdims=True)
    return result | {"valid": valid.any(axis=1, keepdims=True)}


def next_steps(before: Mapping[str, Table], num_members: int) -> list[int]:
    """For each member the environment step after the last one in its rows; 0 without rows."""
    last = np.full(num_members, -1.0)
    for table in before.values():
        last = np.maximum(
            last, np.where(valid_rows(table), table["timesteps"], -1).max(axis=1, initial=-1)
        )
    return [int(step) + 1 for step in last]


def of_metrics(metrics: Metrics, last: int, steps: NDArray[Any]) -> Table:
    """The table of metrics [members, n] of the n iterations up to ``last``.

    ``steps`` [members] are the environment steps before them. Rows of a member that had already
    reached its last step are not valid.
    """
    fields = {name: np.asarray(x) for name, x in metrics._asdict().items() if name != "extra"}
    new_steps = np.diff(fields["timesteps"], axis=1, prepend=steps[:, None])
    first = last - new_steps.shape[1] + 1
    iteration = np.broadcast_to(np.arange(first, last + 1), new_steps.shape)
    valid = (new_steps > 0) | (fields["episodes"] > 0)
    extra = {name: np.asarray(x) for name, x in metrics.extra.items()}
    return {"iteration": iteration, **fields, **extra, "valid": valid}


def to_metrics(table: Table) -> Metrics:
    """The inverse of `of_metrics`."""
    fields: dict[str, Any] = {name: table[name] for name in Metrics._fields if name != "extra"}
    extra: dict[str, Any] = {
        name: x for name, x in table.items() if name not in {*fields, "iteration", "valid"}
    }
    return Metrics(**fields, extra=extra)


def joined(parts: Sequence[Table]) -> Table:
    """Concatenate tables along their rows."""
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
