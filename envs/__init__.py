"""Environments by name: ``make("CartPole-v1")`` or ``make("suite/name")``, `register` for your own, `list_envs`."""

import difflib
from collections.abc import Callable
from importlib import import_module
from typing import Any

if __name__ != "purejaxppo.envs":
    raise ImportError("this package is called purejaxppo.envs: write 'from purejaxppo import envs'")

from purejaxppo.types import ConfigError, Env

SUITES = ("gymnax",)  # modules here, each with make and list_envs; the first has the names without a suite
_registered: dict[str, Callable[..., Env]] = {}


def register(name: str, factory: Callable[..., Env]) -> None:
    """Let ``make(name, **settings)`` return ``factory(**settings)``; an earlier one of that name is replaced."""
    if not name or not callable(factory):
        raise ConfigError("register takes a name and a function that returns an Env")
    _registered[name] = factory


def list_envs(suite: str | None = None) -> list[str]:
    """The names that `make` knows: of one suite, or registered ones and every suite."""
    if suite is not None and suite not in SUITES:
        raise ConfigError(f"{suite!r} is not a suite; there is {', '.join(SUITES)}")
    if suite is not None:
        return _suite(suite).list_envs()
    names = [name if i == 0 else f"{suite}/{name}" for i, suite in enumerate(SUITES) for name in list_envs(suite)]
    return [*_registered, *names]


def make(name: str, **settings: Any) -> Env:
    """The environment ``name``, such as ``CartPole-v1`` or ``gymnax/CartPole-v1``, with the suite's own settings.

    Raises `ConfigError` for a name that does not exist, with the nearest that does.
    """
    if name in _registered:
        return _registered[name](**settings)
    suite, _, short = name.rpartition("/")
    suite = suite or SUITES[0]
    if suite not in SUITES:
        raise ConfigError(f"{name!r} is not an environment: there is no suite {suite!r}, only {', '.join(SUITES)}")
    known = _suite(suite).list_envs()
    if short not in known and short not in getattr(_suite(suite), "DOWNLOADS", ()):
        near = difflib.get_close_matches(short, [*known, *_registered], n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "; `purejaxppo envs` lists what can be trained"
        raise ConfigError(f"{name!r} is not an environment{hint}")
    return _suite(suite).make(short, **settings)


def _suite(name: str) -> Any:
    return import_module(f"purejaxppo.envs.{name}")


def drawing(name: str) -> Callable[[list[Any], list[Any], Any], None]:
    """``draw(states, returns, path)``, which writes a GIF of an episode; `ConfigError` where the suite has none."""
    suite, _, short = name.rpartition("/")
    if name in _registered or not hasattr(_suite(suite or SUITES[0]), "drawing"):
        raise ConfigError(f"{name} cannot be drawn: its suite brings no pictures")
    return _suite(suite or SUITES[0]).drawing(short)
