"""Population-based training: hyper-parameters of agents change during training.

At regular intervals, each of the worst agents copies the whole state of one of the best, with its
environments. It also copies the hyper-parameters and multiplies each by a random factor. This is
truncation selection with perturbation. The lineage of a final agent is a schedule of
hyper-parameters, found in one run.

Source: Jaderberg et al. 2017, arXiv:1711.09846.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from purejaxppo.keys import first_key, select
from purejaxppo.metrics import PARENT, SWEPT, is_finite
from purejaxppo.trees import all_finite
from purejaxppo.types import ConfigError, Metrics, PRNGKey, PyTree, Trainer, TrainState
from purejaxppo.validation import integer

KEY = 0x90B5  # folded into the key of the first agent, it gives the key of all exchanges


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Interval and rule of the exchanges, in which agents copy one another.

    Agents are ranked by the mean return of the episodes that finished since the last exchange.
    ``every`` should therefore cover at least one episode. Each agent of the worst ``share`` copies
    the whole state of a random agent of the best ``share``, and gets a new random key. Each copied
    hyper-parameter is multiplied by one of ``factors``, drawn uniformly, and clipped to the bounds
    of the grid. An agent that diverged (parameters, losses or gradient are not finite) ranks
    last. Any other agent without a finished episode neither copies nor is copied.

    Args:
        every: iterations between two exchanges, at least 1.
        share: fraction of agents that copy, and of agents that are copied; in (0, 0.5].
        factors: positive factors for the copied hyper-parameters.
    """

    every: int
    share: float | int = 0.2
    factors: tuple[float, ...] = (0.8, 1.2)

    def __post_init__(self) -> None:
        integer("every", self.every, 1)
        if not (isinstance(self.share, int | float) and 0 < self.share <= 0.5):
            raise ConfigError(f"share = {self.share!r}: it must be above 0 and at most 0.5")
        numbers = isinstance(self.factors, tuple | list) and all(
            isinstance(x, int | float) for x in self.factors
        )
        if not numbers or not self.factors or not all(0 < x < float("inf") for x in self.factors):
            raise ConfigError(f"factors = {self.factors!r}: they must be positive numbers")
        object.__setattr__(self, "factors", tuple(self.factors))

    def is_due_after(self, iteration: Array | int, num_iterations: int) -> Any:
        """Whether an exchange follows this iteration; none follows the last iteration."""
        return (iteration % self.every == 0) & (iteration < num_iterations)


# name of a swept hyper-parameter -> its lowest and highest value
Bounds = Mapping[str, tuple[float, float]]


class Population(NamedTuple):
    """The state of m agents that copy one another. Like `TrainState`, it is `Trained`."""

    agents: TrainState  # [m, ...]
    swept: dict[str, Array]  # name -> [m] current hyper-parameters
    returns: Float[Array, "m"]  # sum over the episodes that finished since the last exchange
    episodes: Int[Array, "m"]  # number of these episodes
    agent_index: Int[Array, "m"]  # index among all n agents; a device may hold only m < n of them
    key: PRNGKey  # [m] the same key m times

    @property
    def params(self) -> PyTree:
        return self.agents.params

    @property
    def normalizer(self) -> Any:
        return self.agents.normalizer

    @property
    def iteration(self) -> Array:
        return self.agents.iteration


def choose_parents(
    key: PRNGKey, score: Float[Array, "n"], has_not_diverged: Bool[Array, "n"], share: float
) -> Int[Array, "n"]:
    """For each of n agents the index of the agent whose state it continues from.

    An agent is ranked if it ``has_not_diverged`` and its score is finite.
    Let k = max(1, ⌊share · n⌋). The
    best k ranked agents are parents. All agents that are not finite are replaced, then the worst
    ranked agents, up to k in total. A parent must have a higher score than the agent that it
    replaces; otherwise the agent keeps its own index.
    """
    count = len(score)
    num_parents = max(1, int(share * count))
    ranked = has_not_diverged & jnp.isfinite(score)
    fitness = jnp.where(ranked, score, -jnp.inf)
    order = jnp.argsort(-fitness)  # from best to worst; agents that are not ranked come last
    rank = jnp.argsort(order)
    parent = order[jax.random.randint(key, (count,), 0, jnp.clip(ranked.sum(), 1, num_parents))]
    worst = ranked & (
        rank >= ranked.sum() - jnp.maximum(num_parents - (~has_not_diverged).sum(), 0)
    )
    replaced = (worst | ~has_not_diverged) & (fitness[parent] > fitness)
    return jnp.where(replaced, parent, jnp.arange(count)).astype(jnp.int32)


