"""The loggers that a run was asked for, as one.

With a directory there are always ``metrics.csv`` and ``evaluations.csv``; how a run was cut into
chunks does not show in their order. The other loggers are extras, whose packages are imported only
when they are asked for. All of them write the tables that `tables` describes.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from purejaxppo.runs.loggers.base import Before, Logger
from purejaxppo.runs.loggers.csv import open_csv
from purejaxppo.runs.loggers.tensorboard import MOST_STREAMS, open_tensorboard
from purejaxppo.runs.loggers.wandb import MOST_RUNS, open_wandb
from purejaxppo.runs.tables import Table
from purejaxppo.types import ConfigError
from purejaxppo.validation import nearest

LOGGERS: dict[str, Callable] = {
    "csv": open_csv,
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
}
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # imported only when asked for
MOST_MEMBERS = {"tensorboard": MOST_STREAMS, "wandb": MOST_RUNS}


def open_loggers(
    names: Sequence[str],
    directory: Path | None,
    members: Sequence[str],
    description: dict[str, Any],
    before: Before = None,
    numbered: tuple[str, Sequence[int]] | None = None,
) -> Logger:
    """The loggers of these names as one; with a directory ``csv`` is always among them.

    ``before`` has the rows that a resumed run goes on from, so that what its killed predecessor wrote beyond them is
    forgotten; it is empty where the run starts from nothing once more. ``numbered`` is the name of the column that
    tells members apart in CSV files, and their numbers; if not given, they are the seeds 0, 1, …. A logger that fails
    never stops a run: one warning tells of it, and the others go on.
    """
    failed: set[str] = set()

    def attempt(name: str, action: Callable, *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except Exception as error:
            if name not in failed:
                failed.add(name)
                told = f"logger {name!r} failed and is left out from now on: {type(error).__name__}: {error}"
                warnings.warn(told, stacklevel=3)

    names = checked_names(names, directory, len(members))
    numbered = numbered or ("seed", range(len(members)))
    opening = LOGGERS | {"csv": partial(LOGGERS["csv"], numbered=numbered)}
    opened = {
        name: attempt(name, opening[name], directory, members, description, before)
        for name in names
    }

    def write(kind: str, table: Table) -> None:
        for name, logger in opened.items():
            if name not in failed:
                attempt(name, logger.write, kind, table)

    def close() -> None:
        for name, logger in opened.items():
            if logger:
                attempt(name, logger.close)

    return Logger(write, close)


def checked_names(
    names: Sequence[str], directory: Path | None, num_members: int
) -> tuple[str, ...]:
    """The loggers that will write, or one sentence on why they cannot; with a directory ``csv`` is the first."""
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in LOGGERS:
            hint = nearest(name, LOGGERS) or f"; there are {', '.join(LOGGERS)}"
            raise ConfigError(f"logger {name!r} is not known{hint}")
        if directory is None:
            raise ConfigError(
                f"logger {name!r} needs a place to write to: give the run a directory"
            )
        if name in PACKAGES:
            _import(name, PACKAGES[name])
        most = MOST_MEMBERS.get(name, num_members)
        if num_members > most:
            raise ConfigError(
                f"logger {name!r} opens a stream for each agent, {most} at most, and there are {num_members}: "
                "use metrics.csv in the directory of the run"
            )
    return () if directory is None else tuple(dict.fromkeys(["csv", *names]))


def _import(name: str, package: str) -> None:
    try:
        importlib.import_module(package)
    except Exception as error:  # an installed package may fail in its own ways
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            told = f"needs the package {package}: pip install 'purejaxppo[{name}]'"
        else:
            told = f"cannot import the package {package}: {type(error).__name__}: {error}"
        raise ConfigError(f"logger {name!r} {told}") from None
