"""`fit`: `make_trainer` with progress, evaluations, checkpoints and a run directory."""

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
    """Train ``seeds`` agents in parallel, with progress, evaluations, checkpoints and files.

    The iterations run in chunks and are those of ``make_train(config)(key)``, or for several seeds
    those of ``vmap(train)(split(key, seeds))``. Agents are spread over the devices; a
    single agent with ``num_shards`` spreads its environments. Training stops early if every agent
    has diverged; Ctrl-C and SIGTERM stop it after a chunk, with the results so far. Processes that
    `connect` has joined must pass the same arguments, and get the same result.

    Main arguments:
        config: a `Config`, or a mapping with its fields.
        seeds: the number of agents.
        key: an integer or a random key.
        params: initial parameters of every agent: a trained `Policy` (``run.policy()``) or the
            `TrainState` of one agent, both with the moments that normalise its observations, or
            parameters alone, with which normalisation starts anew.
        directory: a new directory, for the files that `run_directory` lists.
        resume: continue the killed or interrupted run in ``directory`` from its newest checkpoint,
            or from the start if it has none. The result equals that of an uninterrupted run, bit
            for bit on the same device. ``env``, ``model``, ``reward_fn``, ``params`` and
            ``frozen`` are not stored: pass the same ones again.
        eval_every: iterations between two evaluations; 0 for none. They play fresh episodes with
            keys of their own, so they do not change training. `Run.best_policy` is the policy with
            the highest mean return.

    Other arguments:
        env: the environment; its name and settings replace those of ``config``.
        model, reward_fn: a custom network and custom rewards, as in `make_trainer`.
        frozen: arrays passed to ``reward_fn``.
        checkpoint_seconds: time between two checkpoints in ``directory``.
        eval_episodes: episodes in an evaluation, for each agent.
        eval_deterministic: take the mode of the action distribution instead of a sample.
        loggers: ``tensorboard`` and ``wandb``.
        on_start: called with the `RunPlan` after compilation.
        on_progress: called with the `Progress` after each chunk.

    Raises `ConfigError` for arguments that are invalid or do not fit together.
    """
    config = validate(config) if isinstance(config, Config) else Config.from_dict(config)
    agents = None if integer("seeds", seeds, 1) == 1 else seeds
    evaluation = _evaluation(eval_every, eval_episodes, eval_deterministic)
    checkpoint_seconds = seconds_of("checkpoint_seconds", checkpoint_seconds)
    key, named_key = random_key(key)
    env = envs.of_config(config) if env is None else env
    if evaluation and env.max_episode_steps is None:
        raise ConfigError(
            f"{env.name} has no bound on the length of an episode, "
            "so its policies cannot be evaluated"
        )
    config = dataclasses.replace(config, env=env.name, env_settings=env.settings)
    # All errors in the arguments are raised before the directory is made.
    require_storable(config, env, model, reward_fn, params, frozen)
    params = None if params is None else starting_point(params)
    mesh_of(config, agents)
    checked_names(loggers, None if directory is None else Path(directory), seeds)
    identity = fingerprint(config, seeds, eval_every, eval_episodes, eval_deterministic)
    with run_directory.open_run_directory(directory, identity, named_key, resume) as home:
        checkpointing = None
        if home is not None:
            names = [f"seed_{seed}" for seed in range(seeds)]
            open_log = partial(open_loggers, loggers, home, names, identity)
            checkpointing = CheckpointPolicy(
                Checkpoints(home / "checkpoints"), checkpoint_seconds, resume, open_log
            )
        programs = compile_programs(
            config, env, agents, model=model, reward_fn=reward_fn, params=params, frozen=frozen
        )
        plan = RunPlan(
            config=config,
            seeds=seeds,
            device=device_name(programs.sharding),
            memory_bytes=programs.memory_bytes,
            compile_seconds=programs.compile_seconds,
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
            config=config,
            seeds=seeds,
            state=processes.gather_to_host(result.state),
            metrics=result.metrics,
            plan=plan,
            train_seconds=result.seconds,
            interrupted=result.interrupted,
            env=env,
            model=model,
            best=processes.gather_to_host(result.best),
            evaluations=result.evaluations,
            resumed_at=result.resumed_at,
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
    """The part of ``config.json`` that must be equal for a run to be resumed."""
    evaluation = _evaluation(eval_every, eval_episodes, eval_deterministic)
    return {
        "kind": "fit",
        "config": config.to_dict(),
        "seeds": seeds,
        "evaluation": evaluation._asdict() if evaluation else None,
    }


def _evaluation(every: int, episodes: int, deterministic: bool) -> Evaluation | None:
    if integer("eval_every", every, 0) == 0:
        return None
    return Evaluation(every, integer("eval_episodes", episodes, 1), bool(deterministic))
