"""The interface of the loggers."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from purejaxppo.runs.tables import Table

# {kind: rows before the checkpoint that a run resumes from}; None for a new run.
Before = Mapping[str, Table] | None


class Logger(NamedTuple):
    """Writes tables. No table begins before the last step that was already written."""

    write: Callable[[str, Table], None]  # (kind, rows); the kind is "metrics" or "evaluation"
    close: Callable[[], None]
