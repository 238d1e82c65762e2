"""Steps per second and compile time on CartPole, in the three shapes of PureJaxRL's headline figures.

PureJaxRL itself is no dependency: to compare, time its ``ppo.py`` with `SETTINGS` of the same case, in turn with this.
"""

import time

import jax
import numpy as np

from purejaxppo import make_train

PUREJAXRL = {
    "LR": 2.5e-4,
    "UPDATE_EPOCHS": 4,
    "NUM_MINIBATCHES": 4,
    "GAMMA": 0.99,
    "GAE_LAMBDA": 0.95,
    "CLIP_EPS": 0.2,
    "ENT_COEF": 0.01,
    "VF_COEF": 0.5,
    "MAX_GRAD_NORM": 0.5,
    "ACTIVATION": "tanh",
    "ENV_NAME": "CartPole-v1",
    "ANNEAL_LR": True,
}
SETTINGS = {
    "wide": PUREJAXRL | {"NUM_ENVS": 2048, "NUM_STEPS": 32, "TOTAL_TIMESTEPS": 2048 * 32 * 20},
    "single": PUREJAXRL | {"NUM_ENVS": 4, "NUM_STEPS": 128, "TOTAL_TIMESTEPS": 4 * 128 * 400},
    "seeds": PUREJAXRL | {"NUM_ENVS": 4, "NUM_STEPS": 128, "TOTAL_TIMESTEPS": 4 * 128 * 100},
}
SEEDS = {"wide": 1, "single": 1, "seeds": 16}


def run(cases: list[str], repeats: int) -> None:
    for case in cases:
        train = make_train(SETTINGS[case])
        keys = jax.random.key(0)
        if SEEDS[case] > 1:
            train, keys = jax.vmap(train), jax.random.split(keys, SEEDS[case])
        started = time.perf_counter()
        compiled = jax.jit(train).lower(keys).compile()
        compile_seconds = time.perf_counter() - started
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            jax.block_until_ready(compiled(keys))
            seconds.append(time.perf_counter() - started)
        rates = SETTINGS[case]["TOTAL_TIMESTEPS"] * SEEDS[case] / np.asarray(seconds)
        machine = f"{jax.devices()[0].device_kind}, JAX {jax.__version__}"
        print(
            f"{case}: median {np.median(rates):,.0f} steps/s ({rates.min():,.0f} to {rates.max():,.0f}, "
            f"{repeats} runs), compilation {compile_seconds:.1f} s, {machine}",
            flush=True,
        )
