"""One process of several that train together; each has two host devices.

python runs_on_processes.py DIRECTORY INDEX COUNT PORT RUN...     RUN is fit, sweep, …
"""

import os
import pickle
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"

import jax
import numpy as np
from small_envs import counter, linear_model

from purejaxppo import Config, fit, processes, programs, sweep
from purejaxppo.networks import feed_forward

CONFIG = Config(
    num_envs=16,
    num_steps=8,
    total_timesteps=16 * 8 * 12,
    num_epochs=2,
    num_minibatches=2,
    num_shards=4,
    normalize_obs=True,
    normalize_reward=True,
)
init, _, _, unroll = linear_model()
MODEL = feed_forward(init, lambda params, obs: unroll(params, (), obs, None))
SMALL = CONFIG.replace(num_envs=4, num_shards=1, num_minibatches=1)


def run_fit(directory: Path, **more):
    run = fit(
        CONFIG, env=counter(), model=MODEL, key=3, directory=directory / "fit", eval_every=4, eval_episodes=4, **more
    )
    state = run.state._replace(key=jax.random.key_data(run.state.key))
    return {
        "state": jax.tree.leaves(jax.tree.map(np.asarray, state)),
        "best": jax.tree.leaves(jax.tree.map(np.asarray, run.best)),
        "metrics": run.metrics._asdict(),
        "evaluations": run.evaluations,
        "resumed_at": run.resumed_at,
    }


def run_agents(directory: Path, **more):
    """Two agents on four devices: one on each process."""
    run = fit(SMALL, env=counter(), model=MODEL, key=3, seeds=2, checkpoint_seconds=0, **more)
    return {"state": jax.tree.leaves(run.state.params), "metrics": run.metrics._asdict()}


def run_sweep(directory: Path, **more):
    result = sweep(
        SMALL,
        3,
        {"lr": [1e-3, 3e-3]},
        3,
        directory / "sweep",
        env=counter(),
        model=MODEL,
        eval_episodes=4,
        at_once=4,
        **more,
    )
    return {
        "scores": result.scores.to_numpy(float),
        "curves": result.curves.to_numpy(float),
        "policy": jax.tree.leaves(result.policy(5).params),
        "devices": result.parts[0].members.tolist(),
    }


if __name__ == "__main__":
    directory, index, count, port, *runs = sys.argv[1:]
    if int(count) > 1:
        processes.connect(f"localhost:{port}", int(count), int(index))
    jax.config.update("jax_enable_x64", True)
    programs.CHUNK_SECONDS = 0.02
    for name in runs:
        outcome = globals()[f"run_{name}"](Path(directory))
        Path(directory, f"{name}_{index}.pkl").write_bytes(pickle.dumps(outcome))
