"""The contract of `Env`: its functions agree with its spaces and with each other."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.types import (
    ACTION_MASK,
    Box,
    ConfigError,
    Dict,
    Env,
    PyTree,
    Space,
    Step,
    action_mask_shape,
    parts_of,
)


def require_consistent(env: Env) -> None:
    """Raise `ConfigError` if reset or step contradicts the spaces or the other function.

    ``reset`` returns ``(state, obs)`` and ``step`` returns a `Step`. An observation is one array
    with the shape of its space, or a dict of such arrays; in a finite space it holds integers. The
    reward is a real scalar; ``terminated``, ``truncated`` and ``mask`` are bool scalars. The states
    of reset and step have the same structure and shapes. Their dtypes may differ, because
    `vectorize` casts a fresh start to the dtypes of a step, but the next step must return these
    dtypes again. Nothing is executed.
    """
    for name, allowed in (("observation_space", Space | Dict), ("action_space", Space)):
        space = getattr(env, name)
        if not isinstance(space, allowed):
            words = f"a {type(space).__name__}: it must be a Discrete, a MultiDiscrete or a Box"
            words += ", or a Dict of these" if name == "observation_space" else ""
            raise ConfigError(f"the {name} of {env.name} is {words}")
    _require_mask(env)
    key = jax.eval_shape(lambda: jax.random.key(0))

    start = jax.eval_shape(env.reset, key)
    if not isinstance(start, tuple | list) or len(start) != 2:
        found = type(start).__name__
        raise ConfigError(f"reset of {env.name} returns a {found}: it must return (state, obs)")
    state, obs = start
    _require_observation(env, "reset", obs)
    step = _step(env, key, state)
    _require_observation(env, "step", step.obs)
    _require_type(env, step.obs)
    _require_scalars(env, step)
    _require_agreement(env, "reset", {"state": state}, "step", {"state": step.state}, _are_castable)

    # `vectorize` casts a fresh start to these dtypes, so the next step must return them again.
    cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), step.state)
    following = _step(env, key, cast)
    before = {"state": step.state, "obs": step.obs}
    after = {"state": following.state, "obs": following.obs}
    _require_agreement(env, "one step", before, "the next", after, operator.eq)


def _step(env: Env, key: Any, state: PyTree) -> Step:
    """The shapes and dtypes of a step."""
    dtype = jnp.result_type(float) if isinstance(env.action_space, Box) else jnp.int32
    action = jax.ShapeDtypeStruct(env.action_space.shape, dtype)
    step = jax.eval_shape(env.step, key, state, action)
    if not isinstance(step, Step):
        found = type(step).__name__
        raise ConfigError(f"step of {env.name} returns a {found}: it must return a Step")
    return step


def _require_mask(env: Env) -> None:
    """The ``action_mask`` has one element for each action."""
    if not isinstance(env.observation_space, Dict):
        return
    space = dict(env.observation_space.spaces).get(ACTION_MASK)
    if space is None:
        return
    shape = action_mask_shape(env.action_space)
    if space.shape != shape:
        words = "which have no mask" if shape is None else f"which need the shape {shape}"
        raise ConfigError(
            f"the action_mask of {env.name} has the shape {space.shape}, and its actions are "
            f"{env.action_space}, {words}"
        )


@functools.lru_cache(maxsize=256)
def require_allowed_actions(env: Env) -> None:
    """Raise `ConfigError` where the ``action_mask`` of a fresh start allows no action.

    Sixteen starts are drawn. A mask that allows nothing later in an episode is not found: all
    actions are then equally probable.
    """
    if not isinstance(env.observation_space, Dict):
        return
    if ACTION_MASK not in dict(env.observation_space.spaces):
        return
    with jax.ensure_compile_time_eval():
        keys = jax.random.split(jax.random.key(0), 16)
        mask = np.asarray(jax.vmap(env.reset)(keys)[1][ACTION_MASK]).astype(bool)
    sizes = getattr(env.action_space, "sizes", mask.shape[1:])
    parts = np.split(mask, np.cumsum(sizes)[:-1], axis=1)
    if not all(part.any(axis=1).all() for part in parts):
        raise ConfigError(
            f"the action_mask of {env.name} allows no action at the start of an episode"
        )


def _require_observation(env: Env, name: str, obs: Any) -> None:
    """Arrays of real numbers, in the structure and with the shapes of their space."""
    space = env.observation_space
    if not isinstance(space, Dict):
        _require_part(env, name, "obs", space, obs)
        return
    names = [part for part, _ in space.spaces]
    if not isinstance(obs, dict) or sorted(obs) != names:
        is_dict = isinstance(obs, dict)
        found = f"a dict of {', '.join(map(str, obs))}" if is_dict else type(obs).__name__
        raise ConfigError(
            f"{name} of {env.name} returns {found} as obs: it must be a dict of {', '.join(names)}"
        )
    for part, part_space in space.spaces:
        _require_part(env, name, f"obs[{part!r}]", part_space, obs[part])


def _require_part(env: Env, name: str, part: str, space: Space, obs: Any) -> None:
    """One array with the shape of its space."""
    if not jax.tree_util.all_leaves([obs]):
        found = type(obs).__name__
        raise ConfigError(f"{name} of {env.name} returns a {found} as {part}: it must be one array")
    if obs.shape != space.shape:
        raise ConfigError(
            f"{name} of {env.name} returns an {part} of the shape {obs.shape}: "
            f"it must have that of its observation_space, {space.shape}"
        )


def _require_type(env: Env, obs: Any) -> None:
    """Integers in a finite space, real numbers or bools in a Box."""
    parts = parts_of(env.observation_space)
    for path, space in jax.tree_util.tree_leaves_with_path(parts):
        name = f"obs{jax.tree_util.keystr(path)}"
        x = obs[path[0].key] if path else obs
        is_box = isinstance(space, Box)
        kinds = (np.integer, np.floating, np.bool_) if is_box else (np.integer,)
        if not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
            allowed = "real numbers" if is_box else "integers"
            raise ConfigError(
                f"{name} of {env.name} has the type {x.dtype}: in the observation_space "
                f"{type(space).__name__} it must hold {allowed}"
            )


def _require_scalars(env: Env, step: Step) -> None:
    """The reward is one real number; terminated, truncated and mask are one bool each."""
    for name in ("reward", "terminated", "truncated", "mask"):
        x = getattr(step, name)
        if not jax.tree_util.all_leaves([x]):
            found = type(x).__name__
            raise ConfigError(
                f"step of {env.name} returns a {found} as {name}: it must be one number"
            )
        kinds = (np.integer, np.floating, np.bool_) if name == "reward" else (np.bool_,)
        if x.shape or not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
            words = "one real number" if name == "reward" else "one bool"
            raise ConfigError(
                f"step of {env.name} returns a {name} of the shape {x.shape} "
                f"and type {x.dtype}: it must be {words}"
            )


def _require_agreement(
    env: Env,
    name: str,
    tree: PyTree,
    other_name: str,
    other: PyTree,
    are_compatible: Callable[[Any, Any], bool],
) -> None:
    """The same structure and shapes, and compatible dtypes."""
    leaves = _by_path(tree)
    other_leaves = _by_path(other)
    rule = f"{name} and {other_name} of {env.name} must return the same structure, shapes and types"
    if unmatched := sorted(leaves.keys() ^ other_leaves.keys()):
        source = name if unmatched[0] in leaves else other_name
        raise ConfigError(f"{rule}: {unmatched[0]} comes from {source} only")
    for path, x in leaves.items():
        y = other_leaves[path]
        if x.shape != y.shape or not are_compatible(x.dtype, y.dtype):
            kinds = f"{x.dtype} of the shape {x.shape} and {y.dtype} of the shape {y.shape}"
            raise ConfigError(f"{rule}: {path} is {kinds}")
    if jax.tree.structure(tree) != jax.tree.structure(other):  # type: ignore[operator]
        words = "their states are made of different containers, such as a list and a tuple"
        raise ConfigError(f"{rule}: {words}")


def _by_path(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _are_castable(start: Any, step: Any) -> bool:
    """Numbers can be cast to one another; a random key cannot be cast."""
    is_key = [jnp.issubdtype(dtype, jax.dtypes.prng_key) for dtype in (start, step)]
    return start == step or not any(is_key)
