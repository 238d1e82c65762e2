"""The message of an error, as a person reads it."""

import pytest

from purejaxppo import ConfigError


def sentence_of(make):
    """The message of the `ConfigError` that ``make()`` raises; it must be one line."""
    with pytest.raises(ConfigError) as error:
        make()
    message = str(error.value)
    assert message and "\n" not in message
    return message
