"""The output of the command line: the plan of a run, its progress and its result."""

import contextlib
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import purejaxppo.envs as envs
from purejaxppo.analysis import tidy
from purejaxppo.analysis.statistics import estimate
from purejaxppo.cli import terminal
from purejaxppo.config import Config
from purejaxppo.policies.evaluate import EpisodeStatistics, evaluate
from purejaxppo.policies.policy import Policy
from purejaxppo.runs import agents
from purejaxppo.runs.run import Run, RunPlan
from purejaxppo.sweeps.portions import GroupPlan
from purejaxppo.sweeps.results import SweepResult
from purejaxppo.sweeps.sweep import SweepPlan, SweepProgress
from purejaxppo.trees import all_finite

NUM_PROGRESS_LINES = 10  # per run, if the output is not a terminal


def say(console: Console, text: str) -> None:
    """Print a sentence; a terminal wraps it between words and never splits a path."""
    if console.is_terminal:
        text = textwrap.fill(text, console.width, break_long_words=False, break_on_hyphens=False)
    console.print(text)


def add_columns(table: Table, left: Sequence[str], right: Sequence[str]) -> None:
    """Add columns of text and of numbers. A cell that is too wide gets more lines."""
    sides: list[tuple[Sequence[str], Literal["left", "right"]]] = [(left, "left"), (right, "right")]
    for names, justify in sides:
        for name in names:
            table.add_column(escape(name), justify=justify, overflow="fold")


def add_row(console: Console, table: Table, *cells: str) -> None:
    """Add a row of plain text, as the terminal shows it."""
    table.add_row(*(escape(terminal.shown(cell, console.encoding)) for cell in cells))


def fits(console: Console, table: Table) -> bool:
    """Whether every cell of the table fits in one line."""
    unbounded = console.options.update(max_width=10_000)
    return console.measure(table, options=unbounded).maximum <= console.width


def progress_bar(console: Console) -> Progress:
    """A bar with text, elapsed time and remaining time; disabled outside a terminal."""
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
    """Shows the plan of a run and its progress; its methods are callbacks of `fit` and `sweep`.

    Use it inside ``with screen.live():``.
    """

    def __init__(self, console: Console, import_seconds: float = 0.0):
        self.console = console
        self.import_seconds = import_seconds
        self.bar = progress_bar(console)
        self.task: TaskID | None = None
        self.total = 1
        self.next_line = 1
        self.steps_per_iteration = 0  # 0: the bar counts timesteps

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        with self.bar:
            yield

    def on_run_start(self, plan: RunPlan) -> None:
        """Show exactly what will run, and the time that imports and compilation took."""
        table = Table.grid(padding=(0, 2))
        for name, text in _plan_rows(plan, self.import_seconds).items():
            table.add_row(f"[bold]{name}", text)
        self.console.print(table)
        config = plan.config
        if config.total_episodes is not None:
            # The steps of the episodes are unknown; the iterations are known.
            self.steps_per_iteration = config.batch_size
        self._start_bar(
            config.actual_timesteps if config.has_fixed_length else config.total_timesteps
        )

    def on_sweep_plan(self, plan: SweepPlan) -> None:
        """Show the plan of a sweep before the first compilation."""
        programs = (
            "one compilation" if plan.compilations == 1 else f"{plan.compilations} compilations"
        )
        say(
            self.console,
            f"{plan.members:,} members: {len(plan.settings):,} settings × {plan.seeds} seeds, "
            f"{plan.timesteps:,} steps in all, {programs}",
        )
        self._start_bar(plan.timesteps)

    def on_group_start(self, group: GroupPlan) -> None:
        """Show what one compiled program of a sweep will run."""
        portions = "all" if group.parallel >= group.members else f"{group.parallel:,}"
        memory = f", {decimal(group.memory_bytes)} on each device" if group.memory_bytes else ""
        say(
            self.console,
            f"{environment_title(group.config)}, {algorithm_title(group.config)}, "
            f"{group.config.num_envs} environments: {group.members:,} members, "
            f"{portions} at once on {group.device}{memory}; "
            f"compiled in {group.compile_seconds:.1f} s",
        )

    def on_progress(self, progress: agents.Progress | SweepProgress) -> None:
        """Update the bar in a terminal; elsewhere print a line at regular intervals."""
        text = f"return {_score(progress.episode_return)}  {_rate(progress.steps_per_second)}"
        assert self.task is not None, "the plan comes before the progress"
        timesteps = progress.timesteps
        completed = timesteps
        if self.steps_per_iteration and isinstance(progress, agents.Progress):
            completed = progress.iterations * self.steps_per_iteration
        self.bar.update(self.task, completed=completed, text=text)
        scaled = completed * NUM_PROGRESS_LINES
        if not self.console.is_terminal and scaled >= self.next_line * self.total:
            self.next_line = scaled // self.total + 1
            self.console.print(f"{timesteps:>14,} steps  {text}")

    def _start_bar(self, total: int) -> None:
        """Start a bar that ends at ``total`` timesteps."""
        self.total = total
        self.next_line = 1
        self.task = self.bar.add_task("", total=total, text="")


