"""Figures of a sweep: their lines, cells, axes and legends."""

import itertools
import time

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from purejaxppo.analysis.plots import COLOURS
from purejaxppo.analysis.statistics import estimate, interquartile_mean, performance_profile
from purejaxppo.analysis.sweep_plots import (
    plot_curves,
    plot_heat_map,
    plot_profile,
    plot_sensitivity,
)
from purejaxppo.types import ConfigError

NAN = np.nan
RATES = [1e-4, 1e-3, 1e-2]
SIZES = [(32,), (64, 64)]


def table(score, seeds=4, **grid):
    """Scores of every combination of the grid's values: ``score(seed, **setting)``."""
    rows = []
    for values in itertools.product(*grid.values()):
        for seed in range(seeds):
            setting = dict(zip(grid, values, strict=True))
            rows.append(
                {"member": len(rows), **setting, "seed": seed, "score": score(seed, **setting)}
            )
    scores = pd.DataFrame(rows).assign(timesteps=1000)
    return scores.assign(
        diverged_at=pd.array([3 if np.isnan(x) else None for x in scores["score"]], dtype="Int64")
    )


def by_rate(seed, lr, **_):
    """Two of the four seeds diverge at the largest rate."""
    return NAN if lr == 1e-2 and seed >= 2 else 100 + 10 * np.log10(lr) + seed**2


def labelled_lines(axes):
    """The lines that have a label: {label: line}."""
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# ------------------------------------------------------------------------------------- sensitivity


def test_sensitivity_to_one_field_shows_the_interquartile_mean_all_runs_and_diverged_runs():
    figure = plot_sensitivity(table(by_rate, lr=RATES[::-1]), "lr")
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("lr", "score", "log")
    assert "lr" in axes.get_title() and " over " in axes.get_title()
    middle, diverged = labelled_lines(axes).values()
    np.testing.assert_array_equal(middle.get_xdata(), RATES)
    np.testing.assert_allclose(middle.get_ydata(), [60 + 2.5, 70 + 2.5, 80.5])
    band = axes.collections[0].get_paths()[0].vertices
    interval = estimate([60.0, 61, 64, 69])
    at = band[np.isclose(band[:, 0], 1e-4), 1]
    assert (at.min(), at.max()) == (interval.low, interval.high)
    (runs,) = [line for line in axes.lines if line.get_marker() == "."]
    np.testing.assert_allclose(np.sort(runs.get_ydata()), [60, 61, 64, 69, 70, 71, 74, 79, 80, 81])
    np.testing.assert_array_equal(diverged.get_xdata(), [1e-2])
    assert legend(figure) == ["interquartile mean, 95 % interval", "2 of 12 runs diverged"]
    assert [text.get_text() for text in axes.texts] == ["2/4"]
    figure.canvas.draw()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.0001", "0.001", "0.01"]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1, 2, 9], "linear"),
        ([1, 2, 10], "log"),
        ([0.0, 1e-3, 1], "linear"),
        ([-100.0, -1], "linear"),
        ([64], "linear"),
    ],
)
def test_an_axis_is_logarithmic_for_positive_numbers_over_a_decade(values, scale):
    (axes,) = plot_sensitivity(table(lambda seed, x: float(seed), x=values), "x").axes
    assert axes.get_xscale() == scale
    (line,) = labelled_lines(axes).values()
    np.testing.assert_array_equal(line.get_xdata(), values)


@pytest.mark.parametrize(
    "values", [[(64, 64), (32,)], ["tanh", "relu"], [True, False], [0.5, None]]
)
def test_values_that_are_not_numbers_are_evenly_spaced_in_their_order(values):
    figure = plot_sensitivity(
        table(lambda seed, x: float(seed + 10 * values.index(x)), x=values), "x"
    )
    (axes,) = figure.axes
    figure.canvas.draw()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [str(value) for value in values]
    (line,) = labelled_lines(axes).values()
    np.testing.assert_array_equal(line.get_xdata(), [0, 1])
    np.testing.assert_array_equal(line.get_ydata(), [1.5, 11.5])
    assert axes.get_xscale() == "linear" and line.get_linestyle() == "None"


