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
from purejaxppo.runs.disk import whole
from purejaxppo.runs.loggers.base import Logger
from purejaxppo.runs.loggers.open import open_loggers
from purejaxppo.runs.programs import Evaluate, Programs, compile_programs, make_evaluate
from purejaxppo.runs.session import EVALUATION, Keeping, Progress, run_session
from purejaxppo.runs.tables import Table
from purejaxppo.sweeps.grid import Group, Setting
from purejaxppo.sweeps.results import Part, load_part, save_part
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


class Work(NamedTuple):
    """What the groups of a sweep have in common."""

    settings: Sequence[Setting]
    seeds: int
    key: int
    env: Env | None
    made_of: dict[str, Any]  # the caller's own model, reward function and frozen parameters
    eval_episodes: int
    eval_deterministic: bool
    at_once: int | None
    memory_limit: int | None
    directory: Path | None
    resume: bool
    checkpoint_seconds: float
    loggers: Sequence[str]
    exchange: tuple[Exchange, Bounds] | None  # of a population, whose members all train at once

    def env_of(self, group: Group) -> Env:
        return envs.of_config(group.config) if self.env is None else self.env

    def members_of(self, group: Group) -> NDArray[np.integer]:
        """The numbers of its members, setting by setting."""
        return (np.array(group.settings)[:, None] * self.seeds + np.arange(self.seeds)).ravel()

    def inputs(self, group: Group, members: NDArray[np.integer]) -> tuple[PRNGKey, dict[str, NDArray[Any]]]:
        """The key of each member, and its hyper-parameters."""
        key = jax.random.key(self.key)
        keys = key[None] if self.seeds == 1 else jax.random.split(key, self.seeds)
        dtype = jnp.result_type(float)
        swept = {name: [self.settings[i // self.seeds][name] for i in members] for name in group.traced}
        return keys[members % self.seeds], {name: np.asarray(x, dtype) for name, x in swept.items()}


def run_group(
    work: Work,
    group: Group,
    on_start: Callable[[GroupPlan], None] | None,
    on_progress: Callable[[int, Progress | None], None],
) -> Iterator[tuple[Part | None, float]]:
    """Train the members of a group, as many at once as there is memory for; a part that is done is read instead.

    Yields each part and the seconds of its training; None for one that was interrupted.
    """
    members = work.members_of(group)
    known, ended = processes.by_first(lambda: _begun(work, members))
    size = known or len(members)
    programs, evaluate = None, None
    like = _agents_like(work, group) if ended else (None, None)
    if len(ended) < len(_parts(members, size)):
        programs, evaluate = _programs(work, group, len(members), known)
        size = programs.agents or 1
        processes.by_first(lambda: _note_size(work, members, size))
        if on_start:
            seconds, memory = programs.compile_seconds, programs.memory_bytes
            on_start(GroupPlan(group.config, len(members), size, device_name(programs.placed), memory, seconds))
    for part in _parts(members, size):
        done: Part | None
        if programs is None or part[0] in ended:
            done, seconds = load_part(_path(work, part), *like), 0.0
        else:
            done, seconds = _run_part(work, group, part, programs, evaluate, on_progress)
        on_progress(0 if done is None else int(done.timesteps.sum()), None)
        yield done, seconds


def _agents_like(work: Work, group: Group) -> tuple[PyTree, Moments | None]:
    """The parameters and observation moments of one agent, as shapes."""
    trainer = make_trainer(group.config, work.env_of(group), work.made_of["model"], work.made_of["reward_fn"])
    state = jax.eval_shape(trainer.init, jax.random.key(0))
    return state.params, state.normalizer.obs


def _programs(work: Work, group: Group, count: int, known: int | None) -> tuple[Programs, Evaluate | None]:
    """Compiled for as many members as fit the memory, by the compiler's count; for ``known`` of them after a resume."""
    devices, least = jax.devices(), jax.process_count()
    env = work.env_of(group)

    def compiled(size: int) -> tuple[Programs, Evaluate | None, int]:
        made_of = work.made_of | {"devices": devices, "exchange": work.exchange}
        programs = compile_programs(group.config, env, size, group.traced, **made_of)
        if not work.eval_episodes:
            return programs, None, max(processes.everyones(programs.memory_bytes))
        inputs = work.inputs(group, _filled(work.members_of(group)[:size], size))
        keys, swept = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
        play = make_evaluate(programs, work.eval_episodes, work.eval_deterministic)
        (evaluate,) = compile_all((play, (swept, programs.shapes, keys)))
        needed = max(programs.memory_bytes, memory_of(evaluate))
        return programs, evaluate, max(processes.everyones(needed))

    if known and known % least:
        raise ConfigError(f"the sweep was begun with {known} members at once, which {least} processes cannot divide")
    limit = min(processes.everyones(work.memory_limit or int(MEMORY_SHARE * _free_memory())))
    size = known or (count if work.exchange else _even(count, work.at_once, len(devices), least))
    programs, evaluate, needed = compiled(size)
    while needed > limit and not known and size > least and not work.exchange:
        size = min(_even(count, max(least, int(size * limit / needed)), len(devices), least), size - least)
        programs, evaluate, needed = compiled(size)
    if needed > limit and known:
        warnings.warn(f"{size} members, as before, need {needed:,} bytes, and {limit:,} are free now", stacklevel=2)
    elif needed > limit:
        raise ConfigError(
            f"{size} members of {group.config.env} need {needed:,} bytes on each device, and {limit:,} are free: "
            "take fewer or smaller environments, or a larger memory_limit"
        )
    return programs, evaluate


def _run_part(
    work: Work,
    group: Group,
    members: NDArray[np.integer],
    programs: Programs,
    evaluate: Evaluate | None,
    on_progress: Callable[[int, Progress | None], None],
) -> tuple[Part | None, float]:
    """Train these members, score them, and store what they came to; None if they were interrupted."""
    keys, swept = work.inputs(group, _filled(members, programs.agents or 1))
    own = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, EVALUATION), 0))(keys)
    keys, own, swept = programs.put(keys), programs.put(own), programs.put(swept)
    ended = run_session(
        programs,
        keys,
        swept,
        keeping=_keeping(work, members),
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
        played = processes.whole(evaluate(swept, ended.state, own).returns)
        scores = np.asarray(played.mean(axis=1))[:count]
    final = processes.whole((ended.state.params, ended.state.normalizer.obs))
    params, moments = jax.tree.map(lambda x: np.asarray(x)[:count], final)
    last = np.where(
        finite.any(axis=1), finite.shape[1] - finite[:, ::-1].argmax(axis=1), 0
    )  # iteration that was finite
    part = Part(
        members,
        curve,
        np.where(finite[:, -1], scores, np.nan),
        np.asarray(metrics.timesteps[:, -1]),
        np.where(finite[:, -1], 0, last + 1),
        params,
        moments,
        schedule_of(metrics, work.exchange[0].every) if work.exchange else None,
    )
    if work.directory:
        processes.by_first(lambda: _store(work, part))
    return part, ended.seconds


def _store(work: Work, part: Part) -> None:
    save_part(_path(work, part.members), part)
    shutil.rmtree(_checkpoints(work, part.members), ignore_errors=True)


def _keeping(work: Work, members: NDArray[np.integer]) -> Keeping | None:
    """The checkpoints of a part, and its loggers; members that only fill a part up are in neither's rows."""
    if work.directory is None:
        return None
    logs = _path(work, members).with_suffix("")
    names, count = [f"member_{member}" for member in members], len(members)
    settings = {name: str(work.settings[i // work.seeds]) for name, i in zip(names, members, strict=True)}

    def open_log(before: Mapping[str, Table] | None) -> Logger:
        known = None if before is None else {kind: _first(table, count) for kind, table in before.items()}
        numbered = "member", members.tolist()
        logs.mkdir(exist_ok=True)
        log = open_loggers(work.loggers, logs, names, {"settings": settings}, known, numbered)
        return Logger(lambda kind, table: log.write(kind, _first(table, count)), log.close)

    checkpoints = Checkpoints(_checkpoints(work, members))
    return Keeping(checkpoints, work.checkpoint_seconds, work.resume, open_log)


def _first(table: Table, count: int) -> Table:
    return {name: x[:count] for name, x in table.items()}


def _parts(members: NDArray[np.integer], size: int) -> list[NDArray[np.integer]]:
    return [members[start : start + size] for start in range(0, len(members), size)]


def _filled(members: NDArray[np.integer], size: int) -> NDArray[np.integer]:
    """As many members as the program is for; the last one again where there are fewer."""
    return np.concatenate([members, np.repeat(members[-1:], size - len(members))])


def _even(count: int, most: int | None, devices: int, processes: int = 1) -> int:
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


def _path(work: Work, members: NDArray[np.integer]) -> Path:
    return (work.directory or Path()) / "parts" / f"members_{members[0]:06d}_{members[-1]:06d}.npz"


def _checkpoints(work: Work, members: NDArray[np.integer]) -> Path:
    return (work.directory or Path()) / "checkpoints" / f"members_{members[0]:06d}_{members[-1]:06d}"


def _begun(work: Work, members: NDArray[np.integer]) -> tuple[int | None, list[int]]:
    """How many of these members the sweep that is resumed had at once, and the first of each part that has ended.

    The number is kept, because with another one bits may differ.
    """
    path = _size_path(work, members)
    if work.directory is None or not path.exists():
        return None, []
    size = json.loads(path.read_text())["at_once"]
    return size, [int(part[0]) for part in _parts(members, size) if _path(work, part).exists()]


def _note_size(work: Work, members: NDArray[np.integer], size: int) -> None:
    if work.directory:
        path = _size_path(work, members)
        path.parent.mkdir(exist_ok=True)
        whole(path, lambda path: path.write_text(json.dumps({"at_once": size}) + "\n"))


def _size_path(work: Work, members: NDArray[np.integer]) -> Path:
    return (work.directory or Path()) / "parts" / f"members_{members[0]:06d}.json"
