"""Atomic writes of files, and locks on directories."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from purejaxppo.types import ConfigError


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` write the file atomically, also if the power fails.

    ``write`` gets a temporary path, and the file there is renamed to ``path``.
    """
    temporary = path.with_name(f".{path.name}.part")
    write(temporary)
    to_disk(temporary)
    temporary.replace(path)
    to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock a directory for this process.

    The operating system releases the lock when the process ends, even if it is killed. Raises
    `ConfigError` if another process holds the lock.
    """
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"another process is training in {directory}: wait, or choose another directory"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)