def test_up_to_eight_combinations_of_other_fields_have_a_line_each():
    scores = table(
        lambda seed, lr, gamma, size: by_rate(seed, lr) + gamma,
        lr=RATES,
        gamma=[0.9, 0.99],
        size=SIZES,
    )
    figure = plot_sensitivity(scores, "lr")
    lines = labelled_lines(figure.axes[0])
    names = [f"gamma {gamma}, size {size}" for gamma in (0.9, 0.99) for size in SIZES]
    assert list(lines) == legend(figure) == [*names, "8 of 48 runs diverged"]
    for name, gamma, colour in zip(names, [0.9, 0.9, 0.99, 0.99], COLOURS, strict=False):
        np.testing.assert_allclose(lines[name].get_ydata(), np.array([62.5, 72.5, 80.5]) + gamma)
        assert lines[name].get_color() == colour
    sizes = labelled_lines(plot_sensitivity(scores[scores["lr"] < 1e-2], "size").axes[0])
    places = [line.get_xdata() for line in sizes.values()]
    assert len(places) == 4 and len({x[0] for x in places}) == 4  # beside one another
    assert all(-0.5 < x[0] < 0.5 < x[1] < 1.5 for x in places)


def test_more_combinations_are_one_line_over_all_of_them_with_an_interval_over_the_seeds():
    """The seeds are equal, so the interval has no width although the settings differ."""
    scores = table(lambda seed, lr, x: np.log10(lr) + 100 * x, lr=RATES, x=range(9))
    figure = plot_sensitivity(scores, "lr")
    (axes,) = figure.axes
    assert "over the seeds and over x" in axes.get_title().replace("\n", " ")
    (line,) = labelled_lines(axes).values()
    np.testing.assert_allclose(line.get_ydata(), np.log10(RATES) + 400)
    vertices = axes.collections[0].get_paths()[0].vertices
    assert set(np.round(vertices[:, 1], 9)) == {396.0, 397.0, 398.0}


def test_combinations_with_one_value_each_are_one_line():
    scores = table(by_rate, lr=RATES).assign(gamma=lambda x: 1 - x["lr"])
    (line, _) = labelled_lines(plot_sensitivity(scores, "lr").axes[0]).values()
    np.testing.assert_array_equal(line.get_xdata(), RATES)


# ---------------------------------------------------------------------------------------- heat map


def test_a_heat_map_shows_interquartile_means_and_how_many_runs_diverged():
    scores = table(
        lambda seed, lr, gamma, size: (
            NAN if gamma == 0.5 and lr > 1e-4 else by_rate(seed, lr) + 10 * gamma
        ),
        lr=RATES,
        gamma=[0.9, 0.5],
        size=SIZES,
    )
    figure = plot_heat_map(scores, "lr", "gamma")
    axes, bar = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("lr", "gamma")
    assert bar.get_ylabel() == "interquartile mean of the score over the seeds\nand over size"
    cells = axes.images[0].get_array().filled(NAN)
    middle = interquartile_mean([0, 0, 1, 1, 4, 4, 9, 9])
    expected = [[60 + middle + 5, NAN, NAN], [60 + middle + 9, 70 + middle + 9, 80.5 + 9]]
    np.testing.assert_allclose(cells, expected)  # the row of the smaller gamma is below
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {
        (0, 0): "67.5",
        (1, 0): "× 8/8",
        (2, 0): "× 8/8",
        (0, 1): "71.5",
        (1, 1): "81.5",
    } | {(2, 1): "89.5\n× 4/8"}
    assert sorted(patch.get_xy() for patch in axes.patches) == [(0.5, -0.5), (1.5, -0.5)]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.0001", "0.001", "0.01"]
    figure.canvas.draw()


def test_a_large_heat_map_has_few_ticks_and_crosses_instead_of_text():
    scores = table(
        lambda seed, lr, x: NAN if (lr, x) == (1e-3, 7) else 1.0,
        1,
        lr=np.logspace(-5, -3, 30),
        x=range(25),
    )
    axes = plot_heat_map(scores, "lr", "x").axes[0]
    assert not axes.texts
    assert [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines] == [(29, 7)]
    assert len(axes.get_xticks()) == 10 and len(axes.get_yticks()) <= 20


def test_a_cell_without_runs_stays_empty():
    scores = table(lambda seed, a, b: float(a + b), a=[0, 1], b=[0, 1]).query("a + b < 2")
    axes = plot_heat_map(scores, "a", "b").axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array().filled(NAN), [[0, 1], [1, NAN]])
    assert len(axes.texts) == 3 and not axes.patches


# ----------------------------------------------------------------------------- profiles and curves


