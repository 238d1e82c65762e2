"""gymnax (Lange 2022): classic control, MinAtar, bsuite and small tasks.

`gymnax` takes seconds to import, so the functions here import it when they need it.
"""

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from purejaxppo.types import Box, ConfigError, Discrete, Env, PRNGKey, PyTree, Space, Step

DOWNLOADS = ("MNISTBandit-bsuite",)  # would download a data set

# Environments that gymnax can draw, besides classic control and MinAtar.
DRAWN = ("Catch-bsuite", "FourRooms-misc", "MetaMaze-misc", "PointRobot-misc", "Pong-misc")


def list_envs() -> list[str]:
    """The environments that can be trained."""
    import gymnax

    return [name for name in gymnax.registered_envs if name not in DOWNLOADS]


def make(name: str, /, **settings: Any) -> Env:
    """The gymnax environment ``name``.

    ``settings`` are fields of its parameters or arguments of its constructor. Raises `ConfigError`
    for unknown or invalid settings.
    """
    env, params = original(name, **settings)
    # gymnax computes bounds with JAX; inside jit they would be traced.
    with jax.ensure_compile_time_eval(), _refusing(name, settings):
        observation_space = _space(name, "observations", env.observation_space(params))
        action_space = _space(name, "actions", env.action_space(params))

    def reset(key: PRNGKey) -> tuple[PyTree, Array]:
        obs, state = env.reset_env(key, params)
        return state, obs

    def step(key: PRNGKey, state: PyTree, action: Array) -> Step:
        obs, state, reward, terminated, _ = env.step_env(key, state, action, params)
        if name == "MemoryChain-bsuite":  # its step_env observes the state before the step
            obs = env.get_obs(state, params)
        reward = jnp.asarray(reward, jnp.result_type(float))  # some are integers
        truncated = env.is_truncated(state, params) & ~terminated
        return Step(state=state, obs=obs, reward=reward, terminated=terminated, truncated=truncated)

    return Env(
        name=name,
        reset=reset,
        step=step,
        observation_space=observation_space,
        action_space=action_space,
        max_episode_steps=int(params.max_steps_in_episode),
        truncates=True,
    )


def original(name: str, /, **settings: Any) -> tuple[Any, Any]:
    """gymnax's environment and parameters. Raises `ConfigError` for unknown settings."""
    import gymnax

    if name in DOWNLOADS:
        raise ConfigError(
            f"{name} fetches a data set when it is made, which this library does not do"
        )
    env, params = gymnax.make(name)
    if not settings:
        return env, params
    fields = [field.name for field in dataclasses.fields(params)]
    arguments = list(inspect.signature(type(env).__init__).parameters.values())[1:]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = sorted([*fields, *(x.name for x in arguments if x.kind not in variable)])
    if unknown := [key for key in settings if key not in known]:
        raise ConfigError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    constructor_settings = {key: x for key, x in settings.items() if key not in fields}
    with _refusing(name, constructor_settings):
        env, params = gymnax.make(name, **constructor_settings)
    changes = {
        key: _validated(name, key, x, getattr(params, key))
        for key, x in settings.items()
        if key in fields
    }
    return env, params.replace(**changes)


@contextlib.contextmanager
def _refusing(name: str, settings: dict[str, Any]) -> Iterator[None]:
    """Turn any exception that ``settings`` cause in gymnax into a `ConfigError` of one sentence."""
    try:
        yield
    except Exception as error:
        if not settings:
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(f"{name} cannot be made with {settings}: {lines[0]}") from None


def _validated(name: str, key: str, value: Any, default: Any) -> Any:
    """The value of a field of the parameters, which must have the kind of its default.

    The contents of arrays and traced values are not checked.
    """
    value = value.item() if isinstance(value, np.generic) else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key == "max_steps_in_episode":
        if not is_number or value < 1 or value != int(value):
            raise ConfigError(f"{name}: {key} = {value!r}: it must be an integer of at least 1")
        return int(value)
    if isinstance(value, jax.Array | np.ndarray):
        return value
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ConfigError(f"{name}: {key} = {value!r}: it must be True or False")
    if isinstance(default, int | float) and not isinstance(default, bool) and not is_number:
        raise ConfigError(f"{name}: {key} = {value!r}: it must be a number")
    if isinstance(default, jax.Array | np.ndarray):
        try:
            return jnp.asarray(value, default.dtype).reshape(default.shape)
        except (TypeError, ValueError):
            allowed = f"numbers of shape {default.shape}"
            raise ConfigError(f"{name}: {key} = {value!r}: it must be {allowed}") from None
    return value


def _space(name: str, plural: str, space: Any) -> Space:
    kind = type(space).__name__
    if kind == "Discrete":
        return Discrete(space.n)
    if kind == "Box":
        return Box(space.shape, space.low, space.high)
    raise ConfigError(
        f"{name} has {plural} of the kind {kind}; only Discrete and Box ones can be trained"
    )


def drawing(name: str, /, **settings: Any) -> Callable[[list[Any], list[Any], Any], None]:
    """A function ``draw(states, returns, path)`` that writes a GIF by gymnax's visualiser.

    ``returns`` are the sums of the rewards up to each state.
    """
    # pygame draws classic control, and must open neither a window nor a sound device.
    for variable in ("SDL_VIDEODRIVER", "SDL_AUDIODRIVER"):
        os.environ.setdefault(variable, "dummy")
    from gymnax.visualize import Visualizer, vis_gym

    env, params = original(name, **settings)
    is_classic = name in vis_gym.SUPPORTED_GYM_ENVS
    if not is_classic and name not in DRAWN and not name.endswith("-MinAtar"):
        raise ConfigError(f"{name} cannot be drawn: gymnax's visualiser has no picture of it")

    def draw(states: list[Any], returns: list[Any], path: Any) -> None:
        if is_classic:
            _draw_classic(name, states, params, path)
        else:
            Visualizer(env, params, states, returns).animate(str(path))

    return draw


def _draw_classic(name: str, states: list[Any], params: Any, path: Any) -> None:
    """Draw every second state with one renderer; gymnax opens one for each frame (0.3 s)."""
    import gymnasium
    from gymnax.visualize import vis_gym
    from PIL import Image

    screen = gymnasium.make(name, render_mode="rgb_array")
    screen.reset()
    gym_env: Any = screen.unwrapped
    vis_gym.set_gym_params(gym_env, name, params)
    frames = []
    for state in states[::2]:
        gym_env.state = vis_gym.get_gym_state(state, name)
        if name == "Pendulum-v1":
            gym_env.last_u = np.asarray(state.last_u, float)
        frame = Image.fromarray(np.asarray(gym_env.render()))
        frame.thumbnail((300, 300))
        frames.append(frame.quantize(32))
    screen.close()
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, loop=0)
