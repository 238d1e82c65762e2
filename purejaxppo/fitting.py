"""`fit`: a training run as a person meets it, in chunks, with progress and a run directory around `make_trainer`."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from purejaxppo import envs, run_directory
from purejaxppo.checks import integer
from purejaxppo.config import Config, validate
from purejaxppo.iterations import empty_rows, run_iterations
from purejaxppo.metrics import finite_so_far
from purejaxppo.policy import Policy
from purejaxppo.train import make_trainer
from purejaxppo.types import ConfigError, Env, Metrics, Model, PRNGKey, PyTree, Reward, TrainState

CHUNK_SECONDS = 0.3  # how often a person sees progress
CHUNK_ITERATIONS = 512  # most iterations between two looks: the size of the buffer of metrics


class Plan(NamedTuple):
    """What is about to run, known once it is compiled."""

    config: Config
    seeds: int
    device: str
    memory_bytes: int  # what the compiled program needs for its state and temporaries
    compile_seconds: float


class Progress(NamedTuple):
    """Where a run stands after a chunk."""

    iterations: int
    timesteps: int  # of one agent, with whole episodes of the one that is furthest behind
    episode_return: float  # of the episodes that finished in the chunk, all agents; NaN where none did
    steps_per_second: float  # of all agents together


@dataclasses.dataclass(frozen=True)
class Run:
    """What `fit` returns: metrics as NumPy arrays [seeds, iterations]; of several seeds the state has them first."""

    config: Config
    seeds: int
    state: TrainState
    metrics: Metrics
    plan: Plan
    train_seconds: float
    interrupted: bool  # stopped by the user before all iterations were run
    env: Env
    model: Model | None

    def policy(self, seed: int = 0) -> Policy:
        """The trained policy of one of the seeds."""
        index = seed if self.seeds > 1 else None
        return Policy.from_state(self.config, self.state, index, self.env, self.model)

    @property
    def diverged_at(self) -> list[int | None]:
        """For each seed the first iteration (counted from 1) at which loss or gradient were not finite, or None."""
        finite = finite_so_far(self.metrics)
        return [None if row.all() else int(row.argmin()) + 1 for row in finite]


def fit(
    config: Config | Mapping[str, Any],
    *,
    seeds: int = 1,
    key: PRNGKey | int = 0,
    env: Env | None = None,
    model: Model | None = None,
    reward_fn: Callable | Reward | None = None,
    params: PyTree = None,
    frozen: PyTree = None,
    directory: str | os.PathLike | None = None,
    on_start: Callable[[Plan], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Train ``seeds`` agents at once, in chunks between which ``on_progress`` is called.

    The same iterations as ``make_train(config)(key)``, for several seeds as ``vmap(train)(split(key, seeds))``. It
    stops early when every agent has diverged, and with what there is at Ctrl-C. ``directory``, which must not exist,
    gets what `run_directory` describes.
    """
    config = validate(config) if isinstance(config, Config) else Config.from_dict(config)
    seeds = integer("seeds", seeds, 1)
    env = envs.make(config.env) if env is None else env
    config = dataclasses.replace(config, env=env.name)
    named_key, key = key, jax.random.key(key) if isinstance(key, int) else key
    trainer = make_trainer(config, env, model, reward_fn)
    if directory is not None:
        directory = run_directory.reserve(directory, {"config": config.to_dict()}, seeds, named_key)

    def init(keys: PRNGKey) -> TrainState:
        def one(key: PRNGKey) -> TrainState:
            return trainer.init(key, params)

        return jax.vmap(one)(keys) if seeds > 1 else one(keys)

    def chunk(frozen: PyTree, state: TrainState, rows: Metrics, count: Any) -> tuple[TrainState, Metrics]:
        """``count`` iterations; how many is not compiled in, so that one program serves every chunk."""

        def one(state: TrainState, rows: Metrics) -> tuple[TrainState, Metrics]:
            return run_iterations(config, partial(trainer.step, frozen=frozen), state, rows, count)

        return jax.vmap(one)(state, rows) if seeds > 1 else one(state, rows)

    started = time.perf_counter()
    keys = jax.random.split(key, seeds) if seeds > 1 else key
    shapes = jax.eval_shape(init, keys)
    capacity = min(CHUNK_ITERATIONS, config.num_iterations)
    one_state = jax.eval_shape(trainer.init, keys[0] if seeds > 1 else keys, params)
    sizes = (seeds, capacity) if seeds > 1 else (capacity,)
    row = jax.eval_shape(trainer.step, one_state, frozen)[1]
    for name, x in row.extra.items():
        if x.shape:
            raise ConfigError(f"the metric {name!r} of reward_fn has the shape {x.shape}: it must be one number")
    rows = empty_rows(row, *sizes)
    programs = jax.jit(init).lower(keys), jax.jit(chunk, donate_argnums=(1, 2)).lower(frozen, shapes, rows, 1)
    with ThreadPoolExecutor() as pool:  # XLA compiles without Python's lock
        compiled_init, compiled = pool.map(lambda program: program.compile(), programs)
    state = compiled_init(keys)
    plan = Plan(config, seeds, _device(), _memory(compiled), time.perf_counter() - started)
    if on_start:
        on_start(plan)

    started = time.perf_counter()
    state, metrics, interrupted = _run_chunks(partial(compiled, frozen), state, rows, plan, on_progress)
    run = Run(config, seeds, state, metrics, plan, time.perf_counter() - started, interrupted, env, model)
    if directory is not None:
        run_directory.write(directory, run)
    return run


