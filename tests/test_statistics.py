"""Means, medians, probabilities and profiles by hand, against SciPy, and against numbers that rliable gave."""

import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from purejaxppo.statistics import (
    AGGREGATES,
    Estimate,
    aggregate,
    estimate,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
)
from purejaxppo.types import ConfigError

NAN = np.nan


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([7.0], 7.0),
        ([1.0, 2.0], 1.5),
        ([3.0, 1.0, 2.0], 2.0),
        ([100.0, 1.0, 2.0, -100.0], 1.5),
        ([9.0, 1, 2, 3, 4, 5, 6, 7], (3 + 4 + 5 + 6) / 4),
        ([0.0, 1, 2, 3, 50], (1 + 2 + 3) / 3),
    ],
)
def test_the_interquartile_mean_leaves_a_quarter_out_at_either_end(x, expected):
    assert interquartile_mean(x) == pytest.approx(expected, rel=1e-15)


def test_the_interquartile_mean_is_taken_along_an_axis():
    x = np.array([[0.0, 1, 2, 30], [4, 3, 2, 1]])
    np.testing.assert_allclose(interquartile_mean(x, axis=1), [1.5, 2.5])
    np.testing.assert_allclose(interquartile_mean(x), [2, 2, 2, 15.5])


@pytest.mark.parametrize("size", [1, 3, 4, 8, 100])
def test_the_interquartile_mean_of_a_nan_is_nan_however_many_values_are_left_out(size):
    assert np.isnan(interquartile_mean([*range(size - 1), NAN]))
    np.testing.assert_array_equal(interquartile_mean([[1.0, NAN]] * size), [1, NAN])


def test_the_interval_of_two_values_is_their_range():
    """A resample is (a, a), (a, b) or (b, b), each end with a chance of a quarter."""
    got = estimate([[1.0, 10.0], [3.0, 10.0]])
    np.testing.assert_array_equal(got.point, [2, 10])
    np.testing.assert_array_equal(got.low, [1, 10])
    np.testing.assert_array_equal(got.high, [3, 10])


def test_the_interval_covers_the_mean_of_normal_numbers_as_theory_says():
    """Of 400 standard normal numbers: the standard error of a 25 % trimmed mean is about 1.09 / 20."""
    x = np.random.default_rng(1).normal(size=400)
    got = estimate(x)
    width = float(got.high - got.low)
    assert width == pytest.approx(2 * 1.96 * 1.09 / 20, rel=0.15)
    assert got.low < got.point < got.high
    assert got.point == interquartile_mean(x)
    again = estimate(x)
    assert (again.low, again.high) == (got.low, got.high)


def test_a_nan_is_not_averaged_away():
    got = estimate([[1.0, 1.0], [2.0, NAN], [3.0, 3.0]])
    assert np.isfinite([got.point[0], got.low[0], got.high[0]]).all()
    assert np.isnan(got.point[1])


def test_strata_are_resampled_by_themselves_whatever_their_sizes():
    """Within a stratum all runs are equal, so no resample differs, although the strata are far apart."""
    got = estimate([0.0, 100, 0, 7, 100, 0], strata=["a", "b", "a", "c", "b", "a"])
    assert got == Estimate(*[np.float64((0 + 0 + 7 + 100) / 4)] * 3)
    apart = estimate([0.0, 100, 0, 7, 100, 0])
    assert apart.low == 0 and apart.high > 50


def test_strata_of_tasks_give_the_interval_of_the_matrix():
    """In a table the strata are labels; of the same runs as [runs, tasks] the two intervals are of one distribution."""
    scores = matrix(12, 5)
    table = estimate(scores.T.ravel(), 20_000, strata=np.repeat(np.arange(5), 12))
    whole = aggregate(scores, resamples=20_000)
    assert table.point == pytest.approx(whole.point, rel=1e-12)
    assert_same_interval(table, (whole.low, whole.high), factor=2**0.5)


# ---------------------------------------------------------------------------------------- by hand


