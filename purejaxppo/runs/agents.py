"""Reinforcement learning as a `Job`: what the modules of `runs` need to train agents."""

from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from purejaxppo.metrics import AGENT_METRICS
from purejaxppo.population import Bounds, Exchange, make_population
from purejaxppo.runs.chunks import Chunk
from purejaxppo.runs.programs import Job, first_metrics, require_valid_metrics
from purejaxppo.setup import Setup
from purejaxppo.shards import state_sharding
from purejaxppo.starting import starting_point
from purejaxppo.train import build_trainer
from purejaxppo.trees import require_trainable
from purejaxppo.types import PyTree


class Progress(NamedTuple):
    """The progress of a run after a chunk."""

    iterations: int
    timesteps: int  # of one agent; with whole episodes the minimum over the agents
    timesteps_of_all: int  # sum over the agents
    episode_return: float  # mean over the episodes finished in the chunk; NaN without any
    steps_per_second: float  # of all agents together


def job_of(setup: Setup, exchange: tuple[Exchange, Bounds] | None = None) -> Job:
    """The job that trains an agent, or with an ``exchange`` a population."""
    config = setup.config
    trainer_of = partial(build_trainer, setup)
    population = None
    if exchange is not None:
        population = partial(make_population, trainer_of, config.num_iterations, *exchange)
    return Job(
        trainer_of=trainer_of,
        num_iterations=config.num_iterations,
        metrics=AGENT_METRICS,
        total=None if config.has_fixed_length else config.total_timesteps,
        num_shards=config.num_shards,
        state_sharding=state_sharding,
        population=population,
    )


def require_storable(setup: Setup, params: PyTree = None, frozen: PyTree = None) -> None:
    """Raise `ConfigError` if a run cannot start, or its parameters or metrics cannot be stored.

    Errors of a custom model or reward function in an iteration are raised here too, before
    anything is compiled.
    """
    trainer = build_trainer(setup)
    key = jax.eval_shape(lambda: jax.random.key(0))
    require_trainable(jax.eval_shape(lambda key: trainer.init(key).params, key))
    if params is not None:
        # Raises an error if `params` does not fit the model.
        jax.eval_shape(lambda key: trainer.init(key, params), key)
        require_trainable(starting_point(params).params)
    if setup.has_own_model or setup.has_own_reward:
        row = jax.eval_shape(lambda key: first_metrics(trainer, key, params, frozen), key)
        require_valid_metrics(job_of(setup), row)


def progress_of(chunk: Chunk, num_agents: int | None = None) -> Progress:
    """The progress of the first ``num_agents`` agents; the others are padding."""
    metrics = jax.tree.map(lambda x: x[:num_agents], chunk.metrics)
    steps_before = chunk.progress_before[:num_agents]
    episodes = metrics.episodes.sum()
    total = np.where(metrics.episodes > 0, metrics.episode_return * metrics.episodes, 0).sum()
    mean = total / episodes if episodes else float("nan")
    steps = metrics.timesteps[:, -1]
    new_steps = float((steps - steps_before).sum(dtype=float))
    return Progress(
        iterations=chunk.done,
        timesteps=int(steps.min()),
        timesteps_of_all=int(steps.sum(dtype=float)),
        episode_return=float(mean),
        steps_per_second=new_steps / chunk.seconds,
    )
