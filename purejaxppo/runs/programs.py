"""Compiled programs that initialise, train and evaluate one agent, or many on all devices."""

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

CHUNK_ITERATIONS = 512  # maximum iterations in a chunk: the size of the metrics buffer

AgentState = TrainState | Population  # of independent agents, or of a population
Swept = Mapping[str, Array]  # swept hyper-parameters, each [agents]


class Programs(NamedTuple):
    """The compiled training of a number of agents.

    ``agents=None`` is a single agent, and no array has an axis of agents.
    """

    config: Config
    env: Env
    model: Model | None
    agents: int | None
    # Of keys, hyper-parameters and metrics; None on a single device.
    sharding: NamedSharding | None
    # Of the state: one sharding, or a tree with one for each leaf; None on a single device.
    state_sharding: PyTree
    init: Callable[[PRNGKey, Swept], AgentState]  # keys [agents]
    # (swept, state, buffer, count) -> (state, buffer); donates state and buffer.
    chunk: Callable[[Swept, AgentState, Metrics, int], tuple[AgentState, Metrics]]
    shapes: AgentState  # of the state
    buffer: Metrics  # shapes [agents, capacity] of the metrics of a chunk
    memory_bytes: int  # for the state and the temporaries of a chunk, on each device
    compile_seconds: float

    @property
    def agent_index(self) -> tuple[slice, ...]:
        """The index of the axis of agents: ``(slice(None),)``, or ``()`` without that axis."""
        return () if self.agents is None else (slice(None),)

    def put(self, tree: PyTree) -> PyTree:
        """Move arrays [agents, ...] to the devices of their agents, by ``sharding``."""
        return device_put_global(tree, self.sharding)

    def keys(self, key: PRNGKey) -> PRNGKey:
        """The keys [agents] split from ``key``; for a single agent the key itself."""
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
    """Compile the training of agents that differ in their keys and ``swept`` hyper-parameters.

    Agents are spread evenly over the largest possible number of devices of all processes. Each
    device runs its agents without communication, except in an ``exchange``. A single agent with
    ``num_shards`` spreads its environments in the same way.

    Main arguments:
        config, env: the configuration and the environment of every agent.
        agents: the number of agents; None for a single one without an axis of agents.
        swept: names of the hyper-parameters that `Programs.init` and `Programs.chunk` take.

    Other arguments:
        model, reward_fn: a custom network and custom rewards, as in `make_trainer`.
        params: initial parameters of every agent, as in `fit`.
        frozen: arrays passed to ``reward_fn``.
        devices: the devices to choose from; by default those of all processes.
        exchange: makes the agents a population, with bounds for its hyper-parameters.

    Raises `ConfigError` for an invalid or unsupported configuration.
    """
    started = time.perf_counter()
    trainer_of = partial(make_trainer, env=env, model=model, reward_fn=reward_fn)
    mesh = mesh_of(config, agents, devices)
    is_population = exchange is not None
    inputs, buffer = _shapes(config, trainer_of, agents, swept, params, frozen, is_population)
    init, chunk = _single_agent_functions(config, trainer_of)
    if exchange:
        axis = mesh.axis_names[0] if mesh.size > 1 else None
        population = make_population(config, trainer_of, *exchange, axis)
        init, chunk = _population_functions(config, *population)
    elif agents is not None:
        init = jax.vmap(init, in_axes=(None, 0, 0))
        chunk = jax.vmap(chunk, in_axes=(None, 0, 0, 0, None))
    if agents is not None and mesh.size > 1:
        unsharded = PartitionSpec()
        sharded = partial(jax.shard_map, mesh=mesh, out_specs=AGENTS, check_vma=False)
        init = sharded(init, in_specs=(unsharded, AGENTS, AGENTS))
        chunk = sharded(chunk, in_specs=(unsharded, AGENTS, AGENTS, AGENTS, unsharded))
    shapes = jax.eval_shape(init, params, *inputs)
    sharding = None
    sharding_of_state = None
    init_shardings: dict[str, Any] = {}
    chunk_shardings: dict[str, Any] = {}
    if mesh.size > 1:
        sharding, sharding_of_state = _shardings(mesh, agents, shapes)
        on_all = replicated(mesh)
        params = device_put_global(params, on_all)
        frozen = device_put_global(frozen, on_all)
        init_shardings = {
            "in_shardings": (on_all, sharding, sharding),
            "out_shardings": sharding_of_state,
        }
        chunk_shardings = {
            "in_shardings": (on_all, sharding, sharding_of_state, sharding, on_all),
            "out_shardings": (sharding_of_state, sharding),
        }
    jitted_init = jax.jit(init, **init_shardings)
    jitted_chunk = jax.jit(chunk, donate_argnums=(2, 3), **chunk_shardings)
    compiled_init, compiled_chunk = compile_all(
        (jitted_init, (params, *inputs)),
        (jitted_chunk, (frozen, inputs[1], shapes, buffer, 1)),
    )
    # The first collective times out after half a minute, so all processes must be ready for it.
    broadcast_from_main(None)
    return Programs(
        config=config,
        env=env,
        model=model,
        agents=agents,
        sharding=sharding,
        state_sharding=sharding_of_state,
        init=partial(compiled_init, params),
        chunk=partial(telling_nan(compiled_chunk), frozen),
        shapes=shapes,
        buffer=buffer,
        memory_bytes=memory_of(compiled_chunk),
        compile_seconds=time.perf_counter() - started,
    )


TrainerOf = Callable[[Config], Trainer]


