"""Wrappers: each takes an `Env` and returns an `Env`."""

import warnings

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from purejaxppo.types import (
    Box,
    ConfigError,
    Env,
    PRNGKey,
    PyTree,
    Step,
)

_told: set[str] = set()  # the warnings issued so far; each is issued once
UNBOUNDED = 1e30  # gymnax uses the largest float32 for a missing bound


def bound_actions(env: Env, squash: bool = False) -> Env:
    """Accept any real vector as the action and map it into the action space by `into_box`.

    An environment without continuous actions is returned unchanged. Raises `ConfigError` for
    ``squash`` if the action space is unbounded.
    """
    space = env.action_space
    if not isinstance(space, Box):
        return env
    if squash and not all(np.all(np.abs(limit) < UNBOUNDED) for limit in space.limits):
        raise ConfigError(
            f"squash_actions needs bounded actions, and those of {env.name} are not; leave it off"
        )

    def step(key: PRNGKey, state: PyTree, action: Array) -> Step:
        return env.step(key, state, into_box(action, space, squash))

    return env._replace(step=step, action_space=Box((int(np.prod(space.shape)),), -np.inf, np.inf))


def warn_of_unreachable_actions(env: Env, squash: bool) -> None:
    """Warn if the actions of a new policy, about −2 … 2, hardly overlap the action space.

    Actions are clipped to the space. In [100, 200] every action becomes 100 and no gradient points
    to 150; in [0, 1000] the policy stays near 0; in [0, 0.01] it reaches the two ends only. In each
    dimension the overlap must be a tenth of the interval and a fiftieth of the policy's range.
    Without bounds the second condition applies alone.
    """
    space = env.action_space
    if squash or not isinstance(space, Box):
        return
    lows, highs = (limit.ravel() for limit in space.limits)
    overlap = np.minimum(highs, 2.0) - np.maximum(lows, -2.0)
    is_bounded = (np.abs(lows) < UNBOUNDED) & (np.abs(highs) < UNBOUNDED)
    needed = np.where(is_bounded, np.maximum((highs - lows) / 10, 4.0 / 50), 4.0 / 50)
    is_far = (overlap < needed) & (lows < highs)
    if is_far.any():
        low = lows[is_far][0]
        high = highs[is_far][0]
        all_bounded = all(np.all(np.abs(limit) < UNBOUNDED) for limit in space.limits)
        remedy = "rescale them"
        if all_bounded:
            remedy = "set squash_actions=True, which scales them to the bounds"
        message = (
            f"{env.name} takes actions between {low:g} and {high:g}, and those of a new policy, "
            f"which are about -2 to 2, are clipped to that: {remedy}"
        )
        if message not in _told:  # a run makes its trainer several times
            _told.add(message)
            warnings.warn(message, stacklevel=4)


def into_box(action: Float[Array, "*batch size"], space: Box, squash: bool) -> Array:
    """Clip ``action`` to the box; with ``squash``, low + (high − low) (1 + tanh(action)) / 2.

    ``action`` is the policy's sample [*batch, size]; the result is [*batch, *space.shape]. The
    log-probability is that of ``action``, before this mapping.
    """
    action = action.reshape(action.shape[:-1] + space.shape)
    # bfloat16 would round the bounds.
    action = action.astype(jnp.promote_types(action.dtype, jnp.float32))
    low, high = (
        jnp.broadcast_to(jnp.asarray(limit, action.dtype), action.shape) for limit in space.limits
    )
    if squash:
        return low + (high - low) * (jnp.tanh(action) + 1) / 2
    return jnp.clip(action, low, high)
