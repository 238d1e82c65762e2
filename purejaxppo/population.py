"""Population-based training: agents whose hyper-parameters change while they train (Jaderberg et al. 2017).

After every so many iterations the worst agents each become one of the best, weights, environments and all, and go on
with its hyper-parameters times a random factor (arXiv:1711.09846, truncation selection and perturbation). What the last
agents have behind them is a schedule of hyper-parameters, found in one run.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from purejaxppo.config import Config
from purejaxppo.keys import first_key, select
from purejaxppo.metrics import PARENT, SWEPT
from purejaxppo.types import ConfigError, Metrics, PRNGKey, PyTree, Trainer, TrainState
from purejaxppo.validation import integer

KEY = 0x90B5  # folded into the first agent's key, it begins the keys of the exchanges


@dataclasses.dataclass(frozen=True)
class Exchange:
    """When and how agents copy one another.

    Every ``every`` iterations each of the worst ``share`` of the agents takes the whole state of one of the best
    ``share``, drawn at random, with a random key of its own, and its hyper-parameters, each times one of ``factors``,
    as likely, and kept within the bounds of the grid. Agents are ordered by the mean return of the episodes that
    finished since the last exchange, so ``every`` should be longer than those; an agent that has none is left alone,
    and one that diverged (parameters, losses or gradient are not finite) is the worst.
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

    def at_the_end_of(self, config: Config, iteration: Array | int) -> Any:
        """Whether there is one after this iteration; after the last one there is none."""
        return (iteration % self.every == 0) & (iteration < config.num_iterations)


Bounds = Mapping[
    str, tuple[float, float]
]  # for each hyper-parameter that is swept the lowest and highest value


class Population(NamedTuple):
    """The state of m agents that copy one another; it is `Trained`, as a `TrainState` is."""

    agents: TrainState  # [m, ...]
    swept: dict[str, Array]  # [m] hyper-parameters now
    returns: Float[Array, "m"]  # of the episodes that finished since the last exchange, their sum
    episodes: Int[Array, "m"]  # and how many
    agent_index: Int[Array, "m"]  # which agents these are, where a device has some of them only
    key: PRNGKey  # [m] the same for all

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
    key: PRNGKey, score: Float[Array, "n"], is_finite: Bool[Array, "n"], share: float
) -> Int[Array, "n"]:
    """Whose state each of n agents goes on with: its own number, or that of one of the best.

    A score that is not finite is not known. There are max(1, ⌊share · n⌋) of the best, if so many are known, and as
    many of the worst, those that are not alive among them.
    """
    count = len(score)
    few = max(1, int(share * count))
    known = is_finite & jnp.isfinite(score)
    value = jnp.where(known, score, -jnp.inf)
    order = jnp.argsort(-value)  # the best first, and last those that are not known
    rank = jnp.argsort(order)
    best = order[jax.random.randint(key, (count,), 0, jnp.clip(known.sum(), 1, few))]
    worst = known & (rank >= known.sum() - jnp.maximum(few - (~is_finite).sum(), 0))
    replaced = (worst | ~is_finite) & (value[best] > value)
    return jnp.where(replaced, best, jnp.arange(count)).astype(jnp.int32)


def own_metrics(swept: Mapping[str, Array], parent: Array) -> dict[str, Array]:
    """What a population has beside the metrics of its agents."""
    return {f"{SWEPT}{name}": x for name, x in swept.items()} | {PARENT: parent}


def make_population(
    config: Config,
    trainer_of: Callable[[Config], Trainer],
    exchange: Exchange,
    bounds: Bounds,
    axis: str | None = None,
) -> tuple[Callable[..., Population], Callable[..., tuple[Population, Metrics]]]:
    """``init(keys [m], swept [m])`` and ``step(population, frozen)`` of m agents, as those of one in `make_trainer`.

    Inside `jax.shard_map` each device has some of the agents, and ``axis`` is the name of the mesh's axis. The metrics
    have, as ``extra``, the hyper-parameters of the iteration, and the agent whose state each goes on with.
    """

    def of_all(x: Array) -> Array:
        """[m, ...] of the agents here, as [n, ...] of all of them."""
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                of_all(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        return x if axis is None else jax.lax.all_gather(x, axis, tiled=True)

    def init(keys: PRNGKey, swept: dict[str, Array], params: PyTree = None) -> Population:
        agents = jax.vmap(lambda key, own: trainer_of(config.replace(**own)).init(key, params))(
            keys, swept
        )
        count = len(keys)
        agent_index = jnp.arange(count, dtype=jnp.int32) + (
            0 if axis is None else jax.lax.axis_index(axis) * count
        )
        key = jax.random.fold_in(first_key(of_all(keys)), KEY)
        zeros = jnp.zeros(count)
        return Population(
            agents,
            swept,
            zeros,
            zeros.astype(jnp.int32),
            agent_index,
            jnp.broadcast_to(key, (count,)),
        )

    def step(state: Population, frozen: PyTree = None) -> tuple[Population, Metrics]:
        agents, metrics = jax.vmap(
            lambda own, agent: trainer_of(config.replace(**own)).step(agent, frozen)
        )(state.swept, state.agents)
        returns = jnp.where(metrics.episodes > 0, metrics.episode_return, 0) * metrics.episodes
        used = state.swept
        state = state._replace(
            agents=agents,
            returns=state.returns + returns,
            episodes=state.episodes + metrics.episodes,
        )
        due = exchange.at_the_end_of(config, agents.iteration[0])
        fitted = ~(jnp.isnan(metrics.value_loss) & jnp.isnan(metrics.explained_variance))
        value_loss = jnp.where(fitted, metrics.value_loss, 0)
        losses_are_finite = jnp.isfinite(metrics.policy_loss + value_loss + metrics.grad_norm)
        state, parent = jax.lax.cond(
            due, copy, lambda state, _: (state, state.agent_index), state, losses_are_finite
        )
        return state, metrics._replace(extra=metrics.extra | own_metrics(used, parent))

    def copy(
        state: Population, losses_are_finite: Bool[Array, "m"]
    ) -> tuple[Population, Int[Array, "m"]]:
        """One exchange."""
        choice, perturbation, fresh = jax.random.split(
            jax.random.fold_in(first_key(state.key), state.iteration[0]), 3
        )
        finite = [
            jnp.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(state.params)
        ]
        is_finite = jnp.stack(finite).all(axis=0) & losses_are_finite
        score = jnp.where(
            state.episodes > 0, state.returns / jnp.maximum(state.episodes, 1), -jnp.inf
        )
        parents = choose_parents(choice, of_all(score), of_all(is_finite), exchange.share)
        parent = parents[state.agent_index]
        copied = parent != state.agent_index
        # Members of the same seed have the same key: with its own one a copy would repeat what its parent does.
        own = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(fresh, state.agent_index)
        agents = jax.tree.map(lambda x: of_all(x)[parent], state.agents)
        agents = agents._replace(key=select(copied, own, state.agents.key))
        swept = {}
        for i, (name, (low, high)) in enumerate(bounds.items()):
            key = jax.random.fold_in(perturbation, i)
            factor = jax.random.choice(key, jnp.asarray(exchange.factors), parents.shape)[
                state.agent_index
            ]
            changed = jnp.clip(of_all(state.swept[name])[parent] * factor, low, high)
            swept[name] = jnp.where(copied, changed, state.swept[name])
        nothing = jnp.zeros_like
        state = Population(
            agents,
            swept,
            nothing(state.returns),
            nothing(state.episodes),
            state.agent_index,
            state.key,
        )
        return state, parent

    return init, step
