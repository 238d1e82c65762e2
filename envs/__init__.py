"""Environments by name: ``make("CartPole-v1")`` or ``make("suite/name")``.

`register` adds an environment of your own, and `list_envs` lists the names.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

if __name__ != "purejaxppo.envs":
    raise ImportError("this package is called purejaxppo.envs: write 'from purejaxppo import envs'")

from purejaxppo.envs.suites import SUITES, Draw
from purejaxppo.types import ConfigError, Env, plain_settings

MOST_KEPT = 256  # size of the cache of `make`
_registered: dict[str, Callable[..., Env]] = {}
# The cache of `make`: (name, settings, precision) -> (factory, environment).
_made: dict[tuple[str, str, str], tuple[Callable[..., Env], Env]] = {}


def register(name: str, factory: Callable[..., Env]) -> None:
    """Let ``make(name, **settings)`` return ``factory(**settings)``.

    This replaces an earlier factory of the same name. The environment must depend on the settings
    only: configs and saved policies store nothing else, and equal settings call the factory once.
    """
    if not name or not callable(factory):
        raise ConfigError("register takes a name and a function that returns an Env")
    _registered[name] = factory
    for key in [key for key in _made if key[0] == name]:
        del _made[key]


def list_envs(suite: str | None = None) -> list[str]:
    """The names that `make` accepts: those of ``suite``, or all names, registered ones first."""
    if suite is not None and suite not in SUITES:
        raise ConfigError(f"{suite!r} is not a suite; there is {', '.join(SUITES)}")
    if suite is not None:
        return SUITES[suite].list_envs()
    names = [
        name if i == 0 else f"{suite}/{name}"
        for i, suite in enumerate(SUITES)
        for name in list_envs(suite)
    ]
    return [*_registered, *names]


def make(name: str, /, **settings: Any) -> Env:
    """The environment ``name``, such as ``CartPole-v1`` or ``gymnax/CartPole-v1``.

    ``settings`` are the suite's. The same name and settings return the same object, so that code
    compiled for an environment is reused. Raises `ConfigError` for an unknown name, with the
    closest known name, and for unknown settings.
    """
    return _make(name, settings)


def of_config(config: Any) -> Env:
    """The environment that a `Config` specifies by ``env`` and ``env_settings``."""
    if config.env_settings is None:
        raise ConfigError(
            f"the settings that {config.env} was made with were not recorded, because they were "
            "arrays or traced values: give the environment itself, or set env_settings"
        )
    return _make(config.env, dict(config.env_settings))


def _make(name: str, settings: Mapping[str, Any]) -> Env:
    name, factory, short_name = _resolve(name)
    build = partial(factory, short_name) if short_name else partial(_registered_env, name, factory)
    recorded = plain_settings(settings)
    if recorded is None:
        return build(**settings)._replace(name=name, settings=None)
    key = name, repr(recorded), str(jnp.result_type(float))
    if key in _made and _made[key][0] is factory:
        return _made[key][1]
    with jax.ensure_compile_time_eval():  # inside jit the constants would be traced
        env = build(**dict(recorded))._replace(name=name, settings=recorded)
    if len(_made) >= MOST_KEPT:
        del _made[next(iter(_made))]
    _made[key] = factory, env
    return env


def _resolve(name: str) -> tuple[str, Callable[..., Env], str]:
    """The name without the first suite, the function that makes it, and its name in the suite.

    A registered environment has the name "" in no suite.
    """
    if name in _registered:
        return name, _registered[name], ""
    suite, _, short_name = name.rpartition("/")
    suite = suite or next(iter(SUITES))
    advice = "one of your own must be registered by envs.register, or given as an Env"
    if suite not in SUITES:
        hint = f": there is no suite {suite!r}, only {', '.join(SUITES)}"
        raise ConfigError(f"{name!r} is not an environment{hint} ({advice})")
    known = SUITES[suite].list_envs()
    if short_name not in (*known, *SUITES[suite].refused):
        closest = difflib.get_close_matches(short_name, [*known, *_registered], n=1, cutoff=0.4)
        listed = "`purejaxppo envs` lists what can be trained"
        hint = f"; did you mean {closest[0]!r}?" if closest else f"; {listed}"
        raise ConfigError(f"{name!r} is not an environment{hint} ({advice})")
    is_first = suite == next(iter(SUITES))
    return short_name if is_first else f"{suite}/{short_name}", SUITES[suite].make, short_name


def _registered_env(name: str, factory: Callable[..., Env], /, **settings: Any) -> Env:
    """The environment of a registered factory, renamed to its registered name."""
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        known = ", ".join(inspect.signature(factory).parameters) or "none"
        message = f"{name!r} cannot be made with these settings: {error}; it has {known}"
        raise ConfigError(message) from None
    except ValueError:  # the factory has no signature
        pass
    env = factory(**settings)
    if not isinstance(env, Env):
        kind = type(env).__name__
        raise ConfigError(
            f"what was registered as {name!r} returned {kind}, and must return an Env"
        )
    return env._replace(name=name)


def drawing(name: str, /, **settings: Any) -> Draw:
    """A function ``draw(states, returns, path)`` that writes a GIF of an episode.

    ``returns`` are the sums of the rewards up to each state. Raises `ConfigError` if the suite
    cannot draw the environment.
    """
    suite, _, short_name = name.rpartition("/")
    draw = None if name in _registered else SUITES[suite or next(iter(SUITES))].draw
    if draw is None:
        raise ConfigError(f"{name} cannot be drawn: its suite brings no pictures")
    return draw(short_name, **settings)
