"""The members of a sweep that one compiled program runs: as many at once as fit the memory, part after part."""

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

import purejaxppo.envs as envs
from purejaxppo.analysis.curves import windowed
from purejaxppo.config import Config
from purejaxppo.metrics import finite_so_far
from purejaxppo.normalize import Moments
from purejaxppo.population import Bounds, Exchange
from purejaxppo.runs import processes
from purejaxppo.runs.checkpoints import Checkpoints
from purejaxppo.runs.compilation import compile_all, device_name, memory_of
from purejaxppo.runs.disk import atomic_write
from purejaxppo.runs.loggers.base import Logger
from purejaxppo.runs.loggers.open import open_loggers
from purejaxppo.runs.programs import Evaluate, Programs, compile_programs, make_evaluate
from purejaxppo.runs.session import EVALUATION, CheckpointPolicy, Progress, run_session
from purejaxppo.runs.tables import Table
from purejaxppo.sweeps.grid import CompilationGroup, Setting
from purejaxppo.sweeps.results import SweepPortion, load_portion, save_portion
from purejaxppo.sweeps.schedules import schedule_of
from purejaxppo.train import make_trainer
from purejaxppo.types import ConfigError, Env, PRNGKey, PyTree

MEMORY_SHARE = 0.8  # of what is free


class GroupPlan(NamedTuple):
    """What one compiled program is about to run."""

    config: Config
    members: int
    at_once: int
    device: str
    memory_bytes: int  # on each device
    compile_seconds: float


