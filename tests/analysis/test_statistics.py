"""Means, medians, probabilities and profiles: by hand, against SciPy and against rliable."""

import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from purejaxppo.analysis.statistics import (
    Estimate,
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
def test_the_interquartile_mean_drops_a_quarter_at_each_end(x, expected):
    assert interquartile_mean(x) == pytest.approx(expected, rel=1e-15)


def test_the_interquartile_mean_is_taken_along_an_axis():
    x = np.array([[0.0, 1, 2, 30], [4, 3, 2, 1]])
    np.testing.assert_allclose(interquartile_mean(x, axis=1), [1.5, 2.5])
    np.testing.assert_allclose(interquartile_mean(x), [2, 2, 2, 15.5])


@pytest.mark.parametrize("size", [1, 3, 4, 8, 100])
def test_the_interquartile_mean_of_a_nan_is_nan_even_if_it_would_be_dropped(size):
    assert np.isnan(interquartile_mean([*range(size - 1), NAN]))
    np.testing.assert_array_equal(interquartile_mean([[1.0, NAN]] * size), [1, NAN])


def test_the_interval_of_two_values_is_their_range():
    """A resample is (a, a) or (b, b) with probability 1/4 each, and (a, b) otherwise."""
    got = estimate([[1.0, 10.0], [3.0, 10.0]])
    np.testing.assert_array_equal(got.point, [2, 10])
    np.testing.assert_array_equal(got.low, [1, 10])
    np.testing.assert_array_equal(got.high, [3, 10])


def test_the_interval_of_normal_numbers_has_the_width_that_theory_gives():
    """The 25 % trimmed mean of 400 standard normals has a standard error of about 1.09 / 20."""
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


def test_strata_are_resampled_separately_whatever_their_sizes():
    """All runs of a stratum are equal, so all resamples are, although the strata differ."""
    got = estimate([0.0, 100, 0, 7, 100, 0], strata=["a", "b", "a", "c", "b", "a"])
    assert got == Estimate(*[np.float64((0 + 0 + 7 + 100) / 4)] * 3)
    unstratified = estimate([0.0, 100, 0, 7, 100, 0])
    assert unstratified.low == 0 and unstratified.high > 50


# ---------------------------------------------------------------------------------------- by hand


def test_one_axis_is_one_task():
    x = np.random.default_rng(2).normal(size=30)
    assert probability_of_improvement(x, x[:7]) == probability_of_improvement(
        x[:, None], x[:7, None]
    )
    for one, two in zip(
        performance_profile(x, [0, 1]), performance_profile(x[:, None], [0, 1]), strict=True
    ):
        np.testing.assert_array_equal(one, two)


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
    """With y = 1, P is the fraction of twos in the resample of x = (0, 2).

    The resample is (0, 0) or (2, 2) with probability 1/4 each, and has one 2 otherwise.
    """
    assert probability_of_improvement([0.0, 2], [1.0]) == (0.5, 0, 1)
    assert probability_of_improvement([1.0], [0.0, 2]) == (0.5, 0, 1)
    assert probability_of_improvement([3.0, 2], [1.0, 0]) == (1, 1, 1)


def test_both_sides_of_a_probability_of_improvement_are_resampled():
    """For large samples of one distribution, U / (n · m) has the variance (1/n + 1/m) / 12."""
    x, y = np.random.default_rng(4).normal(size=(2, 300))
    got = probability_of_improvement(x, y, 20_000)
    assert float(got.high - got.low) == pytest.approx(2 * 1.96 * (2 / 300 / 12) ** 0.5, rel=0.05)


def test_a_performance_profile_by_hand():
    got = performance_profile([[1.0, 5], [3, NAN]], [0, 1, 2.9, 3, 5, -np.inf])
    np.testing.assert_array_equal(got.point, [0.75, 0.5, 0.5, 0.25, 0, 0.75])
    np.testing.assert_array_equal(got.low, [0.5, 0, 0, 0, 0, 0.5])
    np.testing.assert_array_equal(got.high, [1, 1, 1, 0.5, 0, 1])


def test_a_nan_score_makes_the_whole_estimate_nan():
    bad = [[1.0, 2], [3, NAN], [5, 6], [7, 8]]
    assert np.isnan(probability_of_improvement(bad, [[1.0, 2]])).all()
    assert np.isnan(probability_of_improvement([[1.0, 2]], bad)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: performance_profile([], [0]), "scores must be .* got the shape \\(0,\\)"),
        (
            lambda: performance_profile(np.zeros((2, 3, 4)), [0]),
            "scores must be .* got the shape \\(2, 3, 4\\)",
        ),
        (lambda: estimate([]), "at least one value"),
        (
            lambda: probability_of_improvement(np.ones((2, 3)), np.ones((2, 2))),
            "same tasks, got 3 and 2",
        ),
        (lambda: probability_of_improvement([1.0], np.ones((0, 1))), "y must be"),
        (lambda: performance_profile([1.0], []), "thresholds must be"),
        (lambda: performance_profile([1.0], [NAN]), "thresholds must be"),
        (lambda: performance_profile([[]], [0.0]), "scores must be"),
    ],
)
def test_bad_input_is_refused_with_a_message(call, message):
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
        lambda: probability_of_improvement(x, y),
        lambda: performance_profile(x, np.linspace(-3, 3, 100)),
    ):
        assert min(seconds(call) for _ in range(2)) < 1


