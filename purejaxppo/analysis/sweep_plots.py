"""Figures of a sweep from its tidy tables: hyper-parameters against scores, and learning curves.

``scores`` has a row for each run, with a column for each swept field, ``seed`` and ``score`` (NaN
for a run that diverged). ``curves`` has the same fields, ``seed``, ``timesteps`` and
``episode_return``. Interquartile means exclude runs that diverged, and the figures mark them. In a
ranking of settings such a run is worse than any other.
"""

from collections.abc import Sequence, Sized
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from purejaxppo.analysis.curves import Curve, non_empty
from purejaxppo.analysis.plots import (
    COLOURS,
    plot_estimate,
    plot_interquartile_mean,
    style_axes,
    style_curve_axes,
)
from purejaxppo.analysis.statistics import (
    Estimate,
    estimate,
    interquartile_mean,
    performance_profile,
)
from purejaxppo.analysis.tidy import (
    axis_positions,
    best,
    by_setting,
    format_value,
    is_number,
    scores_by_setting,
    setting_label,
    swept_fields,
)
from purejaxppo.types import ConfigError

MAX_LINES = len(COLOURS)  # each needs a colour


def plot_sensitivity(scores: pd.DataFrame, field: str) -> Figure:
    """Score against one hyper-parameter: runs, interquartile mean and its 95 % interval over seeds.

    Each combination of the other swept fields has a line. A single line covers all of them if there
    are more than eight, or if none has two values of ``field``. Numbers are shown to scale, on a
    logarithmic axis if they are positive and span a decade; other values are side by side.

    Raises `ConfigError` if ``field`` was not swept.
    """
    others = [other for other in swept_fields(scores, field) if other != field]
    lines = by_setting(scores, others)
    if len(lines) > MAX_LINES or all(
        rows[field].nunique(dropna=False) == 1 for rows in lines.values()
    ):
        lines = {(): scores}
    strata = others if len(lines) == 1 else []
    numeric = is_number(scores[field])
    positions = axis_positions(scores[field])
    figure, axes = _figure()
    for i, (setting, rows) in enumerate(lines.items()):
        shifted = {
            value: x + (0 if numeric else 0.7 * ((i + 0.5) / len(lines) - 0.5))
            for value, x in positions.items()
        }
        finite = by_setting(rows.dropna(subset="score"), [field])
        parts = {
            shifted[value]: part
            for (value,), part in sorted(finite.items(), key=lambda item: positions[item[0][0]])
        }
        label = "interquartile mean, 95 % interval"
        if len(lines) > 1:
            label = setting_label(others, setting)
        if parts:
            alpha = min(0.5, max(0.1, 20 * len(positions) / len(scores)))
            _plot_runs(axes, parts, COLOURS[i], alpha)
            _plot_means(axes, parts, strata, numeric, COLOURS[i], label, _band_alpha(lines))
    over = f" and over {', '.join(strata)}" if strata else ""
    title = f"score against {field}: interquartile mean, 95 % interval over the seeds{over}"
    style_axes(axes, field, "score", fill(title, 68))
    axes.margins(x=0.05, y=0.12)
    _scale_axis(axes.xaxis, positions, numeric)
    _mark_diverged(axes, scores, field, positions)
    _legend(figure, axes)
    return figure