class SweepSpec(NamedTuple):
    """What the groups of a sweep have in common."""

    settings: Sequence[Setting]
    seeds: int
    key: int
    env: Env | None
    components: dict[str, Any]  # the caller's own model, reward function and frozen parameters
    eval_episodes: int
    eval_deterministic: bool
    at_once: int | None
    memory_limit: int | None
    directory: Path | None
    resume: bool
    checkpoint_seconds: float
    loggers: Sequence[str]
    exchange: tuple[Exchange, Bounds] | None  # of a population, whose members all train at once

    def env_of(self, group: CompilationGroup) -> Env:
        return envs.of_config(group.config) if self.env is None else self.env

    def members_of(self, group: CompilationGroup) -> NDArray[np.integer]:
        """The numbers of its members, setting by setting."""
        return (np.array(group.settings)[:, None] * self.seeds + np.arange(self.seeds)).ravel()

    def inputs(
        self, group: CompilationGroup, members: NDArray[np.integer]
    ) -> tuple[PRNGKey, dict[str, NDArray[Any]]]:
        """The key of each member, and its hyper-parameters."""
        key = jax.random.key(self.key)
        keys = key[None] if self.seeds == 1 else jax.random.split(key, self.seeds)
        dtype = jnp.result_type(float)
        swept = {
            name: [self.settings[i // self.seeds][name] for i in members] for name in group.traced
        }
        return keys[members % self.seeds], {name: np.asarray(x, dtype) for name, x in swept.items()}


def run_group(
    spec: SweepSpec,
    group: CompilationGroup,
    on_start: Callable[[GroupPlan], None] | None,
    on_progress: Callable[[int, Progress | None], None],
) -> Iterator[tuple[SweepPortion | None, float]]:
    """Train the members of a group, as many at once as there is memory for; a part that is done is read instead.

    Yields each part and the seconds of its training; None for one that was interrupted.
    """
    members = spec.members_of(group)
    known, ended = processes.on_main_process(lambda: read_progress(spec, members))
    size = known or len(members)
    programs = None
    evaluate = None
    like = _agents_like(spec, group) if ended else (None, None)
    if len(ended) < len(_parts(members, size)):
        programs, evaluate = _programs(spec, group, len(members), known)
        size = programs.agents or 1
        processes.on_main_process(lambda: write_portion_size(spec, members, size))
        if on_start:
            seconds = programs.compile_seconds
            memory = programs.memory_bytes
            on_start(
                GroupPlan(
                    group.config,
                    len(members),
                    size,
                    device_name(programs.sharding),
                    memory,
                    seconds,
                )
            )
    for part in _parts(members, size):
        done: SweepPortion | None
        if programs is None or part[0] in ended:
            done = load_portion(_path(spec, part), *like)
            seconds = 0.0
        else:
            done, seconds = _run_part(spec, group, part, programs, evaluate, on_progress)
        on_progress(0 if done is None else int(done.timesteps.sum()), None)
        yield done, seconds


def _agents_like(spec: SweepSpec, group: CompilationGroup) -> tuple[PyTree, Moments | None]:
    """The parameters and observation moments of one agent, as shapes."""
    trainer = make_trainer(
        group.config, spec.env_of(group), spec.components["model"], spec.components["reward_fn"]
    )
    state = jax.eval_shape(trainer.init, jax.random.key(0))
    return state.params, state.normalizer.obs


def _programs(
    spec: SweepSpec, group: CompilationGroup, count: int, known: int | None
) -> tuple[Programs, Evaluate | None]:
    """Compiled for as many members as fit the memory, by the compiler's count; for ``known`` of them after a resume."""
    devices = jax.devices()
    least = jax.process_count()
    env = spec.env_of(group)

    def compiled(size: int) -> tuple[Programs, Evaluate | None, int]:
        components = spec.components | {"devices": devices, "exchange": spec.exchange}
        programs = compile_programs(group.config, env, size, group.traced, **components)
        if not spec.eval_episodes:
            return programs, None, max(processes.all_gather_objects(programs.memory_bytes))
        inputs = spec.inputs(group, pad_members(spec.members_of(group)[:size], size))
        keys, swept = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
        play = make_evaluate(programs, spec.eval_episodes, spec.eval_deterministic)
        (evaluate,) = compile_all((play, (swept, programs.shapes, keys)))
        needed = max(programs.memory_bytes, memory_of(evaluate))
        return programs, evaluate, max(processes.all_gather_objects(needed))

    if known and known % least:
        raise ConfigError(
            f"the sweep was begun with {known} members at once, which {least} processes cannot divide"
        )
    limit = min(
        processes.all_gather_objects(spec.memory_limit or int(MEMORY_SHARE * _free_memory()))
    )
    size = known or (
        count if spec.exchange else portion_size(count, spec.at_once, len(devices), least)
    )
    programs, evaluate, needed = compiled(size)
    while needed > limit and not known and size > least and not spec.exchange:
        size = min(
            portion_size(count, max(least, int(size * limit / needed)), len(devices), least),
            size - least,
        )
        programs, evaluate, needed = compiled(size)
    if needed > limit and known:
        warnings.warn(
            f"{size} members, as before, need {needed:,} bytes, and {limit:,} are free now",
            stacklevel=2,
        )
    elif needed > limit:
        raise ConfigError(
            f"{size} members of {group.config.env} need {needed:,} bytes on each device, and {limit:,} are free: "
            "take fewer or smaller environments, or a larger memory_limit"
        )
    return programs, evaluate


def _run_part(
    spec: SweepSpec,
    group: CompilationGroup,
    members: NDArray[np.integer],
    programs: Programs,
    evaluate: Evaluate | None,
    on_progress: Callable[[int, Progress | None], None],
) -> tuple[SweepPortion | None, float]:
    """Train these members, score them, and store what they came to; None if they were interrupted."""
    keys, swept = spec.inputs(group, pad_members(members, programs.agents or 1))
    own = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, EVALUATION), 0))(keys)
    keys = programs.put(keys)
    own = programs.put(own)
    swept = programs.put(swept)
    ended = run_session(
        programs,
        keys,
        swept,
        checkpointing=_checkpoint_policy(spec, members),
        on_progress=lambda now: on_progress(0, now),
        counted=len(members),
    )
    if ended.interrupted:
        return None, ended.seconds
    count = len(members)
    metrics = jax.tree.map(lambda x: x[:count], ended.metrics)
    finite = finite_so_far(metrics)
    curve = windowed(metrics, config=group.config)
    if evaluate is None:
        last = np.isfinite(curve.returns)[:, ::-1].argmax(axis=1)
        scores = curve.returns[np.arange(count), curve.returns.shape[1] - 1 - last]
    else:
        played = processes.gather_to_host(evaluate(swept, ended.state, own).returns)
        scores = np.asarray(played.mean(axis=1))[:count]
    final = processes.gather_to_host((ended.state.params, ended.state.normalizer.obs))
    params, moments = jax.tree.map(lambda x: np.asarray(x)[:count], final)
    last = np.where(
        finite.any(axis=1), finite.shape[1] - finite[:, ::-1].argmax(axis=1), 0
    )  # iteration that was finite
    part = SweepPortion(
        members,
        curve,
        np.where(finite[:, -1], scores, np.nan),
        np.asarray(metrics.timesteps[:, -1]),
        np.where(finite[:, -1], 0, last + 1),
        params,
        moments,
        schedule_of(metrics, spec.exchange[0].every) if spec.exchange else None,
    )
    if spec.directory:
        processes.on_main_process(lambda: _store(spec, part))
    return part, ended.seconds


