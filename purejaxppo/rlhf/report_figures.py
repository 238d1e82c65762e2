"""The figures of a report: training, the judges' scores, and KL divergences."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from purejaxppo.analysis.plots import BLUE, COLOURS, style_axes

# Panels of the figure of training: metric -> label.
PANELS = {
    "episode_return": "score",
    "ref_kl": "KL from the reference, nats per text",
    "completion_length": "tokens of a completion",
    "entropy": "entropy, nats per token",
}


def training_figure(training: pd.DataFrame) -> Figure:
    """Score, KL divergence with its coefficient, lengths and entropy over the iterations."""
    figure = Figure(figsize=(9.6, 6.4), dpi=150, layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        axes.plot(training["iteration"], training[metric], color=BLUE, linewidth=1.2)
        style_axes(axes, "iteration", label, "")
        if metric == "ref_kl" and training["ref_kl_coef"].nunique() > 1:
            right = axes.twinx()
            right.plot(training["iteration"], training["ref_kl_coef"], color=COLOURS[1])
            right.set_ylabel("coefficient β", color=COLOURS[1])
            right.spines["top"].set_visible(False)
    return figure


def judges_figure(
    along: pd.DataFrame, policies: Mapping[str, Mapping[str, float]], judges: Sequence[str]
) -> Figure:
    """Gold against KL along the run, beside the best of n; and all judges against the score."""
    figure = Figure(figsize=(9.6, 4.0), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    gold = judges[0]
    left.plot(along["kl"], along[gold], "o-", color=BLUE, markersize=4, label="along training")
    best = {name: x for name, x in policies.items() if name.startswith("best of")}
    left.plot(
        [x["kl"] for x in best.values()],
        [x[gold] for x in best.values()],
        "s--",
        color=COLOURS[1],
        markersize=4,
        label="best of n, at most this KL",
    )
    for name, x in best.items():
        left.annotate(
            name.split()[-1], (x["kl"], x[gold]), textcoords="offset points", xytext=(4, -10)
        )
    left.plot([0], [policies["sft"][gold]], "k*", markersize=9, label="sft")
    style_axes(left, "KL from the reference, nats per text", f"score of the {gold} judge", "")
    left.legend(frameon=False, fontsize="small")
    _standardized_against_score(right, along, policies["sft"], judges)
    return figure


def _standardized_against_score(
    axes: Axes, along: pd.DataFrame, start: Mapping[str, float], judges: Sequence[str]
) -> None:
    """The change of each judge's score since sft against the score, as a share of the largest."""
    for judge, colour in zip(judges, COLOURS, strict=False):
        change = along[judge] - start[judge]
        largest = np.abs(change).max() or 1.0
        axes.plot(along["score"], change / largest, "o-", color=colour, markersize=4, label=judge)
    style_axes(axes, "score of the reward model", "change of a judge, share of the largest", "")
    axes.legend(frameon=False, fontsize="small")
