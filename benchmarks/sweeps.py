"""How fast a sweep is against its members one after the other, what it holds in memory, and what checkpoints cost.

The members are agents at PureJaxRL's settings on CartPole-v1, 4 environments × 128 steps. A CPU counts as a device for
each core.
"""

import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import psutil

from benchmarks.speed import SETTINGS
from purejaxppo import Config, envs, sweep
from purejaxppo.runs.checkpoints import Checkpoints
from purejaxppo.runs.chunks import run_chunks
from purejaxppo.runs.compilation import device_name
from purejaxppo.runs.programs import Programs, compile_programs

CONFIG = Config.from_dict(SETTINGS["seeds"])


def throughput(seeds: int, repeats: int) -> None:
    """Steps per second of all members of one program, and of one agent's program, in turn."""
    env = envs.of_config(CONFIG)
    together, alone = (compile_programs(CONFIG, env, agents) for agents in (seeds, None))
    ratios, rates = [], []
    for repeat in range(repeats):
        rate, of_one = _rate(together, repeat), _rate(alone, repeat)
        rates.append(rate)
        ratios.append(rate / of_one)
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    print(
        f"{seeds} members at once on {device_name(together)}: {np.median(rates):,.0f} steps/s, {middle:.2f} "
        f"({low:.2f} to {high:.2f}) times one after the other, JAX {jax.__version__}"
    )


def _rate(programs: Programs, key: int) -> float:
    state = programs.init(programs.keys(jax.random.key(key)), {})
    started = time.perf_counter()
    for chunk in run_chunks(programs, {}, state):
        steps = chunk.metrics.timesteps[:, -1].sum(dtype=float)
    return float(steps / (time.perf_counter() - started))


def many(seeds: int, timesteps: int) -> None:
    """A sweep of so many members: 8 learning rates, the rest seeds; its time and its memory."""
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
        f"{seeds} members of {timesteps:,} steps: {seconds:.0f} s in all, {result.seconds:.0f} s of training "
        f"({seeds * timesteps / result.seconds:,.0f} steps/s), {plans[0].at_once} at once, "
        f"{plans[0].memory_bytes / 1e6:.0f} MB on each of {plans[0].device}, the process holds "
        f"{psutil.Process().memory_info().rss / 1e9:.1f} GB; best lr {result.best.lr:.1e}"
    )


def checkpoint_cost(seeds: int, repeats: int) -> None:
    """How long a checkpoint takes to write, as a share of the 30 s between two."""
    env = envs.of_config(CONFIG)
    programs = compile_programs(CONFIG, env, seeds)
    state = programs.init(programs.keys(jax.random.key(0)), {})
    rows = {"metrics": {"policy_loss": np.zeros((seeds, 1000), np.float32)}}
    seconds = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(Path(directory) / "checkpoints")
        for iteration in range(1, repeats + 1):
            started = time.perf_counter()
            checkpoints.save(iteration, (state, None), rows)
            seconds.append(time.perf_counter() - started)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    middle = np.median(seconds[1:])
    print(
        f"a checkpoint of {seeds} agents ({size:.1f} MB): {middle:.2f} s, the first one {seconds[0]:.2f} s: "
        f"{100 * middle / 30:.1f} % at one every 30 s"
    )
