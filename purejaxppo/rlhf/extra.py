"""Imports of the packages that only RLHF on texts needs."""

from importlib import import_module
from typing import Any

from purejaxppo.types import ConfigError


def import_extra(name: str) -> Any:
    """The module ``name`` of a package in the extra ``rlhf``; `ConfigError` if it is missing."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this needs the package {error.name}: pip install 'purejaxppo[rlhf]'"
        ) from None
