"""`sweep`: every combination of hyper-parameters and seeds, in as few compilations as can be."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from purejaxppo.config import Config, validate
from purejaxppo.population import Exchange
from purejaxppo.runs import processes, run_directory
from purejaxppo.runs.loggers.open import checked_names
from purejaxppo.runs.programs import require_storable
from purejaxppo.runs.session import Progress
from purejaxppo.sweeps.grid import (
    DRAWN,
    CompilationGroup,
    Setting,
    bounds_of,
    groups_of,
    settings_of,
)
from purejaxppo.sweeps.portions import GroupPlan, SweepSpec, run_group
from purejaxppo.sweeps.results import SweepResult, write_figures, write_tables
from purejaxppo.types import ConfigError, Env, Model, PyTree, Reward
from purejaxppo.validation import integer, seconds_of


class SweepPlan(NamedTuple):
    """What a sweep is about to do, known before anything is compiled."""

    members: int
    settings: list[Setting]
    seeds: int
    compilations: int  # one for each group, and one more for those that do not fit the memory
    timesteps: int  # of all members together


class SweepProgress(NamedTuple):
    """Where a sweep stands; timesteps are those of all members together."""

    timesteps: int
    episode_return: float  # of the episodes that finished in the last chunk; NaN where none did
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
    """Train every setting of ``grid`` with ``seeds`` seeds, and score the final policies in fresh episodes.

    ``grid`` maps fields of `Config` to lists of values, or to `Uniform` and `LogUniform`, of which ``samples`` draws
    are taken with each combination of the lists. Settings that differ in continuous hyper-parameters share one compiled
    program; other fields make one for each of their combinations. The member of setting h and seed s is the same run
    as ``fit(config.replace(**settings[h]), seeds=seeds, key=key)`` has for s, so all settings have the same seeds.

    Members run ``at_once`` as many as fit into ``memory_limit`` bytes on each device (what is free, if not given) by
    the compiler's own count, spread over all devices. ``directory``, which must not exist, gets the tables, the
    pictures and, in ``parts/``, what each of these portions came to; with ``resume`` a sweep that was killed goes on
    where its last checkpoint was, with the same results. ``eval_episodes=0`` scores by the last returns of training.

    With an ``exchange`` the members are one population that trains at once, and copy one another (`Exchange`). In the
    result each is a setting of its own, that of its end; `SweepResult.schedules` is the way there.

    Processes that `connect` joins call it with the same arguments, and get the same result.
    """
    config = validate(config) if isinstance(config, Config) else Config.from_dict(config)
    grid = dict(grid or {})
    if env is not None and (named := {"env", "env_settings"} & grid.keys()):
        raise ConfigError(f"{min(named)} is swept over: leave the environment object out")
    config = config if env is None else config.replace(env=env.name, env_settings=env.settings)
    seeds = integer("seeds", seeds, 1)
    key = integer("key", key, 0)
    samples = integer("samples", samples, 0)
    settings = settings_of(config, grid, samples, np.random.default_rng(key))
    spec = SweepSpec(
        settings,
        seeds,
        key,
        env,
        {"model": model, "reward_fn": reward_fn, "frozen": frozen},
        integer("eval_episodes", eval_episodes, 0),
        eval_deterministic,
        None if at_once is None else integer("at_once", at_once, 1),
        None if memory_limit is None else integer("memory_limit", memory_limit, 1, bits=62),
        None,
        resume,
        seconds_of("checkpoint_seconds", checkpoint_seconds),
        loggers,
        None,
    )
    groups = groups_of(config, settings)
    if exchange is not None:
        spec = spec._replace(exchange=_population(exchange, grid, spec, groups))
    for group in groups:
        _require_sense(spec, group)
    asked = fingerprint(
        config, seeds, grid, samples, eval_episodes, eval_deterministic, at_once, exchange
    )
    checked_names(loggers, None if directory is None else Path(directory), len(settings) * seeds)
    with run_directory.open_run_directory(directory, asked, key, resume) as home:
        spec = spec._replace(directory=home)
        if on_plan:
            steps = sum(
                group.config.actual_timesteps * len(group.settings) * seeds for group in groups
            )
            on_plan(SweepPlan(len(settings) * seeds, settings, seeds, len(groups), steps))
        result = SweepResult(config, settings, seeds, [], False, 0.0, env, model)
        progress = _counted(on_progress)
        for part, seconds in (
            pair for group in groups for pair in run_group(spec, group, on_start, progress)
        ):
            result = dataclasses.replace(
                result, seconds=result.seconds + seconds, interrupted=part is None
            )
            if part is None:  # its members are not at their end, and have no scores
                break
            result = dataclasses.replace(result, parts=[*result.parts, part])
            if part.schedule is not None:
                ends = {name: x[:, -1].tolist() for name, x in part.schedule.swept.items()}
                final = [{name: ends[name][i] for name in grid} for i in range(len(part.members))]
                result = dataclasses.replace(result, settings=final, seeds=1)
            if home is not None:
                processes.on_main_process(partial(write_tables, home, result))
        if home is not None:
            processes.on_main_process(partial(_write_end, home, result))
    return result


def _write_end(directory: Path, result: SweepResult) -> None:
    if result.parts:
        write_figures(directory, result)
    if not result.interrupted:
        run_directory.end(directory)


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
    """What a sweep has to have in common with the one that it goes on with, as ``config.json`` has it."""
    return {
        "config": config.to_dict(),
        "kind": "sweep",
        "grid": [[name, repr(x if isinstance(x, DRAWN) else list(x))] for name, x in grid.items()],
        "samples": samples,
        "seeds": seeds,
        "eval_episodes": eval_episodes,
        "eval_deterministic": bool(eval_deterministic),
        "at_once": at_once,
        "exchange": None if exchange is None else dataclasses.asdict(exchange),
    }


def _population(
    exchange: Any, grid: Mapping[str, Any], spec: SweepSpec, groups: Sequence[CompilationGroup]
) -> tuple[Exchange, dict[str, tuple[float, float]]]:
    """The exchange and the bounds of the hyper-parameters; what cannot be a population is refused."""
    config = groups[0].config
    count = len(spec.settings) * spec.seeds
    fields = list(spec.settings[0])
    if not isinstance(exchange, Exchange):
        raise ConfigError(
            f"exchange = {exchange!r}: it must be an Exchange, such as Exchange(every=20)"
        )
    static = [name for name in fields if any(name not in group.traced for group in groups)]
    if config.objective == "adaptive_kl" and "kl_coef" in fields:
        static.append("kl_coef")  # it is where the coefficient begins, and nothing later
    if static or not fields:
        what = f"{static[0]!r} is not one" if static else "the grid has none"
        raise ConfigError(f"members exchange continuous hyper-parameters, and {what}")
    bounds = bounds_of(grid)
    for end in zip(*bounds.values(), strict=True):
        validate(config.replace(**dict(zip(bounds, end, strict=True))))
    if count < 2 or spec.at_once not in (None, count):
        raise ConfigError(
            f"a population of {count} with at_once = {spec.at_once}: all train at once, two at least"
        )
    if all(low == high for low, high in bounds.values()):
        raise ConfigError(
            "no hyper-parameter in the grid has two values, so that there is nothing to explore"
        )
    if config.whole_episodes:
        raise ConfigError(
            f"{config.algorithm} counts whole episodes, so that members do not keep step: no exchange"
        )
    if exchange.every >= config.num_iterations:
        raise ConfigError(
            f"every = {exchange.every}: there are {config.num_iterations} iterations, and no exchange"
        )
    if not spec.eval_episodes:
        raise ConfigError(
            "a population is scored in fresh episodes: eval_episodes must be at least 1"
        )
    return exchange, bounds


def _require_sense(spec: SweepSpec, group: CompilationGroup) -> None:
    """What cannot run is refused before anything is trained."""
    env = spec.env_of(group)
    if spec.at_once is not None and spec.at_once < jax.process_count():
        raise ConfigError(
            f"at_once = {spec.at_once}: each of the {jax.process_count()} processes needs a member"
        )
    if spec.eval_episodes and env.max_episode_steps is None:
        raise ConfigError(
            f"{env.name} has no bound on the length of an episode, so its policies cannot be scored by whole ones: "
            "set eval_episodes=0, and they are by their last returns in training"
        )
    require_storable(group.config, env, **spec.components)


def _counted(
    on_progress: Callable[[SweepProgress], None] | None,
) -> Callable[[int, Progress | None], None]:
    """Adds up what the parts took: the steps of one that is done, with None, or 0 and the progress of one that runs."""
    done = [0]

    def note(steps: int, now: Progress | None) -> None:
        done[0] += steps
        if on_progress and now is not None:
            on_progress(
                SweepProgress(
                    done[0] + now.timesteps_of_all, now.episode_return, now.steps_per_second
                )
            )

    return note
