"""Environments by name: ``make("CartPole-v1")`` or ``make("suite/name")``, `register` for your own, `list_envs`."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

if __name__ != "purejaxppo.envs":
    raise ImportError("this package is called purejaxppo.envs: write 'from purejaxppo import envs'")

from purejaxppo.types import ConfigError, Env, plain_settings

SUITES = (
    "gymnax",
)  # modules here, each with make and list_envs; the first has the names without a suite
MOST_KEPT = 256  # environments that `make` remembers
_registered: dict[str, Callable[..., Env]] = {}
# What `make` remembers, by name, settings and precision: what made it, and the environment.
_made: dict[tuple[str, str, str], tuple[Callable[..., Env], Env]] = {}


def register(name: str, factory: Callable[..., Env]) -> None:
    """Let ``make(name, **settings)`` return ``factory(**settings)``; an earlier factory is replaced.

    The factory is called once for the same settings, on which alone its environment must depend:
    they are all that a config and a saved policy keep of it.
    """
    if not name or not callable(factory):
        raise ConfigError("register takes a name and a function that returns an Env")
    _registered[name] = factory
    for key in [key for key in _made if key[0] == name]:
        del _made[key]


def list_envs(suite: str | None = None) -> list[str]:
    """The names that `make` knows: of one suite, or registered ones and every suite."""
    if suite is not None and suite not in SUITES:
        raise ConfigError(f"{suite!r} is not a suite; there is {', '.join(SUITES)}")
    if suite is not None:
        return _suite(suite).list_envs()
    names = [
        name if i == 0 else f"{suite}/{name}"
        for i, suite in enumerate(SUITES)
        for name in list_envs(suite)
    ]
    return [*_registered, *names]


def make(name: str, /, **settings: Any) -> Env:
    """The environment ``name``, such as ``CartPole-v1`` or ``gymnax/CartPole-v1``, with the suite's own settings.

    Called twice with the same name and settings it returns the same object, so that what was
    compiled for an environment serves again. Raises `ConfigError` for a name that does not exist,
    with the nearest that does, and for settings that the environment does not have.
    """
    return _make(name, settings)


def of_config(config: Any) -> Env:
    """The environment that a `Config` names by ``env`` and ``env_settings``."""
    if config.env_settings is None:
        raise ConfigError(
            f"the settings that {config.env} was made with were not recorded, because they were "
            "arrays or traced values: give the environment itself, or set env_settings"
        )
    return _make(config.env, dict(config.env_settings))


def _make(name: str, settings: Mapping[str, Any]) -> Env:
    maker, short = _maker(name)
    build = partial(maker, short) if short else partial(_registered_env, name, maker)
    recorded = plain_settings(settings)
    if recorded is None:
        return build(**settings)._replace(settings=None)
    key = short or name, repr(recorded), str(jnp.result_type(float))
    if key in _made and _made[key][0] is maker:
        return _made[key][1]
    with jax.ensure_compile_time_eval():  # inside of jit its constants would be traced
        env = build(**dict(recorded))._replace(settings=recorded)
    if len(_made) >= MOST_KEPT:
        del _made[next(iter(_made))]
    _made[key] = maker, env
    return env


def _maker(name: str) -> tuple[Callable[..., Env], str]:
    """The registered factory of this name and ""; else the ``make`` of a suite and its name there."""
    if name in _registered:
        return _registered[name], ""
    suite, _, short = name.rpartition("/")
    suite = suite or SUITES[0]
    own = "one of your own must be registered by envs.register, or given as an Env"
    if suite not in SUITES:
        hint = f": there is no suite {suite!r}, only {', '.join(SUITES)}"
        raise ConfigError(f"{name!r} is not an environment{hint} ({own})")
    known = _suite(suite).list_envs()
    if short not in known and short not in getattr(_suite(suite), "DOWNLOADS", ()):
        near = difflib.get_close_matches(short, [*known, *_registered], n=1, cutoff=0.4)
        hint = (
            f"; did you mean {near[0]!r}?"
            if near
            else "; `purejaxppo envs` lists what can be trained"
        )
        raise ConfigError(f"{name!r} is not an environment{hint} ({own})")
    return _suite(suite).make, short


def _registered_env(name: str, factory: Callable[..., Env], /, **settings: Any) -> Env:
    """What the factory makes, under the name that it was registered by."""
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        known = ", ".join(inspect.signature(factory).parameters) or "none"
        told = f"{name!r} cannot be made with these settings: {error}; it has {known}"
        raise ConfigError(told) from None
    except ValueError:  # a function without a signature
        pass
    env = factory(**settings)
    if not isinstance(env, Env):
        kind = type(env).__name__
        raise ConfigError(
            f"what was registered as {name!r} returned {kind}, and must return an Env"
        )
    return env._replace(name=name)


def _suite(name: str) -> Any:
    return import_module(f"purejaxppo.envs.{name}")


def drawing(name: str, /, **settings: Any) -> Callable[[list[Any], list[Any], Any], None]:
    """``draw(states, returns, path)``, which writes a GIF of an episode; `ConfigError` where the suite has none."""
    suite, _, short = name.rpartition("/")
    if name in _registered or not hasattr(_suite(suite or SUITES[0]), "drawing"):
        raise ConfigError(f"{name} cannot be drawn: its suite brings no pictures")
    return _suite(suite or SUITES[0]).drawing(short, **settings)
