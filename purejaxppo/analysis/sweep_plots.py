"""Pictures of a sweep, from its tidy tables: what hyper-parameters do to the score, and how the best settings learn.

``scores`` has a row for each run, with a column for each field that was swept, and ``seed`` and ``score`` (NaN of a run
that diverged); ``curves`` has the same fields, ``seed``, ``timesteps`` and ``episode_return``. Interquartile means
leave runs that diverged out, and the pictures show where there are any; where settings are ranked, such a run counts as
worse than any other.
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
from purejaxppo.analysis.plots import COLOURS, dress, dress_curve, plot_estimate, plot_middle
from purejaxppo.analysis.statistics import (
    Estimate,
    estimate,
    interquartile_mean,
    performance_profile,
)
from purejaxppo.analysis.tidy import (
    best,
    by_setting,
    by_task,
    is_number,
    name,
    positions,
    swept,
    text,
)
from purejaxppo.types import ConfigError

MOST = len(COLOURS)  # lines that can be told apart


def sensitivity(scores: pd.DataFrame, field: str) -> Figure:
    """Score against one hyper-parameter: single runs, and the interquartile mean with its 95 % interval over the seeds.

    The other fields that were swept give a line for each combination of their values; where these are more than eight,
    or none of them has two values of ``field``, one line is over all of them. Numbers are on an axis to scale, a
    logarithmic one where they are positive and span a decade; other values stand side by side.
    """
    others = [other for other in swept(scores, field) if other != field]
    lines = by_setting(scores, others)
    if len(lines) > MOST or all(rows[field].nunique(dropna=False) == 1 for rows in lines.values()):
        lines = {(): scores}
    strata = others if len(lines) == 1 else []
    numbers, places = is_number(scores[field]), positions(scores[field])
    figure, axes = _figure()
    for i, (setting, rows) in enumerate(lines.items()):
        shifted = {
            value: x + (0 if numbers else 0.7 * ((i + 0.5) / len(lines) - 0.5))
            for value, x in places.items()
        }
        finite = by_setting(rows.dropna(subset="score"), [field])
        parts = {
            shifted[value]: part
            for (value,), part in sorted(finite.items(), key=lambda part: places[part[0][0]])
        }
        label = "interquartile mean, 95 % interval" if len(lines) == 1 else name(others, setting)
        if parts:
            _plot_runs(axes, parts, COLOURS[i], min(0.5, max(0.1, 20 * len(places) / len(scores))))
            _plot_middles(axes, parts, strata, numbers, COLOURS[i], label, _alpha(lines))
    over = f" and over {', '.join(strata)}" if strata else ""
    title = f"score against {field}: interquartile mean, 95 % interval over the seeds{over}"
    dress(axes, field, "score", fill(title, 68))
    axes.margins(x=0.05, y=0.12)
    _scale(axes.xaxis, places, numbers)
    _mark_diverged(axes, scores, field, places)
    _legend(figure, axes)
    return figure


def heat_map(scores: pd.DataFrame, x: str, y: str) -> Figure:
    """Interquartile mean of the score for each pair of values of two fields, over the seeds and all other fields.

    Where d of the n runs of a cell diverged it says ``× d/n``, or × alone where there is no room for text; where all
    did it is grey.
    """
    others = [other for other in swept(scores, x, y) if other not in (x, y)]
    columns, rows = list(positions(scores[x])), list(positions(scores[y]))
    cells = np.full((len(rows), len(columns)), np.nan)
    runs = {
        (rows.index(b), columns.index(a)): part["score"]
        for (a, b), part in by_setting(scores, [x, y]).items()
    }
    for at, part in runs.items():
        cells[at] = interquartile_mean(part.dropna()) if part.notna().any() else np.nan
    figure = Figure(figsize=(6.4, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(cells), cmap="viridis", aspect="auto", origin="lower")
    light = image.to_rgba(np.ma.masked_invalid(cells))[..., :3] @ [0.3, 0.6, 0.1] > 0.5
    for at, part in runs.items():
        _write_cell(axes, at, cells, bool(light[at]), part)
    over = f"\nand over {', '.join(others)}" if others else ""
    figure.colorbar(image, ax=axes, label=f"interquartile mean of the score over the seeds{over}")
    for axis, values, room in ((axes.xaxis, columns, 10), (axes.yaxis, rows, 20)):
        every = -(-len(values) // room)
        axis.set_ticks(range(0, len(values), every), [text(value) for value in values[::every]])
    axes.tick_params(axis="x", rotation=_rotation(columns[:: -(-len(columns) // 10)]))
    axes.set(xlabel=x, ylabel=y, title=f"score by {x} and {y}")
    return figure


def profile(scores: pd.DataFrame, fields: Sequence[str]) -> Figure:
    """Performance profiles of the settings of ``fields`` with 95 % intervals: the best eight by interquartile mean.

    For each score τ the share of runs that got more; a run that diverged got no score. Of the fields that are not
    named, each combination of values is resampled by itself.
    """
    others = [other for other in swept(scores, *fields) if other not in fields]
    chosen = best(scores, fields, MOST)
    finite = pd.concat(chosen.values())["score"].dropna()
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    margin = 0.02 * (high - low) or 1.0
    thresholds = np.linspace(low - margin, high + margin, 201)
    figure, axes = _figure()
    for (setting, rows), colour in zip(chosen.items(), COLOURS, strict=False):
        share = performance_profile(by_task(rows, others), thresholds)
        plot_estimate(axes, thresholds, share, colour, name(fields, setting), _alpha(chosen))
    title = "performance profiles, 95 % intervals" + _left_out(len(chosen), scores, fields)
    dress(axes, "score τ", "share of runs with a score > τ", title)
    axes.set_ylim(-0.02, 1.02)
    _legend(figure, axes)
    return figure


def curves(curves: pd.DataFrame, scores: pd.DataFrame, most: int = MOST) -> Figure:
    """Return against environment steps of the ``most`` best settings: interquartile mean, 95 % interval over the seeds.

    The best are those of the highest interquartile mean of ``scores``.
    """
    if not 1 <= most <= MOST:
        raise ConfigError(
            f"most must be from 1 to {MOST}, as many lines as can be told apart, got {most}"
        )
    fields = swept(scores)
    chosen, tables = best(scores, fields, most), by_setting(curves, fields)
    figure, axes = _figure()
    run = (
        "member" if "member" in curves else "seed"
    )  # of a population several members may have the same of both
    for setting, colour in zip(chosen, COLOURS, strict=False):
        returns = tables[setting].pivot(index=run, columns="timesteps", values="episode_return")
        curve = non_empty(Curve(returns.columns.to_numpy(float), returns.to_numpy(float)))
        if curve.returns.size:
            plot_middle(axes, curve, colour, name(fields, setting), _alpha(chosen))
    dress_curve(
        axes,
        "interquartile mean over the seeds, 95 % interval" + _left_out(len(chosen), scores, fields),
    )
    _legend(figure, axes)
    return figure


# --------------------------------------------------------------------------------------------- drawing


def schedules(schedules: pd.DataFrame, scores: pd.DataFrame) -> Figure:
    """Of a population the hyper-parameters behind each member's final state over environment steps, the best marked.

    ``schedules`` is as `SweepResult` has it: a row for each member and part between exchanges.
    """
    fields = [
        str(name) for name in schedules.columns if name not in ("member", "timesteps", "held_by")
    ]
    known = scores.dropna(subset="score")
    best = known["member"].iloc[int(known["score"].to_numpy().argmax())] if len(known) else None
    figure = Figure(figsize=(6.4, 2.6 * len(fields) + 1.0), dpi=150, layout="constrained")
    for axes, field in zip(figure.subplots(len(fields), squeeze=False)[:, 0], fields, strict=True):
        for member, rows in schedules.groupby("member"):
            chosen = member == best
            look = (
                {"color": COLOURS[1], "linewidth": 2.0, "zorder": 3}
                if chosen
                else {"color": "0.55", "linewidth": 0.7}
            )
            label = f"member {member}, the best: {known['score'].max():.4g}" if chosen else None
            steps, values = rows["timesteps"].to_numpy(float), rows[field].to_numpy(float)
            axes.step([0.0, *steps], [values[0], *values], where="pre", label=label, **look)
        low, high = schedules[field].min(), schedules[field].max()
        if low > 0 and high >= 10 * low:
            axes.set_yscale("log")
        dress_curve(axes, "", field)
    figure.suptitle("hyper-parameters behind each final state", fontsize="medium")
    if best is not None:
        _legend(figure, figure.axes[-1])
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    return figure, figure.subplots()


def _alpha(lines: Sized) -> float:
    """Bands are fainter where many lie upon one another."""
    return 0.25 if len(lines) <= 4 else 0.12


def _plot_runs(axes: Axes, parts: dict[float, pd.DataFrame], colour: str, alpha: float) -> None:
    x = np.repeat(list(parts), [len(part) for part in parts.values()])
    y = pd.concat(parts.values())["score"]
    axes.plot(x, y, ".", color=colour, alpha=alpha, markersize=4, markeredgewidth=0)


def _plot_middles(
    axes: Axes,
    parts: dict[float, pd.DataFrame],
    strata: list[str],
    numbers: bool,
    colour: str,
    label: str,
    alpha: float,
) -> None:
    """A line in a band where there are numbers to join, else points with bars; the points marked while they are few."""

    def middle(part: pd.DataFrame) -> Estimate:
        stratum = part.groupby(strata, sort=False, dropna=False).ngroup() if strata else None
        return estimate(part["score"], strata=stratum)

    x, y = np.array(list(parts)), Estimate(*np.transpose([middle(part) for part in parts.values()]))
    if numbers and len(x) > 1:
        plot_estimate(axes, x, y, colour, label, alpha)
        axes.lines[-1].set(marker="o" if len(x) <= 16 else "", markersize=4)
    else:
        axes.vlines(x, y.low, y.high, color=colour, linewidth=1.8)
        axes.plot(x, y.point, "o", color=colour, markersize=5, label=label)


def _apart(x: NDArray[np.floating]) -> bool:
    """Whether there is room for a word at each place on the horizontal axis."""
    return len(x) < 2 or bool(np.diff(x).min() >= 0.08 * (x[-1] - x[0]))


def _scale(axis: Axis, places: dict[Any, float], numbers: bool) -> None:
    """A logarithmic axis for positive numbers that span a decade; ticks at the values where they do not collide."""
    x = np.array(list(places.values()))
    if numbers and x[0] > 0 and x[-1] >= 10 * x[0]:
        axis.axes.set_xscale("log")
        x = np.log(x)
    if numbers and not _apart(x):
        return
    every = -(-len(x) // 40)
    axis.set_major_locator(FixedLocator(list(places.values())[::every]))
    axis.set_minor_locator(NullLocator())
    axis.set_ticklabels([text(value) for value in list(places)[::every]])
    if not numbers:
        axis.axes.set_xlim(-0.5, len(x) - 0.5)
        axis.set_tick_params(rotation=_rotation(list(places)))


def _rotation(values: Sequence[Any]) -> int:
    """Of the words under a horizontal axis: none while they fit side by side."""
    long = sum(len(text(value)) + 2 for value in values) > 70
    return (90 if len(values) > 12 else 30) if long else 0


def _mark_diverged(axes: Axes, scores: pd.DataFrame, field: str, places: dict[Any, float]) -> None:
    """× at the bottom where runs diverged, with how many of how many where there is room."""
    runs = {places[value]: rows["score"] for (value,), rows in by_setting(scores, [field]).items()}
    diverged = {x: int(score.isna().sum()) for x, score in runs.items() if score.isna().any()}
    if not diverged:
        return
    at = axes.get_xaxis_transform()
    label = f"{sum(diverged.values())} of {len(scores)} runs diverged"
    axes.plot(
        list(diverged),
        [0.025] * len(diverged),
        "x",
        color="black",
        markersize=5,
        transform=at,
        label=label,
    )
    if _apart(axes.transData.transform([(x, 0) for x in places.values()])[:, 0]):
        for x, number in diverged.items():
            axes.text(
                x,
                0.05,
                f"{number}/{len(runs[x])}",
                transform=at,
                ha="center",
                va="bottom",
                fontsize="x-small",
            )


def _write_cell(
    axes: Axes, at: tuple[int, int], cells: np.ndarray, light: bool, runs: pd.Series
) -> None:
    row, column = at
    diverged = int(runs.isna().sum())
    if diverged == len(runs):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="0.8"))
    colour = "black" if diverged == len(runs) or light else "white"
    if max(cells.shape) <= 10:
        mark = f"× {diverged}/{len(runs)}" if diverged else ""
        words = mark if diverged == len(runs) else f"{cells[at]:.4g}\n{mark}".strip()
        axes.text(column, row, words, color=colour, ha="center", va="center", fontsize="x-small")
    elif diverged:
        axes.plot(column, row, "x", color=colour, markersize=3, markeredgewidth=0.7)


def _left_out(shown: int, scores: pd.DataFrame, fields: Sequence[str]) -> str:
    settings = len(by_setting(scores, fields))
    return f"\nthe best {shown} of {settings} settings" if settings > shown else ""


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, with as many columns as fit."""
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
