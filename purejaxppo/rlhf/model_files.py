"""Files of language models and reward models: ``model.json`` and ``params.npz`` in a directory."""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from purejaxppo.policies.arrays import read_arrays, write_arrays
from purejaxppo.rlhf.language_model import CRITICS, language_model
from purejaxppo.rlhf.reward_network import reward_model
from purejaxppo.rlhf.transformer import DecoderSizes
from purejaxppo.trees import from_named, named_leaves
from purejaxppo.types import ConfigError, PyTree
from purejaxppo.validation import one_of

FORMAT = "purejaxppo language model"
FORMAT_VERSION = 1
REWARD = "reward"  # the kind of a reward model; those of language models are their critics


class StoredModel(NamedTuple):
    """A language model with a critic of ``kind``, or a reward model."""

    kind: str
    sizes: DecoderSizes
    params: PyTree


def save_model(directory: str | os.PathLike, model: StoredModel) -> Path:
    """Write a new directory, atomically. Raises `ConfigError` if it exists."""
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": model.kind,
        "sizes": dataclasses.asdict(model.sizes),
    }
    return write_arrays(directory, "model", description, model.params)


def load_model(directory: str | os.PathLike) -> StoredModel:
    """Read what `save_model` wrote. Raises `ConfigError` if it is missing, damaged or unknown."""
    description, arrays = read_arrays(
        directory, "model", FORMAT, (FORMAT_VERSION,), required=("kind", "sizes")
    )
    try:
        kind = description["kind"]
        sizes = DecoderSizes(**description["sizes"])
        expected = jax.eval_shape(lambda: _initial_params(kind, sizes))
    except (TypeError, ConfigError):
        raise ConfigError(f"{directory} has a model of a kind or sizes that are unknown") from None
    shapes = {name: x.shape for name, x in named_leaves(expected).items()}
    if {name: x.shape for name, x in arrays.items()} != shapes:
        raise ConfigError(f"the parameters in {directory} do not have the sizes in its model.json")
    named = {name: jnp.asarray(x) for name, x in arrays.items()}
    return StoredModel(kind, sizes, from_named(named, expected))


def _initial_params(kind: str, sizes: DecoderSizes) -> Any:
    key = jax.random.key(0)
    if one_of("kind", kind, (REWARD, *CRITICS)) == REWARD:
        return reward_model(sizes).init(key)
    return language_model(sizes, kind).init(key, jnp.zeros(1, jnp.int32))
