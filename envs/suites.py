"""The table of suites: where their environments come from, and what to install for them."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

from purejaxppo.types import ConfigError, Env

Draw = Callable[[list[Any], list[Any], Any], None]  # (states, returns, path): writes a GIF


class Suite(NamedTuple):
    """A collection of environments, none of which is imported before it is asked for."""

    make: Callable[..., Env]  # (name, **settings) -> Env
    list_envs: Callable[[], list[str]]
    draw: Callable[..., Draw] | None  # (name, **settings) -> Draw; None without pictures
    extra: str | None  # of this package, to install; None where nothing has to be installed
    refused: tuple[str, ...] = ()  # names that are not listed, of which `make` says why


def suite_of(
    module: str, *, draws: bool, extra: str | None = None, refused: tuple[str, ...] = ()
) -> Suite:
    """The suite of a module that has ``make``, ``list_envs`` and, if it draws, ``drawing``.

    The module is imported by the first call. Raises `ConfigError` in a call if a package is missing
    that ``extra`` installs.
    """
    call = partial(_call, module, extra)
    return Suite(
        make=partial(call, "make"),
        list_envs=partial(call, "list_envs"),
        draw=partial(call, "drawing") if draws else None,
        extra=extra,
        refused=refused,
    )


def _call(module: str, extra: str | None, function: str, *arguments: Any, **settings: Any) -> Any:
    try:
        return getattr(import_module(module), function)(*arguments, **settings)
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        suite = module.rpartition(".")[2]
        raise ConfigError(
            f"the suite {suite} needs the package {error.name}: pip install 'purejaxppo[{extra}]'"
        ) from None


# Names without a suite belong to the first.
SUITES: dict[str, Suite] = {
    "gymnax": suite_of("purejaxppo.envs.gymnax", draws=True, refused=("MNISTBandit-bsuite",)),
}
