"""Save and load policies. Loading never executes code from the files."""

import contextlib
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.config import Config, validate
from purejaxppo.networks.actor_critic import make_model
from purejaxppo.normalize import ObsMoments, init_obs_moments
from purejaxppo.policies.arrays import read_arrays, write_arrays
from purejaxppo.policies.policy import Policy
from purejaxppo.trees import from_named, is_extended, named_leaves, require_trainable
from purejaxppo.types import (
    Box,
    ConfigError,
    Dict,
    Discrete,
    Env,
    Model,
    MultiDiscrete,
    ObservationSpace,
    PyTree,
    Space,
    parts_of,
)

FORMAT = "purejaxppo policy"
FORMAT_VERSION = 3
# Version 1 did not record extended dtypes such as bfloat16. Versions 1 and 2 normalised the vector
# of features, not the observations.
READABLE_VERSIONS = (1, 2, 3)
SPACES = {"discrete": Discrete, "multi_discrete": MultiDiscrete, "box": Box}


def save_policy(directory: str | os.PathLike, policy: Policy) -> Path:
    """Write the policy to a new directory and return its path.

    ``policy.json`` holds the config and the spaces; `write_arrays` describes the files. The
    parameters may be any pytree of floating-point arrays. Raises `ConfigError` if the directory
    exists or cannot be written.
    """
    require_trainable(policy.params)
    config = validate(policy.config)
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "observation_space": _space_to_json(policy.observation_space),
        "action_space": _space_to_json(policy.action_space),
        "own_model": policy.has_own_model,
    }
    tree = _named_parts(policy.params, policy.obs_moments)
    return write_arrays(directory, "policy", description, tree)


def load_policy(
    directory: str | os.PathLike, env: Env | None = None, model: Model | None = None
) -> Policy:
    """Load a policy that `save_policy` wrote; one with a custom model needs that ``model``.

    No code in the files is executed. Raises `ConfigError` if the directory is not a policy, is
    damaged, has an unknown format version or does not fit ``env``.
    """
    directory = Path(directory)
    description, arrays = read_arrays(
        directory,
        "policy",
        FORMAT,
        READABLE_VERSIONS,
        required=("config", "observation_space", "action_space", "own_model"),
    )
    config = Config.from_dict(description["config"])
    observation_space = _space_from_json(description["observation_space"])
    action_space = _space_from_json(description["action_space"])
    if env is not None and (env.observation_space, env.action_space) != (
        observation_space,
        action_space,
    ):
        raise ConfigError(f"the policy in {directory} was not trained for the spaces of {env.name}")
    if description["own_model"] and model is None:
        raise ConfigError(
            f"the policy in {directory} has a model of its own: load_policy(directory, model=...)"
        )

    if model is None:
        model = make_model(config, observation_space, action_space)
    params, moments = _restore(directory, description, arrays, config, model, observation_space)
    return Policy(
        config=config,
        params=params,
        obs_moments=moments,
        model=model,
        observation_space=observation_space,
        action_space=action_space,
    )


def _restore(
    directory: Path,
    description: dict[str, Any],
    arrays: dict[str, np.ndarray],
    config: Config,
    model: Model,
    space: ObservationSpace,
) -> tuple[PyTree, ObsMoments | None]:
    """The parameters and the observation moments, checked against the shapes of ``model``."""

    def shape_of(part: Space) -> jax.ShapeDtypeStruct:
        dtype = jnp.result_type(float) if isinstance(part, Box) else jnp.int32
        return jax.ShapeDtypeStruct((1, *part.shape), dtype)

    obs = jax.tree.map(shape_of, parts_of(space))
    moments = init_obs_moments(space) if config.normalize_obs else None
    tree = _named_parts(jax.eval_shape(model.init, jax.random.key(0), obs), moments)
    expected = named_leaves(tree)
    arrays = {name: _decode_format_1(x, expected.get(name)) for name, x in arrays.items()}
    if description["format_version"] < 3:
        arrays = _decode_feature_moments(directory, arrays, expected)
    shapes = {name: x.shape for name, x in arrays.items()}
    expected_shapes = {name: x.shape for name, x in expected.items()}
    all_floating = all(jnp.issubdtype(x.dtype, np.floating) for x in arrays.values())
    if shapes != expected_shapes or not all_floating:
        raise ConfigError(
            f"the parameters in {directory} do not fit the model: "
            "other sizes or another network made them"
        )
    loaded = from_named({name: jnp.asarray(x) for name, x in arrays.items()}, tree)
    return loaded["params"], loaded["obs_moments"]


def _decode_feature_moments(
    directory: Path, arrays: dict[str, np.ndarray], expected: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Moments of features, as formats 1 and 2 have them, as moments of observations.

    The features of a box are its elements in row-major order.
    """
    decoded = {}
    for name, x in arrays.items():
        if name.startswith("obs_moments/"):
            if name not in expected:
                raise ConfigError(
                    f"the policy in {directory} normalises the one-hot features of a finite space, "
                    "which versions of purejaxppo after format 2 do not: load it with the version "
                    "that wrote it"
                )
            if x.size == math.prod(expected[name].shape):
                x = x.reshape(expected[name].shape)
        decoded[name] = x
    return decoded


def _named_parts(params: PyTree, moments: ObsMoments | None) -> dict[str, PyTree]:
    """The content of ``params.npz``: ``params/…`` and, with normalisation, ``obs_moments/…``."""
    return {"params": params, "obs_moments": moments}


def _decode_format_1(x: np.ndarray, expected: Any) -> np.ndarray:
    """Format 1 stored extended dtypes as raw bytes without their name, which the model gives."""
    if x.dtype.kind != "V" or expected is None or not is_extended(expected.dtype):
        return x
    return x.view(expected.dtype) if x.dtype.itemsize == expected.dtype.itemsize else x


def _space_to_json(space: ObservationSpace) -> dict[str, Any]:
    if isinstance(space, Dict):
        parts = {name: _space_to_json(part) for name, part in space.spaces}
        return {"kind": "dict", "spaces": parts}
    name = next(name for name, kind in SPACES.items() if isinstance(space, kind))
    return {"kind": name} | dataclasses.asdict(space)


def _space_from_json(values: Any) -> Any:
    with contextlib.suppress(AttributeError, KeyError, TypeError, ConfigError):
        if values["kind"] == "dict":
            return Dict({name: _space_from_json(part) for name, part in values["spaces"].items()})
        space = SPACES[values["kind"]](**{name: x for name, x in values.items() if name != "kind"})
        if list(space.shape) == values.get("shape", list(space.shape)):
            return space
    raise ConfigError(f"{values!r} is not a space that this version knows")
