"""Runs in four shards on 1, 2 and 4 devices. A separate process, because it must start with four.

python runs_on_devices.py FILE      pickles {(run, devices): results and communicating loops}
"""

import math
import os
import pickle
import re
import sys
from concurrent.futures import ThreadPoolExecutor

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
)

import jax
import numpy as np
from small_envs import LINEAR, counter, memory_model

from purejaxppo import Config, make_train
from purejaxppo.shards import make_mesh, replicated, state_sharding
from purejaxppo.types import Result

PPO = Config(
    num_envs=16,
    num_steps=8,
    total_timesteps=1024,
    num_epochs=2,
    num_minibatches=2,
    num_shards=4,
    hidden_sizes=(8,),
    normalize_obs=True,
    normalize_reward=True,
)
REINFORCE = PPO.replace(algorithm="reinforce", num_epochs=1, num_minibatches=1, anneal_lr=False)
RUNS = {  # config, model, whether in float64, numbers of devices
    "ppo": (PPO, LINEAR, True, (1, 2, 4)),
    "trpo": (PPO.replace(algorithm="trpo", fisher_subsample=3), LINEAR, True, (1, 4)),
    "reinforce": (
        REINFORCE.replace(total_timesteps=64, baseline="leave_one_out"),
        LINEAR,
        True,
        (1, 4),
    ),
    "memory": (
        PPO.replace(total_timesteps=640, objective="adaptive_kl"),
        memory_model(3),
        False,
        (1, 2),
    ),
}
COLLECTIVE = re.compile(r"= (\S+|\(.*?\)) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(")


def lowered(name, count):
    config, model, x64, _ = RUNS[name]
    with jax.enable_x64(x64):
        train = make_train(config, counter(), model)
        key = jax.random.key(3)
        mesh = make_mesh(4, jax.devices()[:count])
        out_shardings = Result(
            state_sharding(mesh, jax.eval_shape(train, key).state), replicated(mesh)
        )
        return jax.jit(train, in_shardings=replicated(mesh), out_shardings=out_shardings).lower(key)


def outcome(name, count, compiled):
    with jax.enable_x64(RUNS[name][2]):
        state, metrics = compiled(jax.random.key(3))
        arrays = jax.tree.map(
            np.asarray, (state._replace(key=jax.random.key_data(state.key)), metrics)
        )
    sharded = (
        state.env.obs,
        state.normalizer.reward.discounted_return,
        *jax.tree.leaves(state.carry),
    )
    return {
        "state": jax.tree.leaves(arrays[0]),
        "metrics": arrays[1]._asdict(),
        "parts": [x.sharding.shard_shape(x.shape) for x in sharded],
    } | communication(compiled.as_text())


def communication(text):
    """Kinds of the collectives in a program, size of the largest, and loops that contain any."""
    computations = dict(
        re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S)
    )
    collectives = [match for body in computations.values() for match in COLLECTIVE.findall(body)]
    shapes = [
        shape.split(",") for types, _ in collectives for shape in re.findall(r"\[([\d,]*)\]", types)
    ]

    def communicates(name):
        body = computations[name]
        inner = re.findall(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)", body)
        return bool(COLLECTIVE.search(body)) or any(map(communicates, inner))

    loops = re.findall(r"body=%?([\w.\-]+)", text)
    return {
        "kinds": sorted({kind for _, kind in collectives}),
        "largest": max((math.prod(int(n) for n in shape if n) for shape in shapes), default=0),
        "loops": len(loops),
        "communicating": sum(map(communicates, loops)),
    }


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    cases = [(name, count) for name, (*_, counts) in RUNS.items() for count in counts]
    with ThreadPoolExecutor(2) as pool:  # XLA compiles without Python's lock
        programs = [pool.submit(lambda low: low.compile(), lowered(*case)) for case in cases]
        results = {
            case: outcome(*case, program.result())
            for case, program in zip(cases, programs, strict=True)
        }
    with open(sys.argv[1], "wb") as file:
        pickle.dump(results, file)
