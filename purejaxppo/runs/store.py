"""`Store`: a directory that the processes of a run share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from purejaxppo.runs import processes


class Store(NamedTuple):
    """A directory that the processes of a run share; only the main process writes it.

    All processes call the same methods. An error of the main process is raised in all of them.
    Without a directory nothing is stored. (Arrays of checkpoints and finished portions of sweeps
    are read by every process itself.)
    """

    directory: Path | None

    def write(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Call ``action(directory, *arguments)``."""
        if self.directory is not None:
            processes.on_main_process(lambda: _ignore(action(self.directory, *arguments)))

    def read(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """The result of ``action(directory, *arguments)``, which JSON must be able to represent.

        None without a directory.
        """
        if self.directory is None:
            return None
        return processes.on_main_process(lambda: action(self.directory, *arguments))

    def subdirectory(self, name: str) -> "Store":
        """The store of a directory in this one, which ``write`` may have to make."""
        return Store(None if self.directory is None else self.directory / name)


def _ignore(result: Any) -> None:
    """No result: the main process would have to send it to the others."""
