"""Small changes to an environment: each takes an `Env` and returns one."""

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

_told: set[str] = set()  # warnings, each of which is given once
UNBOUNDED = 1e30  # gymnax writes the largest float32 where there is no bound


def bound_actions(env: Env, squash: bool = False) -> Env:
    """Continuous actions of any size, as one vector, brought into the action space by `into_box`.

    An environment whose actions are not continuous is unchanged.
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
    """Warn where a new policy, whose actions are about −2 … 2, hardly meets the box that they are clipped to.

    In a box [100, 200] every action is 100 and no gradient says that 150 would be better; in [0, 1000] the policy
    never gets far from 0; in [0, 0.01] it sees the two ends only. What the two ranges have in common must be a tenth of
    the box and a fiftieth of the policy's range.
    """
    space = env.action_space
    if squash or not isinstance(space, Box):
        return
    lows, highs = (limit.ravel() for limit in space.limits)
    common = np.minimum(highs, 2.0) - np.maximum(lows, -2.0)
    is_bounded = (np.abs(lows) < UNBOUNDED) & (np.abs(highs) < UNBOUNDED)
    needed = np.where(is_bounded, np.maximum((highs - lows) / 10, 4.0 / 50), 4.0 / 50)
    is_far = (common < needed) & (lows < highs)
    if is_far.any():
        low, high = lows[is_far][0], highs[is_far][0]
        all_bounded = all(np.all(np.abs(limit) < UNBOUNDED) for limit in space.limits)
        remedy = (
            "set squash_actions=True, which scales them to the bounds"
            if all_bounded
            else "rescale them"
        )
        told = (
            f"{env.name} takes actions between {low:g} and {high:g}, and those of a new policy, which are about -2 to "
            f"2, are clipped to that: {remedy}"
        )
        if told not in _told:  # a run makes its trainer several times
            _told.add(told)
            warnings.warn(told, stacklevel=4)


def into_box(action: Float[Array, "*batch size"], space: Box, squash: bool) -> Array:
    """The action that the environment gets: clipped to the box, or low + (high − low) (1 + tanh(action)) / 2.

    ``action`` is the vector that a policy has, with any leading axes; the result is [*batch, *space.shape]. The
    log-probability belongs to ``action``, before this.
    """
    action = action.reshape(action.shape[:-1] + space.shape)
    # In bfloat16 the bounds themselves would be rounded.
    action = action.astype(jnp.promote_types(action.dtype, jnp.float32))
    low, high = (
        jnp.broadcast_to(jnp.asarray(limit, action.dtype), action.shape) for limit in space.limits
    )
    if squash:
        return low + (high - low) * (jnp.tanh(action) + 1) / 2
    return jnp.clip(action, low, high)
