"""Learning curves: mean episode returns over windows of environment steps."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from purejaxppo.config import Config
from purejaxppo.metrics import finite_so_far
from purejaxppo.types import Metrics


class Curve(NamedTuple):
    """Mean return over windows of environment steps, one row per agent; NaN where no episode finished in a window."""

    timesteps: NDArray[np.floating]  # [windows] steps at the end of each
    returns: NDArray[np.floating]  # [agents, windows]


def windowed(metrics: Metrics, num_windows: int = 60, config: Config | None = None) -> Curve:
    """Episode returns in windows: Σ return · episodes / Σ episodes, so that every episode counts once.

    An iteration in which no episode ended has no return, and an agent has none from the iteration on at which its loss
    was no longer finite. Agents that count whole episodes do not take the same number of steps in an iteration; the
    windows are the same for all of them, and with ``config`` the same for all agents that it can have.
    """
    returns, episodes, finite, steps = (
        np.atleast_2d(np.asarray(x))
        for x in (
            metrics.episode_return,
            metrics.episodes,
            finite_so_far(metrics),
            metrics.timesteps,
        )
    )
    steps = steps.astype(np.int64)
    # No window is shorter than an iteration, so that each has one of every agent that got as far.
    agent = np.arange(len(steps))[:, None]
    if config is None:
        num_windows = max(
            1, min(num_windows, steps.max() // np.diff(steps, axis=1, prepend=0).max())
        )
        window, ends = (steps * num_windows - 1) // steps.max(), np.zeros(num_windows)
        np.maximum.at(ends, window, steps)
    else:
        length = config.batch_size * math.ceil(
            config.actual_timesteps / config.batch_size / num_windows
        )
        num_windows, window = math.ceil(config.actual_timesteps / length), (steps - 1) // length
        ends = np.minimum(np.arange(1, num_windows + 1) * length, config.actual_timesteps).astype(
            float
        )

    def in_windows(x: NDArray[Any]) -> NDArray[Any]:
        total = np.zeros((len(steps), num_windows))
        np.add.at(total, (agent, window), x)
        return total

    episodes = np.where(finite, episodes, 0)
    total, count = in_windows(np.where(episodes > 0, returns * episodes, 0)), in_windows(episodes)
    with np.errstate(invalid="ignore"):
        return Curve(ends, total / count)


def non_empty(curve: Curve) -> Curve:
    """The windows in which an episode of any agent finished."""
    finished = np.isfinite(curve.returns).any(axis=0)
    return Curve(curve.timesteps[finished], curve.returns[:, finished])
