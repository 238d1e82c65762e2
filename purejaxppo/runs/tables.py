"""Metrics and evaluations of several members as columns, and their formats for loggers.

A table maps the name of a column to an array [members, n]: ``iteration``, the progress (such as
``timesteps``) and the measurements. If there is a column ``valid``, it marks the rows that exist;
after the last row of a member that finished early no row is valid.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purejaxppo.metrics import MetricsDescription
from purejaxppo.trees import as_stored
from purejaxppo.types import PyTree

Table = Mapping[str, NDArray[Any]]

BLOCK_ROWS = 2**16  # maximum number of rows held as text


def valid_rows(table: Table) -> NDArray[np.bool_]:
    """[members, n] whether each row exists."""
    return np.asarray(table.get("valid", np.ones(table["iteration"].shape)), bool)


def measurements(described: MetricsDescription, table: Table) -> list[str]:
    """The names of the columns with measurements."""
    return [name for name in table if name not in ("iteration", described.progress, "valid")]


def columns(described: MetricsDescription, table: Table) -> list[str]:
    """The names of the columns in files, in order."""
    return ["iteration", described.progress, *measurements(described, table)]


def lines(
    described: MetricsDescription, table: Table, member_indices: Sequence[int]
) -> Iterator[str]:
    """The valid rows as comma-separated text, in blocks: the index of the member, then `columns`.

    Rows are sorted by iteration, then by member. NaN becomes an empty cell. Numbers are read back
    exactly: nine digits identify a float32, and printing them is three times as fast as finding
    the shortest exact form.
    """
    valid = valid_rows(table)
    member = np.broadcast_to(np.asarray(member_indices)[:, None], valid.shape)
    data = [member, *(np.asarray(table[name]) for name in columns(described, table))]
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


def points(
    described: MetricsDescription, kind: str, table: Table
) -> Iterator[list[tuple[int, dict[str, float]]]]:
    """The valid rows of each member as (progress, {tag: value}), without NaN.

    For the ``kind`` "metrics" a tag starts with the group of the metric or with "extra", for
    "evaluation" with that word.
    """
    names = measurements(described, table)
    groups = described.groups if kind == "metrics" else dict.fromkeys(names, kind)
    tags = [f"{groups.get(name, 'extra')}/{name}" for name in names]
    values = np.stack([np.asarray(table[name], float) for name in names], axis=-1)
    for rows, steps, valid in zip(
        values, np.asarray(table[described.progress]), valid_rows(table), strict=True
    ):
        yield [
            (int(step), {tag: x for tag, x in zip(tags, row, strict=True) if x == x})
            for step, row in zip(steps[valid].tolist(), rows[valid].tolist(), strict=True)
        ]


def averaged(described: MetricsDescription, table: Table) -> Table:
    """One row per member: the mean over its valid rows, at the progress of the last valid row.

    Means are weighted with the counts of their samples.
    """
    valid = valid_rows(table)
    if not valid.size:
        return table
    last = np.arange(len(valid)), valid.shape[1] - 1 - valid[:, ::-1].argmax(axis=1)
    names = ("iteration", described.progress, *described.not_averaged)
    result = {name: np.asarray(table[name])[last][:, None] for name in names if name in table}
    for name in measurements(described, table):
        if name in described.not_averaged:
            continue
        count = described.counts.get(name)
        weight = np.where(valid, table[count] if count else 1, 0)
        x = np.asarray(table[name], float)
        weight = np.where(np.isnan(x), 0, weight)
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: there is no measurement
            total = np.where(weight > 0, x * weight, 0).sum(axis=1, keepdims=True)
            result[name] = total / weight.sum(axis=1, keepdims=True)
    return result | {"valid": valid.any(axis=1, keepdims=True)}


def next_steps(
    described: MetricsDescription, before: Mapping[str, Table], num_members: int
) -> list[int]:
    """For each member the progress of its last valid row plus one; 0 without rows."""
    last = np.full(num_members, -1.0)
    for table in before.values():
        last = np.maximum(
            last, np.where(valid_rows(table), table[described.progress], -1).max(axis=1, initial=-1)
        )
    return [int(step) + 1 for step in last]


def of_metrics(
    described: MetricsDescription, metrics: PyTree, last: int, completed: NDArray[Any]
) -> Table:
    """The table of metrics [members, n] of the n iterations up to ``last``.

    The first ``completed`` [members] rows of each member are valid; the others are padding.
    """
    columns = {name: as_stored(x) for name, x in described.columns(metrics).items()}
    shape = columns[described.progress].shape
    row = np.broadcast_to(np.arange(shape[1]), shape)
    iteration = row + last - shape[1] + 1
    return {"iteration": iteration, **columns, "valid": row < completed[:, None]}


def joined(parts: Sequence[Table]) -> Table:
    """Concatenate tables along their rows."""
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
