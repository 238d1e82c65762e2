"""`fit`: `make_trainer` with progress, evaluations, checkpoints and a run directory."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from purejaxppo.config import Config
from purejaxppo.runs.agents import Progress, job_of, progress_of, require_storable
from purejaxppo.runs.compilation import device_name
from purejaxppo.runs.evaluation import Evaluation, make_evaluator
from purejaxppo.runs.job import run_job
from purejaxppo.runs.programs import Programs
from purejaxppo.runs.run import Run, RunPlan, write
from purejaxppo.runs.session import SessionResult
from purejaxppo.setup import Setup, set_up
from purejaxppo.starting import starting_point
from purejaxppo.types import ConfigError, Env, Model, PyTree, Reward
from purejaxppo.validation import integer


def fit(
    config: Config | Mapping[str, Any] | Setup,
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
        config: a `Config`, a mapping with its fields, or a `Setup` (`set_up`), which contains
            ``env``, ``model`` and ``reward_fn``.
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
    setup = set_up(config, env, model, reward_fn)
    config = setup.config
    evaluation = _evaluation(eval_every, eval_episodes, eval_deterministic)
    if evaluation and setup.env.max_episode_steps is None:
        raise ConfigError(
            f"{setup.env.name} has no bound on the length of an episode, "
            "so its policies cannot be evaluated"
        )
    require_storable(setup, params, frozen)
    params = None if params is None else starting_point(params)

    def plan_of(programs: Programs) -> RunPlan:
        return RunPlan(
            config=config,
            seeds=seeds,
            device=device_name(programs.sharding),
            memory_bytes=programs.memory_bytes,
            compile_seconds=programs.compile_seconds,
        )

    def run_of(result: SessionResult) -> Run:
        return Run(
            config=config,
            seeds=seeds,
            state=result.state,
            metrics=result.metrics,
            plan=plan_of(result.programs),
            train_seconds=result.seconds,
            interrupted=result.interrupted,
            env=setup.env,
            model=setup.own_model,
            best=result.best,
            evaluations=result.evaluations,
            resumed_at=result.resumed_at,
        )

    result = run_job(
        job_of(setup),
        seeds=seeds,
        key=key,
        params=params,
        frozen=frozen,
        directory=directory,
        identity=fingerprint(config, seeds, eval_every, eval_episodes, eval_deterministic),
        resume=resume,
        checkpoint_seconds=checkpoint_seconds,
        loggers=loggers,
        evaluator_of=partial(make_evaluator, setup, evaluation) if evaluation else None,
        on_start=(lambda programs: on_start(plan_of(programs))) if on_start else None,
        on_chunk=(lambda chunk: on_progress(progress_of(chunk))) if on_progress else None,
        on_end=lambda home, result: write(home, run_of(result)),
    )
    return run_of(result)


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
