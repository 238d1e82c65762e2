"""Weights & Biases."""

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purejaxppo.runs import tables
from purejaxppo.runs.disk import atomic_write
from purejaxppo.runs.loggers.base import Before, Logger
from purejaxppo.runs.tables import Table

MOST_RUNS = 100  # each takes about half a second to open, and up to a millisecond whenever it logs


def open_wandb(
    directory: Path, members: Sequence[str], description: dict[str, Any], before: Before
) -> Logger:
    """A run per member, all in one group; ``wandb.json`` holds what their ids begin with, for a run that is resumed.

    A call of `log` can take as long as an iteration: of the metrics in a table each member logs the mean.
    """
    import wandb

    path = directory / "wandb.json"
    if not path.exists():
        described = json.dumps({"id": secrets.token_hex(4)}) + "\n"
        atomic_write(path, lambda path: path.write_text(described))
    shared_id = json.loads(path.read_text())["id"]
    with (
        contextlib.ExitStack() as stack
    ):  # where one cannot be opened, those that were are finished
        runs = []
        for index, member in enumerate(members):
            quiet = (
                {"silent": True, "x_disable_stats": True} if index else {}
            )  # the first one tells where the group is
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "purejaxppo",
                dir=directory,
                id=f"{shared_id}-{index}",
                name=f"{directory.name}-{member}",
                group=f"{directory.name}-{shared_id}",
                config=description,
                resume="allow",
                reinit="create_new",
                settings={"console": "off", "quiet": True, **quiet},
            )
            stack.callback(run.finish)
            runs.append(run)
        opened = stack.pop_all()
    starts = [
        run.starting_step for run in runs
    ]  # a resumed run has all before it, and takes nothing there

    def write(kind: str, table: Table) -> None:
        table = tables.averaged(table) if kind == "metrics" else table
        for run, start, points in zip(runs, starts, tables.points(kind, table), strict=True):
            for step, values in points:
                if step >= start:
                    run.log(values, step=step)

    return Logger(write, opened.close)
