"""Weights & Biases."""

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purejaxppo.metrics import MetricsDescription
from purejaxppo.runs import tables
from purejaxppo.runs.disk import atomic_write
from purejaxppo.runs.loggers.base import Before, Logger
from purejaxppo.runs.tables import Table

# Opening a run takes about half a second, and each call of its `log` up to a millisecond.
MOST_RUNS = 100


def open_wandb(
    directory: Path,
    members: Sequence[str],
    config: dict[str, Any],
    described: MetricsDescription,
    before: Before,
) -> Logger:
    """Open one W&B run per member, all in one group.

    ``wandb.json`` stores the common prefix of their ids, so that a resumed run finds them. A call
    of `log` can take as long as an iteration, so each member logs the mean over the metrics in a
    table.
    """
    import wandb

    path = directory / "wandb.json"
    if not path.exists():
        text = json.dumps({"id": secrets.token_hex(4)}) + "\n"
        atomic_write(path, lambda path: path.write_text(text))
    shared_id = json.loads(path.read_text())["id"]
    # If a run cannot be opened, the stack finishes those opened before.
    with contextlib.ExitStack() as stack:
        runs = []
        for index, member in enumerate(members):
            # Only the first run prints the address of the group.
            quiet = {"silent": True, "x_disable_stats": True} if index else {}
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "purejaxppo",
                dir=directory,
                id=f"{shared_id}-{index}",
                name=f"{directory.name}-{member}",
                group=f"{directory.name}-{shared_id}",
                config=config,
                resume="allow",
                reinit="create_new",
                settings={"console": "off", "quiet": True, **quiet},
            )
            stack.callback(run.finish)
            runs.append(run)
        opened = stack.pop_all()
    # W&B already has the rows before this step of a resumed run, and accepts no others there.
    starts = [run.starting_step for run in runs]

    def write(kind: str, table: Table) -> None:
        table = tables.averaged(described, table) if kind == "metrics" else table
        for run, start, points in zip(
            runs, starts, tables.points(described, kind, table), strict=True
        ):
            for step, values in points:
                if step >= start:
                    run.log(values, step=step)

    return Logger(write, opened.close)