def test_each_setting_has_a_profile_and_the_best_is_first():
    scores = table(by_rate, lr=RATES)
    figure = plot_profile(scores, ["lr"])
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("score τ", "share of runs with a score > τ")
    lines = labelled_lines(axes)
    # Half of the runs of the last one diverged.
    assert list(lines) == legend(figure) == ["lr 0.001", "lr 0.0001", "lr 0.01"]
    line = lines["lr 0.01"]
    share = performance_profile([80.0, 81, NAN, NAN], line.get_xdata())
    np.testing.assert_array_equal(line.get_ydata(), share.point)
    assert line.get_ydata()[0] == 0.5 and line.get_ydata()[-1] == 0
    band = axes.collections[-1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (share.low.min(), share.high.max())


def test_a_profile_resamples_each_value_of_the_fields_it_leaves_out_separately():
    """The seeds are equal, so the interval has no width although the settings differ."""
    (axes,) = plot_profile(table(lambda seed, lr, x: float(x), lr=RATES, x=[1, 2]), ["lr"]).axes
    np.testing.assert_array_equal(
        np.unique(axes.collections[0].get_paths()[0].vertices[:, 1]), [0, 0.5, 1]
    )
    complete = table(lambda seed, lr, x: float(x), lr=RATES, x=[1, 2])
    incomplete = complete.iloc[1:]  # a run is missing
    line = labelled_lines(plot_profile(incomplete, ["lr"]).axes[0])["lr 0.0001"]
    np.testing.assert_allclose(np.unique(line.get_ydata()), [0, 4 / 7, 1])


def curves_of(scores, windows=5):
    """A curve for each run, from 0 to its score; no episode ends in the first window."""
    steps = np.arange(1, windows + 1) * 100
    shares = np.array([NAN, *np.linspace(0, 1, windows - 1)])
    runs = scores.drop(columns=["score", "timesteps", "diverged_at"])
    parts = [
        runs.iloc[[i] * windows].assign(timesteps=steps, episode_return=score * shares)
        for i, score in enumerate(scores["score"])
    ]
    return pd.concat(parts, ignore_index=True)


def test_curves_are_those_of_the_best_settings():
    scores = table(by_rate, lr=RATES, size=SIZES)
    figure = plot_curves(curves_of(scores), scores, most=2)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("environment steps", "episode return")
    assert "the best 2 of 6 settings" in axes.get_title()
    lines = labelled_lines(axes)
    assert list(lines) == legend(figure) == ["lr 0.001, size (32,)", "lr 0.001, size (64, 64)"]
    for line in lines.values():
        np.testing.assert_array_equal(line.get_xdata(), [200, 300, 400, 500])
        np.testing.assert_allclose(line.get_ydata(), 72.5 * np.linspace(0, 1, 4))


def test_seeds_alone_are_one_setting():
    scores = table(lambda seed: float(seed))
    (line,) = labelled_lines(plot_curves(curves_of(scores), scores).axes[0]).values()
    assert line.get_label() == "all runs" and line.get_ydata()[-1] == 1.5


def test_hundreds_of_settings_give_few_lines_in_seconds():
    scores = table(
        lambda seed, lr, x: seed - (x - 3) ** 2.0, lr=np.logspace(-5, -3, 20), x=range(20)
    )
    returns = curves_of(scores, windows=20)
    start = time.process_time()
    figures = [
        plot_sensitivity(scores, "lr"),
        plot_heat_map(scores, "lr", "x"),
        plot_profile(scores, ["lr", "x"]),
    ]
    figures.append(plot_curves(returns, scores))
    assert time.process_time() - start < 10
    for figure in (figures[2], figures[3]):
        assert len(labelled_lines(figure.axes[0])) == 8
        assert "the best 8 of 400 settings" in figure.axes[0].get_title()
        assert (
            len({to_hex(line.get_color()) for line in labelled_lines(figure.axes[0]).values()}) == 8
        )
    assert len(labelled_lines(figures[0].axes[0])) == 1


def test_a_sweep_in_which_every_run_diverged_can_be_drawn():
    scores = table(lambda seed, lr, size: NAN, lr=RATES, size=SIZES)
    figures = [
        plot_sensitivity(scores, "lr"),
        plot_sensitivity(scores, "size"),
        plot_heat_map(scores, "lr", "size"),
    ]
    figures += [plot_profile(scores, ["lr"]), plot_curves(curves_of(scores), scores)]
    for figure in figures:
        figure.canvas.draw()
    assert legend(figures[0]) == ["24 of 24 runs diverged"]
    assert [text.get_text() for text in figures[2].axes[0].texts] == ["× 4/4"] * 6
    assert all(
        (line.get_ydata() == 0).all() for line in labelled_lines(figures[3].axes[0]).values()
    )
    assert not figures[4].axes[0].lines


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda scores: plot_sensitivity(scores, "gamma"), "'gamma' was not swept; swept: lr"),
        (lambda scores: plot_heat_map(scores, "lr", "seed"), "'seed' was not swept"),
        (lambda scores: plot_profile(scores, ["lr", "x"]), "'x' was not swept"),
        (lambda scores: plot_curves(scores, scores, 9), "most must be from 1 to 8"),
    ],
)
def test_an_impossible_figure_is_refused_with_a_message(call, message):
    with pytest.raises(ConfigError, match=message):
        call(table(by_rate, lr=RATES))
