"""Steps per second and compile time on CartPole: PPO in the shapes of PureJaxRL's headline figures, and TRPO.

The peers are no dependencies. To compare, time PureJaxRL's ``ppo.py`` with `SETTINGS` of the same case, or
``benchmarks/sb3_trpo.py`` in an environment that has sb3-contrib, in turn with this.
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
# rl-baselines3-zoo's settings of TRPO on CartPole: minibatches of 512, 20 passes for the critic.
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
            train, keys = jax.vmap(train), jax.random.split(keys, SEEDS[case])
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
            f"{case}: median {np.median(rates):,.0f} steps/s ({rates.min():,.0f} to {rates.max():,.0f}, "
            f"{repeats} runs), compilation {compile_seconds:.1f} s, {machine}",
            flush=True,
        )


def iteration_cost(repeats: int) -> None:
    """One iteration of TRPO against one of PPO with 4 epochs, on the same batch of 64 × 128 steps, in turn."""
    same = Config(
        num_envs=64, num_steps=128, num_minibatches=8, num_epochs=4, total_timesteps=10**9
    )
    configs = {
        "ppo": same,
        "trpo, whole batch": same.replace(algorithm="trpo"),
        "trpo, one sample in 10": same.replace(algorithm="trpo", fisher_subsample=10),
    }
    steps, states, seconds = {}, {}, {name: [] for name in configs}
    for name, config in configs.items():
        trainer = make_trainer(config)
        steps[name], states[name] = jax.jit(trainer.step), jax.jit(trainer.init)(jax.random.key(0))
        jax.block_until_ready(steps[name](states[name]))
    for _ in range(repeats):
        for name in configs:
            started = time.perf_counter()
            for _ in range(5):
                states[name], _ = steps[name](states[name])
            jax.block_until_ready(states[name])
            seconds[name].append((time.perf_counter() - started) / 5)
    base = np.asarray(seconds["ppo"])
    for name, taken in seconds.items():
        low, ratio, high = np.percentile(np.asarray(taken) / base, [25, 50, 75])
        print(
            f"{name}: {1000 * np.median(taken):.1f} ms an iteration, {ratio:.2f} of PPO's ({low:.2f} to {high:.2f})"
        )
