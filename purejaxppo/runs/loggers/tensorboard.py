"""TensorBoard, written with the package tensorboardX."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from purejaxppo.metrics import MetricsDescription
from purejaxppo.runs import tables
from purejaxppo.runs.loggers.base import Before, Logger
from purejaxppo.runs.tables import Table

MOST_STREAMS = 100  # each of them keeps a file open


def open_tensorboard(
    directory: Path,
    members: Sequence[str],
    config: dict[str, Any],
    described: MetricsDescription,
    before: Before,
) -> Logger:
    """Open one stream per member, ``tensorboard/MEMBER``; the step is the progress.

    `tensorboardX.SummaryWriter` writes in a thread. After that thread has met a full disk, its
    queue blocks forever, and training with it. The underlying `EventsWriter` writes immediately and
    raises.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    writers = []
    with ExitStack() as stack:
        for member, step in zip(
            members, tables.next_steps(described, before or {}, len(members)), strict=True
        ):
            folder = directory / "tensorboard" / member
            folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files of a stream in order of their names. By default these
            # contain the time in seconds, which may be equal.
            writer = EventsWriter(str(folder / "events"), f".{len(list(folder.iterdir())):06d}")
            stack.callback(writer.close)
            writers.append(writer)
            if before is not None:  # discards events from this step on in earlier files
                restart = SessionLog(status=SessionLog.START)
                writer.write_event(Event(wall_time=time.time(), step=step, session_log=restart))
            writer.flush()
        opened = stack.pop_all()

    def write(kind: str, table: Table) -> None:
        now = time.time()
        for writer, points in zip(writers, tables.points(described, kind, table), strict=True):
            for step, values in points:
                summary = Summary(
                    value=[Summary.Value(tag=tag, simple_value=x) for tag, x in values.items()]
                )
                writer.write_event(Event(wall_time=now, step=step, summary=summary))
            writer.flush()

    return Logger(write, opened.close)