def test_aggregates_by_hand():
    scores = np.array([[0.0, 10, 100], [2, 30, 300]])
    assert aggregate(scores, "mean").point == 442 / 6
    assert aggregate(scores, "median").point == 20  # the means over the runs are 1, 20 and 200
    assert aggregate(scores, "interquartile_mean").point == (2 + 10 + 30 + 100) / 4


def test_an_interval_is_over_the_runs_of_each_task_and_not_over_the_tasks():
    for statistic in AGGREGATES:
        point, low, high = aggregate(np.tile([0.0, 10, 500], (6, 1)), statistic)
        assert low == point == high


def test_one_axis_is_one_task():
    x = np.random.default_rng(2).normal(size=30)
    assert aggregate(x) == aggregate(x[:, None]) == estimate(x)
    assert aggregate(x, "median") == aggregate(x, "mean")
    assert probability_of_improvement(x, x[:7]) == probability_of_improvement(x[:, None], x[:7, None])
    for one, two in zip(performance_profile(x, [0, 1]), performance_profile(x[:, None], [0, 1]), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    """σ / √n on either side, times 1.96; the standard error of a percentile of 20,000 resamples is 2 % of σ / √n."""
    x = np.random.default_rng(3).normal(size=(200, 4))
    got = aggregate(x, "mean", 20_000)
    error = x.std(axis=0).mean() / 800**0.5
    assert got.low == pytest.approx(got.point - 1.96 * error, abs=0.1 * error)
    assert got.high == pytest.approx(got.point + 1.96 * error, abs=0.1 * error)


def test_what_does_not_fit_into_memory_at_once_gives_the_same(monkeypatch):
    whole = aggregate(matrix(12, 5), resamples=1000)
    monkeypatch.setattr("purejaxppo.statistics.AT_ONCE", 60 * 7)
    assert aggregate(matrix(12, 5), resamples=1000) == whole


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1.0, 2], [0.0, 0, 0], 1.0),
        ([0.0], [1.0, 2], 0.0),
        ([1.0, 2, 3], [2.0], 0.5),
        ([1.0, 1], [1.0, 0], 0.75),
        ([[1.0, 0], [3, 0]], [[2.0, 1], [2, 1]], 0.25),
        ([-np.inf, 5], [-np.inf, 4], 0.625),
    ],
)
def test_the_probability_of_improvement_by_hand(x, y, expected):
    assert probability_of_improvement(x, y).point == pytest.approx(expected, rel=1e-12)


def test_the_interval_of_a_probability_of_improvement_of_two_runs():
    """x is drawn as (0, 0), (0, 2) or (2, 2), of four times once, twice and once, and y is 1: P is the share of 2."""
    assert probability_of_improvement([0.0, 2], [1.0]) == (0.5, 0, 1)
    assert probability_of_improvement([1.0], [0.0, 2]) == (0.5, 0, 1)
    assert probability_of_improvement([3.0, 2], [1.0, 0]) == (1, 1, 1)


def test_both_sides_of_a_probability_of_improvement_are_resampled():
    """Of large samples of one distribution the variance is (1/n + 1/m) / 12, that of U over n · m."""
    x, y = np.random.default_rng(4).normal(size=(2, 300))
    got = probability_of_improvement(x, y, 20_000)
    assert float(got.high - got.low) == pytest.approx(2 * 1.96 * (2 / 300 / 12) ** 0.5, rel=0.05)


def test_a_performance_profile_by_hand():
    got = performance_profile([[1.0, 5], [3, NAN]], [0, 1, 2.9, 3, 5, -np.inf])
    np.testing.assert_array_equal(got.point, [0.75, 0.5, 0.5, 0.25, 0, 0.75])
    np.testing.assert_array_equal(got.low, [0.5, 0, 0, 0, 0, 0.5])
    np.testing.assert_array_equal(got.high, [1, 1, 1, 0.5, 0, 1])