# ------------------------------------------------------------------------ against SciPy and rliable


def matrices(tasks):
    """Scores with many ties."""
    values = st.integers(-8, 8).map(float) | st.floats(-1e3, 1e3)
    return hnp.arrays(float, st.tuples(st.integers(1, 20), st.just(tasks)), elements=values)


@given(matrices(2), matrices(2))
def test_the_probability_of_improvement_is_scipys_mann_whitney_u(x, y):
    """rliable's probability_of_improvement makes this call for each task."""
    pairs = zip(x.T, y.T, strict=True)
    expected = np.mean(
        [scipy.stats.mannwhitneyu(a, b, method="asymptotic").statistic for a, b in pairs]
    )
    got = probability_of_improvement(x, y, resamples=1).point
    assert got == pytest.approx(expected / (len(x) * len(y)), rel=1e-12, abs=1e-12)


def matrix(runs, tasks, shift=0.0):
    """Scores [runs, tasks]: a run is good or bad in all tasks, and tasks are far apart.

    So an interval from resampled rows, or from all numbers as one sample, is far from the
    stratified one.
    """
    run, task = np.indices((runs, tasks))
    return 10 * task + 3 * np.sin(7 * run + shift) + np.sin(5 * run * task + task + shift)


# Results of rliable 1.2.0 with arch 7.2.0, NumPy 2.4.6, SciPy 1.17.1 and pandas 2.3.3 (it needs
# arch < 8, which does not import with pandas 3). After numpy.random.seed(0):
# library.get_interval_estimates of each matrix with 50,000 resamples (20,000 for probabilities) and
# library.create_performance_profile with 50,000.
RLIABLE = {
    (12, 5): (20.547430846686755, 19.788482955221824, 21.214011108010183),
    (7, 1): (0.8018192136399378, -1.0998258574987605, 2.278933674232376),
    (3, 26): (126.72206254140863, 126.2829846657154, 127.14972160710495),
    (10, 4): (15.04347778960658, 14.109811018785608, 15.92816218417961),
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

    The 2.5 % point of R samples with standard deviation σ has the standard error
    √(0.025 · 0.975 / R) / φ(−1.96) · σ = 2.67 σ / √R, which is 0.019 σ for R = 20,000. An interval
    is 3.92 σ wide, so four standard errors, with rliable's smaller one added, are 2.3 % of its
    width. Where the values are discrete, an end may also fall on the next value (``step``).
    """
    low, high = expected
    bound = factor * 0.023 * (high - low) + step
    assert abs(got.low - low) <= bound
    assert abs(got.high - high) <= bound


def estimate_over_tasks(scores, resamples=20_000):
    """`estimate` over all runs of all tasks; each task is a stratum."""
    runs, tasks = scores.shape
    return estimate(scores.T.ravel(), resamples, strata=np.repeat(np.arange(tasks), runs))


@given(matrices(3))
def test_the_interquartile_mean_is_scipys_trimmed_mean_of_all_runs(scores):
    """rliable's aggregate_iqm makes the same call."""
    expected = scipy.stats.trim_mean(scores, proportiontocut=0.25, axis=None)
    assert estimate_over_tasks(scores, 1).point == pytest.approx(expected, rel=1e-12, abs=1e-9)


@pytest.mark.parametrize("shape", RLIABLE)
def test_interquartile_means_and_their_intervals_are_those_of_rliable(shape):
    point, *interval = RLIABLE[shape]
    got = estimate_over_tasks(matrix(*shape))
    assert got.point == pytest.approx(point, rel=1e-12)
    assert_same_interval(got, interval)


def test_the_bound_distinguishes_stratified_resampling_from_other_kinds():
    point, *interval = RLIABLE[12, 5]
    scores = matrix(12, 5)
    rows = np.random.default_rng(0).integers(0, 12, (20_000, 12))
    everything = np.random.default_rng(0).integers(0, 60, (20_000, 60))
    for samples in (scores[rows].reshape(20_000, -1), scores.ravel()[everything]):
        ends = np.percentile(interquartile_mean(samples, axis=1), [2.5, 97.5])
        with pytest.raises(AssertionError):
            assert_same_interval(Estimate(point, *ends), interval)


@pytest.mark.parametrize("case", IMPROVEMENT)
def test_the_probability_of_improvement_and_its_interval_are_those_of_rliable(case):
    x = matrix(12, 5)
    y = matrix(9, 5, 0.4)
    if case == "many equal":
        x = np.round(x)
        y = np.round(y)
    elif case == "one task":
        x = x[:, :1]
        y = matrix(9, 1, 0.4)
    point, *interval = IMPROVEMENT[case]
    got = probability_of_improvement(x, y, 20_000)
    assert got.point == pytest.approx(point, rel=1e-12)
    # The factor √2: both bootstraps have 20,000 resamples.
    assert_same_interval(got, interval, factor=2**0.5, step=0.5 / (12 * 9 * x.shape[1]))


def test_the_performance_profile_and_its_intervals_are_those_of_rliable():
    """The values are multiples of 1/60."""
    got = performance_profile(matrix(12, 5), THRESHOLDS, 20_000)
    np.testing.assert_allclose(got.point, PROFILE[0], rtol=1e-12)
    np.testing.assert_allclose([got.low, got.high], PROFILE[1:], atol=1e-9 + 1 / 60)
