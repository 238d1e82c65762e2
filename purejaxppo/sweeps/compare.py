"""`compare`: algorithms compared over many seeds, as a table, as data and as a figure."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from purejaxppo.analysis.curves import Curve, windowed
from purejaxppo.analysis.plots import comparison_figure
from purejaxppo.analysis.statistics import estimate
from purejaxppo.config import ALGORITHMS, Config, variants_of
from purejaxppo.policies.evaluate import evaluate
from purejaxppo.runs import run_directory
from purejaxppo.runs.agents import Progress
from purejaxppo.runs.disk import atomic_write
from purejaxppo.runs.fit import fit
from purejaxppo.runs.run import Run, RunPlan
from purejaxppo.setup import set_up
from purejaxppo.types import ConfigError
from purejaxppo.validation import integer


class Entry(NamedTuple):
    """One algorithm in one environment."""

    env: str  # the name that `compare` got
    name: str  # of the algorithm or variant: ppo, ppo/unclipped, reinforce/none, …
    config: Config
    curve: Curve  # returns during training, [seeds, windows]
    # [seeds] mean return of the final policy in fresh episodes; NaN for a seed that diverged
    scores: NDArray[np.floating]
    timesteps: float  # of one agent, mean over the seeds
    steps_per_second: float  # of all agents together, without compilation
    interrupted: bool  # by Ctrl-C, before the end of training

    @property
    def largest_fall(self) -> float:
        """The largest drop of a curve below its maximum so far; median over the seeds."""
        returns = self.curve.returns[np.isfinite(self.curve.returns).any(axis=1)]
        if not returns.size:
            return float("nan")
        return float(np.median(np.nanmax(np.fmax.accumulate(returns, axis=1) - returns, axis=1)))


def variant_names() -> list[str]:
    """The variants of all algorithms, such as ``ppo/adaptive_kl``."""
    return [
        f"{algorithm}/{kind}"
        for algorithm in ALGORITHMS
        for kinds in variants_of(algorithm).values()
        for kind in kinds
    ]


def variant(env: str, name: str, **changes: Any) -> Config:
    """The tuned configuration of an algorithm, or of a variant such as ``ppo/adaptive_kl``.

    A variant is an objective of PPO or a baseline of REINFORCE. ``changes`` replace tuned settings.
    """
    algorithm, slash, kind = name.partition("/")
    fields = {kind: field for field, kinds in variants_of(algorithm).items() for kind in kinds}
    if slash and kind not in fields:
        variants = ", ".join(variant_names())
        raise ConfigError(f"{name!r} is not a variant of an algorithm; known: {variants}")
    named = {"algorithm": algorithm} | ({fields[kind]: kind} if slash else {})
    if conflicts := sorted({"env", *named} & changes.keys()):
        raise ConfigError(
            f"{conflicts[0]} cannot be changed: the environment and the name {name!r} determine it"
        )
    return Config.for_env(env, **named, **changes)


def compare(
    envs: Sequence[str],
    algorithms: Sequence[str],
    *,
    seeds: int = 8,
    key: int = 0,
    eval_episodes: int = 128,
    deterministic: bool = True,
    changes: Mapping[str, Any] | None = None,
    directory: str | os.PathLike | None = None,
    on_start: Callable[[RunPlan], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Entry]:
    """Train each algorithm in each environment with ``seeds`` seeds, and score the final policies.

    Each algorithm has its tuned settings. All configurations are checked before training starts.
    Ctrl-C stops the comparison and returns the entries so far.

    Main arguments:
        envs: names of the environments.
        algorithms: names of algorithms or variants (`variant`).
        seeds: the number of agents for each algorithm and environment, trained in parallel.
        key: an integer from which the random keys are made.
        changes: fields of `Config` that replace tuned settings. Without ``total_timesteps``, all
            algorithms of an environment get the largest that one of them is tuned for.
        directory: a new directory, for ``comparison.md``, ``scores.csv``, ``curves.csv`` and
            ``comparison.png``, written again after every entry, and ``config.json``.

    Other arguments:
        eval_episodes: fresh episodes that score each final policy.
        deterministic: take the mode of the action distribution instead of a sample.
        on_start: called with the `RunPlan` of each run after its compilation.
        on_progress: called with the `Progress` after each chunk.

    Raises `ConfigError` for arguments that are invalid or do not fit together.
    """
    if (
        not envs
        or not algorithms
        or len(set(envs)) < len(envs)
        or len(set(algorithms)) < len(algorithms)
    ):
        raise ConfigError(
            "compare needs at least one environment and one algorithm, each given once"
        )
    seeds = integer("seeds", seeds, 1)
    key = integer("key", key, 0)
    eval_episodes = integer("eval_episodes", eval_episodes, 1)
    planned = [plan for env in envs for plan in _plan_runs(env, algorithms, changes or {})]
    setups = [set_up(config) for _, _, config in planned]
    for setup in setups:
        if setup.env.max_episode_steps is None:
            raise ConfigError(
                f"{setup.env.name} has no bound on the length of an episode, "
                "so its policies cannot be scored"
            )
    if directory is not None:
        configs = [
            {"asked": f"{name} on {env}", **config.to_dict()} for env, name, config in planned
        ]
        directory = run_directory.reserve(
            directory, {"configs": configs, "seeds": seeds, "key": key}
        )
    entries: list[Entry] = []
    # `fit` handles Ctrl-C in training; here it is handled in compilation and writing.
    with contextlib.suppress(KeyboardInterrupt):
        for (env, name, _), setup in zip(planned, setups, strict=True):
            run = fit(setup, seeds=seeds, key=key, on_start=on_start, on_progress=on_progress)
            entries.append(_entry(env, name, run, key, eval_episodes, deterministic))
            if directory is not None:
                write(directory, entries)
            if run.interrupted:
                break
    return entries


def _plan_runs(
    env: str, algorithms: Sequence[str], changes: Mapping[str, Any]
) -> list[tuple[str, str, Config]]:
    """The environment, the name and the configuration of each algorithm.

    All have the same ``total_timesteps``.
    """
    configs = [variant(env, name, **changes) for name in algorithms]
    if "total_timesteps" not in changes:
        configs = [
            x.replace(total_timesteps=max(y.total_timesteps for y in configs)) for x in configs
        ]
    return [(env, name, config) for name, config in zip(algorithms, configs, strict=True)]


def _entry(
    env: str, name: str, run: Run, key: int, eval_episodes: int, deterministic: bool
) -> Entry:
    scores = np.full(run.seeds, np.nan)
    eval_keys = jax.random.split(jax.random.fold_in(jax.random.key(key), 1), run.seeds)
    for seed, eval_key in enumerate(eval_keys):
        if run.diverged_at[seed] is None:
            scores[seed] = evaluate(
                run.policy(seed), run.env, eval_key, eval_episodes, deterministic
            ).returns.mean()
    timesteps = run.metrics.timesteps[:, -1].astype(float)
    return Entry(
        env=env,
        name=name,
        config=run.config,
        curve=windowed(run.metrics),
        scores=scores,
        timesteps=float(timesteps.mean()),
        steps_per_second=float(timesteps.sum() / run.train_seconds),
        interrupted=run.interrupted,
    )


# -------------------------------------------------------------------------------------------- files


def write(directory: str | os.PathLike, entries: Sequence[Entry]) -> None:
    """Write the comparison as Markdown, CSV and PNG. Each file is written atomically."""
    directory = Path(directory)
    curves: dict[str, dict[str, Curve]] = {}
    for entry in entries:
        curves.setdefault(entry.env, {})[entry.name] = entry.curve
    atomic_write(
        directory / "comparison.md",
        lambda path: path.write_text(markdown(entries), encoding="utf-8"),
    )
    atomic_write(
        directory / "scores.csv", lambda path: scores_table(entries).to_csv(path, index=False)
    )
    atomic_write(
        directory / "curves.csv", lambda path: curves_table(entries).to_csv(path, index=False)
    )
    figure = comparison_figure(curves)
    atomic_write(directory / "comparison.png", lambda path: figure.savefig(path, format="png"))


def rows(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """A row of the table for each entry, with the text of each column."""

    def row(entry: Entry) -> dict[str, str]:
        scores = entry.scores[np.isfinite(entry.scores)]
        diverged = len(entry.scores) - len(scores)
        spread = "–"
        if len(scores):
            low, high = np.percentile(scores, [25, 75])
            spread = f"{high - low:.1f} ({scores.min():.1f} … {scores.max():.1f})"
        return {
            "environment": entry.env,
            "algorithm": entry.name
            + (f" ({diverged} of {len(entry.scores)} seeds diverged)" if diverged else "")
            + (" (interrupted)" if entry.interrupted else ""),
            "steps": f"{entry.timesteps:,.0f}",
            "final return [95 %]": "{:.1f} [{:.1f}, {:.1f}]".format(*estimate(scores))
            if len(scores)
            else "–",
            "spread (worst … best)": spread,
            "largest fall": "–" if np.isnan(entry.largest_fall) else f"{entry.largest_fall:.1f}",
            "steps/s": f"{entry.steps_per_second:,.0f}",
        }

    return [row(entry) for entry in entries]


def markdown(entries: Sequence[Entry]) -> str:
    """The table in Markdown, with a line that explains its columns."""
    table = rows(entries)
    lines = [list(table[0]), ["---"] * len(table[0]), *(list(row.values()) for row in table)]
    seeds = len(entries[0].scores)
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
        + f"\n\n{seeds} seeds. Final return: interquartile mean of the final policies in fresh "
        "episodes, with its 95 % bootstrap interval. Spread: interquartile range of the seeds. "
        "Largest fall: largest drop of a seed's training curve below its maximum so far, median "
        "over the seeds.\n"
    )


def scores_table(entries: Sequence[Entry]) -> pd.DataFrame:
    """One row for each environment, algorithm and seed."""
    return pd.DataFrame(
        [
            {"env": entry.env, "algorithm": entry.name, "seed": seed, "score": score}
            for entry in entries
            for seed, score in enumerate(entry.scores)
        ]
    )


def curves_table(entries: Sequence[Entry]) -> pd.DataFrame:
    """One row for each environment, algorithm, seed and window of steps."""
    return pd.DataFrame(
        [
            {
                "env": entry.env,
                "algorithm": entry.name,
                "seed": seed,
                "timesteps": steps,
                "episode_return": mean,
            }
            for entry in entries
            for seed, returns in enumerate(entry.curve.returns)
            for steps, mean in zip(entry.curve.timesteps, returns, strict=True)
        ]
    )