def test_a_nan_makes_every_number_nan_that_it_belongs_to():
    bad = [[1.0, 2], [3, NAN], [5, 6], [7, 8]]
    for statistic in AGGREGATES:
        assert np.isnan(aggregate(bad, statistic)).all()
    assert np.isnan(probability_of_improvement(bad, [[1.0, 2]])).all()
    assert np.isnan(probability_of_improvement([[1.0, 2]], bad)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aggregate([]), "scores must be .* got the shape \\(0,\\)"),
        (lambda: aggregate(np.zeros((2, 3, 4))), "scores must be .* got the shape \\(2, 3, 4\\)"),
        (lambda: aggregate([1.0], "iqm"), "one of interquartile_mean, median, mean, got 'iqm'"),
        (lambda: estimate([]), "at least one value"),
        (lambda: probability_of_improvement(np.ones((2, 3)), np.ones((2, 2))), "same tasks, got 3 and 2"),
        (lambda: probability_of_improvement([1.0], np.ones((0, 1))), "y must be"),
        (lambda: performance_profile([1.0], []), "thresholds must be"),
        (lambda: performance_profile([1.0], [NAN]), "thresholds must be"),
        (lambda: performance_profile([[]], [0.0]), "scores must be"),
    ],
)
def test_bad_input_is_said_in_a_sentence(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_256_runs_take_well_under_a_second():
    x, y = np.random.default_rng(5).normal(size=(2, 256))

    def seconds(call):
        start = time.process_time()
        call()
        return time.process_time() - start

    for call in (
        lambda: estimate(x),
        lambda: aggregate(x),
        lambda: probability_of_improvement(x, y),
        lambda: performance_profile(x, np.linspace(-3, 3, 100)),
    ):
        assert min(seconds(call) for _ in range(2)) < 1


# ------------------------------------------------------------------------- against SciPy and rliable


def matrices(tasks):
    """Scores of which many are equal."""
    values = st.integers(-8, 8).map(float) | st.floats(-1e3, 1e3)
    return hnp.arrays(float, st.tuples(st.integers(1, 20), st.just(tasks)), elements=values)


@given(matrices(3))
def test_the_interquartile_mean_is_scipys_trimmed_mean_of_all_runs(scores):
    """rliable's aggregate_iqm is this very call."""
    expected = scipy.stats.trim_mean(scores, proportiontocut=0.25, axis=None)
    assert aggregate(scores, resamples=1).point == pytest.approx(expected, rel=1e-12, abs=1e-9)


@given(matrices(2), matrices(2))
def test_the_probability_of_improvement_is_scipys_mann_whitney_u(x, y):
    """rliable's probability_of_improvement is this call of each task."""
    pairs = zip(x.T, y.T, strict=True)
    expected = np.mean([scipy.stats.mannwhitneyu(a, b, method="asymptotic").statistic for a, b in pairs])
    got = probability_of_improvement(x, y, resamples=1).point
    assert got == pytest.approx(expected / (len(x) * len(y)), rel=1e-12, abs=1e-12)


def matrix(runs, tasks, shift=0.0):
    """Scores in which a run is much better or worse in all tasks, and tasks are far apart: [runs, tasks].

    So an interval from whole rows, or from all numbers as one sample, would be far from the stratified one.
    """
    run, task = np.indices((runs, tasks))
    return 10 * task + 3 * np.sin(7 * run + shift) + np.sin(5 * run * task + task + shift)


# What rliable 1.2.0 gave (with arch 7.2.0, NumPy 2.4.6, SciPy 1.17.1 and pandas 2.3.3: it needs arch < 8, which does
# not import with pandas 3): after numpy.random.seed(0), library.get_interval_estimates of each matrix with 50,000
# resamples (20,000 for probabilities) and library.create_performance_profile with 50,000.
RLIABLE = {
    ((12, 5), "interquartile_mean"): (20.547430846686755, 19.788482955221824, 21.214011108010183),
    ((12, 5), "median"): (20.480532053262134, 19.255056757697908, 21.656429278655107),
    ((12, 5), "mean"): (20.45353186043954, 19.901093265350617, 21.001324437705268),
    ((7, 1), "interquartile_mean"): (0.8018192136399378, -1.0998258574987605, 2.278933674232376),
    ((7, 1), "median"): (0.6044790702196284, -0.8652173473801111, 1.963893589495076),
    ((7, 1), "mean"): (0.6044790702196284, -0.8652173473801111, 1.963893589495076),
    ((3, 26), "interquartile_mean"): (126.72206254140863, 126.2829846657154, 127.14972160710495),
    ((3, 26), "median"): (126.59861631505498, 125.54481054019666, 127.53632461297971),
    ((3, 26), "mean"): (126.6166428615959, 126.31965259395919, 126.91140413469827),
    ((10, 4), "interquartile_mean"): (15.04347778960658, 14.109811018785608, 15.92816218417961),
    ((10, 4), "median"): (15.04347778960658, 14.10981101878561, 15.928162184179614),
    ((10, 4), "mean"): (15.026956994456611, 14.388531172294513, 15.661410365411594),
}
IMPROVEMENT = {
    "all different": (0.5518518518518519, 0.437037037037037, 0.6666666666666666),
    "many equal": (0.5416666666666667, 0.4305555555555555, 0.6537037037037037),
    "one task": (0.5, 0.24074074074074073, 0.7685185185185185),
}
THRESHOLDS = [-5, 0, 5, 9, 15, 22, 31, 60]
PROFILE = (
    [60 / 60, 55 / 60, 48 / 60, 45 / 60, 36 / 60, 28 / 60, 17 / 60, 0],
    [60 / 60, 52 / 60, 48 / 60, 42 / 60, 36 / 60, 25 / 60, 14 / 60, 0],
    [60 / 60, 58 / 60, 48 / 60, 48 / 60, 36 / 60, 31 / 60, 20 / 60, 0],
)


def assert_same_interval(got, expected, factor=1.0, step=0.0):
    """Two bootstraps of the same data differ by chance only.

    The 2.5 % point of R samples has the standard error √(0.025 · 0.975 / R) / φ(−1.96) = 2.67 / √R of the samples'
    standard deviation σ: 0.019 σ for R = 20,000. An interval is 3.92 σ wide, so four of these, and rliable's smaller
    one beside it, are 2.3 % of its width. Where the numbers are discrete an end may also fall on the next of them.
    """
    low, high = expected
    bound = factor * 0.023 * (high - low) + step
    assert abs(got.low - low) <= bound
    assert abs(got.high - high) <= bound


@pytest.mark.parametrize(("shape", "statistic"), RLIABLE)
def test_aggregates_and_their_intervals_are_those_of_rliable(shape, statistic):
    point, *interval = RLIABLE[shape, statistic]
    got = aggregate(matrix(*shape), statistic, 20_000)
    assert got.point == pytest.approx(point, rel=1e-12)
    assert_same_interval(got, interval)


def test_the_bound_tells_stratified_resampling_from_the_others():
    _, *interval = RLIABLE[(12, 5), "mean"]
    scores = matrix(12, 5)
    rows = np.random.default_rng(0).integers(0, 12, (20_000, 12))
    everything = np.random.default_rng(0).integers(0, 60, (20_000, 60))
    for samples in (scores[rows].mean(axis=(1, 2)), scores.ravel()[everything].mean(axis=1)):
        with pytest.raises(AssertionError):
            assert_same_interval(Estimate(scores.mean(), *np.percentile(samples, [2.5, 97.5])), interval)


@pytest.mark.parametrize("case", IMPROVEMENT)
def test_the_probability_of_improvement_and_its_interval_are_those_of_rliable(case):
    x, y = matrix(12, 5), matrix(9, 5, 0.4)
    if case == "many equal":
        x, y = np.round(x), np.round(y)
    elif case == "one task":
        x, y = x[:, :1], matrix(9, 1, 0.4)
    point, *interval = IMPROVEMENT[case]
    got = probability_of_improvement(x, y, 20_000)
    assert got.point == pytest.approx(point, rel=1e-12)
    assert_same_interval(got, interval, factor=2**0.5, step=0.5 / (12 * 9 * x.shape[1]))  # both have 20,000 resamples


def test_the_performance_profile_and_its_intervals_are_those_of_rliable():
    """The numbers are sixtieths."""
    got = performance_profile(matrix(12, 5), THRESHOLDS, 20_000)
    np.testing.assert_allclose(got.point, PROFILE[0], rtol=1e-12)
    np.testing.assert_allclose([got.low, got.high], PROFILE[1:], atol=1e-9 + 1 / 60)
