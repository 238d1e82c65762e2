"""One process of several that train together; each has two host devices.

python runs_on_processes.py DIRECTORY INDEX COUNT PORT RUN...     writes DIRECTORY/RUN_INDEX.pkl
"""

import os
import pickle
import signal
import sys
import warnings
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).parents[1]))  # the helpers that tests share
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
)

import jax
import numpy as np
from compiled_once import compiled_once
from small_envs import LINEAR, counter

from purejaxppo import Config, ConfigError, Exchange, fit, sweep
from purejaxppo.runs import checkpoints as checkpoint
from purejaxppo.runs import processes

CONFIG = Config(
    num_envs=16,
    num_steps=8,
    total_timesteps=16 * 8 * 9,
    num_epochs=2,
    num_minibatches=2,
    num_shards=4,
    normalize_obs=True,
    normalize_reward=True,
)
SMALL = CONFIG.replace(num_envs=4, num_shards=1, num_minibatches=1)
HOW = {"env": counter(), "model": LINEAR, "key": 3}


def of_run(run):
    state = run.state._replace(key=jax.random.key_data(run.state.key))
    return {
        "arrays": jax.tree.leaves(jax.tree.map(np.asarray, (state, run.best))),
        "tables": jax.tree.leaves((run.metrics, run.evaluations)),
        "resumed_at": run.resumed_at,
        "interrupted": run.interrupted,
        "device": run.plan.device,
    }


def train(directory, ends=None, **more):
    """One agent, its environments in four shards; the second process gets a signal after some iteration."""

    def on_progress(progress):
        if ends and jax.process_index() == 1 and progress.iterations >= ends[1]:
            os.kill(os.getpid(), ends[0])

    how = {"directory": directory, "eval_every": 3, "eval_episodes": 4}
    return of_run(fit(CONFIG, **HOW, **how, on_progress=on_progress, **more))


def full_disk(directory):
    """The first two checkpoints cannot be written."""
    write, calls = checkpoint.Checkpoints._write, []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) < 3:
            raise OSError("no space left")
        return write(*arguments)

    with (
        mock.patch.object(checkpoint.Checkpoints, "_write", fails),
        warnings.catch_warnings(record=True) as told,
    ):
        outcome = train(directory / "full", checkpoint_seconds=0)
    return outcome | {
        "told": [str(x.message) for x in told if "checkpoint" in str(x.message)],
        "calls": len(calls),
    }


def sweeping(directory):
    """Six members on four devices, four at once."""
    result = sweep(
        SMALL,
        3,
        {"lr": [1e-3, 3e-3]},
        directory=directory / "sweep",
        eval_episodes=4,
        at_once=4,
        **HOW,
    )
    tables = [table.to_numpy(float) for table in (result.scores, result.curves)]
    return {
        "arrays": jax.tree.leaves(result.policy(5).params),
        "tables": tables,
        "parts": len(result.parts),
    }


def population(directory):
    """Eight members that copy one another, two on each device."""
    how = {
        "directory": directory / "population",
        "eval_episodes": 4,
        "exchange": Exchange(2, share=0.5),
    }
    result = sweep(SMALL, 4, {"lr": [1e-3, 3e-3]}, **how, **HOW)
    tables = [table.to_numpy(float) for table in (result.scores, result.schedules)]
    assert (result.schedules["held_by"] != result.schedules["member"]).any()
    return {"arrays": jax.tree.leaves(result.policy(5).params), "tables": tables}


def refused(directory):
    """What is said to wrong input, the same in all processes."""
    taken, there = directory / "taken", {"directory": directory / "whole"}
    asked = [
        lambda: fit(CONFIG, **HOW, **there),
        lambda: fit(CONFIG.replace(num_shards=1), **HOW, directory=taken),
        lambda: fit(CONFIG, seeds=3, **HOW, directory=taken),
        lambda: sweep(SMALL, 2, at_once=1, directory=taken, **HOW),
        lambda: fit(CONFIG.replace(lr=1e-3 * (1 + jax.process_index())), **HOW, directory=taken),
    ]
    said = []
    for ask in asked:
        try:
            ask()
        except ConfigError as error:
            said.append(str(error))
    return {"said": said, "taken": taken.exists()}


RUNS = {
    "whole": lambda directory: train(directory / "whole"),
    "sweep": sweeping,
    "population": population,
    "refused": refused,
    "full": full_disk,
    "stopped": lambda directory: train(directory / "run", (signal.SIGTERM, 2)),
    "killed": lambda directory: train(
        directory / "run", (signal.SIGKILL, 6), resume=True, checkpoint_seconds=0
    ),
    "resumed": lambda directory: train(directory / "run", resume=True),
}

if __name__ == "__main__":
    directory, (index, count, port), runs = Path(sys.argv[1]), map(int, sys.argv[2:5]), sys.argv[5:]
    if count > 1:
        processes.connect(f"localhost:{port}", count, index)
    jax.config.update("jax_enable_x64", True)
    with compiled_once():
        for name in runs:
            (directory / f"{name}_{index}.pkl").write_bytes(pickle.dumps(RUNS[name](directory)))
