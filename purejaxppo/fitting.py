"""`fit`: a training run as a person meets it, with progress, checkpoints and a run directory around `make_trainer`."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from purejaxppo import envs, processes, run_directory
from purejaxppo.checkpoint import Checkpoints
from purejaxppo.checks import integer, random_key, seconds_of
from purejaxppo.config import Config, validate
from purejaxppo.loggers import checked_names, open_loggers
from purejaxppo.metrics import finite_so_far
from purejaxppo.policy import Policy
from purejaxppo.programs import compile_programs, device_name, mesh_of, require_storable
from purejaxppo.session import Best, Evaluation, Keeping, Progress, run_session
from purejaxppo.starting import starting_point
from purejaxppo.tables import Table
from purejaxppo.types import ConfigError, Env, Metrics, Model, PyTree, Reward, TrainState


class Plan(NamedTuple):
    """What is about to run, known once it is compiled."""

    config: Config
    seeds: int
    device: str
    memory_bytes: int  # what the compiled program needs for its state and temporaries
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Run:
    """What `fit` returns: metrics as NumPy arrays [seeds, iterations]; of several seeds the state has them first."""

    config: Config
    seeds: int
    state: TrainState
    metrics: Metrics
    plan: Plan
    train_seconds: float
    interrupted: bool  # stopped by the user before all iterations were run
    env: Env
    model: Model | None
    best: Best | None = None  # by the evaluations during training; None without any
    evaluations: Table | None = None  # columns iteration, timesteps, return_mean, …, each [seeds, evaluations]
    resumed_at: int = 0  # the iteration of the checkpoint that the run went on from

    def policy(self, seed: int = 0) -> Policy:
        """The trained policy of one of the seeds."""
        index = seed if self.seeds > 1 else None
        return Policy.from_state(self.config, self.state, index, self.env, self.model)

    def best_policy(self, seed: int = 0) -> Policy:
        """The policy with the highest mean return in an evaluation during training (``eval_every``).

        The highest of several noisy means is higher than what it estimates: evaluate it again before quoting it.
        """
        index = seed if self.seeds > 1 else None
        if self.best is None or not self.best.iteration.reshape(-1)[seed]:
            raise ConfigError("no policy was evaluated during training: fit(..., eval_every=iterations)")
        return Policy.from_state(self.config, self.best, index, self.env, self.model)

    @property
    def diverged_at(self) -> list[int | None]:
        """For each seed the first iteration (counted from 1) at which loss or gradient were not finite, or None."""
        finite = finite_so_far(self.metrics)
        return [None if row.all() else int(row.argmin()) + 1 for row in finite]


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
    on_start: Callable[[Plan], None] | None = None,
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
        raise ConfigError(f"{env.name} has no bound on the length of an episode, so its policies cannot be evaluated")
    config = dataclasses.replace(config, env=env.name, env_settings=env.settings)
    require_storable(config, env, model, reward_fn, params, frozen)  # before a directory is made
    params = None if params is None else starting_point(params)
    mesh_of(config, agents)
    checked_names(loggers, None if directory is None else Path(directory), seeds)
    asked = asked_of(config, seeds, eval_every, eval_episodes, eval_deterministic)
    with run_directory.opened(directory, asked, named_key, resume) as home:
        keeping = None
        if home is not None:
            log = partial(open_loggers, loggers, home, [f"seed_{seed}" for seed in range(seeds)], asked)
            keeping = Keeping(Checkpoints(home / "checkpoints"), checkpoint_seconds, resume, log)
        programs = compile_programs(config, env, agents, model=model, reward_fn=reward_fn, params=params, frozen=frozen)
        plan = Plan(config, seeds, device_name(programs), programs.memory_bytes, programs.compile_seconds)
        if on_start:
            on_start(plan)
        keys = programs.keys(key)
        ended = run_session(programs, keys, {}, evaluation=evaluation, keeping=keeping, on_progress=on_progress)
        run = Run(
            config,
            seeds,
            processes.whole(ended.state),
            ended.metrics,
            plan,
            ended.seconds,
            ended.interrupted,
            env,
            model,
            processes.whole(ended.best),
            ended.evaluations,
            ended.resumed_at,
        )
        if home is not None:
            processes.by_first(partial(run_directory.write, home, run))
    return run


def asked_of(
    config: Config, seeds: int, eval_every: int = 0, eval_episodes: int = 128, eval_deterministic: bool = True
) -> dict[str, Any]:
    """What a run has to have in common with the one that it goes on with, as ``config.json`` has it."""
    evaluation = _evaluation(eval_every, eval_episodes, eval_deterministic)
    played = evaluation._asdict() if evaluation else None
    return {"kind": "fit", "config": config.to_dict(), "seeds": seeds, "evaluation": played}


def _evaluation(every: int, episodes: int, deterministic: bool) -> Evaluation | None:
    if integer("eval_every", every, 0) == 0:
        return None
    return Evaluation(every, integer("eval_episodes", episodes, 1), bool(deterministic))
