"""JSON and JSON Lines files, written atomically."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from purejaxppo.runs.disk import atomic_write


def write_json(path: Path, content: Any) -> None:
    """One value, indented."""
    _write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """One value on each line."""
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    atomic_write(path, lambda path: path.write_text(text, encoding="utf-8"))
