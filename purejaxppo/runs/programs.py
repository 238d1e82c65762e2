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
from purejaxppo.iterations import empty_rows, run_iterations
from purejaxppo.policies.evaluate import EpisodeStatistics, evaluate
from purejaxppo.policies.policy import Policy
from purejaxppo.population import Bounds, Exchange, Population, make_population, own_metrics
from purejaxppo.runs.compilation import AGENTS, compile_all, memory_of, mesh_of, telling_nan
from purejaxppo.runs.processes import agreed, put
from purejaxppo.shards import replicated, state_sharding
from purejaxppo.starting import starting_point
from purejaxppo.train import make_trainer
from purejaxppo.trees import require_trainable
from purejaxppo.types import ConfigError, Env, Metrics, Model, PRNGKey, PyTree, Reward, Trainer, TrainState

CHUNK_ITERATIONS = 512  # most iterations between two looks: the size of the buffer of metrics

State = TrainState | Population  # of agents on their own, or of those that copy one another
Swept = Mapping[str, Array]  # hyper-parameters in which the agents differ, each [agents]


class Programs(NamedTuple):
    """The training of some number of agents, compiled; with ``agents=None`` of one, without an axis for it."""

    config: Config
    env: Env
    model: Model | None
    agents: int | None
    placed: NamedSharding | None  # where keys, hyper-parameters and metrics are, if on more than one device
    state_placed: PyTree  # likewise the state: a sharding for each of its leaves, or one for all
    init: Callable[[PRNGKey, Swept], State]  # keys [agents]
    chunk: Callable[[Swept, State, Metrics, int], tuple[State, Metrics]]  # uses up state and rows
    shapes: State
    rows: Metrics  # shapes [agents, capacity] of the metrics of a chunk
    memory_bytes: int  # what a chunk needs for its state and temporaries, on each device
    compile_seconds: float

    @property
    def ahead(self) -> tuple[slice, ...]:
        """The index of all agents; of one without an axis, nothing."""
        return () if self.agents is None else (slice(None),)

    def put(self, tree: PyTree) -> PyTree:
        """Arrays [agents, ...] on the devices whose agents they belong to; those of one agent on all of its devices."""
        return put(tree, self.placed)

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
    mesh, nowhere = mesh_of(config, agents, devices), PartitionSpec()
    inputs, rows = _shapes(config, trainer_of, agents, swept, params, frozen, exchange is not None)
    init, chunk = _of_one(config, trainer_of, params)
    if exchange:
        axis = mesh.axis_names[0] if mesh.size > 1 else None
        init, chunk = _of_population(config, *make_population(config, trainer_of, *exchange, axis), params)
    elif agents is not None:
        init, chunk = jax.vmap(init), jax.vmap(chunk, in_axes=(None, 0, 0, 0, None))
    if agents is not None and mesh.size > 1:
        over = partial(jax.shard_map, mesh=mesh, out_specs=AGENTS, check_vma=False)
        init, chunk = over(init, in_specs=AGENTS), over(chunk, in_specs=(nowhere, AGENTS, AGENTS, AGENTS, nowhere))
    shapes = jax.eval_shape(init, *inputs)
    placed, where = None, None
    of_init: dict[str, Any] = {}
    of_chunk: dict[str, Any] = {}
    if mesh.size > 1:
        everywhere = replicated(mesh)
        placed, where = _placed(mesh, agents, shapes)
        of_init = {"in_shardings": placed, "out_shardings": where}
        of_chunk = {"in_shardings": (everywhere, placed, where, placed, everywhere), "out_shardings": (where, placed)}
        frozen = put(frozen, everywhere)
    compiled_init, compiled = compile_all(
        (jax.jit(init, **of_init), inputs),
        (jax.jit(chunk, donate_argnums=(2, 3), **of_chunk), (frozen, inputs[1], shapes, rows, 1)),
    )
    agreed(None)  # all are ready: to begin with, the devices wait half a minute for one another
    seconds, run = time.perf_counter() - started, partial(telling_nan(compiled), frozen)
    memory = memory_of(compiled)
    return Programs(config, env, model, agents, placed, where, compiled_init, run, shapes, rows, memory, seconds)


TrainerOf = Callable[[Config], Trainer]


def _of_one(config: Config, trainer_of: TrainerOf, params: PyTree) -> tuple[Callable, Callable]:
    """The two functions that are compiled, of one agent."""

    def init(key: PRNGKey, swept: Swept) -> TrainState:
        return trainer_of(config.replace(**swept)).init(key, params)

    def chunk(
        frozen: PyTree, swept: Swept, state: TrainState, rows: Metrics, count: Array | int
    ) -> tuple[TrainState, Metrics]:
        """``count`` iterations; how many is not compiled in, so that one program serves every chunk."""
        step = partial(trainer_of(config.replace(**swept)).step, frozen=frozen)
        return run_iterations(config, step, state, rows, count)

    return init, chunk


def _of_population(config: Config, init: Callable, step: Callable, params: PyTree) -> tuple[Callable, Callable]:
    """The two functions that are compiled, of agents that copy one another."""

    def chunk(
        frozen: PyTree, swept: Swept, state: Population, rows: Metrics, count: Array | int
    ) -> tuple[Population, Metrics]:
        rows = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), rows)  # an iteration's metrics are a row
        state, rows = run_iterations(config, partial(step, frozen=frozen), state, rows, count)
        return state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), rows)

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
    rows = jax.eval_shape(lambda: empty_rows(row, min(CHUNK_ITERATIONS, config.num_iterations)))
    if agents is None:
        return inputs, rows
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((agents, *x.shape), x.dtype), (inputs, rows))


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

    def one(swept: Swept, state: State, key: PRNGKey) -> EpisodeStatistics:
        policy = Policy.from_state(config.replace(**swept), state, None, env, model)
        played = evaluate(policy, env, key, episodes, deterministic)
        finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(policy.params)]).all()
        return played._replace(returns=jnp.where(finite, played.returns, jnp.nan))

    play = one if agents is None else jax.vmap(one)
    if programs.placed is None:
        return jax.jit(play)
    mesh = programs.placed.mesh
    if agents is not None:
        play = jax.shard_map(play, mesh=mesh, in_specs=AGENTS, out_specs=AGENTS, check_vma=False)
    placed = programs.placed
    return jax.jit(play, in_shardings=(placed, programs.state_placed, placed), out_shardings=placed)


def _placed(mesh: Mesh, agents: int | None, shapes: State) -> tuple[NamedSharding, PyTree]:
    """Where keys, hyper-parameters and metrics are, and where the state is."""
    if isinstance(shapes, TrainState) and agents is None:
        return replicated(mesh), state_sharding(mesh, shapes)
    return NamedSharding(mesh, AGENTS), NamedSharding(mesh, AGENTS)


def _require_scalar_metrics(row: Metrics) -> None:
    for name, x in row.extra.items():
        if x.shape:
            raise ConfigError(f"the metric {name!r} of reward_fn has the shape {x.shape}: it must be one number")
