"""`sweep`: every combination of hyper-parameters and seeds, in few compilations."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from purejaxppo.config import Config, validate
from purejaxppo.population import Exchange
from purejaxppo.runs import run_directory
from purejaxppo.runs.agents import Progress, require_storable
from purejaxppo.runs.loggers.open import checked_names
from purejaxppo.runs.store import Store
from purejaxppo.setup import set_up
from purejaxppo.sweeps.grid import (
    DISTRIBUTIONS,
    Setting,
    bounds_of,
    groups_of,
    settings_of,
)
from purejaxppo.sweeps.portions import Group, GroupPlan, SweepSpec, run_group
from purejaxppo.sweeps.results import SweepResult, write_figures, write_tables
from purejaxppo.types import ConfigError, Env, Model, PyTree, Reward
from purejaxppo.validation import integer, seconds_of


class SweepPlan(NamedTuple):
    """What a sweep is about to do, known before anything is compiled."""

    members: int
    settings: list[Setting]
    seeds: int
    compilations: int  # one for each group; smaller portions to fit into memory take more
    timesteps: int  # sum over the members


class SweepProgress(NamedTuple):
    """The progress of a sweep."""

    timesteps: int  # sum over the members
    episode_return: float  # mean over the episodes finished in the last chunk; NaN without any
    steps_per_second: float


def sweep(
    config: Config | Mapping[str, Any],
    seeds: int = 8,
    grid: Mapping[str, Any] | None = None,
    key: int = 0,
    directory: str | os.PathLike | None = None,
    *,
    samples: int = 0,
    exchange: Exchange | None = None,
    env: Env | None = None,
    model: Model | None = None,
    reward_fn: Callable | Reward | None = None,
    frozen: PyTree = None,
    eval_episodes: int = 128,
    eval_deterministic: bool = True,
    at_once: int | None = None,
    memory_limit: int | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    loggers: Sequence[str] = (),
    on_plan: Callable[[SweepPlan], None] | None = None,
    on_start: Callable[[GroupPlan], None] | None = None,
    on_progress: Callable[[SweepProgress], None] | None = None,
) -> SweepResult:
    """Train every setting of ``grid`` with ``seeds`` seeds, and score the final policies.

    Settings that differ only in continuous hyper-parameters share one compiled program; each
    combination of other fields needs its own. Members train in parallel, spread over all devices.
    If they do not fit into memory by the estimate of the compiler, they train in portions. The
    member with setting h and seed s is the run that
    ``fit(config.replace(**settings[h]), seeds=seeds, key=key)`` gives for seed s.
    Processes that `connect` has joined must pass the same arguments, and get the same result.

    Main arguments:
        config: a `Config`, or a mapping with its fields.
        seeds: the number of seeds for each setting. All settings have the same seeds.
        grid: fields of `Config` with lists of values, `Uniform` or `LogUniform`.
        key: an integer from which the random keys and the draws are made.
        directory: a new directory, for tables, figures and, in ``parts/``, the finished portions.
        samples: the number of draws from the distributions, for each combination of the lists.
        exchange: train the members as one population that copies agents (`Exchange`). In the result
            each member is a setting of its own, with its final hyper-parameters;
            `SweepResult.schedules` has the earlier ones.
        resume: continue the killed or interrupted sweep in ``directory`` from its last checkpoint,
            with the same result. ``env``, ``model``, ``reward_fn`` and ``frozen`` are not stored:
            pass the same ones again.

    Other arguments:
        env: the environment; its name and settings replace those of ``config``.
        model, reward_fn: a custom network and custom rewards, as in `make_trainer`.
        frozen: arrays passed to ``reward_fn``.
        eval_episodes: fresh episodes that score each final policy; 0 scores by the last returns in
            training.
        eval_deterministic: take the mode of the action distribution instead of a sample.
        at_once: the most members that train in parallel.
        memory_limit: bytes on each device; None for a share of the free memory.
        checkpoint_seconds: time between two checkpoints in ``directory``.
        loggers: ``tensorboard`` and ``wandb``.
        on_plan: called with the `SweepPlan` before anything is compiled.
        on_start: called with the `GroupPlan` after the compilation of each group.
        on_progress: called with the `SweepProgress` after each chunk.

    Raises `ConfigError` for arguments that are invalid or do not fit together.
    """
    config = validate(config) if isinstance(config, Config) else Config.from_dict(config)
    grid = dict(grid or {})
    if env is not None and (swept := {"env", "env_settings"} & grid.keys()):
        raise ConfigError(f"{min(swept)} is swept over: leave the environment object out")
    config = config if env is None else config.replace(env=env.name, env_settings=env.settings)
    seeds = integer("seeds", seeds, 1)
    key = integer("key", key, 0)
    samples = integer("samples", samples, 0)
    settings = settings_of(config, grid, samples, np.random.default_rng(key))
    spec = SweepSpec(
        settings=settings,
        seeds=seeds,
        key=key,
        frozen=frozen,
        eval_episodes=integer("eval_episodes", eval_episodes, 0),
        eval_deterministic=eval_deterministic,
        max_parallel=None if at_once is None else integer("at_once", at_once, 1),
        memory_limit=None
        if memory_limit is None
        else integer("memory_limit", memory_limit, 1, bits=62),
        store=Store(None),
        resume=resume,
        checkpoint_seconds=seconds_of("checkpoint_seconds", checkpoint_seconds),
        loggers=loggers,
        exchange=None,
    )
    groups = [
        Group(set_up(group.config, env, model, reward_fn), group.traced, group.settings)
        for group in groups_of(config, settings)
    ]
    if exchange is not None:
        spec = spec._replace(exchange=_validated_exchange(exchange, grid, spec, groups))
    for group in groups:
        _require_runnable(spec, group)
    identity = fingerprint(
        config, seeds, grid, samples, eval_episodes, eval_deterministic, at_once, exchange
    )
    checked_names(loggers, None if directory is None else Path(directory), len(settings) * seeds)
    with run_directory.open_run_directory(directory, identity, key, resume) as store:
        spec = spec._replace(store=store)
        if on_plan:
            timesteps = sum(
                group.setup.config.actual_timesteps * len(group.settings) * seeds
                for group in groups
            )
            on_plan(
                SweepPlan(
                    members=len(settings) * seeds,
                    settings=settings,
                    seeds=seeds,
                    compilations=len(groups),
                    timesteps=timesteps,
                )
            )
        result = SweepResult(
            config=config,
            settings=settings,
            seeds=seeds,
            parts=[],
            interrupted=False,
            seconds=0.0,
            env=env,
            model=model,
        )
        progress = _progress_of_all(on_progress)
        for portion, seconds in (
            pair for group in groups for pair in run_group(spec, group, on_start, progress)
        ):
            result = dataclasses.replace(
                result, seconds=result.seconds + seconds, interrupted=portion is None
            )
            if portion is None:  # its members have no scores
                break
            result = dataclasses.replace(result, parts=[*result.parts, portion])
            if portion.schedule is not None:
                final = {name: x[:, -1].tolist() for name, x in portion.schedule.swept.items()}
                final_settings = [
                    {name: final[name][i] for name in grid} for i in range(len(portion.members))
                ]
                result = dataclasses.replace(result, settings=final_settings, seeds=1)
            store.write(write_tables, result)
        if result.parts:
            store.write(write_figures, result)
        if not result.interrupted:
            store.write(run_directory.end)
    return result


def fingerprint(
    config: Config,
    seeds: int,
    grid: Mapping[str, Any],
    samples: int = 0,
    eval_episodes: int = 128,
    eval_deterministic: bool = True,
    at_once: int | None = None,
    exchange: Exchange | None = None,
) -> dict[str, Any]:
    """The part of ``config.json`` that must be equal for a sweep to be resumed."""
    return {
        "config": config.to_dict(),
        "kind": "sweep",
        "grid": [
            [name, repr(x if isinstance(x, DISTRIBUTIONS) else list(x))] for name, x in grid.items()
        ],
        "samples": samples,
        "seeds": seeds,
        "eval_episodes": eval_episodes,
        "eval_deterministic": bool(eval_deterministic),
        "at_once": at_once,
        "exchange": None if exchange is None else dataclasses.asdict(exchange),
    }


def _validated_exchange(
    exchange: Any, grid: Mapping[str, Any], spec: SweepSpec, groups: Sequence[Group]
) -> tuple[Exchange, dict[str, tuple[float, float]]]:
    """The exchange and the bounds of the hyper-parameters.

    Raises `ConfigError` if the members cannot form a population.
    """
    config = groups[0].setup.config
    num_members = len(spec.settings) * spec.seeds
    fields = list(spec.settings[0])
    if not isinstance(exchange, Exchange):
        raise ConfigError(
            f"exchange = {exchange!r}: it must be an Exchange, such as Exchange(every=20)"
        )
    static = [name for name in fields if any(name not in group.traced for group in groups)]
    if config.objective == "adaptive_kl" and "kl_coef" in fields:
        static.append("kl_coef")  # only the initial value of the coefficient
    if static or not fields:
        reason = (
            f"{static[0]!r} is not one: leave it out of the grid"
            if static
            else "the grid has none: add one"
        )
        raise ConfigError(
            f"members of a population exchange continuous hyper-parameters, and {reason}"
        )
    bounds = bounds_of(grid)
    for values in zip(*bounds.values(), strict=True):  # the lowest values, then the highest
        validate(config.replace(**dict(zip(bounds, values, strict=True))))
    if num_members < 2 or spec.max_parallel not in (None, num_members):
        raise ConfigError(
            f"a population of {num_members} with at_once = {spec.max_parallel}: "
            "it must have at least two members, and all train at once"
        )
    if all(low == high for low, high in bounds.values()):
        raise ConfigError(
            "no hyper-parameter in the grid has two values, so there is nothing to explore: "
            "give one a list of values, or a distribution"
        )
    if config.whole_episodes:
        raise ConfigError(
            f"{config.algorithm} trains on whole episodes, so members take different numbers of "
            "steps and cannot exchange: leave out exchange"
        )
    if exchange.every >= config.num_iterations:
        raise ConfigError(
            f"every = {exchange.every}: it must be less than the number of iterations, "
            f"{config.num_iterations}"
        )
    if not spec.eval_episodes:
        raise ConfigError(
            "a population is scored in fresh episodes: eval_episodes must be at least 1"
        )
    return exchange, bounds


def _require_runnable(spec: SweepSpec, group: Group) -> None:
    """Raise `ConfigError` before training if a group cannot run."""
    env = group.setup.env
    if spec.max_parallel is not None and spec.max_parallel < jax.process_count():
        raise ConfigError(
            f"at_once = {spec.max_parallel}: "
            f"each of the {jax.process_count()} processes needs a member"
        )
    if spec.eval_episodes and env.max_episode_steps is None:
        raise ConfigError(
            f"{env.name} has no bound on the length of an episode, "
            "so its policies cannot be scored in fresh episodes: "
            "set eval_episodes=0 to score them by their last returns in training"
        )
    require_storable(group.setup, frozen=spec.frozen)


def _progress_of_all(
    on_progress: Callable[[SweepProgress], None] | None,
) -> Callable[[int, Progress | None], None]:
    """A callback that adds the timesteps of finished portions to the progress of the current one.

    It is called with 0 and the progress of the current portion, and at the end of a portion with
    the timesteps of the portion and None.
    """
    finished_timesteps = [0]

    def report(timesteps: int, now: Progress | None) -> None:
        finished_timesteps[0] += timesteps
        if on_progress and now is not None:
            on_progress(
                SweepProgress(
                    finished_timesteps[0] + now.timesteps_of_all,
                    now.episode_return,
                    now.steps_per_second,
                )
            )

    return report
