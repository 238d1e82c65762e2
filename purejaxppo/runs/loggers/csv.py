"""``metrics.csv`` and ``evaluations.csv``: one row per member (agent of the run) and iteration."""

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from purejaxppo.metrics import MetricsDescription
from purejaxppo.runs import tables
from purejaxppo.runs.disk import atomic_write
from purejaxppo.runs.loggers.base import Before, Logger
from purejaxppo.runs.tables import Table

# {kind of table: file}
FILES = {"metrics": "metrics.csv", "evaluation": "evaluations.csv"}


def open_csv(
    directory: Path,
    members: Sequence[str],
    config: dict[str, Any],
    described: MetricsDescription,
    before: Before,
    numbered: tuple[str, Sequence[int]],
) -> Logger:
    """Open the CSV files. If the process is killed, at most the last line is incomplete.

    ``numbered`` is the name of the first column, which identifies members, and its values.
    """
    index_column, member_indices = numbered
    files: dict[str, IO[str]] = {}
    columns: dict[str, list[str]] = {}

    def begin(kind: str, path: Path, table: Table, mode: str) -> IO[str]:
        columns[kind] = tables.columns(described, table)
        file = path.open(mode, encoding="utf-8", newline="")
        csv.writer(file, lineterminator="\n").writerow([index_column, *columns[kind]])
        return file

    def rewrite(kind: str, table: Table, path: Path) -> None:
        with begin(kind, path, table, "w") as file:
            file.writelines(tables.lines(described, table, member_indices))

    for kind, name in FILES.items() if before is not None else ():
        table = (before or {}).get(kind)
        if table is None or not tables.valid_rows(table).any():
            (directory / name).unlink(missing_ok=True)
        else:
            atomic_write(directory / name, partial(rewrite, kind, table))
            files[kind] = (directory / name).open("a", encoding="utf-8", newline="")

    def write(kind: str, table: Table) -> None:
        if kind not in files:
            # Mode "x", because a run never overwrites.
            files[kind] = begin(kind, directory / FILES[kind], table, "x")
        if tables.columns(described, table) != columns[kind]:
            raise ValueError(
                f"{FILES[kind]} has the columns {columns[kind]}, "
                f"but now {tables.columns(described, table)} came"
            )
        files[kind].writelines(tables.lines(described, table, member_indices))
        files[kind].flush()

    def close() -> None:
        for file in files.values():
            file.close()

    return Logger(write, close)
