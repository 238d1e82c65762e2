"""The speed of a sweep compared with sequential runs, its memory, and the cost of checkpoints.

The members are agents at PureJaxRL's settings on CartPole-v1, 4 environments × 128 steps each. A
CPU counts as one device per core.
"""

import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import psutil

from benchmarks.speed import SETTINGS
from purejaxppo import Config, sweep
from purejaxppo.runs.agents import job_of
from purejaxppo.runs.checkpoints import Checkpoints
from purejaxppo.runs.chunks import run_chunks
from purejaxppo.runs.compilation import device_name
from purejaxppo.runs.programs import Programs, compile_programs
from purejaxppo.runs.store import Store
from purejaxppo.setup import set_up

CONFIG = Config.from_dict(SETTINGS["seeds"])


def throughput(seeds: int, repeats: int) -> None:
    """Print the steps per second of all members in one program, and the ratio to a single agent.

    The two programs run in turn.
    """
    job = job_of(set_up(CONFIG))
    parallel = compile_programs(job, seeds)
    single = compile_programs(job, None)
    ratios = []
    rates = []
    for repeat in range(repeats):
        parallel_rate = _rate(parallel, repeat)
        single_rate = _rate(single, repeat)
        rates.append(parallel_rate)
        ratios.append(parallel_rate / single_rate)
    low, median, high = np.percentile(ratios, [25, 50, 75])
    print(
        f"{seeds} members at once on {device_name(parallel.sharding)}: "
        f"{np.median(rates):,.0f} steps/s, "
        f"{median:.2f} ({low:.2f} to {high:.2f}) times one after the other, JAX {jax.__version__}"
    )


def _rate(programs: Programs, key: int) -> float:
    state = programs.init(programs.keys(jax.random.key(key)), {})
    started = time.perf_counter()
    for chunk in run_chunks(programs, {}, state):
        steps = chunk.metrics.timesteps[:, -1].sum(dtype=float)
    return float(steps / (time.perf_counter() - started))


def many(seeds: int, timesteps: int) -> None:
    """Print the time and the memory of a sweep: 8 learning rates with ``seeds`` / 8 seeds each."""
    plans = []
    started = time.perf_counter()
    result = sweep(
        CONFIG.replace(total_timesteps=timesteps),
        seeds=seeds // 8,
        grid={"lr": np.geomspace(1e-4, 1e-2, 8).tolist()},
        eval_episodes=16,
        on_start=plans.append,
    )
    seconds = time.perf_counter() - started
    print(
        f"{seeds} members of {timesteps:,} steps: {seconds:.0f} s in total, "
        f"{result.seconds:.0f} s of training "
        f"({seeds * timesteps / result.seconds:,.0f} steps/s), {plans[0].parallel} at once, "
        f"{plans[0].memory_bytes / 1e6:.0f} MB on each of {plans[0].device}, the process holds "
        f"{psutil.Process().memory_info().rss / 1e9:.1f} GB; best lr {result.best.lr:.1e}"
    )


def checkpoint_cost(seeds: int, repeats: int) -> None:
    """Print the time to write a checkpoint, also as a share of the 30 s between two."""
    programs = compile_programs(job_of(set_up(CONFIG)), seeds)
    state = programs.init(programs.keys(jax.random.key(0)), {})
    rows = {"metrics": {"policy_loss": np.zeros((seeds, 1000), np.float32)}}
    seconds = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(Store(Path(directory) / "checkpoints"))
        for iteration in range(1, repeats + 1):
            started = time.perf_counter()
            checkpoints.save(iteration, (state, None), rows)
            seconds.append(time.perf_counter() - started)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    median = np.median(seconds[1:])
    print(
        f"a checkpoint of {seeds} agents ({size:.1f} MB): {median:.2f} s, "
        f"the first one {seconds[0]:.2f} s: {100 * median / 30:.1f} % at one every 30 s"
    )
