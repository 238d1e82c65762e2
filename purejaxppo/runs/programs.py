"""Compiled training: the programs that run one agent, or many at once on all devices, and the loop that calls them."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from purejaxppo.config import Config
from purejaxppo.iterations import metrics_buffer, run_iterations
from purejaxppo.policies.evaluate import EpisodeStatistics, evaluate
from purejaxppo.policies.policy import Policy
from purejaxppo.population import Bounds, Exchange, Population, make_population, own_metrics
from purejaxppo.runs.compilation import AGENTS, compile_all, memory_of, mesh_of, telling_nan
from purejaxppo.runs.processes import broadcast_from_main, device_put_global
from purejaxppo.shards import replicated, state_sharding
from purejaxppo.starting import starting_point
from purejaxppo.train import make_trainer
from purejaxppo.trees import require_trainable
from purejaxppo.types import (
    ConfigError,
    Env,
    Metrics,
    Model,
    PRNGKey,
    PyTree,
    Reward,
    Trainer,
    TrainState,
)

CHUNK_ITERATIONS = 512  # most iterations between two looks: the size of the buffer of metrics

AgentState = TrainState | Population  # of agents on their own, or of those that copy one another
Swept = Mapping[str, Array]  # hyper-parameters in which the agents differ, each [agents]


class Programs(NamedTuple):
    """The training of some number of agents, compiled; with ``agents=None`` of one, without an axis for it."""

    config: Config
    env: Env
    model: Model | None
    agents: int | None
    sharding: (
        NamedSharding | None
    )  # where keys, hyper-parameters and metrics are, if on more than one device
    state_sharding: PyTree  # likewise the state: a sharding for each of its leaves, or one for all
    init: Callable[[PRNGKey, Swept], AgentState]  # keys [agents]
    chunk: Callable[
        [Swept, AgentState, Metrics, int], tuple[AgentState, Metrics]
    ]  # uses up state and rows
    shapes: AgentState
    buffer: Metrics  # shapes [agents, capacity] of the metrics of a chunk
    memory_bytes: int  # what a chunk needs for its state and temporaries, on each device
    compile_seconds: float

    @property
    def agent_index(self) -> tuple[slice, ...]:
        """The index of all agents; of one without an axis, nothing."""
        return () if self.agents is None else (slice(None),)

    def put(self, tree: PyTree) -> PyTree:
        """Arrays [agents, ...] on the devices whose agents they belong to; those of one agent on all of its devices."""
        return device_put_global(tree, self.sharding)

    def keys(self, key: PRNGKey) -> PRNGKey:
        """A key for each agent: the key itself for one, else it is split."""
        return self.put(key if self.agents is None else jax.random.split(key, self.agents))


def compile_programs(
    config: Config,
    env: Env,
    agents: int | None,
    swept: Sequence[str] = (),
    *,
    model: Model | None = None,
    reward_fn: Callable | Reward | None = None,
    params: PyTree = None,
    frozen: PyTree = None,
    devices: Sequence[jax.Device] | None = None,
    exchange: tuple[Exchange, Bounds] | None = None,
) -> Programs:
    """Compile the training of ``agents`` agents that differ in their keys and in the hyper-parameters ``swept``.

    They are spread over the devices of all processes, of which as many are used as divide their number: each runs its
    own agents, and nothing is communicated but what a population copies in an ``exchange``. One agent with
    ``num_shards`` has its environments on as many devices as divide the shards.

    Raises `ConfigError` for what cannot run.
    """
    started = time.perf_counter()
    trainer_of = partial(make_trainer, env=env, model=model, reward_fn=reward_fn)
    mesh = mesh_of(config, agents, devices)
    is_population = exchange is not None
    inputs, buffer = _shapes(config, trainer_of, agents, swept, params, frozen, is_population)
    init, chunk = _of_one(config, trainer_of, params)
    if exchange:
        axis = mesh.axis_names[0] if mesh.size > 1 else None
        population = make_population(config, trainer_of, *exchange, axis)
        init, chunk = _of_population(config, *population, params)
    elif agents is not None:
        init = jax.vmap(init)
        chunk = jax.vmap(chunk, in_axes=(None, 0, 0, 0, None))
    if agents is not None and mesh.size > 1:
        everywhere = PartitionSpec()
        sharded = partial(jax.shard_map, mesh=mesh, out_specs=AGENTS, check_vma=False)
        init = sharded(init, in_specs=AGENTS)
        chunk = sharded(chunk, in_specs=(everywhere, AGENTS, AGENTS, AGENTS, everywhere))
    shapes = jax.eval_shape(init, *inputs)
    sharding, state_placement = None, None
    init_shardings: dict[str, Any] = {}
    chunk_shardings: dict[str, Any] = {}
    if mesh.size > 1:
        sharding, state_placement = _shardings(mesh, agents, shapes)
        frozen = device_put_global(frozen, replicated(mesh))
        inputs_of_chunk = (replicated(mesh), sharding, state_placement, sharding, replicated(mesh))
        init_shardings = {"in_shardings": sharding, "out_shardings": state_placement}
        chunk_shardings = {
            "in_shardings": inputs_of_chunk,
            "out_shardings": (state_placement, sharding),
        }
    jitted_init = jax.jit(init, **init_shardings)
    jitted_chunk = jax.jit(chunk, donate_argnums=(2, 3), **chunk_shardings)
    compiled_init, compiled_chunk = compile_all(
        (jitted_init, inputs), (jitted_chunk, (frozen, inputs[1], shapes, buffer, 1))
    )
    # At first the devices wait half a minute for one another: all must be ready.
    broadcast_from_main(None)
    return Programs(
        config=config,
        env=env,
        model=model,
        agents=agents,
        sharding=sharding,
        state_sharding=state_placement,
        init=compiled_init,
        chunk=partial(telling_nan(compiled_chunk), frozen),
        shapes=shapes,
        buffer=buffer,
        memory_bytes=memory_of(compiled_chunk),
        compile_seconds=time.perf_counter() - started,
    )


TrainerOf = Callable[[Config], Trainer]


def _of_one(config: Config, trainer_of: TrainerOf, params: PyTree) -> tuple[Callable, Callable]:
    """The two functions that are compiled, of one agent."""

    def init(key: PRNGKey, swept: Swept) -> TrainState:
        return trainer_of(config.replace(**swept)).init(key, params)

    def chunk(
        frozen: PyTree, swept: Swept, state: TrainState, buffer: Metrics, count: Array | int
    ) -> tuple[TrainState, Metrics]:
        """``count`` iterations; how many is not compiled in, so that one program serves every chunk."""
        step = partial(trainer_of(config.replace(**swept)).step, frozen=frozen)
        return run_iterations(config, step, state, buffer, count)

    return init, chunk


def _of_population(
    config: Config, init: Callable, step: Callable, params: PyTree
) -> tuple[Callable, Callable]:
    """The two functions that are compiled, of agents that copy one another."""

    def chunk(
        frozen: PyTree, swept: Swept, state: Population, buffer: Metrics, count: Array | int
    ) -> tuple[Population, Metrics]:
        buffer = jax.tree.map(
            lambda x: jnp.swapaxes(x, 0, 1), buffer
        )  # an iteration's metrics are a row
        state, buffer = run_iterations(config, partial(step, frozen=frozen), state, buffer, count)
        return state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), buffer)

    return partial(init, params=params), chunk


def _shapes(
    config: Config,
    trainer_of: TrainerOf,
    agents: int | None,
    swept: Sequence[str],
    params: PyTree,
    frozen: PyTree,
    population: bool,
) -> tuple[tuple[PyTree, PyTree], Metrics]:
    """The shapes of the keys and the hyper-parameters, and of the metrics of a chunk."""
    inputs = jax.eval_shape(lambda: jax.random.key(0)), dict.fromkeys(swept, jnp.zeros(()))

    def one_row(key: PRNGKey, swept: Swept) -> Metrics:
        return _first_metrics(trainer_of(config.replace(**swept)), key, params, frozen)

    row = jax.eval_shape(one_row, *inputs)
    _require_scalar_metrics(row)
    if population:
        row = row._replace(extra=row.extra | own_metrics(inputs[1], jnp.zeros((), jnp.int32)))
    buffer = jax.eval_shape(
        lambda: metrics_buffer(row, min(CHUNK_ITERATIONS, config.num_iterations))
    )
    if agents is None:
        return inputs, buffer
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((agents, *x.shape), x.dtype), (inputs, buffer)
    )


def require_storable(
    config: Config,
    env: Env,
    model: Model | None,
    reward_fn: Callable | Reward | None,
    params: PyTree = None,
    frozen: PyTree = None,
) -> None:
    """Raise `ConfigError` for a run that cannot start, or whose parameters or metrics cannot be written to files.

    Errors that a model or reward function of the caller's own raises in an iteration come from here as
    well, before anything is compiled.
    """
    trainer = make_trainer(config, env, model, reward_fn)
    key = jax.eval_shape(lambda: jax.random.key(0))
    fresh = jax.eval_shape(lambda key: trainer.init(key).params, key)
    require_trainable(fresh)
    if params is not None:
        jax.eval_shape(lambda key: trainer.init(key, params), key)  # refuses what does not fit
        require_trainable(starting_point(params).params)
    if model is not None or reward_fn is not None:
        row = jax.eval_shape(lambda key: _first_metrics(trainer, key, params, frozen), key)
        _require_scalar_metrics(row)


def _first_metrics(trainer: Trainer, key: PRNGKey, params: PyTree, frozen: PyTree) -> Metrics:
    """The metrics of the first iteration."""
    return trainer.step(trainer.init(key, params), frozen)[1]


Evaluate = Any  # a jitted (swept, state, keys [agents]) -> EpisodeStatistics [agents, episodes]


def make_evaluate(programs: Programs, episodes: int, deterministic: bool) -> Evaluate:
    """``(swept, state, keys [agents]) -> EpisodeStatistics [agents, episodes]`` of the policies of a state.

    An agent that diverged, whose parameters are not numbers, plays something; its returns are NaN.
    """
    config, env, model, agents = programs.config, programs.env, programs.model, programs.agents

    def one(swept: Swept, state: AgentState, key: PRNGKey) -> EpisodeStatistics:
        policy = Policy.from_state(config.replace(**swept), state, None, env, model)
        played = evaluate(policy, env, key, episodes, deterministic)
        finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(policy.params)]).all()
        return played._replace(returns=jnp.where(finite, played.returns, jnp.nan))

    play = one if agents is None else jax.vmap(one)
    if programs.sharding is None:
        return jax.jit(play)
    mesh = programs.sharding.mesh
    if agents is not None:
        play = jax.shard_map(play, mesh=mesh, in_specs=AGENTS, out_specs=AGENTS, check_vma=False)
    sharding = programs.sharding
    return jax.jit(
        play, in_shardings=(sharding, programs.state_sharding, sharding), out_shardings=sharding
    )


def _shardings(mesh: Mesh, agents: int | None, shapes: AgentState) -> tuple[NamedSharding, PyTree]:
    """Where keys, hyper-parameters and metrics are, and where the state is."""
    if isinstance(shapes, TrainState) and agents is None:
        return replicated(mesh), state_sharding(mesh, shapes)
    return NamedSharding(mesh, AGENTS), NamedSharding(mesh, AGENTS)


def _require_scalar_metrics(row: Metrics) -> None:
    for name, x in row.extra.items():
        if x.shape:
            raise ConfigError(
                f"the metric {name!r} of reward_fn has the shape {x.shape}: it must be one number"
            )
