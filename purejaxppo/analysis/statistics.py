"""Summaries over runs and their bootstrap intervals, as in Agarwal et al. (2021) and rliable.

Paper: arXiv:2108.13264. Scores are [runs, tasks], or [runs] for one task. All intervals are 95 %
percentile-bootstrap intervals. The resampling is seeded, so the same data give the same interval.
An interval estimates the variation of the result over seeds; for a single run it is the point
itself.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from purejaxppo.types import ConfigError

Values = np.floating | NDArray[np.floating]


class Estimate(NamedTuple):
    """A point estimate and the ends of its 95 % interval; arrays for several columns."""

    point: Values
    low: Values
    high: Values


def interquartile_mean(x: ArrayLike, axis: int = 0) -> Values:
    """The mean without the lowest and the highest quarter of the values, each rounded down.

    It is NaN if any value is NaN. Raises `ConfigError` if there are no values.
    """
    ordered = np.sort(np.asarray(x, float), axis=axis)
    size = ordered.shape[axis]
    if not size:
        raise ConfigError("an interquartile mean needs at least one value, got none")
    middle = np.take(ordered, range(size // 4, size - size // 4), axis=axis).mean(axis=axis)
    has_nan = np.isnan(np.take(ordered, -1, axis=axis))  # NaNs are sorted to the end
    return np.where(has_nan, np.nan, middle)[()]


def estimate(x: ArrayLike, resamples: int = 2000, strata: ArrayLike | None = None) -> Estimate:
    """The interquartile mean of each column of x [agents, ...] with its interval over agents.

    ``strata`` [agents] is the setting or task of each agent. Each stratum is resampled separately,
    with its own number of agents. A column with a NaN gives NaN.
    """
    x = np.asarray(x, float)
    point = interquartile_mean(x)
    stratum = (
        np.zeros(len(x), int)
        if strata is None
        else np.unique(np.asarray(strata), return_inverse=True)[1]
    )
    order = np.argsort(stratum, kind="stable")
    size = np.bincount(stratum)
    drawn = np.random.default_rng(0).integers(0, size[stratum[order]], (resamples, len(x)))
    rows = order[drawn + (np.cumsum(size) - size)[stratum[order]]]
    return _interval(point, interquartile_mean(x[rows], axis=1))


def probability_of_improvement(x: ArrayLike, y: ArrayLike, resamples: int = 2000) -> Estimate:
    """The probability that a run of X beats one of Y: mean over tasks of P(X > Y) + P(X = Y) / 2.

    ``x`` is [n, tasks] and ``y`` is [m, tasks]. For each task the probability is the Mann–Whitney U
    statistic divided by n · m (section 4.3). The interval comes from resampling the runs of x and y
    separately in each task. A NaN gives NaN; to rank a run without a score last, pass −inf.

    Raises `ConfigError` for empty scores or different numbers of tasks.
    """
    x = _score_matrix("x", x)
    y = _score_matrix("y", y)
    if x.shape[1] != y.shape[1]:
        raise ConfigError(f"x and y must have the same tasks, got {x.shape[1]} and {y.shape[1]}")
    rng = np.random.default_rng(0)
    points = []
    samples = []
    for a, b in zip(x.T, y.T, strict=True):
        beats = (a[:, None] > b) + 0.5 * (a[:, None] == b)
        beats[np.isnan(a)[:, None] | np.isnan(b)] = np.nan
        points.append(beats.mean())
        weights_a = _bootstrap_weights(rng, len(a), resamples)
        weights_b = _bootstrap_weights(rng, len(b), resamples)
        samples.append(((weights_a @ beats) * weights_b).sum(axis=1))
    return _interval(np.mean(points), np.mean(samples, axis=0))


def performance_profile(
    scores: ArrayLike, thresholds: ArrayLike, resamples: int = 2000
) -> Estimate:
    """The share of runs with a score > τ for each threshold τ, over all tasks: arrays [thresholds].

    This is the run-score distribution of section 4.2. Its intervals are pointwise, and the runs of
    each task are resampled separately. A NaN, the score of a run that diverged, is above no
    threshold. Raises `ConfigError` for empty scores or invalid thresholds.
    """
    scores = _score_matrix("scores", scores)
    thresholds = np.asarray(thresholds, float)
    if thresholds.ndim != 1 or not thresholds.size or np.isnan(thresholds).any():
        raise ConfigError(
            f"thresholds must be a list of at least one number and no NaN, got {thresholds}"
        )
    rng = np.random.default_rng(0)
    above = [(task[:, None] > thresholds).astype(float) for task in scores.T]
    samples = [_bootstrap_weights(rng, len(scores), resamples) @ task for task in above]
    return _interval(np.mean(above, axis=(0, 1)), np.mean(samples, axis=0))


def _bootstrap_weights(rng: np.random.Generator, runs: int, resamples: int) -> NDArray[np.floating]:
    """The share of draws that fall on each run in each resample [resamples, runs]."""
    return rng.multinomial(runs, np.full(runs, 1 / runs), resamples) / runs


def _interval(point: Values, samples: Values) -> Estimate:
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    return Estimate(point, low, high)


def _score_matrix(name: str, x: ArrayLike) -> NDArray[np.floating]:
    """The scores as [runs, tasks]."""
    x = np.asarray(x, float)
    if x.ndim not in (1, 2) or not x.size:
        raise ConfigError(
            f"{name} must be [runs] or [runs, tasks] with at least one of each, "
            f"got the shape {x.shape}"
        )
    return x.reshape(len(x), -1)
