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

from purejaxppo import envs
from purejaxppo.checkpoint import Checkpoints
from purejaxppo.config import Config
from purejaxppo.files import whole
from purejaxppo.grids import Group, Setting
from purejaxppo.loggers import Logger, open_loggers
from purejaxppo.metrics import finite_so_far
from purejaxppo.plots import windowed
from purejaxppo.programs import Evaluate, Programs, compile_programs, device_name, make_evaluate, memory_of
from purejaxppo.session import EVALUATION, Keeping, Progress, run_session
from purejaxppo.sweep_results import Part, load_part, save_part
from purejaxppo.tables import Table
from purejaxppo.types import ConfigError, Env, PRNGKey

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

    def env_of(self, group: Group) -> Env:
        return envs.make(group.config.env) if self.env is None else self.env

    def members_of(self, group: Group) -> NDArray[np.int_]:
        """The numbers of its members, setting by setting."""
        return (np.array(group.settings)[:, None] * self.seeds + np.arange(self.seeds)).ravel()

    def inputs(self, group: Group, members: NDArray[np.int_]) -> tuple[PRNGKey, dict[str, NDArray[Any]]]:
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
    name = f"members_{members[0]:06d}"
    known = _known_size(work, name)
    programs, evaluate = None, None
    size = known or len(members)
    if not known or not all(_path(work, part).exists() for part in _parts(members, size)):
        programs, evaluate = _programs(work, group, len(members), known)
        size = programs.agents or 1
        _note_size(work, name, size)
        if on_start:
            seconds, memory = programs.compile_seconds, programs.memory_bytes
            on_start(GroupPlan(group.config, len(members), size, device_name(programs), memory, seconds))
    for part in _parts(members, size):
        done, seconds = _read_part(work, part), 0.0
        if done is None and programs is not None:
            done, seconds = _run_part(work, group, part, programs, evaluate, on_progress)
        on_progress(0 if done is None else int(done.timesteps.sum()), None)
        yield done, seconds


def _read_part(work: Work, members: NDArray[np.int_]) -> Part | None:
    path = _path(work, members)
    return load_part(path) if work.directory and path.exists() else None


def _programs(work: Work, group: Group, count: int, known: int | None) -> tuple[Programs, Evaluate | None]:
    """Compiled for as many members as fit the memory, by the compiler's count; for ``known`` of them after a resume."""
    devices = jax.local_devices()
    env = work.env_of(group)

    def compiled(size: int) -> tuple[Programs, Evaluate | None, int]:
        programs = compile_programs(group.config, env, size, group.traced, devices=devices, **work.made_of)
        if not work.eval_episodes:
            return programs, None, programs.memory_bytes
        keys, swept = work.inputs(group, _filled(work.members_of(group)[:size], size))
        lowered = make_evaluate(programs, work.eval_episodes, work.eval_deterministic).lower(
            swept, programs.shapes, keys
        )
        evaluate = lowered.compile()
        return programs, evaluate, max(programs.memory_bytes, memory_of(evaluate))

    limit = work.memory_limit or int(MEMORY_SHARE * _free_memory(devices))
    size = known or _even(count, work.at_once, len(devices))
    programs, evaluate, needed = compiled(size)
    while needed > limit and not known and size > 1:
        size = min(_even(count, max(1, int(size * limit / needed)), len(devices)), size - 1)
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
    members: NDArray[np.int_],
    programs: Programs,
    evaluate: Evaluate | None,
    on_progress: Callable[[int, Progress | None], None],
) -> tuple[Part | None, float]:
    """Train these members, score them, and store what they came to; None if they were interrupted."""
    keys, swept = work.inputs(group, _filled(members, programs.agents or 1))
    keys, swept = programs.put(keys), programs.put(swept)
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
        own = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, EVALUATION), 0))(keys)
        scores = np.asarray(evaluate(swept, ended.state, own).returns.mean(axis=1))[:count]
    params, moments = jax.tree.map(lambda x: np.asarray(x)[:count], (ended.state.params, ended.state.normalizer.obs))
    part = Part(
        members,
        curve,
        np.where(finite[:, -1], scores, np.nan),
        np.asarray(metrics.timesteps[:, -1]),
        np.where(finite[:, -1], 0, finite.argmin(axis=1) + 1),
        params,
        moments,
    )
    if work.directory:
        save_part(_path(work, members), part)
        shutil.rmtree(_checkpoints(work.directory, members), ignore_errors=True)
    return part, ended.seconds


def _keeping(work: Work, members: NDArray[np.int_]) -> Keeping | None:
    """The checkpoints of a part, and its loggers; members that only fill a part up are in neither's rows."""
    if work.directory is None:
        return None
    logs = _path(work, members).with_suffix("")
    logs.mkdir(exist_ok=True)
    names, count = [f"member_{member}" for member in members], len(members)
    settings = {name: str(work.settings[i // work.seeds]) for name, i in zip(names, members, strict=True)}

    def open_log(before: Mapping[str, Table] | None) -> Logger:
        known = None if before is None else {kind: _first(table, count) for kind, table in before.items()}
        numbered = "member", members.tolist()
        log = open_loggers(work.loggers, logs, names, {"settings": settings}, known, numbered)
        return Logger(lambda kind, table: log.write(kind, _first(table, count)), log.close)

    checkpoints = Checkpoints(_checkpoints(work.directory, members))
    return Keeping(checkpoints, work.checkpoint_seconds, work.resume, open_log)


def _first(table: Table, count: int) -> Table:
    return {name: x[:count] for name, x in table.items()}


def _parts(members: NDArray[np.int_], size: int) -> list[NDArray[np.int_]]:
    return [members[start : start + size] for start in range(0, len(members), size)]


def _filled(members: NDArray[np.int_], size: int) -> NDArray[np.int_]:
    """As many members as the program is for; the last one again where there are fewer."""
    return np.concatenate([members, np.repeat(members[-1:], size - len(members))])


def _even(count: int, most: int | None, devices: int) -> int:
    """The size of parts as equal as can be, at most ``most``; if there is work for all devices, a multiple of them."""
    size = math.ceil(count / math.ceil(count / min(most or count, count)))
    if size < devices:
        return size
    up = math.ceil(size / devices) * devices
    return up if most is None or up <= most else up - devices


def _free_memory(devices: Sequence[jax.Device]) -> int:
    """Bytes that are free on each device; on the CPU its devices share what the machine has."""
    statistics = devices[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return int(statistics["bytes_limit"] - statistics["bytes_in_use"])
    return int(psutil.virtual_memory().available / len(devices))


def _path(work: Work, members: NDArray[np.int_]) -> Path:
    return (work.directory or Path()) / "parts" / f"members_{members[0]:06d}_{members[-1]:06d}.npz"


def _checkpoints(directory: Path, members: NDArray[np.int_]) -> Path:
    return directory / "checkpoints" / f"members_{members[0]:06d}_{members[-1]:06d}"


def _known_size(work: Work, name: str) -> int | None:
    """How many members at once the sweep that is resumed had in this group: with another number bits may differ."""
    path = (work.directory or Path()) / "parts" / f"{name}.json"
    return json.loads(path.read_text())["at_once"] if work.directory and path.exists() else None


def _note_size(work: Work, name: str, size: int) -> None:
    if work.directory:
        (work.directory / "parts").mkdir(exist_ok=True)
        text = json.dumps({"at_once": size}) + "\n"
        whole(work.directory / "parts" / f"{name}.json", lambda path: path.write_text(text))
