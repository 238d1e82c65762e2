"""What every logger is."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from purejaxppo.runs.tables import Table

Before = (
    Mapping[str, Table] | None
)  # kind: rows that a resumed run goes on from; None for a new run


class Logger(NamedTuple):
    """Where tables go. A table's first steps come after, or are, the last ones written before."""

    write: Callable[[str, Table], None]  # kind, "metrics" or "evaluation", and rows
    close: Callable[[], None]