def _run_chunks(
    chunk: Callable, state: TrainState, rows: Metrics, plan: Plan, on_progress: Callable[[Progress], None] | None
) -> tuple[TrainState, Metrics, bool]:
    """All iterations, `CHUNK_SECONDS` at a time; returns state, metrics [seeds, iterations], whether interrupted."""
    config, capacity = plan.config, rows.timesteps.shape[-1]
    ahead = (slice(None),) * (rows.timesteps.ndim - 1)  # the axis of agents, where there are several
    done, count, played, collected = 0, 1, 0.0, []
    with _interruptible() as interrupted:
        while done < config.num_iterations and not interrupted():
            started = time.perf_counter()
            state, rows = chunk(state, rows, count)
            # This waits for the chunk; it copies, since `rows` is given away to the next one.
            new = jax.tree.map(lambda x, n=count: np.array(x[*ahead, :n]), rows)
            seconds = time.perf_counter() - started
            collected.append(new)
            done += count
            before, played = played, new.timesteps[..., -1].sum(dtype=float)  # of all agents
            if on_progress:
                on_progress(_progress(new, done, (played - before) / seconds))
            over = ~np.isfinite(new.policy_loss + new.grad_norm)[..., -1]  # diverged
            if config.whole_episodes:
                over |= new.timesteps[..., -1] >= config.total_timesteps
            if over.all():
                break
            count = int(
                np.clip(count * CHUNK_SECONDS / seconds, 1, min(capacity, max(config.num_iterations - done, 1)))
            )
    metrics = jax.tree.map(lambda *parts: np.concatenate(parts, axis=len(ahead)), *collected)
    longest = int(np.max(state.iteration))  # the last chunk may have room for more
    metrics = jax.tree.map(lambda x: x[*ahead, :longest], metrics)
    return state, metrics if ahead else jax.tree.map(lambda x: x[None], metrics), interrupted()


def _progress(new: Metrics, iterations: int, steps_per_second: float) -> Progress:
    episodes = new.episodes.sum()
    total = np.where(new.episodes > 0, new.episode_return * new.episodes, 0).sum()
    mean = total / episodes if episodes else float("nan")
    return Progress(iterations, int(new.timesteps[..., -1].min()), float(mean), steps_per_second)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C takes effect between chunks, where the state is whole; a second one at once."""
    pressed: list[int] = []

    def note(signal_number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signal_number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _device() -> str:
    device = jax.devices()[0]
    return device.platform if device.device_kind == device.platform else f"{device.platform} ({device.device_kind})"


def _memory(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    return int(analysis.argument_size_in_bytes + analysis.temp_size_in_bytes) if analysis else 0
