"""PureJaxRL's configuration dictionaries, whose keys are upper-case, in our names."""

from collections.abc import Collection, Mapping
from typing import Any

from purejaxppo.types import ConfigError
from purejaxppo.validation import nearest

OTHER_NAMES = {"ENV_NAME": "env", "UPDATE_EPOCHS": "num_epochs"}
DERIVED = ("NUM_UPDATES", "MINIBATCH_SIZE")  # its make_train writes these into the caller's dict


def from_purejaxrl(values: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """The mapping in our names; ``NORMALIZE_ENV`` is observations and rewards both, as in its continuous script.

    ``fields`` are those of `Config`. Raises `ConfigError` for an unknown key, or for two that mean the same field.
    """
    known = OTHER_NAMES | {name.upper(): name for name in fields}
    ours: dict[str, Any] = {}
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
        if repeated := [name for name in names if name in ours]:
            raise ConfigError(
                f"{repeated[0]!r} is given twice, once as {key!r}: leave one of them out"
            )
        ours |= dict.fromkeys(names, value)
    return ours
