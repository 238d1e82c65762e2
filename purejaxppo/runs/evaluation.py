"""Evaluations of policies during and after training, and the best policy of each agent."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from purejaxppo.normalize import Normalizer
from purejaxppo.policies.evaluate import EpisodeStatistics, evaluate
from purejaxppo.policies.policy import Policy
from purejaxppo.runs import processes
from purejaxppo.runs.chunks import Chunk
from purejaxppo.runs.compilation import AGENTS
from purejaxppo.runs.programs import Programs, Swept
from purejaxppo.runs.session import Evaluator
from purejaxppo.runs.tables import Table
from purejaxppo.setup import Setup
from purejaxppo.trees import all_finite
from purejaxppo.types import PRNGKey, PyTree, Trained, TrainState

EVALUATION = 0x5E7A1  # folded into an agent's key, it gives the base key of its evaluations

Evaluate = Any  # a jitted (swept, state, keys [agents]) -> EpisodeStatistics [agents, episodes]


class Evaluation(NamedTuple):
    """How to evaluate during training."""

    every: int  # iterations
    episodes: int
    deterministic: bool


class Best(NamedTuple):
    """The policy with the highest mean return in an evaluation, for each agent.

    `Policy.from_state` accepts it.
    """

    params: PyTree
    normalizer: Normalizer
    iteration: Array  # [agents] of the evaluation; 0 before the first one
    score: Array  # [agents] mean return in the evaluation; -∞ before the first one


def make_evaluate(setup: Setup, programs: Programs, episodes: int, deterministic: bool) -> Evaluate:
    """A jitted ``(swept, state, keys [agents]) -> EpisodeStatistics [agents, episodes]``.

    The returns of an agent with non-finite parameters are NaN.
    """
    env = setup.env

    def evaluate_agent(swept: Swept, state: Trained, key: PRNGKey) -> EpisodeStatistics:
        config = setup.config.replace(**swept)
        policy = Policy.from_state(config, state, None, env, setup.own_model)
        statistics = evaluate(policy, env, key, episodes, deterministic)
        is_finite = all_finite(policy.params)
        return statistics._replace(returns=jnp.where(is_finite, statistics.returns, jnp.nan))

    play = evaluate_agent if programs.agents is None else jax.vmap(evaluate_agent)
    sharding = programs.sharding
    if sharding is None:
        return jax.jit(play)
    if programs.agents is not None:
        play = jax.shard_map(
            play, mesh=sharding.mesh, in_specs=AGENTS, out_specs=AGENTS, check_vma=False
        )
    return jax.jit(
        play, in_shardings=(sharding, programs.state_sharding, sharding), out_shardings=sharding
    )


def make_evaluator(
    setup: Setup, evaluation: Evaluation, programs: Programs, keys: PRNGKey
) -> Evaluator:
    """The `Evaluator` that plays fresh episodes with the policies and keeps the best of each agent.

    The keys depend on the agent and the iteration only, so a different ``every`` changes neither
    training nor the other evaluations.
    """
    evaluate = make_evaluate(setup, programs, evaluation.episodes, evaluation.deterministic)

    def key_of(key: PRNGKey, iteration: Array | int) -> PRNGKey:
        return jax.random.fold_in(jax.random.fold_in(key, EVALUATION), iteration)

    keys_of = jax.jit(key_of if programs.agents is None else jax.vmap(key_of, in_axes=(0, None)))

    @jax.jit
    def update_best(
        best: Best, state: TrainState, statistics: EpisodeStatistics
    ) -> tuple[Best, dict[str, Array]]:
        row = {
            "return_mean": statistics.returns.mean(axis=-1),
            "return_std": statistics.returns.std(axis=-1),
            "length_mean": statistics.lengths.mean(axis=-1),
        }
        is_better = row["return_mean"] > best.score
        new = Best(
            state.params,
            Normalizer(state.normalizer.obs, None),
            state.iteration,
            row["return_mean"],
        )

        def choose(new: Array, old: Array) -> Array:
            padding = (1,) * (new.ndim - is_better.ndim)
            return jnp.where(is_better.reshape(is_better.shape + padding), new, old)

        return jax.tree.map(choose, new, best), row

    def step(best: Best, chunk: Chunk) -> tuple[Best, Table]:
        statistics = evaluate({}, chunk.state, keys_of(keys, chunk.done))
        best, row = update_best(best, chunk.state, statistics)
        row = processes.gather_to_host(row)
        timesteps = np.asarray(chunk.metrics.timesteps[:, -1:])
        columns = {name: np.asarray(x).reshape(-1, 1) for name, x in row.items()}
        return best, {
            "iteration": np.full(timesteps.shape, chunk.done),
            "timesteps": timesteps,
            **columns,
        }

    return Evaluator(evaluation.every, _initial_best, step)


def _initial_best(state: TrainState) -> Best:
    """`Best` before the first evaluation; a copy, because the first chunk donates the state."""
    params, moments = jax.tree.map(jnp.copy, (state.params, state.normalizer.obs))
    # Computed from the state, so that they have its sharding, which a restored checkpoint keeps.
    score = jnp.where(state.iteration < 0, 0.0, -jnp.inf).astype(jnp.result_type(float))
    return Best(params, Normalizer(moments, None), state.iteration * 0, score)
