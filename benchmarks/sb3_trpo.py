"""Time sb3-contrib's TRPO at rl-baselines3-zoo's CartPole settings; requires sb3-contrib."""

import time

from sb3_contrib import TRPO
from stable_baselines3.common.env_util import make_vec_env

TIMESTEPS = 100_000

if __name__ == "__main__":
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    model = TRPO(
        "MlpPolicy",
        env,
        n_steps=512,
        batch_size=512,
        gae_lambda=0.98,
        cg_damping=1e-3,
        learning_rate=1e-3,
        n_critic_updates=20,
        seed=0,
    )
    started = time.perf_counter()
    model.learn(TIMESTEPS)
    print(f"sb3-contrib TRPO: {model.num_timesteps / (time.perf_counter() - started):,.0f} steps/s")