def _single_agent_functions(config: Config, trainer_of: TrainerOf) -> tuple[Callable, Callable]:
    """``init`` and ``chunk`` of one agent, before compilation.

    ``params`` and ``frozen`` are arguments: as closures they would be constants in the executable.
    """

    def init(params: PyTree, key: PRNGKey, swept: Swept) -> TrainState:
        return trainer_of(config.replace(**swept)).init(key, params)

    def chunk(
        frozen: PyTree, swept: Swept, state: TrainState, buffer: Metrics, count: Array | int
    ) -> tuple[TrainState, Metrics]:
        """``count`` iterations; the count is an argument, so that one program runs every chunk."""
        step = partial(trainer_of(config.replace(**swept)).step, frozen=frozen)
        return run_iterations(config, step, state, buffer, count)

    return init, chunk


def _population_functions(
    config: Config, init_population: Callable, step: Callable
) -> tuple[Callable, Callable]:
    """``init`` and ``chunk`` of a population, before compilation."""

    def init(params: PyTree, keys: PRNGKey, swept: Swept) -> Population:
        return init_population(keys, swept, params)

    def chunk(
        frozen: PyTree, swept: Swept, state: Population, buffer: Metrics, count: Array | int
    ) -> tuple[Population, Metrics]:
        # `run_iterations` writes the metrics of an iteration to a row.
        buffer = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), buffer)
        state, buffer = run_iterations(config, partial(step, frozen=frozen), state, buffer, count)
        return state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), buffer)

    return init, chunk


def _shapes(
    config: Config,
    trainer_of: TrainerOf,
    agents: int | None,
    swept: Sequence[str],
    params: PyTree,
    frozen: PyTree,
    is_population: bool,
) -> tuple[tuple[PyTree, PyTree], Metrics]:
    """The shapes of (keys, hyper-parameters) and of the metrics buffer of a chunk."""
    inputs = jax.eval_shape(lambda: jax.random.key(0)), dict.fromkeys(swept, jnp.zeros(()))

    def metrics_row(key: PRNGKey, swept: Swept) -> Metrics:
        return _first_metrics(trainer_of(config.replace(**swept)), key, params, frozen)

    row = jax.eval_shape(metrics_row, *inputs)
    _require_scalar_metrics(row)
    if is_population:
        row = row._replace(extra=row.extra | own_metrics(inputs[1], jnp.zeros((), jnp.int32)))
    capacity = min(CHUNK_ITERATIONS, config.num_iterations)
    buffer = jax.eval_shape(lambda: metrics_buffer(row, capacity))
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
    """Raise `ConfigError` if a run cannot start, or its parameters or metrics cannot be stored.

    Errors of a custom model or reward function in an iteration are raised here too, before
    anything is compiled.
    """
    trainer = make_trainer(config, env, model, reward_fn)
    key = jax.eval_shape(lambda: jax.random.key(0))
    fresh = jax.eval_shape(lambda key: trainer.init(key).params, key)
    require_trainable(fresh)
    if params is not None:
        # Raises an error if `params` does not fit the model.
        jax.eval_shape(lambda key: trainer.init(key, params), key)
        require_trainable(starting_point(params).params)
    if model is not None or reward_fn is not None:
        row = jax.eval_shape(lambda key: _first_metrics(trainer, key, params, frozen), key)
        _require_scalar_metrics(row)


def _first_metrics(trainer: Trainer, key: PRNGKey, params: PyTree, frozen: PyTree) -> Metrics:
    """The metrics of the first iteration."""
    return trainer.step(trainer.init(key, params), frozen)[1]


Evaluate = Any  # a jitted (swept, state, keys [agents]) -> EpisodeStatistics [agents, episodes]


def make_evaluate(programs: Programs, episodes: int, deterministic: bool) -> Evaluate:
    """A jitted ``(swept, state, keys [agents]) -> EpisodeStatistics [agents, episodes]``.

    The returns of an agent with non-finite parameters are NaN.
    """
    config = programs.config
    env = programs.env
    model = programs.model
    agents = programs.agents

    def evaluate_agent(swept: Swept, state: AgentState, key: PRNGKey) -> EpisodeStatistics:
        policy = Policy.from_state(config.replace(**swept), state, None, env, model)
        statistics = evaluate(policy, env, key, episodes, deterministic)
        is_finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(policy.params)]).all()
        return statistics._replace(returns=jnp.where(is_finite, statistics.returns, jnp.nan))

    play = evaluate_agent if agents is None else jax.vmap(evaluate_agent)
    sharding = programs.sharding
    if sharding is None:
        return jax.jit(play)
    if agents is not None:
        play = jax.shard_map(
            play, mesh=sharding.mesh, in_specs=AGENTS, out_specs=AGENTS, check_vma=False
        )
    return jax.jit(
        play, in_shardings=(sharding, programs.state_sharding, sharding), out_shardings=sharding
    )


def _shardings(mesh: Mesh, agents: int | None, shapes: AgentState) -> tuple[NamedSharding, PyTree]:
    """The sharding of keys, hyper-parameters and metrics, and that of the state."""
    if isinstance(shapes, TrainState) and agents is None:
        return replicated(mesh), state_sharding(mesh, shapes)
    return NamedSharding(mesh, AGENTS), NamedSharding(mesh, AGENTS)


def _require_scalar_metrics(row: Metrics) -> None:
    for name, x in row.extra.items():
        if x.shape:
            raise ConfigError(
                f"the metric {name!r} of reward_fn has the shape {x.shape}: it must be one number"
            )
