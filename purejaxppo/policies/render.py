"""Animations of a trained policy."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import purejaxppo.envs as envs
from purejaxppo.policies.policy import Policy
from purejaxppo.types import ConfigError, Env, PyTree


def animate(
    policy: Policy, path: str | os.PathLike, key: int = 0, max_steps: int = 500
) -> tuple[Path, float]:
    """Write a GIF of one episode with the mode of each action distribution.

    Returns the path and the return of the episode, which ends after ``max_steps`` steps at the
    latest. Raises `ConfigError` if the suite cannot draw the environment or the file cannot be
    written.
    """
    path = Path(path)
    if path.suffix.lower() != ".gif":
        raise ConfigError(f"{path}: the picture is a GIF, so its name must end in .gif")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no directory {path.parent}")
    env = envs.of_config(policy.config)
    draw = envs.drawing(policy.config.env, **dict(policy.config.env_settings or ()))
    states, rewards = play(policy, env, key, max_steps)
    temporary = path.with_name(f".{path.stem}.part.gif")
    try:
        draw(states, list(jnp.cumsum(jnp.asarray(rewards))), temporary)
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path, float(sum(rewards))


def play(policy: Policy, env: Env, key: int, max_steps: int) -> tuple[list[PyTree], list[float]]:
    """Play one episode: its states, and the reward on arrival in each (0 for the initial state)."""
    key_reset, key_steps = jax.random.split(jax.random.key(key))
    state, obs = env.reset(key_reset)
    carry = policy.initial_carry(1)
    reset = jnp.ones(1, bool)
    env_step = jax.jit(env.step)
    states = [state]
    rewards = [0.0]
    for step_key in jax.random.split(key_steps, max_steps):
        batch = jax.tree.map(lambda x: jnp.asarray(x)[None], obs)
        carry, action = policy.step(carry, batch, reset)
        timestep: Any = env_step(step_key, state, action[0])
        state = timestep.state
        obs = timestep.obs
        reset = jnp.zeros(1, bool)
        states.append(state)
        rewards.append(float(timestep.reward))
        if timestep.terminated or timestep.truncated:
            break
    return states, rewards
