"""Learning curves: means are weighted by episodes, and every agent is shown."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from purejaxppo.analysis.curves import windowed
from purejaxppo.analysis.plots import learning_curve
from purejaxppo.types import Metrics

NAN = np.nan


def metrics(returns, episodes, loss=None):
    """Metrics with real values only in the fields of a curve; 10 steps per iteration."""
    returns = np.asarray(returns, float)
    episodes = np.asarray(episodes)
    ones = np.ones(returns.shape)
    loss = ones if loss is None else np.asarray(loss, float)
    fields = dict.fromkeys(Metrics._fields, ones) | {
        "timesteps": np.broadcast_to(10 * np.arange(1, returns.shape[-1] + 1), returns.shape),
        "episode_return": returns,
        "episodes": episodes,
        "value_loss": loss,
        "extra": {},
    }
    return Metrics(**fields)


def test_windowed_means_are_weighted_by_the_number_of_episodes():
    curve = windowed(metrics([1.0, 5.0, NAN, 2.0, 8.0, 8.0], [3, 1, 0, 4, 0, 2]), num_windows=2)
    np.testing.assert_array_equal(curve.timesteps, [30, 60])
    np.testing.assert_allclose(
        curve.returns, [[(3 * 1 + 1 * 5) / 4, (4 * 2 + 2 * 8) / 6]], rtol=1e-12
    )


def test_a_window_without_a_finished_episode_is_nan_and_never_0():
    curve = windowed(metrics([NAN, NAN, 4.0, NAN], [0, 0, 1, 0]), num_windows=4)
    np.testing.assert_array_equal(curve.returns, [[NAN, NAN, 4.0, NAN]])


def test_fewer_iterations_than_windows_give_one_point_each():
    curve = windowed(metrics([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.ones((2, 3), int)))
    np.testing.assert_array_equal(curve.timesteps, [10, 20, 30])
    np.testing.assert_array_equal(curve.returns, [[1, 2, 3], [4, 5, 6]])


def test_windows_do_not_overlap_and_cover_every_iteration():
    rng = np.random.default_rng(0)
    returns = rng.normal(size=101)
    episodes = rng.integers(0, 4, 101)
    curve = windowed(metrics(returns, episodes), num_windows=7)
    ends = (curve.timesteps / 10).astype(int)
    assert len(ends) == 7 and ends[-1] == 101
    for start, end, got in zip([0, *ends[:-1]], ends, curve.returns[0], strict=True):
        expected = np.average(returns[start:end], weights=episodes[start:end])
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_agents_whose_iterations_differ_in_length_share_their_windows():
    """The iterations end at steps 10, 30, 60, 100 and 20, 40, 60, 80.

    A window has at least 40 steps, so there are two windows of 50.
    """
    both = metrics([[1.0, 2, 3, 4], [5, 6, 7, 8]], [[1, 1, 2, 1], [1, 3, 1, 1]])
    curve = windowed(both._replace(timesteps=np.asarray([[10, 30, 60, 100], [20, 40, 60, 80]])))
    np.testing.assert_array_equal(curve.timesteps, [40, 100])
    np.testing.assert_allclose(
        curve.returns, [[(1 + 2) / 2, (2 * 3 + 4) / 3], [(5 + 3 * 6) / 4, (7 + 8) / 2]]
    )


def test_an_agent_that_stopped_early_does_not_truncate_the_curves_of_the_others():
    """The iterations end at steps 10, 20, 20, 20 and 40, 80, 120, 160.

    There are four windows of 40, and the first agent has returns in the first one only.
    """
    both = metrics([[1.0, 2, NAN, NAN], [5, 6, 7, 8]], [[1, 1, 0, 0], [1, 1, 1, 1]])
    curve = windowed(both._replace(timesteps=np.asarray([[10, 20, 20, 20], [40, 80, 120, 160]])))
    np.testing.assert_array_equal(curve.returns, [[1.5, NAN, NAN, NAN], [5, 6, 7, 8]])
    one = windowed(metrics([[3.0], [4.0]], [[1], [1]])._replace(timesteps=np.asarray([[10], [14]])))
    np.testing.assert_array_equal(one.returns, [[3.0], [4.0]])


@pytest.mark.parametrize("bad", [NAN, np.inf])
def test_returns_of_an_agent_are_nan_from_its_divergence_onwards(bad):
    loss = [[1.0, 1, 1, 1], [1, bad, 1, 1]]
    curve = windowed(
        metrics([[1.0, 2, 3, 4], [5, 0, 0, 0]], np.ones((2, 4), int), loss), num_windows=4
    )
    np.testing.assert_array_equal(curve.returns, [[1, 2, 3, 4], [5, NAN, NAN, NAN]])


@pytest.mark.parametrize("shape", [(12,), (1, 12), (5, 12)])
def test_a_learning_curve_is_a_figure_with_labelled_axes(shape):
    rng = np.random.default_rng(0)
    figure = learning_curve(
        metrics(rng.normal(size=shape), np.ones(shape, int)), "PPO on an environment"
    )
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("environment steps", "episode return")
    assert axes.get_title() == "PPO on an environment"
    agents = shape[0] if len(shape) == 2 else 1
    (legend,) = [text.get_text() for text in axes.get_legend().get_texts()]
    expected = "one seed" if agents == 1 else "interquartile mean of 5 seeds, 95 % interval"
    assert legend.startswith(expected)
    assert len(axes.lines) == (1 if agents == 1 else agents + 1)
    figure.canvas.draw()


def test_the_drawn_line_is_the_interquartile_mean_of_the_seeds():
    returns = np.array([[0.0, 10], [1, 11], [2, 12], [300, -500]])
    (axes,) = learning_curve(metrics(returns, np.ones((4, 2), int))).axes
    np.testing.assert_array_equal(axes.lines[-1].get_xdata(), [10, 20])
    np.testing.assert_allclose(axes.lines[-1].get_ydata(), [1.5, 10.5])


@pytest.mark.parametrize("shape", [(6,), (3, 6)])
def test_a_learning_curve_without_a_finished_episode_can_be_drawn(shape):
    figure = learning_curve(metrics(np.full(shape, NAN), np.zeros(shape, int)))
    (axes,) = figure.axes
    assert axes.get_xlabel() == "environment steps"
    assert all(np.isnan(line.get_ydata()).all() for line in axes.lines)
    figure.canvas.draw()


def test_a_seed_without_episodes_does_not_hide_the_others():
    """The line is the mean over the seeds that have a return, not NaN."""
    returns = np.array([[1.0, 2, 3], [3, 4, 5], [NAN] * 3])
    episodes = np.array([[1] * 3, [1] * 3, [0] * 3])
    (axes,) = learning_curve(metrics(returns, episodes)).axes
    np.testing.assert_allclose(axes.lines[-1].get_ydata(), [2.0, 3.0, 4.0])
