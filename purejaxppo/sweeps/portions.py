"""Training of a group of settings, in portions of members that fit into memory.

A member is one setting with one seed. The members of a portion train in parallel in one compiled
program; the portions of a group train one after another.
"""

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from numpy.typing import NDArray

from purejaxppo.analysis.curves import windowed
from purejaxppo.config import Config
from purejaxppo.metrics import AGENT_METRICS, finite_so_far
from purejaxppo.normalize import Moments
from purejaxppo.population import Bounds, Exchange
from purejaxppo.runs import processes
from purejaxppo.runs.agents import Progress, job_of, progress_of
from purejaxppo.runs.checkpoints import Checkpoints
from purejaxppo.runs.compilation import compile_all, device_name, memory_of
from purejaxppo.runs.disk import atomic_write
from purejaxppo.runs.evaluation import EVALUATION, Evaluate, make_evaluate
from purejaxppo.runs.loggers.base import Logger
from purejaxppo.runs.loggers.open import open_loggers
from purejaxppo.runs.programs import Programs, compile_programs
from purejaxppo.runs.session import CheckpointPolicy, run_session
from purejaxppo.runs.store import Store
from purejaxppo.runs.tables import Table
from purejaxppo.setup import Setup
from purejaxppo.sweeps.grid import Setting
from purejaxppo.sweeps.results import SweepPortion, load_portion, save_portion
from purejaxppo.sweeps.schedules import schedule_of
from purejaxppo.train import build_trainer
from purejaxppo.types import ConfigError, PRNGKey, PyTree

MEMORY_SHARE = 0.8  # the share of the free memory that a program may use


class GroupPlan(NamedTuple):
    """What one compiled program is about to run."""

    config: Config
    members: int
    parallel: int  # members that train at once
    device: str
    memory_bytes: int  # on each device
    compile_seconds: float


class Group(NamedTuple):
    """A `CompilationGroup` and the `Setup` of its configuration."""

    setup: Setup
    traced: tuple[str, ...]  # the fields in which the settings may differ
    settings: tuple[int, ...]  # indices in the list of all settings


