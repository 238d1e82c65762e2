"""Summaries over runs and their bootstrap intervals, after Agarwal et al. (2021), arXiv:2108.13264, and its rliable.

Scores are [runs, tasks]; [runs] are those of one task. All intervals are 95 % percentile-bootstrap intervals, and the
resampling is seeded, so the same data give the same interval. An interval says how much the result would differ with
other seeds; of a single run it is the point itself.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from purejaxppo.types import ConfigError

Values = np.floating | NDArray[np.floating]


class Estimate(NamedTuple):
    """A point and the two ends of its 95 % interval; arrays where several columns were summarised."""

    point: Values
    low: Values
    high: Values


def interquartile_mean(x: ArrayLike, axis: int = 0) -> Values:
    """The mean of the middle half: a quarter of the values, rounded down, is left out at either end.

    A NaN among the values gives NaN.
    """
    ordered = np.sort(np.asarray(x, float), axis=axis)
    size = ordered.shape[axis]
    if not size:
        raise ConfigError("an interquartile mean needs at least one value, got none")
    middle = np.take(ordered, range(size // 4, size - size // 4), axis=axis).mean(axis=axis)
    return np.where(np.isnan(np.take(ordered, -1, axis=axis)), np.nan, middle)[
        ()
    ]  # NaNs are sorted to the end


def estimate(x: ArrayLike, resamples: int = 2000, strata: ArrayLike | None = None) -> Estimate:
    """The interquartile mean of each column of x [agents, ...] with its interval over agents.

    ``strata`` [agents] says to which setting or task an agent belongs: each is then resampled by itself, whatever its
    number of agents. A column with a NaN gives NaN.
    """
    x = np.asarray(x, float)
    point = interquartile_mean(x)
    stratum = (
        np.zeros(len(x), int)
        if strata is None
        else np.unique(np.asarray(strata), return_inverse=True)[1]
    )
    order, size = np.argsort(stratum, kind="stable"), np.bincount(stratum)
    drawn = np.random.default_rng(0).integers(0, size[stratum[order]], (resamples, len(x)))
    rows = order[drawn + (np.cumsum(size) - size)[stratum[order]]]
    return _interval(point, interquartile_mean(x[rows], axis=1))


def probability_of_improvement(x: ArrayLike, y: ArrayLike, resamples: int = 2000) -> Estimate:
    """How probable it is that a run of X beats one of Y: the mean over the tasks of P(X > Y) + P(X = Y) / 2.

    ``x`` [n, tasks] and ``y`` [m, tasks]; of each task it is the Mann–Whitney U statistic over n · m (section 4.3). The
    interval is from resampling the runs of x and those of y apart, task by task. A NaN gives NaN; where a run without a
    score is to count as the worst, give −inf.
    """
    x, y = _matrix("x", x), _matrix("y", y)
    if x.shape[1] != y.shape[1]:
        raise ConfigError(f"x and y must have the same tasks, got {x.shape[1]} and {y.shape[1]}")
    rng, points, samples = np.random.default_rng(0), [], []
    for a, b in zip(x.T, y.T, strict=True):
        beats = (a[:, None] > b) + 0.5 * (a[:, None] == b)
        beats[np.isnan(a)[:, None] | np.isnan(b)] = np.nan
        points.append(beats.mean())
        samples.append(
            ((_shares(rng, len(a), resamples) @ beats) * _shares(rng, len(b), resamples)).sum(
                axis=1
            )
        )
    return _interval(np.mean(points), np.mean(samples, axis=0))


def performance_profile(
    scores: ArrayLike, thresholds: ArrayLike, resamples: int = 2000
) -> Estimate:
    """For each threshold τ the share of all runs and tasks with a score > τ, with pointwise intervals: arrays [τ].

    The run-score distribution of section 4.2, the runs of every task resampled by themselves. A NaN, the score of a run
    that diverged, is above no threshold.
    """
    scores, thresholds = _matrix("scores", scores), np.asarray(thresholds, float)
    if thresholds.ndim != 1 or not thresholds.size or np.isnan(thresholds).any():
        raise ConfigError(
            f"thresholds must be a list of at least one number and no NaN, got {thresholds}"
        )
    rng = np.random.default_rng(0)
    above = [(task[:, None] > thresholds).astype(float) for task in scores.T]
    samples = [_shares(rng, len(scores), resamples) @ task for task in above]
    return _interval(np.mean(above, axis=(0, 1)), np.mean(samples, axis=0))


def _shares(rng: np.random.Generator, runs: int, resamples: int) -> NDArray[np.floating]:
    """How often a resample draws each run, as a share of all its draws; [resamples, runs]."""
    return rng.multinomial(runs, np.full(runs, 1 / runs), resamples) / runs


def _interval(point: Values, samples: Values) -> Estimate:
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    return Estimate(point, low, high)


def _matrix(name: str, x: ArrayLike) -> NDArray[np.floating]:
    x = np.asarray(x, float)
    if x.ndim not in (1, 2) or not x.size:
        raise ConfigError(
            f"{name} must be [runs] or [runs, tasks] with at least one of each, got the shape {x.shape}"
        )
    return x.reshape(len(x), -1)
