"""One of several processes that train together; each has two host devices.

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
from purejaxppo.runs import checkpoints, processes

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
RUN = {"env": counter(), "model": LINEAR, "key": 3}


def results_of(run):
    state = run.state._replace(key=jax.random.key_data(run.state.key))
    return {
        "arrays": jax.tree.leaves(jax.tree.map(np.asarray, (state, run.best))),
        "tables": jax.tree.leaves((run.metrics, run.evaluations)),
        "resumed_at": run.resumed_at,
        "interrupted": run.interrupted,
        "device": run.plan.device,
    }


def train(directory, kill=None, **more):
    """One agent with its environments in four shards.

    With ``kill=(signal, iteration)`` the second process gets the signal after that iteration.
    """

    def on_progress(progress):
        if kill and jax.process_index() == 1 and progress.iterations >= kill[1]:
            os.kill(os.getpid(), kill[0])

    options = {"directory": directory, "eval_every": 3, "eval_episodes": 4}
    return results_of(fit(CONFIG, **RUN, **options, on_progress=on_progress, **more))


def full_disk(directory):
    """The first two checkpoints cannot be written."""
    write = checkpoints.Checkpoints._write
    calls = []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) < 3:
            raise OSError("no space left")
        return write(*arguments)

    with (
        mock.patch.object(checkpoints.Checkpoints, "_write", fails),
        warnings.catch_warnings(record=True) as caught,
    ):
        outcome = train(directory / "full", checkpoint_seconds=0)
    return outcome | {
        "warnings": [str(x.message) for x in caught if "checkpoint" in str(x.message)],
        "calls": len(calls),
    }


def run_sweep(directory):
    """Six members on four devices, four in parallel."""
    result = sweep(
        SMALL,
        3,
        {"lr": [1e-3, 3e-3]},
        directory=directory / "sweep",
        eval_episodes=4,
        at_once=4,
        **RUN,
    )
    tables = [table.to_numpy(float) for table in (result.scores, result.curves)]
    return {
        "arrays": jax.tree.leaves(result.policy(5).params),
        "tables": tables,
        "parts": len(result.parts),
    }


def run_population(directory):
    """Eight members that copy one another, two on each device."""
    options = {
        "directory": directory / "population",
        "eval_episodes": 4,
        "exchange": Exchange(2, share=0.5),
    }
    result = sweep(SMALL, 4, {"lr": [1e-3, 3e-3]}, **options, **RUN)
    tables = [table.to_numpy(float) for table in (result.scores, result.schedules)]
    assert (result.schedules["held_by"] != result.schedules["member"]).any()
    return {"arrays": jax.tree.leaves(result.policy(5).params), "tables": tables}


def whole_episodes(directory):
    """Four agents, which need different numbers of iterations for their steps."""
    config = SMALL.replace(algorithm="reinforce", num_epochs=1, anneal_lr=True, total_timesteps=200)
    run = fit(config, seeds=4, directory=directory / "whole_episodes", **RUN)
    assert len(set(run.state.iteration.tolist())) > 1
    return results_of(run)


def refused(directory):
    """The errors for wrong input, which are the same in all processes."""
    taken = directory / "taken"
    existing = {"directory": directory / "whole"}
    calls = [
        lambda: fit(CONFIG, **RUN, **existing),
        lambda: fit(CONFIG.replace(num_shards=1), **RUN, directory=taken),
        lambda: fit(CONFIG, seeds=3, **RUN, directory=taken),
        lambda: sweep(SMALL, 2, at_once=1, directory=taken, **RUN),
        lambda: fit(CONFIG.replace(lr=1e-3 * (1 + jax.process_index())), **RUN, directory=taken),
    ]
    messages = []
    for call in calls:
        try:
            call()
        except ConfigError as error:
            messages.append(str(error))
    return {"messages": messages, "taken": taken.exists()}


RUNS = {
    "whole": lambda directory: train(directory / "whole"),
    "sweep": run_sweep,
    "population": run_population,
    "episodes": whole_episodes,
    "refused": refused,
    "full": full_disk,
    "stopped": lambda directory: train(directory / "run", (signal.SIGTERM, 2)),
    "killed": lambda directory: train(
        directory / "run", (signal.SIGKILL, 6), resume=True, checkpoint_seconds=0
    ),
    "resumed": lambda directory: train(directory / "run", resume=True),
}

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    index, count, port = map(int, sys.argv[2:5])
    runs = sys.argv[5:]
    if count > 1:
        processes.connect(f"localhost:{port}", count, index)
    jax.config.update("jax_enable_x64", True)
    with compiled_once():
        for name in runs:
            (directory / f"{name}_{index}.pkl").write_bytes(pickle.dumps(RUNS[name](directory)))