def own_metrics(swept: Mapping[str, Array], parent: Array) -> dict[str, Array]:
    """The metrics that a population adds: hyper-parameters and parents."""
    return {f"{SWEPT}{name}": x for name, x in swept.items()} | {PARENT: parent}


def make_population(
    trainer_of: Callable[..., Trainer],
    num_iterations: int,
    exchange: Exchange,
    bounds: Bounds,
    axis: str | None = None,
) -> tuple[Callable[..., Population], Callable[..., tuple[Population, Metrics]]]:
    """``init(keys [m], swept [m])`` and ``step(population, frozen)`` for m agents.

    They correspond to the functions of a `Trainer`. ``trainer_of(**swept)`` is the trainer of one
    agent with these hyper-parameters. Inside `jax.shard_map` each device holds m of
    the n agents, and ``axis`` is the name of the mesh axis. The metrics have two more kinds of
    ``extra``: the hyper-parameters of the iteration, and the index of the agent whose state each
    agent continues from.
    """

    def all_gather(x: Array) -> Array:
        """[m, ...] of the agents on this device becomes [n, ...] of all agents."""
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                all_gather(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        return x if axis is None else jax.lax.all_gather(x, axis, tiled=True)

    def init(keys: PRNGKey, swept: dict[str, Array], params: PyTree = None) -> Population:
        agents = jax.vmap(lambda key, swept: trainer_of(**swept).init(key, params))(keys, swept)
        count = len(keys)
        agent_index = jnp.arange(count, dtype=jnp.int32) + (
            0 if axis is None else jax.lax.axis_index(axis) * count
        )
        key = jax.random.fold_in(first_key(all_gather(keys)), KEY)
        zeros = jnp.zeros(count)
        return Population(
            agents=agents,
            swept=swept,
            returns=zeros,
            episodes=zeros.astype(jnp.int32),
            agent_index=agent_index,
            key=jnp.broadcast_to(key, (count,)),
        )

    def step(state: Population, frozen: PyTree = None) -> tuple[Population, Metrics]:
        agents, metrics = jax.vmap(lambda swept, agent: trainer_of(**swept).step(agent, frozen))(
            state.swept, state.agents
        )
        returns = jnp.where(metrics.episodes > 0, metrics.episode_return, 0) * metrics.episodes
        swept = state.swept
        state = state._replace(
            agents=agents,
            returns=state.returns + returns,
            episodes=state.episodes + metrics.episodes,
        )
        is_due = exchange.is_due_after(agents.iteration[0], num_iterations)
        state, parent = jax.lax.cond(
            is_due,
            exchange_agents,
            lambda state, _: (state, state.agent_index),
            state,
            is_finite(metrics),
        )
        return state, metrics._replace(extra=metrics.extra | own_metrics(swept, parent))

    def exchange_agents(
        state: Population, losses_are_finite: Bool[Array, "m"]
    ) -> tuple[Population, Int[Array, "m"]]:
        """The population after one exchange, and the parent of each agent."""
        key_parents, key_factors, key_copies = jax.random.split(
            jax.random.fold_in(first_key(state.key), state.iteration[0]), 3
        )
        has_not_diverged = all_finite(state.params, num_axes=1) & losses_are_finite
        score = jnp.where(
            state.episodes > 0, state.returns / jnp.maximum(state.episodes, 1), -jnp.inf
        )
        parents = choose_parents(
            key_parents, all_gather(score), all_gather(has_not_diverged), exchange.share
        )
        parent = parents[state.agent_index]
        copied = parent != state.agent_index
        # Agents with the same seed have the same key, so a copy that kept its own key could repeat
        # the samples of its parent.
        new_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key_copies, state.agent_index)
        agents = jax.tree.map(lambda x: all_gather(x)[parent], state.agents)
        agents = agents._replace(key=select(copied, new_keys, state.agents.key))
        swept = {}
        for i, (name, (low, high)) in enumerate(bounds.items()):
            key = jax.random.fold_in(key_factors, i)
            factor = jax.random.choice(key, jnp.asarray(exchange.factors), parents.shape)[
                state.agent_index
            ]
            perturbed = jnp.clip(all_gather(state.swept[name])[parent] * factor, low, high)
            swept[name] = jnp.where(copied, perturbed, state.swept[name])
        state = Population(
            agents=agents,
            swept=swept,
            returns=jnp.zeros_like(state.returns),
            episodes=jnp.zeros_like(state.episodes),
            agent_index=state.agent_index,
            key=state.key,
        )
        return state, parent

    return init, step
