"""Steps per second and compile time of PPO and TRPO on CartPole.

PPO has the batch shapes of PureJaxRL's headline figures. The peers are not dependencies. To compare
with them, run this in turn with PureJaxRL's ``ppo.py`` at the `SETTINGS` of the same case, or with
``benchmarks/sb3_trpo.py`` where sb3-contrib is installed.
"""

import time

import jax
import numpy as np

from purejaxppo import Config, make_train, make_trainer

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
# rl-baselines3-zoo's settings for TRPO on CartPole: minibatches of 512, 20 critic epochs.
ZOO_TRPO = {
    "algorithm": "trpo",
    "num_envs": 2,
    "num_steps": 512,
    "num_epochs": 20,
    "num_minibatches": 2,
    "lr": 1e-3,
    "anneal_lr": False,
    "gae_lambda": 0.98,
    "cg_damping": 1e-3,
    "cg_iterations": 15,
    "total_timesteps": 100_000,
}
SETTINGS = {
    "wide": PUREJAXRL | {"NUM_ENVS": 2048, "NUM_STEPS": 32, "TOTAL_TIMESTEPS": 2048 * 32 * 20},
    "single": PUREJAXRL | {"NUM_ENVS": 4, "NUM_STEPS": 128, "TOTAL_TIMESTEPS": 4 * 128 * 400},
    "seeds": PUREJAXRL | {"NUM_ENVS": 4, "NUM_STEPS": 128, "TOTAL_TIMESTEPS": 4 * 128 * 100},
    "trpo": ZOO_TRPO,
    "trpo_seeds": ZOO_TRPO,
}
SEEDS = {"wide": 1, "single": 1, "seeds": 16, "trpo": 1, "trpo_seeds": 16}


def run(cases: list[str], repeats: int) -> None:
    for case in cases:
        config = Config.from_dict(SETTINGS[case])
        train = make_train(config)
        keys = jax.random.key(0)
        if SEEDS[case] > 1:
            train = jax.vmap(train)
            keys = jax.random.split(keys, SEEDS[case])
        started = time.perf_counter()
        compiled = jax.jit(train).lower(keys).compile()
        compile_seconds = time.perf_counter() - started
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            jax.block_until_ready(compiled(keys))
            seconds.append(time.perf_counter() - started)
        rates = config.actual_timesteps * SEEDS[case] / np.asarray(seconds)
        machine = f"{jax.devices()[0].device_kind}, JAX {jax.__version__}"
        print(
            f"{case}: median {np.median(rates):,.0f} steps/s "
            f"({rates.min():,.0f} to {rates.max():,.0f}, {repeats} runs), "
            f"compilation {compile_seconds:.1f} s, {machine}",
            flush=True,
        )


def iteration_cost(repeats: int) -> None:
    """Time an iteration of TRPO and one of PPO with 4 epochs in turn, on 64 × 128 steps."""
    ppo = Config(num_envs=64, num_steps=128, num_minibatches=8, num_epochs=4, total_timesteps=10**9)
    configs = {
        "ppo": ppo,
        "trpo, whole batch": ppo.replace(algorithm="trpo"),
        "trpo, one sample in 10": ppo.replace(algorithm="trpo", fisher_subsample=10),
    }
    steps = {}
    states = {}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for name, config in configs.items():
        trainer = make_trainer(config)
        steps[name] = jax.jit(trainer.step)
        states[name] = jax.jit(trainer.init)(jax.random.key(0))
        jax.block_until_ready(steps[name](states[name]))
    for _ in range(repeats):
        for name in configs:
            started = time.perf_counter()
            for _ in range(5):
                states[name], _ = steps[name](states[name])
            jax.block_until_ready(states[name])
            seconds[name].append((time.perf_counter() - started) / 5)
    ppo_seconds = np.asarray(seconds["ppo"])
    for name, times in seconds.items():
        low, ratio, high = np.percentile(np.asarray(times) / ppo_seconds, [25, 50, 75])
        print(
            f"{name}: {1000 * np.median(times):.1f} ms per iteration, "
            f"{ratio:.2f} times PPO's ({low:.2f} to {high:.2f})"
        )