def _plan_rows(plan: RunPlan, import_seconds: float) -> dict[str, str]:
    """The lines of a run's plan, by their titles."""
    config = plan.config
    rounded = config.actual_timesteps != config.total_timesteps
    epochs = f"{config.num_epochs} epochs of {config.num_minibatches} minibatches"
    data = f"{config.num_steps} × {config.num_envs} steps"
    length = f"{config.actual_timesteps:,} per agent in {config.num_iterations:,} iterations" + (
        f" ({config.total_timesteps:,} rounded up)" if rounded else ""
    )
    if config.whole_episodes:
        data = f"one whole episode in each of {config.num_envs} environments"
        length = (
            f"{config.total_timesteps:,} to {config.actual_timesteps:,} per agent, "
            "counted in whole episodes"
        )
    if config.total_episodes is not None:
        length = (
            f"{config.num_iterations * config.num_envs:,} episodes per agent "
            f"in {config.num_iterations:,} iterations"
        )
    return {
        "environment": f"{environment_title(config)}, {config.num_envs} copies per agent",
        "algorithm": f"{algorithm_title(config)}, {epochs} on {data}",
        "steps": length,
        "agents": "1" if plan.seeds == 1 else f"{plan.seeds} at once",
        "device": plan.device,
        "memory": f"{decimal(plan.memory_bytes)}, as compiled" if plan.memory_bytes else "unknown",
        "start-up": f"imports {import_seconds:.1f} s, compilation {plan.compile_seconds:.1f} s",
    }


def show_sweep(console: Console, result: SweepResult, most: int = 10) -> None:
    """Show the best settings with the intervals of their scores."""
    if not result.parts:
        return
    table = _sweep_table(console, result, most)
    console.print(
        table if fits(console, table) else _sweep_table(console, result, most, in_one_column=True)
    )
    if len(result.summary) > most:
        console.print(f"({len(result.summary) - most} more settings in summary.csv)")


def environment_title(config: Config) -> str:
    """The environment, followed by its settings in brackets."""
    settings = ", ".join(
        f"{name}={value}" for name, value in dict(config.env_settings or ()).items()
    )
    return config.env + (f" ({settings})" if settings else "")


def _sweep_table(
    console: Console, result: SweepResult, most: int, in_one_column: bool = False
) -> Table:
    """A row for each setting; its fields are in one column each, or all in one column."""
    title = "score of the final policies: interquartile mean over the seeds, 95 % interval"
    table = Table(title=title, show_lines=in_one_column)
    add_columns(
        table, ["setting"] if in_one_column else result.fields, ["score", "median", "seeds"]
    )
    for row in result.summary.head(most).to_dict("records"):
        values = {field: tidy.format_value(row[field]) for field in result.fields}
        setting = (
            [" ".join(f"{name}={x}" for name, x in values.items())]
            if in_one_column
            else values.values()
        )
        score = "{:.1f} [{:.1f}, {:.1f}]".format(
            *(row[name] for name in ("interquartile_mean", "low", "high"))
        )
        score = score.replace(" [", "\n[") if in_one_column else score
        diverged = f", {row['diverged']} diverged" if row["diverged"] else ""
        seeds = f"{row['seeds']}{diverged}"
        add_row(console, table, *setting, score, _score(row["median"]), seeds)
    return table


def algorithm_title(config: Config) -> str:
    """The algorithm, followed in brackets by the choices that are not the default."""
    variant = [x for x in (config.objective, config.baseline) if x not in ("clip", "value")]
    return config.algorithm.upper() + (f" ({', '.join(variant)})" if variant else "")


