"""Conversion of PureJaxRL's configuration dictionaries, which have upper-case keys."""

from collections.abc import Collection, Mapping
from typing import Any

from purejaxppo.types import ConfigError
from purejaxppo.validation import nearest

OTHER_NAMES = {"ENV_NAME": "env", "UPDATE_EPOCHS": "num_epochs"}
# PureJaxRL's make_train writes these derived values into the caller's dict; they are ignored.
DERIVED = ("NUM_UPDATES", "MINIBATCH_SIZE")


def from_purejaxrl(values: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """The mapping with the field names of `Config`, which are passed as ``fields``.

    ``NORMALIZE_ENV`` normalises both observations and rewards, as in PureJaxRL's continuous-action
    script. Raises `ConfigError` for an unknown key, or for two keys that name the same field.
    """
    known = OTHER_NAMES | {name.upper(): name for name in fields}
    converted: dict[str, Any] = {}
    for key, value in values.items():
        if key in DERIVED:
            continue
        names = (
            ("normalize_obs", "normalize_reward")
            if key == "NORMALIZE_ENV"
            else (known.get(key, key),)
        )
        if names[0] not in fields:
            keys = [*known, "NORMALIZE_ENV"]
            raise ConfigError(
                f"{key!r} is not a setting{nearest(key, keys) or '; known: ' + ', '.join(keys)}"
            )
        if repeated := [name for name in names if name in converted]:
            raise ConfigError(
                f"{repeated[0]!r} is given twice, once as {key!r}: leave one of them out"
            )
        converted |= dict.fromkeys(names, value)
    return converted
