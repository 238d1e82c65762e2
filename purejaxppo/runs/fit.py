"""`fit`: a training run as a person meets it, with progress, checkpoints and a run directory around `make_trainer`."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import purejaxppo.envs as envs
from purejaxppo.config import Config, validate
from purejaxppo.keys import random_key
from purejaxppo.runs import processes, run_directory
from purejaxppo.runs.checkpoints import Checkpoints
from purejaxppo.runs.compilation import device_name, mesh_of
from purejaxppo.runs.loggers.open import checked_names, open_loggers
from purejaxppo.runs.programs import compile_programs, require_storable
from purejaxppo.runs.run import Run, RunPlan, write
from purejaxppo.runs.session import CheckpointPolicy, Evaluation, Progress, run_session
from purejaxppo.starting import starting_point
from purejaxppo.types import ConfigError, Env, Model, PyTree, Reward
from purejaxppo.validation import integer, seconds_of


def fit(
    config: Config | Mapping[str, Any],
    *,
    seeds: int = 1,
    key: Any = 0,
    env: Env | None = None,
    model: Model | None = None,
    reward_fn: Callable | Reward | None = None,
    params: PyTree = None,
    frozen: PyTree = None,
    directory: str | os.PathLike | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    eval_every: int = 0,
    eval_episodes: int = 128,
    eval_deterministic: bool = True,
    loggers: Sequence[str] = (),
    on_start: Callable[[RunPlan], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Train ``seeds`` agents at once, in chunks between which ``on_progress`` is called.

    The same iterations as ``make_train(config)(key)``, for several seeds as ``vmap(train)(split(key, seeds))``. Where
    there are several devices, the agents are spread over them; a single one with ``num_shards`` has its environments on
    several. It stops early when every agent has diverged, and with what there is at Ctrl-C or SIGTERM. Processes that
    `connect` joins call it with the same arguments, and get the same result.

    ``key`` is an integer or a random key. ``directory``, which must not exist, gets what `run_directory` describes, a
    checkpoint every ``checkpoint_seconds`` among it. With ``resume`` a run in it that was killed or interrupted goes on
    from its newest checkpoint, or from the start where it has none yet, and ends with the same numbers, bit for bit on
    the same device, as if nothing had happened. The same ``env``, ``model``, ``reward_fn``, ``params`` and ``frozen``
    are the caller's to give. The name and the settings of an ``env`` that is given replace those of
    the config.

    ``params`` is what every agent starts from: a trained `Policy` (``run.policy()``) or the
    `TrainState` of one agent, with the moments that normalise its observations, or parameters alone,
    with which normalisation starts anew.

    Every ``eval_every`` iterations the policies play ``eval_episodes`` fresh episodes, with keys of their own, so that
    training is the same whatever is asked for; `Run.best_policy` is the one of the highest mean. ``loggers`` are
    ``tensorboard`` and ``wandb``.
    """
    config = validate(config) if isinstance(config, Config) else Config.from_dict(config)
    agents = None if integer("seeds", seeds, 1) == 1 else seeds
    evaluation = _evaluation(eval_every, eval_episodes, eval_deterministic)
    checkpoint_seconds = seconds_of("checkpoint_seconds", checkpoint_seconds)
    key, named_key = random_key(key)
    env = envs.of_config(config) if env is None else env
    if evaluation and env.max_episode_steps is None:
        raise ConfigError(
            f"{env.name} has no bound on the length of an episode, so its policies cannot be evaluated"
        )
    config = dataclasses.replace(config, env=env.name, env_settings=env.settings)
    require_storable(config, env, model, reward_fn, params, frozen)  # before a directory is made
    params = None if params is None else starting_point(params)
    mesh_of(config, agents)
    checked_names(loggers, None if directory is None else Path(directory), seeds)
    asked = fingerprint(config, seeds, eval_every, eval_episodes, eval_deterministic)
    with run_directory.open_run_directory(directory, asked, named_key, resume) as home:
        checkpointing = None
        if home is not None:
            log = partial(
                open_loggers, loggers, home, [f"seed_{seed}" for seed in range(seeds)], asked
            )
            checkpointing = CheckpointPolicy(
                Checkpoints(home / "checkpoints"), checkpoint_seconds, resume, log
            )
        programs = compile_programs(
            config, env, agents, model=model, reward_fn=reward_fn, params=params, frozen=frozen
        )
        plan = RunPlan(
            config,
            seeds,
            device_name(programs.sharding),
            programs.memory_bytes,
            programs.compile_seconds,
        )
        if on_start:
            on_start(plan)
        keys = programs.keys(key)
        result = run_session(
            programs,
            keys,
            {},
            evaluation=evaluation,
            checkpointing=checkpointing,
            on_progress=on_progress,
        )
        run = Run(
            config,
            seeds,
            processes.gather_to_host(result.state),
            result.metrics,
            plan,
            result.seconds,
            result.interrupted,
            env,
            model,
            processes.gather_to_host(result.best),
            result.evaluations,
            result.resumed_at,
        )
        if home is not None:
            processes.on_main_process(partial(write, home, run))
    return run


def fingerprint(
    config: Config,
    seeds: int,
    eval_every: int = 0,
    eval_episodes: int = 128,
    eval_deterministic: bool = True,
) -> dict[str, Any]:
    """What a run has to have in common with the one that it goes on with, as ``config.json`` has it."""
    evaluation = _evaluation(eval_every, eval_episodes, eval_deterministic)
    played = evaluation._asdict() if evaluation else None
    return {"kind": "fit", "config": config.to_dict(), "seeds": seeds, "evaluation": played}


def _evaluation(every: int, episodes: int, deterministic: bool) -> Evaluation | None:
    if integer("eval_every", every, 0) == 0:
        return None
    return Evaluation(every, integer("eval_episodes", episodes, 1), bool(deterministic))
