"""Pictures of training: what the command line writes and a notebook shows."""

from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from purejaxppo.metrics import finite_so_far
from purejaxppo.statistics import Estimate, estimate
from purejaxppo.types import Metrics

BLUE = "#1f6fb4"


class Curve(NamedTuple):
    """Mean return over windows of iterations, one row per agent; NaN where no episode finished in a window."""

    timesteps: NDArray[np.floating]  # [windows] steps at the end of each
    returns: NDArray[np.floating]  # [agents, windows]


def windowed(metrics: Metrics, num_windows: int = 60) -> Curve:
    """Episode returns in windows: Σ return · episodes / Σ episodes, so that every episode counts once.

    An iteration in which no episode ended has no return, and an agent has none from the iteration on at which its loss
    was no longer finite.
    """
    returns, episodes, finite = (
        np.atleast_2d(np.asarray(x)) for x in (metrics.episode_return, metrics.episodes, finite_so_far(metrics))
    )
    steps = np.atleast_2d(np.asarray(metrics.timesteps))[0]
    episodes = np.where(finite, episodes, 0)
    starts = np.unique(np.linspace(0, len(steps), num_windows, endpoint=False).astype(int))
    total = np.add.reduceat(np.where(episodes > 0, returns * episodes, 0), starts, axis=1)
    count = np.add.reduceat(episodes, starts, axis=1)
    with np.errstate(invalid="ignore"):
        return Curve(steps[np.append(starts[1:], len(steps)) - 1].astype(float), total / count)


def learning_curve(metrics: Metrics, title: str = "", num_windows: int = 60) -> Figure:
    """Return against environment steps; of several agents the interquartile mean and its 95 % interval.

    ``metrics`` are those of a `Result` or a `Run`, with or without a leading axis of agents.
    """
    curve = windowed(metrics, num_windows)
    agents = len(curve.returns)
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    seen = np.isfinite(curve.returns).any(axis=0)
    steps, returns = curve.timesteps[seen], curve.returns[:, seen]
    if agents > 1 and returns.size:
        axes.plot(steps, returns.T, color=BLUE, alpha=min(0.25, 4 / agents), linewidth=0.6)
        windows = [estimate(window[np.isfinite(window)]) for window in returns.T]  # over the agents that have a return
        middle = Estimate(*np.transpose(windows))
        label = f"interquartile mean of {agents} seeds, 95 % interval"
        axes.fill_between(steps, middle.low, middle.high, color=BLUE, alpha=0.25, linewidth=0)
        axes.plot(steps, middle.point, color=BLUE, linewidth=1.8, label=label)
    else:
        axes.plot(steps, returns[0], color=BLUE, linewidth=1.8, label="one seed, mean over finished episodes")
    axes.set(xlabel="environment steps", ylabel="episode return", title=title)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, loc="best", fontsize="small")
    axes.margins(x=0.02)
    return figure