def _store(spec: SweepSpec, part: SweepPortion) -> None:
    save_portion(_path(spec, part.members), part)
    shutil.rmtree(_checkpoints(spec, part.members), ignore_errors=True)


def _checkpoint_policy(spec: SweepSpec, members: NDArray[np.integer]) -> CheckpointPolicy | None:
    """The checkpoints of a part, and its loggers; members that only fill a part up are in neither's rows."""
    if spec.directory is None:
        return None
    logs = _path(spec, members).with_suffix("")
    names = [f"member_{member}" for member in members]
    count = len(members)
    settings = {
        name: str(spec.settings[i // spec.seeds]) for name, i in zip(names, members, strict=True)
    }

    def open_log(before: Mapping[str, Table] | None) -> Logger:
        known = (
            None
            if before is None
            else {kind: _first(table, count) for kind, table in before.items()}
        )
        numbered = "member", members.tolist()
        logs.mkdir(exist_ok=True)
        log = open_loggers(spec.loggers, logs, names, {"settings": settings}, known, numbered)
        return Logger(lambda kind, table: log.write(kind, _first(table, count)), log.close)

    checkpoints = Checkpoints(_checkpoints(spec, members))
    return CheckpointPolicy(checkpoints, spec.checkpoint_seconds, spec.resume, open_log)


def _first(table: Table, count: int) -> Table:
    return {name: x[:count] for name, x in table.items()}


def _parts(members: NDArray[np.integer], size: int) -> list[NDArray[np.integer]]:
    return [members[start : start + size] for start in range(0, len(members), size)]


def pad_members(members: NDArray[np.integer], size: int) -> NDArray[np.integer]:
    """As many members as the program is for; the last one again where there are fewer."""
    return np.concatenate([members, np.repeat(members[-1:], size - len(members))])


def portion_size(count: int, most: int | None, devices: int, processes: int = 1) -> int:
    """The size of parts as equal as can be, at most ``most``, and a multiple of the processes.

    If there is work for all devices, it is a multiple of them.
    """
    size = math.ceil(count / math.ceil(count / min(most or count, count)))
    unit = devices if size >= devices else processes
    up = math.ceil(size / unit) * unit
    return up if most is None or up <= most else up - unit


def _free_memory() -> int:
    """Bytes that are free on each device of this process; on the CPU they share what the machine has."""
    devices = jax.local_devices()
    statistics = devices[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return int(statistics["bytes_limit"] - statistics["bytes_in_use"])
    return int(psutil.virtual_memory().available / len(devices) / processes.on_this_machine())


def _path(spec: SweepSpec, members: NDArray[np.integer]) -> Path:
    return (spec.directory or Path()) / "parts" / f"members_{members[0]:06d}_{members[-1]:06d}.npz"


def _checkpoints(spec: SweepSpec, members: NDArray[np.integer]) -> Path:
    return (
        (spec.directory or Path()) / "checkpoints" / f"members_{members[0]:06d}_{members[-1]:06d}"
    )


def read_progress(spec: SweepSpec, members: NDArray[np.integer]) -> tuple[int | None, list[int]]:
    """How many of these members the sweep that is resumed had at once, and the first of each part that has ended.

    The number is kept, because with another one bits may differ.
    """
    path = _size_path(spec, members)
    if spec.directory is None or not path.exists():
        return None, []
    size = json.loads(path.read_text())["at_once"]
    return size, [int(part[0]) for part in _parts(members, size) if _path(spec, part).exists()]


def write_portion_size(spec: SweepSpec, members: NDArray[np.integer], size: int) -> None:
    """Store how many members train at once, for a resume."""
    if spec.directory:
        path = _size_path(spec, members)
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, lambda path: path.write_text(json.dumps({"at_once": size}) + "\n"))


def _size_path(spec: SweepSpec, members: NDArray[np.integer]) -> Path:
    return (spec.directory or Path()) / "parts" / f"members_{members[0]:06d}.json"