def plot_heat_map(scores: pd.DataFrame, x: str, y: str) -> Figure:
    """Interquartile mean of the score for each pair of values of two fields.

    It is taken over the seeds and all other fields. If d of the n runs of a cell diverged, the cell
    has the text ``× d/n``, or × alone if text does not fit; it is grey if all runs diverged.

    Raises `ConfigError` if ``x`` or ``y`` was not swept.
    """
    others = [other for other in swept_fields(scores, x, y) if other not in (x, y)]
    columns = list(axis_positions(scores[x]))
    rows = list(axis_positions(scores[y]))
    cells = np.full((len(rows), len(columns)), np.nan)
    runs = {
        (rows.index(b), columns.index(a)): part["score"]
        for (a, b), part in by_setting(scores, [x, y]).items()
    }
    for cell, part in runs.items():
        cells[cell] = interquartile_mean(part.dropna()) if part.notna().any() else np.nan
    figure = Figure(figsize=(6.4, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(cells), cmap="viridis", aspect="auto", origin="lower")
    light = image.to_rgba(np.ma.masked_invalid(cells))[..., :3] @ [0.3, 0.6, 0.1] > 0.5
    for cell, part in runs.items():
        _write_cell(axes, cell, cells, bool(light[cell]), part)
    over = f"\nand over {', '.join(others)}" if others else ""
    figure.colorbar(image, ax=axes, label=f"interquartile mean of the score over the seeds{over}")
    for axis, values, max_ticks in ((axes.xaxis, columns, 10), (axes.yaxis, rows, 20)):
        every = -(-len(values) // max_ticks)
        labels = [format_value(value) for value in values[::every]]
        axis.set_ticks(range(0, len(values), every), labels)
    axes.tick_params(axis="x", rotation=_rotation(columns[:: -(-len(columns) // 10)]))
    axes.set(xlabel=x, ylabel=y, title=f"score by {x} and {y}")
    return figure


def plot_profile(scores: pd.DataFrame, fields: Sequence[str]) -> Figure:
    """Performance profiles, with 95 % intervals, of the best eight settings of ``fields``.

    The best have the highest interquartile means. A profile is the share of runs with a score above
    τ, for each τ; a run that diverged has no score. Each combination of values of the other fields
    is resampled separately.

    Raises `ConfigError` if one of ``fields`` was not swept.
    """
    others = [other for other in swept_fields(scores, *fields) if other not in fields]
    chosen = best(scores, fields, MAX_LINES)
    finite = pd.concat(chosen.values())["score"].dropna()
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    margin = 0.02 * (high - low) or 1.0
    thresholds = np.linspace(low - margin, high + margin, 201)
    figure, axes = _figure()
    for (setting, rows), colour in zip(chosen.items(), COLOURS, strict=False):
        share = performance_profile(scores_by_setting(rows, others), thresholds)
        label = setting_label(fields, setting)
        plot_estimate(axes, thresholds, share, colour, label, _band_alpha(chosen))
    title = "performance profiles, 95 % intervals" + _omitted(len(chosen), scores, fields)
    style_axes(axes, "score τ", "share of runs with a score > τ", title)
    axes.set_ylim(-0.02, 1.02)
    _legend(figure, axes)
    return figure


def plot_curves(curves: pd.DataFrame, scores: pd.DataFrame, most: int = MAX_LINES) -> Figure:
    """Return against environment steps: interquartile mean and 95 % interval over the seeds.

    The lines are the ``most`` settings with the highest interquartile mean of ``scores``.

    Raises `ConfigError` unless ``most`` is from 1 to `MAX_LINES`.
    """
    if not 1 <= most <= MAX_LINES:
        raise ConfigError(
            f"most must be from 1 to {MAX_LINES}, the number of distinct colours, got {most}"
        )
    fields = swept_fields(scores)
    chosen = best(scores, fields, most)
    tables = by_setting(curves, fields)
    figure, axes = _figure()
    # Members of a population may share both setting and seed.
    run = "member" if "member" in curves else "seed"
    for setting, colour in zip(chosen, COLOURS, strict=False):
        returns = tables[setting].pivot(index=run, columns="timesteps", values="episode_return")
        curve = non_empty(Curve(returns.columns.to_numpy(float), returns.to_numpy(float)))
        if curve.returns.size:
            label = setting_label(fields, setting)
            plot_interquartile_mean(axes, curve, colour, label, _band_alpha(chosen))
    title = "interquartile mean over the seeds, 95 % interval"
    style_curve_axes(axes, title + _omitted(len(chosen), scores, fields))
    _legend(figure, axes)
    return figure


# ---------------------------------------------------------------------------------------- drawing


def plot_schedules(schedules: pd.DataFrame, scores: pd.DataFrame) -> Figure:
    """The hyper-parameters behind each member's final state in a population; the best is marked.

    They are drawn against environment steps. ``schedules`` is that of `SweepResult`, with a row for
    each member and interval between exchanges.
    """
    fields = [
        str(name) for name in schedules.columns if name not in ("member", "timesteps", "held_by")
    ]
    scored = scores.dropna(subset="score")
    best_member = None
    if len(scored):
        best_member = scored["member"].iloc[int(scored["score"].to_numpy().argmax())]
    figure = Figure(figsize=(6.4, 2.6 * len(fields) + 1.0), dpi=150, layout="constrained")
    for axes, field in zip(figure.subplots(len(fields), squeeze=False)[:, 0], fields, strict=True):
        for member, rows in schedules.groupby("member"):
            style: dict[str, Any] = {"color": "0.55", "linewidth": 0.7}
            if member == best_member:
                label = f"member {member}, the best: {scored['score'].max():.4g}"
                style = {"color": COLOURS[1], "linewidth": 2.0, "zorder": 3, "label": label}
            steps = rows["timesteps"].to_numpy(float)
            values = rows[field].to_numpy(float)
            axes.step([0.0, *steps], [values[0], *values], where="pre", **style)
        low = schedules[field].min()
        high = schedules[field].max()
        if low > 0 and high >= 10 * low:
            axes.set_yscale("log")
        style_curve_axes(axes, "", field)
    figure.suptitle("hyper-parameters behind each final state", fontsize="medium")
    if best_member is not None:
        _legend(figure, figure.axes[-1])
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    return figure, figure.subplots()


def _band_alpha(lines: Sized) -> float:
    """The opacity of the bands, which is lower for many lines because bands overlap."""
    return 0.25 if len(lines) <= 4 else 0.12


def _plot_runs(axes: Axes, parts: dict[float, pd.DataFrame], colour: str, alpha: float) -> None:
    x = np.repeat(list(parts), [len(part) for part in parts.values()])
    y = pd.concat(parts.values())["score"]
    axes.plot(x, y, ".", color=colour, alpha=alpha, markersize=4, markeredgewidth=0)


def _plot_means(
    axes: Axes,
    parts: dict[float, pd.DataFrame],
    strata: list[str],
    numeric: bool,
    colour: str,
    label: str,
    alpha: float,
) -> None:
    """Draw a line with a band for several numbers, otherwise points with bars.

    Points on a line are marked if there are few.
    """

    def mean(part: pd.DataFrame) -> Estimate:
        stratum = part.groupby(strata, sort=False, dropna=False).ngroup() if strata else None
        return estimate(part["score"], strata=stratum)

    x = np.array(list(parts))
    y = Estimate(*np.transpose([mean(part) for part in parts.values()]))
    if numeric and len(x) > 1:
        plot_estimate(axes, x, y, colour, label, alpha)
        axes.lines[-1].set(marker="o" if len(x) <= 16 else "", markersize=4)
    else:
        axes.vlines(x, y.low, y.high, color=colour, linewidth=1.8)
        axes.plot(x, y.point, "o", color=colour, markersize=5, label=label)


def _labels_fit(x: NDArray[np.floating]) -> bool:
    """Whether there is room for a label at each position on the horizontal axis."""
    return len(x) < 2 or bool(np.diff(x).min() >= 0.08 * (x[-1] - x[0]))


def _scale_axis(axis: Axis, positions: dict[Any, float], numeric: bool) -> None:
    """Make the axis logarithmic for positive numbers that span a decade; put ticks at the values.

    Numbers whose labels would overlap get the default ticks.
    """
    x = np.array(list(positions.values()))
    if numeric and x[0] > 0 and x[-1] >= 10 * x[0]:
        axis.axes.set_xscale("log")
        x = np.log(x)
    if numeric and not _labels_fit(x):
        return
    every = -(-len(x) // 40)
    axis.set_major_locator(FixedLocator(list(positions.values())[::every]))
    axis.set_minor_locator(NullLocator())
    axis.set_ticklabels([format_value(value) for value in list(positions)[::every]])
    if not numeric:
        axis.axes.set_xlim(-0.5, len(x) - 0.5)
        axis.set_tick_params(rotation=_rotation(list(positions)))


def _rotation(values: Sequence[Any]) -> int:
    """The rotation, in degrees, of the labels of a horizontal axis: 0 if they fit side by side."""
    long = sum(len(format_value(value)) + 2 for value in values) > 70
    return (90 if len(values) > 12 else 30) if long else 0


def _mark_diverged(
    axes: Axes, scores: pd.DataFrame, field: str, positions: dict[Any, float]
) -> None:
    """Mark values with diverged runs by × at the bottom, with their share if there is room."""
    runs = {
        positions[value]: rows["score"] for (value,), rows in by_setting(scores, [field]).items()
    }
    diverged = {x: int(score.isna().sum()) for x, score in runs.items() if score.isna().any()}
    if not diverged:
        return
    transform = axes.get_xaxis_transform()
    label = f"{sum(diverged.values())} of {len(scores)} runs diverged"
    axes.plot(
        list(diverged),
        [0.025] * len(diverged),
        "x",
        color="black",
        markersize=5,
        transform=transform,
        label=label,
    )
    pixels = axes.transData.transform([(x, 0) for x in positions.values()])[:, 0]
    if _labels_fit(pixels):
        for x, count in diverged.items():
            axes.text(
                x,
                0.05,
                f"{count}/{len(runs[x])}",
                transform=transform,
                ha="center",
                va="bottom",
                fontsize="x-small",
            )


def _write_cell(
    axes: Axes, cell: tuple[int, int], cells: np.ndarray, light: bool, runs: pd.Series
) -> None:
    row, column = cell
    diverged = int(runs.isna().sum())
    if diverged == len(runs):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="0.8"))
    colour = "black" if diverged == len(runs) or light else "white"
    if max(cells.shape) <= 10:
        mark = f"× {diverged}/{len(runs)}" if diverged else ""
        label = mark if diverged == len(runs) else f"{cells[cell]:.4g}\n{mark}".strip()
        axes.text(column, row, label, color=colour, ha="center", va="center", fontsize="x-small")
    elif diverged:
        axes.plot(column, row, "x", color=colour, markersize=3, markeredgewidth=0.7)


def _omitted(shown: int, scores: pd.DataFrame, fields: Sequence[str]) -> str:
    """The line of a title that says how many settings are shown, if not all are."""
    settings = len(by_setting(scores, fields))
    return f"\nthe best {shown} of {settings} settings" if settings > shown else ""


def _legend(figure: Figure, axes: Axes) -> None:
    """Put the legend below the axes, with the largest number of columns that fits."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = max(1, min(4, 100 // (max(map(len, labels)) + 8)))
        figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize="small",
        )