class SweepSpec(NamedTuple):
    """The options that all groups of a sweep share."""

    settings: Sequence[Setting]
    seeds: int
    key: int
    frozen: PyTree
    eval_episodes: int
    eval_deterministic: bool
    max_parallel: int | None
    memory_limit: int | None
    store: Store
    resume: bool
    checkpoint_seconds: float
    loggers: Sequence[str]
    exchange: tuple[Exchange, Bounds] | None  # of a population, whose members all train at once

    def members_of(self, group: Group) -> NDArray[np.integer]:
        """The indices of the members of a group, ordered by setting and seed."""
        return (np.array(group.settings)[:, None] * self.seeds + np.arange(self.seeds)).ravel()

    def inputs(
        self, group: Group, members: NDArray[np.integer]
    ) -> tuple[PRNGKey, dict[str, NDArray[Any]]]:
        """The keys [members] and the traced hyper-parameters, each [members]."""
        key = jax.random.key(self.key)
        keys = key[None] if self.seeds == 1 else jax.random.split(key, self.seeds)
        dtype = jnp.result_type(float)
        swept = {
            name: [self.settings[i // self.seeds][name] for i in members] for name in group.traced
        }
        return keys[members % self.seeds], {name: np.asarray(x, dtype) for name, x in swept.items()}


def run_group(
    spec: SweepSpec,
    group: Group,
    on_start: Callable[[GroupPlan], None] | None,
    on_progress: Callable[[int, Progress | None], None],
) -> Iterator[tuple[SweepPortion | None, float]]:
    """Train the members of a group, portion by portion. Finished portions are loaded instead.

    Yields each portion with its training time in seconds. An interrupted portion is None.
    """
    members = spec.members_of(group)
    resumed_size, finished = spec.store.read(read_progress, members) or (None, [])
    size = resumed_size or len(members)
    programs = None
    evaluate = None
    shapes = _agent_shapes(group) if finished else (None, None)
    if len(finished) < len(_split(members, size)):
        programs, evaluate = _compile_within_memory(spec, group, len(members), resumed_size)
        size = programs.agents or 1
        spec.store.write(write_portion_size, members, size)
        if on_start:
            on_start(
                GroupPlan(
                    config=group.setup.config,
                    members=len(members),
                    parallel=size,
                    device=device_name(programs.sharding),
                    memory_bytes=programs.memory_bytes,
                    compile_seconds=programs.compile_seconds,
                )
            )
    for portion_members in _split(members, size):
        portion: SweepPortion | None
        if programs is None or portion_members[0] in finished:
            assert spec.store.directory is not None
            portion = load_portion(_portion_path(spec.store.directory, portion_members), *shapes)
            seconds = 0.0
        else:
            portion, seconds = _train_portion(
                spec, group, portion_members, programs, evaluate, on_progress
            )
        on_progress(0 if portion is None else int(portion.timesteps.sum()), None)
        yield portion, seconds


def _agent_shapes(group: Group) -> tuple[PyTree, Moments | None]:
    """The shapes of the parameters and the observation moments of one agent."""
    state = jax.eval_shape(build_trainer(group.setup).init, jax.random.key(0))
    return state.params, state.normalizer.obs


def _compile_within_memory(
    spec: SweepSpec, group: Group, num_members: int, resumed_size: int | None
) -> tuple[Programs, Evaluate | None]:
    """The programs for a portion that fits into memory, by the estimate of the compiler.

    With ``resumed_size`` a portion has this size, even if it does not fit.
    """
    devices = jax.devices()
    num_processes = jax.process_count()
    job = job_of(group.setup, spec.exchange)

    def compile_portion(size: int) -> tuple[Programs, Evaluate | None, int]:
        programs = compile_programs(job, size, group.traced, frozen=spec.frozen, devices=devices)
        if not spec.eval_episodes:
            return programs, None, max(processes.all_gather_objects(programs.memory_bytes))
        inputs = spec.inputs(group, pad_members(spec.members_of(group)[:size], size))
        keys, swept = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
        jitted = make_evaluate(group.setup, programs, spec.eval_episodes, spec.eval_deterministic)
        (evaluate,) = compile_all((jitted, (swept, programs.shapes, keys)))
        needed = max(programs.memory_bytes, memory_of(evaluate))
        return programs, evaluate, max(processes.all_gather_objects(needed))

    if resumed_size and resumed_size % num_processes:
        raise ConfigError(
            f"the sweep was started with {resumed_size} members at once, which cannot be divided "
            f"among {num_processes} processes: resume it with a number of processes that divides "
            f"{resumed_size}"
        )
    limit = min(
        processes.all_gather_objects(spec.memory_limit or int(MEMORY_SHARE * _free_memory()))
    )
    size = resumed_size or (
        num_members
        if spec.exchange
        else portion_size(num_members, spec.max_parallel, len(devices), num_processes)
    )
    programs, evaluate, needed = compile_portion(size)
    while needed > limit and not resumed_size and size > num_processes and not spec.exchange:
        max_parallel = max(num_processes, int(size * limit / needed))
        size = min(
            portion_size(num_members, max_parallel, len(devices), num_processes),
            size - num_processes,
        )
        programs, evaluate, needed = compile_portion(size)
    if needed > limit and resumed_size:
        warnings.warn(
            f"{size} members at once, as before the resume, need {needed:,} bytes on each device, "
            f"and {limit:,} are free",
            stacklevel=2,
        )
    elif needed > limit:
        raise ConfigError(
            f"{size} members of {group.setup.config.env} need {needed:,} bytes on each device, and "
            f"{limit:,} are free: take fewer or smaller environments, or a larger memory_limit"
        )
    return programs, evaluate


def _train_portion(
    spec: SweepSpec,
    group: Group,
    members: NDArray[np.integer],
    programs: Programs,
    evaluate: Evaluate | None,
    on_progress: Callable[[int, Progress | None], None],
) -> tuple[SweepPortion | None, float]:
    """Train, score and save these members. The portion is None if it was interrupted."""
    keys, swept = spec.inputs(group, pad_members(members, programs.agents or 1))
    eval_keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, EVALUATION), 0))(
        keys
    )
    keys = programs.put(keys)
    eval_keys = programs.put(eval_keys)
    swept = programs.put(swept)
    session = run_session(
        programs,
        keys,
        swept,
        checkpointing=_checkpoint_policy(spec, members),
        on_chunk=lambda chunk: on_progress(0, progress_of(chunk, len(members))),
    )
    if session.interrupted:
        return None, session.seconds
    count = len(members)
    metrics = jax.tree.map(lambda x: x[:count], session.metrics)
    finite = finite_so_far(metrics)
    curve = windowed(metrics, config=group.setup.config)
    if evaluate is None:
        # The returns of the last window in which an episode finished.
        windows_after = np.isfinite(curve.returns)[:, ::-1].argmax(axis=1)
        scores = curve.returns[np.arange(count), curve.returns.shape[1] - 1 - windows_after]
    else:
        returns = processes.gather_to_host(evaluate(swept, session.state, eval_keys).returns)
        scores = np.asarray(returns.mean(axis=1))[:count]
    policies = processes.gather_to_host((session.state.params, session.state.normalizer.obs))
    params, moments = jax.tree.map(lambda x: np.asarray(x)[:count], policies)
    # Counted from 1; 0 if no iteration was finite.
    last_finite_iteration = np.where(
        finite.any(axis=1), finite.shape[1] - finite[:, ::-1].argmax(axis=1), 0
    )
    portion = SweepPortion(
        members=members,
        curve=curve,
        scores=np.where(finite[:, -1], scores, np.nan),
        timesteps=np.asarray(metrics.timesteps[:, -1]),
        diverged_at=np.where(finite[:, -1], 0, last_finite_iteration + 1),
        params=params,
        obs_moments=moments,
        schedule=schedule_of(metrics, spec.exchange[0].every) if spec.exchange else None,
    )
    spec.store.write(_save, portion)
    return portion, session.seconds


