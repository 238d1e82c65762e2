"""`compare`: algorithms side by side over many seeds, as a table, as data and as a picture."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from numpy.typing import NDArray

import purejaxppo.envs as environments
from purejaxppo.analysis.curves import Curve, windowed
from purejaxppo.analysis.plots import comparison_figure
from purejaxppo.analysis.statistics import estimate
from purejaxppo.config import ALGORITHMS, Config, variants_of
from purejaxppo.policies.evaluate import evaluate
from purejaxppo.runs import run_directory
from purejaxppo.runs.disk import atomic_write
from purejaxppo.runs.fit import fit
from purejaxppo.runs.run import Run, RunPlan
from purejaxppo.runs.session import Progress
from purejaxppo.train import make_trainer
from purejaxppo.types import ConfigError
from purejaxppo.validation import integer


class Entry(NamedTuple):
    """One algorithm in one environment."""

    env: str  # as asked for
    name: str  # likewise: ppo, ppo/unclipped, reinforce/none, …
    config: Config
    curve: Curve  # returns during training, [seeds, windows]
    scores: NDArray[
        np.floating
    ]  # [seeds] mean return of the final policy in fresh episodes; NaN of a diverged one
    timesteps: float  # that one agent took, mean over the seeds
    steps_per_second: float  # of all agents together, without compilation
    interrupted: bool  # by Ctrl-C, before the end of the training

    @property
    def largest_fall(self) -> float:
        """How far a seed's curve fell at most below its own best so far; the median over the seeds."""
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
    """The settings for an environment of an algorithm by name, or of a variant such as ``ppo/adaptive_kl``.

    After the stroke stands PPO's objective or REINFORCE's baseline. ``changes`` go on top of the tuned settings.
    """
    algorithm, stroke, kind = name.partition("/")
    fields = {kind: field for field, kinds in variants_of(algorithm).items() for kind in kinds}
    if stroke and kind not in fields:
        known = variant_names()
        raise ConfigError(f"{name!r} is not a variant of an algorithm; known: {', '.join(known)}")
    said = {"algorithm": algorithm} | ({fields[kind]: kind} if stroke else {})
    if twice := sorted({"env", *said} & changes.keys()):
        raise ConfigError(
            f"{twice[0]} cannot be changed: the environment and the name {name!r} say what it is"
        )
    return Config.for_env(env, **said, **changes)


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
    """Train each algorithm in each environment, ``seeds`` agents at once, and score the final policies.

    Each has the settings tuned for it, with ``changes`` on top; unless these say another ``total_timesteps``, all
    algorithms of an environment get the largest that one of them is tuned for. All settings are checked before anything
    is trained. ``directory``, which must be new, gets ``comparison.md``, ``scores.csv``, ``curves.csv``,
    ``comparison.png`` and ``config.json``, written anew after every entry. Ctrl-C ends it with the entries so far.
    """
    if (
        not envs
        or not algorithms
        or len(set(envs)) < len(envs)
        or len(set(algorithms)) < len(algorithms)
    ):
        raise ConfigError(
            "compare needs at least one environment and one algorithm, and each of them once"
        )
    seeds = integer("seeds", seeds, 1)
    key = integer("key", key, 0)
    eval_episodes = integer("eval_episodes", eval_episodes, 1)
    planned = [plan for env in envs for plan in _planned(env, algorithms, changes or {})]
    for env, _, config in planned:
        made = environments.of_config(config)
        if made.max_episode_steps is None:
            raise ConfigError(
                f"{env} has no bound on the length of an episode, so its policies cannot be scored"
            )
        make_trainer(config, made)
    if directory is not None:
        described = [
            {"asked": f"{name} on {env}", **config.to_dict()} for env, name, config in planned
        ]
        directory = run_directory.reserve(
            directory, {"configs": described, "seeds": seeds, "key": key}
        )
    entries: list[Entry] = []
    with contextlib.suppress(
        KeyboardInterrupt
    ):  # while it compiles or writes; `fit` sees to it while it trains
        for env, name, config in planned:
            run = fit(config, seeds=seeds, key=key, on_start=on_start, on_progress=on_progress)
            entries.append(_entry(env, name, run, key, eval_episodes, deterministic))
            if directory is not None:
                write(directory, entries)
            if run.interrupted:
                break
    return entries


def _planned(
    env: str, algorithms: Sequence[str], changes: Mapping[str, Any]
) -> list[tuple[str, str, Config]]:
    """The environment, the name and the settings of each algorithm, all with one number of steps."""
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
    for seed, one in enumerate(
        jax.random.split(jax.random.fold_in(jax.random.key(key), 1), run.seeds)
    ):
        if run.diverged_at[seed] is None:
            scores[seed] = evaluate(
                run.policy(seed), run.env, one, eval_episodes, deterministic
            ).returns.mean()
    steps = run.metrics.timesteps[:, -1].astype(float)
    return Entry(
        env,
        name,
        run.config,
        windowed(run.metrics),
        scores,
        float(steps.mean()),
        float(steps.sum() / run.train_seconds),
        run.interrupted,
    )


# ---------------------------------------------------------------------------------------------- files


def write(directory: str | os.PathLike, entries: Sequence[Entry]) -> None:
    """The comparison as Markdown, CSV and PNG; each file appears whole or not at all."""
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
    """What the table says of each entry, column by column."""

    def row(entry: Entry) -> dict[str, str]:
        scores = entry.scores[np.isfinite(entry.scores)]
        lost = len(entry.scores) - len(scores)
        spread = "–"
        if len(scores):
            low, high = np.percentile(scores, [25, 75])
            spread = f"{high - low:.1f} ({scores.min():.1f} … {scores.max():.1f})"
        return {
            "environment": entry.env,
            "algorithm": entry.name
            + (f" ({lost} of {len(entry.scores)} seeds diverged)" if lost else "")
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
    """The table with a line on what its columns are."""
    table = rows(entries)
    lines = [list(table[0]), ["---"] * len(table[0]), *(list(row.values()) for row in table)]
    seeds = len(entries[0].scores)
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
        + f"\n\n{seeds} seeds. Final return: interquartile mean of the final policies in fresh episodes, with its 95 % "
        "bootstrap interval. Spread: between the quartiles of the seeds. Largest fall: how far a seed's training curve "
        "fell below its own best, median over the seeds.\n"
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
