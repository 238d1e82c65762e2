"""The files of a policy: saved, and loaded without running code from them."""

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


READABLE_VERSIONS = (1, 2, 3)  # 1 could not tell bfloat16; 1 and 2 normalised features


SPACES = {"discrete": Discrete, "multi_discrete": MultiDiscrete, "box": Box}


def save_policy(directory: str | os.PathLike, policy: Policy) -> Path:
    """Write the policy as ``policy.json`` (format version, config, spaces, checksum) and ``params.npz`` (plain arrays).

    The parameters may be any pytree of floating-point arrays. Types that NumPy does not have, such as
    bfloat16, are stored as float32, and ``policy.json`` names them. The directory must not exist; it
    appears whole or not at all.
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
    """The policy that `save_policy` wrote. A policy with a model of the caller's own needs that ``model`` again.

    Nothing in the files is run. Raises `ConfigError` for a directory that is no policy, is damaged, comes from a newer
    version or does not fit ``env``.
    """
    directory = Path(directory)
    description, arrays = _read(directory)
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
    params, moments = _in_place(directory, description, arrays, config, model, observation_space)
    return Policy(config, params, moments, model, observation_space, action_space)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The description and the arrays, checked to be ours, whole and of a version that is known."""
    not_ours = ConfigError(
        f"{directory} is not a policy of purejaxppo: it needs a policy.json and a params.npz of its own"
    )
    try:
        description = json.loads((directory / "policy.json").read_text())
        packed = (directory / "params.npz").read_bytes()
    except (OSError, ValueError, RecursionError):
        raise not_ours from None
    if not isinstance(description, dict) or description.get("format") != "purejaxppo policy":
        raise not_ours
    if description.get("format_version") not in READABLE_VERSIONS:
        raise ConfigError(
            f"{directory} has format version {description.get('format_version')}, and this version of purejaxppo reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}: load it with the version that wrote it"
        )
    missing = {
        "config",
        "observation_space",
        "action_space",
        "own_model",
        "params_sha256",
    } - description.keys()
    if missing:
        raise ConfigError(
            f"{directory / 'policy.json'} is damaged: it lacks {', '.join(sorted(missing))}"
        )
    if hashlib.sha256(packed).hexdigest() != description["params_sha256"]:
        raise ConfigError(
            f"{directory / 'params.npz'} is damaged: its checksum is not the one that was saved"
        )
    try:
        with np.load(io.BytesIO(packed), allow_pickle=False) as file:
            arrays = dict(file)
    except ValueError:  # pickled objects, which are never loaded
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


def _in_place(
    directory: Path,
    description: dict[str, Any],
    arrays: dict[str, np.ndarray],
    config: Config,
    model: Model,
    space: ObservationSpace,
) -> tuple[PyTree, ObsMoments | None]:
    """The arrays as the parameters and the observation moments, in the shapes that this model has."""

    def shape_of(part: Space) -> jax.ShapeDtypeStruct:
        dtype = jnp.result_type(float) if isinstance(part, Box) else jnp.int32
        return jax.ShapeDtypeStruct((1, *part.shape), dtype)

    obs = jax.tree.map(shape_of, parts_of(space))
    moments = init_obs_moments(space) if config.normalize_obs else None
    tree = _named_parts(jax.eval_shape(model.init, jax.random.key(0), obs), moments)
    expected = named_leaves(tree)
    arrays = {name: _as_format_1_meant(x, expected.get(name)) for name, x in arrays.items()}
    if description["format_version"] < 3:
        arrays = _with_moments_of_observations(directory, arrays, expected)
    shapes, expected_shapes = (
        {name: x.shape for name, x in named.items()} for named in (arrays, expected)
    )
    if shapes != expected_shapes or not all(
        jnp.issubdtype(x.dtype, np.floating) for x in arrays.values()
    ):
        raise ConfigError(
            f"the parameters in {directory} do not fit the model: other sizes or another network made them"
        )
    loaded = from_named({name: jnp.asarray(x) for name, x in arrays.items()}, tree)
    return loaded["params"], loaded["obs_moments"]


def _with_moments_of_observations(
    directory: Path, arrays: dict[str, np.ndarray], expected: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Formats 1 and 2 normalised features, which are the observations of a box as one vector."""
    fitting = {}
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
        fitting[name] = x
    return fitting


def _named_parts(params: PyTree, moments: ObsMoments | None) -> dict[str, PyTree]:
    """What ``params.npz`` holds: ``params/…`` and, where there are moments, ``obs_moments/…``."""
    return {"params": params, "obs_moments": moments}


def _as_format_1_meant(x: np.ndarray, expected: Any) -> np.ndarray:
    """Format 1 kept the bytes of bfloat16 and the like without the type's name, which the model knows."""
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
