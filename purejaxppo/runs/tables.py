"""The numbers of a run's members as columns, and the forms in which loggers want them.

A table maps the name of a column to an array [members, n]: `iteration`, `timesteps`, and what was measured. Where there
is a column `valid`, it says which rows exist; of an agent that ended earlier none follow.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purejaxppo.metrics import PARENT
from purejaxppo.types import Metrics

Table = Mapping[str, NDArray[Any]]

BLOCK_ROWS = 2**16  # most rows that are held as text at once

_NO_MEASUREMENT = ("iteration", "timesteps", "valid")
_GROUPS = {
    **dict.fromkeys(("episode_return", "episode_length", "episodes"), "train"),
    **dict.fromkeys(("policy_loss", "value_loss", "entropy"), "loss"),
    **dict.fromkeys(
        ("approx_kl", "clip_fraction", "explained_variance", "grad_norm", "first_ratio_deviation"),
        "update",
    ),
}


def existing(table: Table) -> NDArray[np.bool_]:
    """[members, n] which rows exist."""
    return np.asarray(table.get("valid", np.ones(table["iteration"].shape)), bool)


def columns(table: Table) -> list[str]:
    """The names of the columns that are written."""
    return ["iteration", "timesteps", *(name for name in table if name not in _NO_MEASUREMENT)]


def lines(table: Table, numbers: Sequence[int]) -> Iterator[str]:
    """The rows as comma-separated text, the member's number and `columns`, of all members iteration after iteration.

    Numbers come back exactly, and NaN is an empty cell. Nine digits tell all float32 apart, and to print them is three
    times as fast as to find the fewest that do.
    """
    exists = existing(table)
    member = np.broadcast_to(np.asarray(numbers)[:, None], exists.shape)
    data = [member, *(np.asarray(table[name]) for name in columns(table))]
    line = (
        ",".join(
            "%d" if x.dtype.kind in "biu" else "%.9g" if x.dtype.itemsize <= 4 else "%r"
            for x in data
        )
        + "\n"
    )
    block = max(1, BLOCK_ROWS // len(exists))
    for part in (slice(start, start + block) for start in range(0, exists.shape[1], block)):
        cells = [x[:, part].T[exists[:, part].T].tolist() for x in data]
        yield "".join([line % row for row in zip(*cells, strict=True)]).replace("nan", "")


def points(kind: str, table: Table) -> Iterator[list[tuple[int, dict[str, float]]]]:
    """For each member its rows as (environment steps, {tag: value}); NaN, which is no measurement, is left out.

    ``kind`` is "metrics", which are grouped as `_GROUPS` has it, or "evaluation".
    """
    names = [name for name in table if name not in _NO_MEASUREMENT]
    tags = [f"{_GROUPS.get(name, 'extra') if kind == 'metrics' else kind}/{name}" for name in names]
    values = np.stack([np.asarray(table[name], float) for name in names], axis=-1)
    for rows, steps, exists in zip(
        values, np.asarray(table["timesteps"]), existing(table), strict=True
    ):
        yield [
            (int(step), {tag: x for tag, x in zip(tags, row, strict=True) if x == x})
            for step, row in zip(steps[exists].tolist(), rows[exists].tolist(), strict=True)
        ]


def averaged(table: Table) -> Table:
    """One row per member: means over its rows, of returns and lengths over its episodes, at its last row's steps."""
    exists = existing(table)
    if not exists.size:
        return table
    last = np.arange(len(exists)), exists.shape[1] - 1 - exists[:, ::-1].argmax(axis=1)
    result = {name: np.asarray(table[name])[last][:, None] for name in ("iteration", "timesteps")}
    for name in columns(table)[len(result) :]:
        if name == PARENT:  # a number of an agent
            result[name] = np.asarray(table[name])[last][:, None]
            continue
        weight = np.where(
            exists, table["episodes"] if name in ("episode_return", "episode_length") else 1, 0
        )
        x = np.asarray(table[name], float)
        weight = np.where(np.isnan(x), 0, weight)
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as it should be
            total = np.where(weight > 0, x * weight, 0).sum(axis=1, keepdims=True)
            result[name] = total / weight.sum(axis=1, keepdims=True)
    return result | {"valid": exists.any(axis=1, keepdims=True)}


def next_steps(before: Mapping[str, Table], num_members: int) -> list[int]:
    """For each member the first environment step after those of all its rows."""
    last = np.full(num_members, -1.0)
    for table in before.values():
        last = np.maximum(
            last, np.where(existing(table), table["timesteps"], -1).max(axis=1, initial=-1)
        )
    return [int(step) + 1 for step in last]


def of_metrics(metrics: Metrics, last: int, steps: NDArray[Any]) -> Table:
    """Metrics [members, n] of the n iterations up to ``last``, before which the members had taken ``steps`` [members].

    A member that had counted its steps and waited for the others has no valid row.
    """
    fields = {name: np.asarray(x) for name, x in metrics._asdict().items() if name != "extra"}
    taken = np.diff(fields["timesteps"], axis=1, prepend=steps[:, None])
    iteration = np.broadcast_to(np.arange(last - taken.shape[1] + 1, last + 1), taken.shape)
    valid = (taken > 0) | (fields["episodes"] > 0)
    extra = {name: np.asarray(x) for name, x in metrics.extra.items()}
    return {"iteration": iteration, **fields, **extra, "valid": valid}


def to_metrics(table: Table) -> Metrics:
    """The metrics that a table was made of."""
    fields: dict[str, Any] = {name: table[name] for name in Metrics._fields if name != "extra"}
    extra: dict[str, Any] = {
        name: x for name, x in table.items() if name not in {*fields, "iteration", "valid"}
    }
    return Metrics(**fields, extra=extra)


def joined(parts: Sequence[Table]) -> Table:
    """Tables one after the other."""
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