def _save(directory: Path, portion: SweepPortion) -> None:
    """Save a finished portion, and remove its checkpoints."""
    save_portion(_portion_path(directory, portion.members), portion)
    shutil.rmtree(directory / _checkpoint_name(portion.members), ignore_errors=True)


def _checkpoint_policy(spec: SweepSpec, members: NDArray[np.integer]) -> CheckpointPolicy | None:
    """The checkpoints and the loggers of a portion. Padding members are not logged."""
    if spec.store.directory is None:
        return None
    log_directory = _portion_path(spec.store.directory, members).with_suffix("")
    names = [f"member_{member}" for member in members]
    count = len(members)
    settings = {
        name: str(spec.settings[i // spec.seeds]) for name, i in zip(names, members, strict=True)
    }

    def open_log(before: Mapping[str, Table] | None) -> Logger:
        before_of_members = (
            None
            if before is None
            else {kind: _first_agents(table, count) for kind, table in before.items()}
        )
        numbered = "member", members.tolist()
        log_directory.mkdir(exist_ok=True)
        log = open_loggers(
            spec.loggers,
            log_directory,
            names,
            {"settings": settings},
            AGENT_METRICS,
            before_of_members,
            numbered,
        )
        return Logger(lambda kind, table: log.write(kind, _first_agents(table, count)), log.close)

    checkpoints = Checkpoints(spec.store.subdirectory(_checkpoint_name(members)))
    return CheckpointPolicy(checkpoints, spec.checkpoint_seconds, spec.resume, open_log)


def _first_agents(table: Table, count: int) -> Table:
    return {name: x[:count] for name, x in table.items()}


def _split(members: NDArray[np.integer], size: int) -> list[NDArray[np.integer]]:
    return [members[start : start + size] for start in range(0, len(members), size)]


def pad_members(members: NDArray[np.integer], size: int) -> NDArray[np.integer]:
    """The members [size], padded with copies of the last one."""
    return np.concatenate([members, np.repeat(members[-1:], size - len(members))])


def portion_size(
    num_members: int, max_parallel: int | None, num_devices: int, num_processes: int = 1
) -> int:
    """The size of portions that are as equal as possible, and at most ``max_parallel``.

    It is a multiple of the number of devices, or of processes if a portion has fewer members than
    there are devices.
    """
    num_portions = math.ceil(num_members / min(max_parallel or num_members, num_members))
    size = math.ceil(num_members / num_portions)
    unit = num_devices if size >= num_devices else num_processes
    rounded_up = math.ceil(size / unit) * unit
    fits = max_parallel is None or rounded_up <= max_parallel
    return rounded_up if fits else rounded_up - unit


def _free_memory() -> int:
    """Free bytes on each device of this process. CPU devices share the memory of the machine."""
    devices = jax.local_devices()
    statistics = devices[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return int(statistics["bytes_limit"] - statistics["bytes_in_use"])
    return int(psutil.virtual_memory().available / len(devices) / processes.on_this_machine())


def _portion_path(directory: Path, members: NDArray[np.integer]) -> Path:
    return directory / "parts" / f"members_{members[0]:06d}_{members[-1]:06d}.npz"


def _checkpoint_name(members: NDArray[np.integer]) -> str:
    return f"checkpoints/members_{members[0]:06d}_{members[-1]:06d}"


def read_progress(directory: Path, members: NDArray[np.integer]) -> tuple[int | None, list[int]]:
    """The portion size of the sweep to resume, and the first member of each finished portion.

    A resumed sweep keeps the size, because with another one the results may differ in the last
    bits.
    """
    path = _size_path(directory, members)
    if not path.exists():
        return None, []
    size = json.loads(path.read_text())["at_once"]
    finished = [
        int(portion[0])
        for portion in _split(members, size)
        if _portion_path(directory, portion).exists()
    ]
    return size, finished


def write_portion_size(directory: Path, members: NDArray[np.integer], size: int) -> None:
    """Store the number of members that train at once, for `read_progress`."""
    path = _size_path(directory, members)
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, lambda path: path.write_text(json.dumps({"at_once": size}) + "\n"))


def _size_path(directory: Path, members: NDArray[np.integer]) -> Path:
    return directory / "parts" / f"members_{members[0]:06d}.json"
