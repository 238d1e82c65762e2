"""What the command line shows: the plan of a run, its progress and its result."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from purejaxppo import envs, fitting, session, settings
from purejaxppo.config import Config
from purejaxppo.evaluation import EpisodeStatistics, evaluate
from purejaxppo.policy import Policy
from purejaxppo.statistics import estimate
from purejaxppo.sweep_parts import GroupPlan
from purejaxppo.sweep_results import SweepResult
from purejaxppo.sweeping import SweepPlan, SweepProgress

LINES = 10  # progress lines of a run where the output is not a terminal


def progress_bar(console: Console) -> Progress:
    """A bar with a text, the time gone and the time left; nothing where the output is not a terminal."""
    return Progress(
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    )


class Screen:
    """Shows one run of `fit`: give ``on_start`` and ``on_progress`` to it, inside ``with screen.live():``."""

    def __init__(self, console: Console, import_seconds: float):
        self.console = console
        self.import_seconds = import_seconds
        self.bar = progress_bar(console)

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        with self.bar:
            yield

    def on_start(self, plan: fitting.Plan) -> None:
        """What exactly will run, and what it took to get here."""
        config = plan.config
        rounded = config.actual_timesteps != config.total_timesteps
        epochs = f"{config.num_epochs} epochs of {config.num_minibatches} minibatches"
        data = f"{config.num_steps} × {config.num_envs} steps"
        length = f"{config.actual_timesteps:,} per agent in {config.num_iterations:,} iterations" + (
            f" ({config.total_timesteps:,} rounded up)" if rounded else ""
        )
        if config.whole_episodes:
            data = f"one whole episode in each of {config.num_envs} environments"
            length = f"{config.total_timesteps:,} to {config.actual_timesteps:,} per agent, until so many are counted"
        rows = {
            "environment": f"{config.env}, {config.num_envs} copies per agent",
            "algorithm": f"{algorithm_title(config)}, {epochs} on {data}",
            "steps": length,
            "agents": "1" if plan.seeds == 1 else f"{plan.seeds} at once",
            "device": plan.device,
            "memory": f"{decimal(plan.memory_bytes)}, as compiled" if plan.memory_bytes else "unknown",
            "start-up": f"imports {self.import_seconds:.1f} s, compilation {plan.compile_seconds:.1f} s",
        }
        table = Table.grid(padding=(0, 2))
        for name, text in rows.items():
            table.add_row(f"[bold]{name}", text)
        self.console.print(table)
        self.total, self.next_line = config.total_timesteps if config.whole_episodes else config.actual_timesteps, 1
        self.task = self.bar.add_task("", total=self.total, text="")

    def on_progress(self, now: session.Progress) -> None:
        """The bar of a terminal; elsewhere a line now and then."""
        text = f"return {_number(now.episode_return)}  {_rate(now.steps_per_second)}"
        self.bar.update(self.task, completed=now.timesteps, text=text)
        if not self.console.is_terminal and now.timesteps * LINES >= self.next_line * self.total:
            self.next_line = now.timesteps * LINES // self.total + 1
            self.console.print(f"{now.timesteps:>12,} steps  {text}")


class SweepScreen:
    """Shows a sweep: one line of progress over all of its members."""

    def __init__(self, console: Console):
        self.console = console
        self.bar = progress_bar(console)
        self.total, self.next_line = 1, 1

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        with self.bar:
            yield

    def on_plan(self, plan: SweepPlan) -> None:
        """What will run, before the first compilation."""
        self.total = plan.timesteps
        programs = "one compilation" if plan.compilations == 1 else f"{plan.compilations} compilations"
        self.console.print(
            f"{plan.members:,} members: {len(plan.settings):,} settings × {plan.seeds} seeds, "
            f"{plan.timesteps:,} steps in all, {programs}"
        )
        self.task = self.bar.add_task("", total=plan.timesteps, text="")

    def on_start(self, group: GroupPlan) -> None:
        """What one compiled program will run."""
        portions = "all" if group.at_once >= group.members else f"{group.at_once:,}"
        self.console.print(
            f"{group.config.env}, {algorithm_title(group.config)}, {group.config.num_envs} environments: "
            f"{group.members:,} members, {portions} at once on {group.device}, "
            f"{decimal(group.memory_bytes)} on each device; compiled in {group.compile_seconds:.1f} s"
        )

    def on_progress(self, now: SweepProgress) -> None:
        """The bar of a terminal; elsewhere a line now and then."""
        text = f"return {_number(now.episode_return)}  {_rate(now.steps_per_second)}"
        self.bar.update(self.task, completed=now.timesteps, text=text)
        if not self.console.is_terminal and now.timesteps * LINES >= self.next_line * self.total:
            self.next_line = now.timesteps * LINES // self.total + 1
            self.console.print(f"{now.timesteps:>14,} steps  {text}")


def show_sweep(console: Console, result: SweepResult, most: int = 10) -> None:
    """The best settings, with the interval of their scores."""
    if not result.parts:
        return
    table = Table(title="score of the final policies: interquartile mean over the seeds, 95 % interval")
    for field in result.fields:
        table.add_column(field)
    for column in ("score", "median", "seeds"):
        table.add_column(column, justify="right")
    for row in result.summary.head(most).to_dict("records"):
        lost = f", {row['diverged']} diverged" if row["diverged"] else ""
        score = "{:.1f} \\[{:.1f}, {:.1f}]".format(*(row[name] for name in ("interquartile_mean", "low", "high")))
        values = (settings.text(row[field]) for field in result.fields)
        table.add_row(*values, score, _number(row["median"]), f"{row['seeds']}{lost}")
    console.print(table)
    if len(result.summary) > most:
        console.print(f"({len(result.summary) - most} more settings in summary.csv)")


def algorithm_title(config: Config) -> str:
    """The algorithm, and in brackets what of it is not the default."""
    variant = [x for x in (config.objective, config.baseline) if x not in ("clip", "value")]
    return config.algorithm.upper() + (f" ({', '.join(variant)})" if variant else "")


def show_result(console: Console, run: fitting.Run) -> None:
    """A table of how the run ended; a run that diverged says so."""
    timesteps = np.asarray(run.metrics.timesteps)
    before = int(timesteps[:, run.resumed_at - 1].sum(dtype=float)) if run.resumed_at else 0
    steps = int(timesteps[:, -1].sum(dtype=float)) - before
    console.print(
        f"{steps:,} steps in {run.train_seconds:.1f} s: {_rate(steps / run.train_seconds)}"
        + (" (interrupted)" if run.interrupted else "")
        + (f", after the {before:,} of the run that was resumed at iteration {run.resumed_at}" if before else "")
    )
    for seed, iteration in enumerate(run.diverged_at):
        if iteration is not None:
            console.print(
                f"[red bold]Seed {seed} diverged[/]: loss or gradient became NaN or infinite in iteration "
                f"{iteration}. Try a smaller --lr, a smaller --max-grad-norm or --normalize-reward."
            )


def show_evaluation(console: Console, policies: list[Policy], num_episodes: int, key: int = 0) -> None:
    """Fresh episodes of each policy, most probable actions and sampled ones; with several, the middle over them."""
    table = Table(title=f"{policies[0].config.env}: return over {num_episodes} fresh episodes of the final policy")
    for column in ("", "deterministic", "sampled", "mean length"):
        table.add_column(column, justify="left" if not column else "right")
    keys = jax.random.split(jax.random.key(key), len(policies))
    env, scores = envs.make(policies[0].config.env), []
    for seed, (policy, one) in enumerate(zip(policies, keys, strict=True)):
        both = [evaluate(policy, env, jax.random.clone(one), num_episodes, mode) for mode in (True, False)]
        scores.append([float(result.returns.mean()) for result in both])
        name = "policy" if len(policies) == 1 else f"seed {seed}"
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(policy.params)):
            name += " (diverged: its parameters are not numbers)"
        table.add_row(name, *(_spread(result) for result in both), f"{float(both[0].lengths.mean()):.0f}")
    if len(policies) > 1:
        middle = estimate(np.asarray(scores))
        table.add_section()
        cells = [f"{p:.1f} \\[{low:.1f}, {high:.1f}]" for p, low, high in np.transpose(middle)]
        table.add_row("interquartile mean, 95 % interval", *cells, "")
    console.print(table)


def show_comparison(console: Console, rows: list[dict[str, str]]) -> None:
    """The table of `comparison.rows`."""
    table = Table()
    for i, column in enumerate(rows[0]):
        table.add_column(column.replace("[", "\\["), justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row.values()))
    console.print(table)


def _spread(result: EpisodeStatistics) -> str:
    returns = np.asarray(result.returns)
    return f"{returns.mean():.1f} ± {returns.std():.1f}"


def _number(x: float) -> str:
    return "–" if np.isnan(x) else f"{x:.1f}"


def _rate(steps_per_second: float) -> str:
    return f"{steps_per_second:,.0f} steps/s"
