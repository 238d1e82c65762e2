"""Files that appear whole or not at all, and directories that one process at a time has."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from purejaxppo.types import ConfigError


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make the file so that it appears whole or not at all, also when the power fails."""
    temporary = path.with_name(f".{path.name}.part")
    write(temporary)
    to_disk(temporary)
    temporary.replace(path)
    to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Wait until a file, or what a directory lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Only this process may write there; the operating system ends that with the process, however it ends."""
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
