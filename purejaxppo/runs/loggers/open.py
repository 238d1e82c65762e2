"""The selected loggers of a run, combined into one.

A run with a directory always writes ``metrics.csv`` and ``evaluations.csv``; their order of rows
does not depend on the chunks. The other loggers are optional: their packages are imported only if
they are selected. All of them write the tables of the module `tables`.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from purejaxppo.metrics import MetricsDescription
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
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # imported only if selected
MOST_MEMBERS = {"tensorboard": MOST_STREAMS, "wandb": MOST_RUNS}


def open_loggers(
    names: Sequence[str],
    directory: Path | None,
    members: Sequence[str],
    config: dict[str, Any],
    described: MetricsDescription,
    before: Before = None,
    numbered: tuple[str, Sequence[int]] | None = None,
) -> Logger:
    """Open the loggers with these names as one; with a directory ``csv`` is always among them.

    ``config`` is shown by W&B, and ``described`` describes the metrics. ``before`` holds the rows
    before the checkpoint that the run resumes from: rows that the killed run logged after it are
    discarded. It is empty if the run resumes without a checkpoint.
    ``numbered`` is the name of the column that identifies members in CSV files, and its values; the
    default is ``seed``, 0, 1, …. If a logger fails, one warning is issued and the run and the other
    loggers continue. Raises `ConfigError` for invalid names (`checked_names`).
    """
    failed: set[str] = set()

    def attempt(name: str, action: Callable, *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except Exception as error:
            if name not in failed:
                failed.add(name)
                message = (
                    f"logger {name!r} failed and is left out from now on: "
                    f"{type(error).__name__}: {error}"
                )
                warnings.warn(message, stacklevel=3)

    names = checked_names(names, directory, len(members))
    numbered = numbered or ("seed", range(len(members)))
    openers = LOGGERS | {"csv": partial(LOGGERS["csv"], numbered=numbered)}
    loggers = {
        name: attempt(name, openers[name], directory, members, config, described, before)
        for name in names
    }

    def write(kind: str, table: Table) -> None:
        for name, logger in loggers.items():
            if name not in failed:
                attempt(name, logger.write, kind, table)

    def close() -> None:
        for name, logger in loggers.items():
            if logger:
                attempt(name, logger.close)

    return Logger(write, close)


def checked_names(
    names: Sequence[str], directory: Path | None, num_members: int
) -> tuple[str, ...]:
    """The names of the loggers that will write; with a directory ``csv`` comes first.

    Raises `ConfigError` for an unknown name, a missing directory or package, or too many members.
    """
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
                f"logger {name!r} opens a stream for each member, {most} at most, "
                f"and there are {num_members}: use metrics.csv in the directory of the run"
            )
    return () if directory is None else tuple(dict.fromkeys(["csv", *names]))


def _import(name: str, package: str) -> None:
    try:
        importlib.import_module(package)
    except Exception as error:  # importing an installed package may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            reason = f"needs the package {package}: pip install 'purejaxppo[{name}]'"
        else:
            reason = f"cannot import the package {package}: {type(error).__name__}: {error}"
        raise ConfigError(f"logger {name!r} {reason}") from None