def show_result(console: Console, run: Run) -> None:
    """Show the steps and the speed of a run, and the seeds that diverged."""
    timesteps = np.asarray(run.metrics.timesteps)
    earlier = int(timesteps[:, run.resumed_at - 1].sum(dtype=float)) if run.resumed_at else 0
    steps = int(timesteps[:, -1].sum(dtype=float)) - earlier
    say(
        console,
        f"{steps:,} steps in {run.train_seconds:.1f} s: {_rate(steps / run.train_seconds)}"
        + (" (interrupted)" if run.interrupted else "")
        + (
            f", after the {earlier:,} of the run that was resumed at iteration {run.resumed_at}"
            if earlier
            else ""
        ),
    )
    for seed, iteration in enumerate(run.diverged_at):
        if iteration is not None:
            say(
                console,
                f"[red bold]Seed {seed} diverged[/]: "
                f"loss or gradient became NaN or infinite in iteration {iteration}. "
                "Try a smaller --lr, a smaller --max-grad-norm or --normalize-reward.",
            )


def show_evaluation(
    console: Console,
    policies: list[Policy],
    num_episodes: int,
    key: int = 0,
    max_steps: int | None = None,
) -> None:
    """Play fresh episodes with each policy and show their mean return ± standard deviation.

    Actions are the most probable ones in one column and sampled in the other. Several policies
    have a row with the interquartile mean over them.
    """
    content = f"return over {num_episodes} fresh episodes of the final policy"
    table = Table(title=f"{environment_title(policies[0].config)}: {content}")
    add_columns(table, [""], ["deterministic", "sampled", "mean\nlength"])
    keys = jax.random.split(jax.random.key(key), len(policies))
    env = envs.of_config(policies[0].config)
    scores = []
    for seed, (policy, policy_key) in enumerate(zip(policies, keys, strict=True)):
        results = [
            evaluate(
                policy,
                env,
                jax.random.clone(policy_key),
                num_episodes,
                deterministic,
                max_steps=max_steps,
            )
            for deterministic in (True, False)
        ]
        scores.append([float(result.returns.mean()) for result in results])
        name = "policy" if len(policies) == 1 else f"seed {seed}"
        if not all_finite(policy.params):
            name += " (diverged: its parameters are not finite)"
        length = f"{float(results[0].lengths.mean()):.0f}"
        add_row(console, table, name, *map(_spread, results), length)
    if len(policies) > 1:
        over_policies = estimate(np.asarray(scores))
        table.add_section()
        cells = [
            f"{point:.1f}\n[{low:.1f}, {high:.1f}]"
            for point, low, high in np.transpose(over_policies)
        ]
        add_row(console, table, "interquartile mean,\n95 % interval", *cells, "")
    console.print(table)


def show_comparison(console: Console, rows: list[dict[str, str]]) -> None:
    """Show the table of `compare.rows`, or a narrower one per environment if it does not fit."""
    table = Table()
    names = list(rows[0])
    add_columns(table, names[:2], names[2:])
    for row in rows:
        add_row(console, table, *row.values())
    if fits(console, table):
        console.print(table)
        return
    for env, env_rows in itertools.groupby(rows, key=lambda row: row["environment"]):
        console.print(_narrow_comparison(console, env, list(env_rows)))


def _narrow_comparison(console: Console, env: str, rows: list[dict[str, str]]) -> Table:
    """The entries of one environment, each in two lines: a number, and details below it."""
    table = Table(
        title=escape(env),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    columns = [
        "final return\n[95 %]",
        "spread\n(worst … best)",
        "largest\nfall",
        "steps\nper second",
    ]
    add_columns(table, ["algorithm"], [terminal.shown(name, console.encoding) for name in columns])
    table.columns[0].max_width = len("leave_one_out")
    for row in rows:
        algorithm = row["algorithm"].replace("/", "/\n", 1).replace(" (", "\n(")
        final = row["final return [95 %]"].replace(" [", "\n[")
        spread = row["spread (worst … best)"].replace(" (", "\n(")
        add_row(
            console,
            table,
            algorithm,
            final,
            spread,
            row["largest fall"],
            f"{row['steps']}\n{row['steps/s']}",
        )
    return table


def _spread(result: EpisodeStatistics) -> str:
    returns = np.asarray(result.returns)
    return f"{returns.mean():.1f} ± {returns.std():.1f}"


def _score(x: float) -> str:
    return "–" if np.isnan(x) else f"{x:.1f}"


def _rate(steps_per_second: float) -> str:
    return f"{steps_per_second:,.0f} steps/s"
