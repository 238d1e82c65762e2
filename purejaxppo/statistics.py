"""Summaries over agents: the interquartile mean and its bootstrap interval (Agarwal et al. 2021)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = np.floating | NDArray[np.floating]


class Estimate(NamedTuple):
    """A point and the two ends of its 95 % interval; arrays where several columns were summarised."""

    point: Values
    low: Values
    high: Values


def interquartile_mean(x: ArrayLike, axis: int = 0) -> Values:
    """The mean of the middle half: a quarter of the values, rounded down, is left out at either end."""
    ordered = np.sort(np.asarray(x, float), axis=axis)
    cut = ordered.shape[axis] // 4
    return np.take(ordered, range(cut, ordered.shape[axis] - cut), axis=axis).mean(axis=axis)


def estimate(x: ArrayLike, resamples: int = 2000) -> Estimate:
    """The interquartile mean of each column of x [agents, ...] with its 95 % percentile-bootstrap interval over agents.

    A column with a NaN gives NaN. The resampling is seeded, so the same data give the same interval.
    """
    x = np.asarray(x, float)
    rows = np.random.default_rng(0).integers(0, len(x), (resamples, len(x)))
    samples = interquartile_mean(x[rows], axis=1)
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    return Estimate(interquartile_mean(x), low, high)
