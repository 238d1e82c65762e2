"""Learning curves: mean episode returns over windows of environment steps."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from purejaxppo.config import Config
from purejaxppo.metrics import finite_so_far
from purejaxppo.types import Metrics


class Curve(NamedTuple):
    """Mean return in windows of environment steps; NaN where no episode finished."""

    timesteps: NDArray[np.floating]  # [windows] steps at the end of each window
    returns: NDArray[np.floating]  # [agents, windows]


def windowed(metrics: Metrics, num_windows: int = 60, config: Config | None = None) -> Curve:
    """Mean episode returns in windows: Σ return · episodes / Σ episodes.

    Every episode has the same weight. An iteration in which no episode ended has no return. An
    agent has no return from the iteration in which its loss stopped being finite.

    All agents share the windows, although agents with whole episodes take different numbers of
    steps in an iteration. With ``config``, the windows depend on the configuration alone.
    """
    returns = np.atleast_2d(np.asarray(metrics.episode_return))
    episodes = np.atleast_2d(np.asarray(metrics.episodes))
    finite = np.atleast_2d(np.asarray(finite_so_far(metrics)))
    steps = np.atleast_2d(np.asarray(metrics.timesteps)).astype(np.int64)
    agent = np.arange(len(steps))[:, None]
    # No window is shorter than an iteration, so each contains one of every agent that got as far.
    if config is None:
        num_windows = max(
            1, min(num_windows, steps.max() // np.diff(steps, axis=1, prepend=0).max())
        )
        window = (steps * num_windows - 1) // steps.max()
        ends = np.zeros(num_windows)
        np.maximum.at(ends, window, steps)
    else:
        length = config.batch_size * math.ceil(
            config.actual_timesteps / config.batch_size / num_windows
        )
        num_windows = math.ceil(config.actual_timesteps / length)
        window = (steps - 1) // length
        ends = np.minimum(np.arange(1, num_windows + 1) * length, config.actual_timesteps).astype(
            float
        )

    def sum_in_windows(x: NDArray[Any]) -> NDArray[Any]:
        total = np.zeros((len(steps), num_windows))
        np.add.at(total, (agent, window), x)
        return total

    episodes = np.where(finite, episodes, 0)
    total = sum_in_windows(np.where(episodes > 0, returns * episodes, 0))
    count = sum_in_windows(episodes)
    with np.errstate(invalid="ignore"):
        return Curve(ends, total / count)


def non_empty(curve: Curve) -> Curve:
    """The windows in which at least one agent finished an episode."""
    finished = np.isfinite(curve.returns).any(axis=0)
    return Curve(curve.timesteps[finished], curve.returns[:, finished])
