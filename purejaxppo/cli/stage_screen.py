"""The output of ``purejaxppo rlhf``: the progress of the stages of a pipeline."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import TaskID

from purejaxppo.cli.console import progress_bar, say
from purejaxppo.rlhf.stages import Stage, StageEvents
from purejaxppo.runs.chunks import Chunk
from purejaxppo.runs.programs import Programs

NUM_PROGRESS_LINES = 5  # per stage, if the output is not a terminal


class StageScreen:
    """Shows the progress of the stages of a pipeline; use it inside ``with screen.live():``."""

    def __init__(self, console: Console):
        self.console = console
        self.bar = progress_bar(console)
        self.task: TaskID | None = None
        self.lines = 0

    @property
    def events(self) -> StageEvents:
        """The callbacks of `run_pipeline`."""
        return StageEvents(
            self.on_start, self.on_chunk, lambda sentence: say(self.console, sentence)
        )

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        with self.bar:
            yield

    def on_start(self, stage: Stage, programs: Programs) -> None:
        """Show what a stage will run."""
        say(
            self.console,
            f"{stage.name}: {stage.job.num_iterations:,} iterations of about "
            f"{stage.units_per_iteration:,.0f} {stage.unit}; "
            f"compiled in {programs.compile_seconds:.1f} s",
        )
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task("", total=stage.job.num_iterations, text="")
        self.lines = 0

    def on_chunk(self, stage: Stage, chunk: Chunk) -> None:
        """Update the bar in a terminal; elsewhere print a line at regular intervals."""
        described = stage.job.metrics
        plotted = float(described.columns(chunk.metrics)[described.plotted][0, -1])
        count = described.columns(chunk.metrics)[described.plotted].shape[-1]
        rate = count * stage.units_per_iteration / chunk.seconds
        name = "score" if described.plotted == "episode_return" else described.plotted
        text = f"{name} {plotted:.3f}  {rate:,.0f} {stage.unit}/s"
        assert self.task is not None, "a stage starts before its first chunk"
        self.bar.update(self.task, completed=chunk.done, text=text)
        lines = chunk.done * NUM_PROGRESS_LINES // stage.job.num_iterations
        if not self.console.is_terminal and lines > self.lines:
            self.lines = lines
            self.console.print(f"{chunk.done:>10,} iterations  {text}")
