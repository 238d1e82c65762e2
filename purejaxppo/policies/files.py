"""Save and load policies. Loading never executes code from the files."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.config import Config, validate
from purejaxppo.networks.actor_critic import make_model
from purejaxppo.normalize import ObsMoments, init_obs_moments
from purejaxppo.policies.policy import Policy
from purejaxppo.trees import as_stored, from_named, is_extended, named_leaves, require_trainable
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

FORMAT_VERSION = 3
# Version 1 did not record extended dtypes such as bfloat16. Versions 1 and 2 normalised the vector
# of features, not the observations.
READABLE_VERSIONS = (1, 2, 3)
SPACES = {"discrete": Discrete, "multi_discrete": MultiDiscrete, "box": Box}


def save_policy(directory: str | os.PathLike, policy: Policy) -> Path:
    """Write the policy to a new directory and return its path.

    ``policy.json`` holds the format version, the config, the spaces and a checksum; ``params.npz``
    holds plain arrays. The parameters may be any pytree of floating-point arrays. Dtypes that NumPy
    lacks, such as bfloat16, are stored as float32, and ``policy.json`` records them. The write is
    atomic. Raises `ConfigError` if the directory exists or cannot be written.
    """
    directory = Path(directory)
    if directory.exists():
        raise ConfigError(f"{directory} exists already; choose another directory for the policy")
    require_trainable(policy.params)
    config = validate(policy.config)
    leaves = named_leaves(_named_parts(policy.params, policy.obs_moments))
    arrays = {name: np.asarray(x) for name, x in leaves.items()}
    stored = {name: as_stored(x) for name, x in arrays.items()}
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise ConfigError(f"cannot write to {directory.parent}: {error.strerror}") from None
    try:
        np.savez(temporary / "params.npz", **stored)  # type: ignore[arg-type]
        description = {
            "format": "purejaxppo policy",
            "format_version": FORMAT_VERSION,
            "config": config.to_dict(),
            "observation_space": _space_to_json(policy.observation_space),
            "action_space": _space_to_json(policy.action_space),
            "own_model": policy.has_own_model,
            "dtypes": {name: str(x.dtype) for name, x in arrays.items() if is_extended(x.dtype)},
            "params_sha256": hashlib.sha256((temporary / "params.npz").read_bytes()).hexdigest(),
        }
        (temporary / "policy.json").write_text(json.dumps(description, indent=2) + "\n")
        temporary.chmod(0o755)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return directory


def load_policy(
    directory: str | os.PathLike, env: Env | None = None, model: Model | None = None
) -> Policy:
    """Load a policy that `save_policy` wrote; one with a custom model needs that ``model``.

    No code in the files is executed. Raises `ConfigError` if the directory is not a policy, is
    damaged, has an unknown format version or does not fit ``env``.
    """
    directory = Path(directory)
    description, arrays = _read_files(directory)
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


def _read_files(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The description and the arrays, with format, version, checksum and dtypes verified."""
    not_ours = ConfigError(
        f"{directory} is not a policy of purejaxppo: "
        "it needs a policy.json and a params.npz of its own"
    )
    try:
        description = json.loads((directory / "policy.json").read_text())
        npz_bytes = (directory / "params.npz").read_bytes()
    except (OSError, ValueError, RecursionError):
        raise not_ours from None
    if not isinstance(description, dict) or description.get("format") != "purejaxppo policy":
        raise not_ours
    if description.get("format_version") not in READABLE_VERSIONS:
        raise ConfigError(
            f"{directory} has format version {description.get('format_version')}, and this version "
            f"of purejaxppo reads {' and '.join(map(str, READABLE_VERSIONS))}: load it with the "
            "version that wrote it"
        )
    required = {"config", "observation_space", "action_space", "own_model", "params_sha256"}
    missing = required - description.keys()
    if missing:
        raise ConfigError(
            f"{directory / 'policy.json'} is damaged: it lacks {', '.join(sorted(missing))}"
        )
    if hashlib.sha256(npz_bytes).hexdigest() != description["params_sha256"]:
        raise ConfigError(
            f"{directory / 'params.npz'} is damaged: its checksum is not the one that was saved"
        )
    try:
        with np.load(io.BytesIO(npz_bytes), allow_pickle=False) as file:
            arrays = dict(file)
    except ValueError:  # pickled objects are never loaded
        raise ConfigError(
            f"{directory / 'params.npz'} is damaged: it holds something else than numbers"
        ) from None
    try:
        dtypes = {name: jnp.dtype(dtype) for name, dtype in description.get("dtypes", {}).items()}
        extended = {name: arrays[name].astype(dtype) for name, dtype in dtypes.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        path = directory / "policy.json"
        raise ConfigError(f"{path} is damaged: its dtypes are not those of the arrays") from None
    return description, arrays | extended


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
