"""Figures of training, for the command line and notebooks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from purejaxppo.analysis.curves import Curve, non_empty, windowed
from purejaxppo.analysis.statistics import Estimate, estimate
from purejaxppo.metrics import MetricsDescription
from purejaxppo.types import Metrics

BLUE = "#1f6fb4"
COLOURS = (  # after Okabe and Ito
    BLUE,
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7a5c3e",
    "#555555",
)


def learning_curve(metrics: Metrics, title: str = "", num_windows: int = 60) -> Figure:
    """Return against environment steps.

    Several agents are summarised by the interquartile mean and its 95 % interval. ``metrics`` come
    from a `Result` or a `Run`, with or without a leading axis of agents.
    """
    curve = windowed(metrics, num_windows)
    agents = len(curve.returns)
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    curve = non_empty(curve)
    if agents > 1 and curve.returns.size:
        axes.plot(
            curve.timesteps, curve.returns.T, color=BLUE, alpha=min(0.25, 4 / agents), linewidth=0.6
        )
        plot_interquartile_mean(
            axes, curve, BLUE, f"interquartile mean of {agents} seeds, 95 % interval"
        )
    else:
        label = "one seed, mean over finished episodes"
        axes.plot(curve.timesteps, curve.returns[0], color=BLUE, linewidth=1.8, label=label)
    style_curve_axes(axes, title)
    axes.legend(frameon=False, loc="best", fontsize="small")
    return figure


def metric_curve(described: MetricsDescription, metrics: Any, title: str = "") -> Figure:
    """The plotted metric of a trainer against its progress, with a line for each member.

    ``metrics`` are NumPy arrays [members, iterations].
    """
    columns = described.columns(metrics)
    members = len(columns[described.plotted])
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    alpha = max(0.25, 1 / members)
    for x, y in zip(columns[described.progress], columns[described.plotted], strict=True):
        axes.plot(x, y, color=BLUE, alpha=alpha, linewidth=1.2)
    style_axes(axes, described.progress, described.plotted, title)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def comparison_figure(curves: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """A row for each environment: the returns of the algorithms, and the spread of their seeds.

    The left panel shows the interquartile mean over the seeds with its 95 % interval, the right one
    the interquartile range of the seeds. ``curves[environment][algorithm]`` holds the seeds of one
    algorithm.
    """
    figure = Figure(figsize=(9.6, 3.6 * len(curves)), dpi=150, layout="constrained")
    names = list(dict.fromkeys(name for row in curves.values() for name in row))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    grid = figure.subplots(len(curves), 2, squeeze=False)
    for (env, row), (left, right) in zip(curves.items(), grid, strict=True):
        for name, curve in row.items():
            curve = non_empty(curve)
            if curve.returns.size:
                plot_interquartile_mean(left, curve, colours[name], name)
                low, high = np.nanpercentile(curve.returns, [25, 75], axis=0)
                right.plot(curve.timesteps, high - low, color=colours[name], linewidth=1.4)
        style_curve_axes(left, f"{env}: interquartile mean, 95 % interval")
        style_curve_axes(right, f"{env}: spread between seeds", "distance of the quartiles")
        left.legend(frameon=False, loc="best", fontsize="small")
    return figure


def plot_interquartile_mean(
    axes: Axes, curve: Curve, colour: str, label: str, alpha: float = 0.25
) -> None:
    """Draw the interquartile mean, with its interval, over the agents with a return in a window."""
    windows = [estimate(window[np.isfinite(window)]) for window in curve.returns.T]
    plot_estimate(axes, curve.timesteps, Estimate(*np.transpose(windows)), colour, label, alpha)


def plot_estimate(
    axes: Axes, x: NDArray[np.floating], y: Estimate, colour: str, label: str, alpha: float = 0.25
) -> None:
    """Draw a line with a band of its intervals."""
    axes.fill_between(x, y.low, y.high, color=colour, alpha=alpha, linewidth=0)
    axes.plot(x, y.point, color=colour, linewidth=1.8, label=label)


def style_curve_axes(axes: Axes, title: str, ylabel: str = "episode return") -> None:
    """Apply the common style of axes over environment steps."""
    style_axes(axes, "environment steps", ylabel, title)
    axes.xaxis.set_major_locator(MaxNLocator(5))  # more labels would overlap
    axes.xaxis.set_major_formatter("{x:,.0f}")


def style_axes(axes: Axes, xlabel: str, ylabel: str, title: str) -> None:
    """Apply the common style of all axes."""
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.margins(x=0.02)
