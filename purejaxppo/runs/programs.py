"""`Job`, any training loop, and the compiled programs that initialise it and run its iterations."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from purejaxppo.iterations import metrics_buffer, run_iterations
from purejaxppo.metrics import MetricsDescription
from purejaxppo.runs.compilation import AGENTS, compile_all, memory_of, mesh_of, telling_nan
from purejaxppo.runs.processes import broadcast_from_main, device_put_global
from purejaxppo.shards import replicated
from purejaxppo.types import ConfigError, PRNGKey, PyTree, Trainer

RESERVED_NAMES = ("iteration", "valid", "seed", "member")  # columns of tables and CSV files

CHUNK_ITERATIONS = 512  # maximum iterations in a chunk: the size of the metrics buffer

Swept = Mapping[str, Array]  # swept hyper-parameters, each [agents]


class Job(NamedTuple):
    """A training loop, as the modules of `runs` compile, checkpoint, log and resume it.

    The trainer may learn by reinforcement or from labels: of its state only the pytree is known,
    and of its metrics, a pytree of scalars, only their description.
    """

    # (**hyperparameters) -> Trainer; hyperparameters are those of a sweep, and may be traced
    trainer_of: Callable[..., Trainer]
    num_iterations: int  # with ``total`` an upper bound
    metrics: MetricsDescription
    # The progress after which training ends, at least 1; None: after ``num_iterations``. It is
    # not used in a population.
    total: int | None = None
    # A single agent is divided into shards, which can be placed on several devices by
    # ``state_sharding(mesh, state)``.
    num_shards: int = 1
    state_sharding: Callable[[Mesh, PyTree], PyTree] | None = None
    # (mesh axis or None) -> init(keys, swept, params), step(state, frozen) of all agents together
    population: Callable[[str | None], tuple[Callable, Callable]] | None = None


# ((keys, hyper-parameters), buffer of metrics), as shapes
JobShapes = tuple[tuple[PyTree, PyTree], PyTree]


class Programs(NamedTuple):
    """The compiled training of a number of agents.

    ``agents=None`` is a single agent, and no array has an axis of agents.
    """

    job: Job
    agents: int | None
    # Of keys, hyper-parameters and metrics; None on a single device.
    sharding: NamedSharding | None
    # Of the state: one sharding, or a tree with one for each leaf; None on a single device.
    state_sharding: PyTree
    init: Callable[[PRNGKey, Swept], PyTree]  # keys [agents] -> state
    # (swept, state, buffer, count) -> (state, buffer, completed iterations [agents]).
    # Donates state and buffer.
    chunk: Callable[[Swept, PyTree, PyTree, int], tuple[PyTree, PyTree, Array]]
    shapes: PyTree  # of the state
    buffer: PyTree  # shapes [agents, capacity] of the metrics of a chunk
    memory_bytes: int  # for the state and the temporaries of a chunk, on each device
    compile_seconds: float

    @property
    def agent_index(self) -> tuple[slice, ...]:
        """The index of the axis of agents: ``(slice(None),)``, or ``()`` without that axis."""
        return () if self.agents is None else (slice(None),)

    @property
    def capacity(self) -> int:
        """The maximum number of iterations in a chunk."""
        return jax.tree.leaves(self.buffer)[0].shape[-1]

    def put(self, tree: PyTree) -> PyTree:
        """Move arrays [agents, ...] to the devices of their agents, by ``sharding``."""
        return device_put_global(tree, self.sharding)

    def keys(self, key: PRNGKey) -> PRNGKey:
        """The keys [agents] split from ``key``; for a single agent the key itself."""
        return self.put(key if self.agents is None else jax.random.split(key, self.agents))


def compile_programs(
    job: Job,
    agents: int | None,
    swept: Sequence[str] = (),
    *,
    params: PyTree = None,
    frozen: PyTree = None,
    devices: Sequence[jax.Device] | None = None,
    shapes: JobShapes | None = None,
) -> Programs:
    """Compile the training of agents that differ in their keys and ``swept`` hyper-parameters.

    Agents are spread evenly over the largest possible number of devices of all processes. Each
    device runs its agents without communication, except in a population. The shards of a single
    agent are spread in the same way.

    Main arguments:
        job: the training loop of every agent.
        agents: the number of agents; None for a single one without an axis of agents.
        swept: names of the hyper-parameters that `Programs.init` and `Programs.chunk` take.

    Other arguments:
        params: initial parameters of every agent, passed to ``Trainer.init``.
        frozen: arrays passed to ``Trainer.step``.
        devices: the devices to choose from; by default those of all processes.
        shapes: the result of `shapes_of` for the same arguments, if it is known.

    Raises `ConfigError` for an invalid or unsupported configuration.
    """
    started = time.perf_counter()
    mesh = mesh_of(job.num_shards, agents, devices)
    init, chunk = _functions(job, agents, "agents" if mesh.size > 1 else None)
    inputs, buffer = shapes or shapes_of(job, agents, swept, params, frozen)
    if agents is not None and mesh.size > 1:
        unsharded = PartitionSpec()
        sharded = partial(jax.shard_map, mesh=mesh, out_specs=AGENTS, check_vma=False)
        init = sharded(init, in_specs=(unsharded, AGENTS, AGENTS))
        chunk = sharded(chunk, in_specs=(unsharded, AGENTS, AGENTS, AGENTS, unsharded))
    state_shapes = jax.eval_shape(init, params, *inputs)
    sharding = None
    sharding_of_state = None
    init_shardings: dict[str, Any] = {}
    chunk_shardings: dict[str, Any] = {}
    if mesh.size > 1:
        sharding, sharding_of_state = _shardings(job, mesh, agents, state_shapes)
        on_all = replicated(mesh)
        params = device_put_global(params, on_all)
        frozen = device_put_global(frozen, on_all)
        init_shardings = {
            "in_shardings": (on_all, sharding, sharding),
            "out_shardings": sharding_of_state,
        }
        chunk_shardings = {
            "in_shardings": (on_all, sharding, sharding_of_state, sharding, on_all),
            "out_shardings": (sharding_of_state, sharding, sharding),
        }
    jitted_init = jax.jit(init, **init_shardings)
    jitted_chunk = jax.jit(chunk, donate_argnums=(2, 3), **chunk_shardings)
    compiled_init, compiled_chunk = compile_all(
        (jitted_init, (params, *inputs)),
        (jitted_chunk, (frozen, inputs[1], state_shapes, buffer, 1)),
    )
    # The first collective times out after half a minute, so all processes must be ready for it.
    broadcast_from_main(None)
    return Programs(
        job=job,
        agents=agents,
        sharding=sharding,
        state_sharding=sharding_of_state,
        init=partial(compiled_init, params),
        chunk=partial(telling_nan(compiled_chunk), frozen),
        shapes=state_shapes,
        buffer=buffer,
        memory_bytes=memory_of(compiled_chunk),
        compile_seconds=time.perf_counter() - started,
    )


def _functions(job: Job, agents: int | None, axis: str | None) -> tuple[Callable, Callable]:
    """``init`` and ``chunk`` of all agents of a device, before compilation.

    ``params`` and ``frozen`` are arguments: as closures they would be constants in the executable.
    The number of iterations is an argument too, so that one program runs every chunk.
    """
    if job.population is not None:
        return _population_functions(job, *job.population(axis))

    def init(params: PyTree, key: PRNGKey, swept: Swept) -> PyTree:
        return job.trainer_of(**swept).init(key, params)

    def chunk(
        frozen: PyTree, swept: Swept, state: PyTree, buffer: PyTree, count: Array | int
    ) -> tuple[PyTree, PyTree, Array]:
        step = partial(job.trainer_of(**swept).step, frozen=frozen)
        return run_iterations(step, state, buffer, count, job.metrics, job.total)

    if agents is None:
        return init, chunk
    return (
        jax.vmap(init, in_axes=(None, 0, 0)),
        jax.vmap(chunk, in_axes=(None, 0, 0, 0, None)),
    )


def _population_functions(
    job: Job, init_population: Callable, step: Callable
) -> tuple[Callable, Callable]:
    """``init`` and ``chunk`` of a population, whose agents take every iteration together."""

    def init(params: PyTree, keys: PRNGKey, swept: Swept) -> PyTree:
        return init_population(keys, swept, params)

    def chunk(
        frozen: PyTree, swept: Swept, state: PyTree, buffer: PyTree, count: Array | int
    ) -> tuple[PyTree, PyTree, Array]:
        # `run_iterations` writes the metrics of an iteration to a row.
        rows = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), buffer)
        step_all = partial(step, frozen=frozen)
        state, rows, completed = run_iterations(step_all, state, rows, count, job.metrics)
        buffer = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), rows)
        agents = jax.tree.leaves(buffer)[0].shape[0]
        return state, buffer, jnp.broadcast_to(completed, (agents,))

    return init, chunk


def shapes_of(
    job: Job,
    agents: int | None,
    swept: Sequence[str] = (),
    params: PyTree = None,
    frozen: PyTree = None,
) -> JobShapes:
    """The shapes of (keys, hyper-parameters) and of the metrics buffer of a chunk.

    Raises `ConfigError` if the metrics do not fit their description (`require_valid_metrics`).
    """
    inputs = jax.eval_shape(lambda: jax.random.key(0)), dict.fromkeys(swept, jnp.zeros(()))
    of_agents = () if agents is None else (agents,)
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*of_agents, *x.shape), x.dtype), inputs)
    if job.population is not None:
        init, step = job.population(None)
        rows = jax.eval_shape(
            lambda keys, swept: step(init(keys, swept, params), frozen)[1], *inputs
        )
        row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)
    else:
        one = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[len(of_agents) :], x.dtype), inputs
        )
        row = jax.eval_shape(
            lambda key, swept: first_metrics(job.trainer_of(**swept), key, params, frozen), *one
        )
    require_valid_metrics(job, row)
    capacity = min(CHUNK_ITERATIONS, job.num_iterations)
    return inputs, jax.eval_shape(lambda: metrics_buffer(row, *of_agents, capacity))


def first_metrics(trainer: Trainer, key: PRNGKey, params: PyTree, frozen: PyTree) -> PyTree:
    """The metrics of the first iteration."""
    return trainer.step(trainer.init(key, params), frozen)[1]


def require_valid_metrics(job: Job, row: PyTree) -> None:
    """Raise `ConfigError` if the metrics of an iteration do not fit their description.

    Every metric must be one number with a name of its own, and the description may only name
    existing metrics.
    """
    described = job.metrics
    columns = described.columns(row)
    if len(columns) < len(jax.tree.leaves(row)):
        raise ConfigError("two metrics have the same name: rename one")
    for name, x in columns.items():
        if name in RESERVED_NAMES:
            raise ConfigError(f"the metric {name!r} has the name of a column of files: rename it")
        if x.shape:
            raise ConfigError(f"the metric {name!r} has the shape {x.shape}: it must be one number")
    counts = described.counts
    for name in (described.progress, described.plotted, *counts, *counts.values()):
        if name not in columns:
            raise ConfigError(
                f"the description of the metrics names {name!r}, "
                f"and the trainer has only {', '.join(columns)}"
            )
    if described.progress in counts.values():
        raise ConfigError(f"{described.progress!r} cannot be both the progress and a count")
    if job.total is not None and job.total < 1:
        raise ConfigError(f"total = {job.total}: the progress at the end must be at least 1")


def _shardings(
    job: Job, mesh: Mesh, agents: int | None, shapes: PyTree
) -> tuple[NamedSharding, PyTree]:
    """The sharding of keys, hyper-parameters and metrics, and that of the state."""
    if agents is None:
        on_all = replicated(mesh)
        return on_all, job.state_sharding(mesh, shapes) if job.state_sharding else on_all
    return NamedSharding(mesh, AGENTS), NamedSharding(mesh, AGENTS)
