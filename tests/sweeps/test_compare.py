"""`compare`: its training, its tables and its files."""

import json
import os
import signal

import numpy as np
import pandas as pd
import pytest
from small_envs import counter

from purejaxppo import Config, ConfigError, envs
from purejaxppo.analysis.curves import Curve
from purejaxppo.analysis.plots import comparison_figure
from purejaxppo.sweeps import compare as compare_module
from purejaxppo.sweeps.compare import Entry, compare, variant

ENV = "episodes of 5"
SMALL = {
    "num_envs": 4,
    "num_steps": 10,
    "num_minibatches": 1,
    "num_epochs": 1,
    "hidden_sizes": (4,),
}
NAMES = ["ppo/unclipped", "reinforce/none"]
NAN = np.nan


@pytest.fixture(autouse=True, scope="module")
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(envs._registered, ENV, lambda: counter()._replace(name=ENV))
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two algorithms, three seeds each: (entries, directory, plans)."""
    directory = tmp_path_factory.mktemp("compared") / "here"
    plans = []
    changes = {**SMALL, "total_timesteps": 400}
    entries = compare(
        [ENV],
        NAMES,
        seeds=3,
        eval_episodes=4,
        changes=changes,
        directory=directory,
        on_start=plans.append,
    )
    return entries, directory, plans


def entry(
    scores, returns=((1.0, 3.0, 2.0), (4.0, 1.0, 5.0)), name="ppo", env=ENV, interrupted=False
):
    curve = Curve(np.asarray([10.0, 20.0, 30.0]), np.asarray(returns))
    return Entry(
        env=env,
        name=name,
        config=Config(env=env),
        curve=curve,
        scores=np.asarray(scores),
        timesteps=30.0,
        steps_per_second=1000.0,
        interrupted=interrupted,
    )


def test_each_algorithm_is_trained_and_scored_with_its_own_settings(compared):
    entries, _, plans = compared
    assert [one.name for one in entries] == NAMES
    assert [one.config for one in entries] == [plan.config for plan in plans]
    assert (entries[0].config.objective, entries[1].config.baseline) == ("unclipped", "none")
    assert [one.config.whole_episodes for one in entries] == [False, True]
    for one in entries:
        assert one.scores.shape == (3,)
        assert (one.scores >= 1).all() and (one.scores <= 1 + 2 + 3 + 4 + 5).all()
        assert len(one.curve.returns) == 3 and 400 <= one.timesteps <= 440


def test_it_writes_a_table_data_and_a_figure(compared):
    entries, directory, _ = compared
    assert sorted(path.name for path in directory.iterdir()) == [
        "comparison.md",
        "comparison.png",
        "config.json",
        "curves.csv",
        "scores.csv",
    ]
    assert (directory / "comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    described = json.loads((directory / "config.json").read_text())
    assert [config.pop("asked") for config in described["configs"]] == [
        f"{name} on {ENV}" for name in NAMES
    ]
    assert [Config.from_dict(config) for config in described["configs"]] == [
        one.config for one in entries
    ]
    scores = pd.read_csv(directory / "scores.csv")
    np.testing.assert_allclose(
        scores.score, np.concatenate([one.scores for one in entries]), rtol=1e-6
    )
    assert scores.algorithm.tolist() == [name for name in NAMES for _ in range(3)]
    curves = pd.read_csv(directory / "curves.csv")
    mine = curves[(curves.algorithm == NAMES[1]) & (curves.seed == 2)]
    np.testing.assert_allclose(mine.episode_return, entries[1].curve.returns[2], rtol=1e-6)
    np.testing.assert_allclose(mine.timesteps, entries[1].curve.timesteps)
    text = (directory / "comparison.md").read_text()
    assert text == compare_module.markdown(entries) and text.count(f"| {ENV} |") == 2


def test_a_row_of_a_literal_example():
    """The quartiles of 1 … 5 are 2 and 4; the seeds fall 1 and 3 below their best, 2 on average."""
    (row,) = compare_module.rows([entry([5.0, 1.0, 2.0, 3.0, 4.0])])
    assert row["spread (worst … best)"] == "2.0 (1.0 … 5.0)"
    assert row["final return [95 %]"].startswith("3.0 [")
    assert (row["largest fall"], row["steps"], row["steps/s"]) == ("2.0", "30", "1,000")


def test_a_diverged_seed_is_reported_and_counts_in_no_mean():
    rows = compare_module.rows(
        [entry([3.0, NAN, 3.0], [[1, 5, 2], [4, NAN, NAN], [9, 2, 3]]), entry([NAN], [[NAN] * 3])]
    )
    assert [row["largest fall"] for row in rows] == ["3.0", "–"]
    assert rows[0]["algorithm"] == "ppo (1 of 3 seeds diverged)"
    assert rows[0]["final return [95 %]"] == "3.0 [3.0, 3.0]"
    assert (rows[1]["final return [95 %]"], rows[1]["spread (worst … best)"]) == ("–", "–")


def test_the_figure_has_a_row_for_each_environment_and_a_line_for_each_algorithm():
    curve = entry([0.0]).curve
    diverged = Curve(np.asarray([10.0, 20.0]), np.full((2, 2), NAN))
    figure = comparison_figure(
        {"one": {"ppo": curve, "trpo": curve, "reinforce": diverged}, "two": {"ppo": curve}}
    )
    lines = [len(axes.lines) for axes in figure.axes]
    assert lines == [2, 2, 1, 1]
    left, right = figure.axes[:2]
    np.testing.assert_allclose(left.lines[0].get_ydata(), [2.5, 2.0, 3.5])
    # The distance between the quartiles of two values.
    np.testing.assert_allclose(right.lines[0].get_ydata(), [1.5, 1.0, 1.5])
    assert left.get_title().startswith("one") and figure.axes[2].get_title().startswith("two")
    assert left.lines[0].get_color() != left.lines[1].get_color()


@pytest.mark.parametrize(
    ("names", "algorithms", "more", "sentence"),
    [
        ([ENV], ["ppo", "ppo"], {}, "each given once"),
        ([], ["ppo"], {}, "at least one environment"),
        ([ENV], ["ppo/none"], {}, "'ppo/none' is not a variant of an algorithm; known: ppo/clip"),
        ([ENV], ["trpo/clip"], {}, "not a variant"),
        ([ENV], ["pppo"], {}, "did you mean 'ppo'"),
        ([ENV], ["ppo"], {"seeds": 0}, "seeds = 0"),
        ([ENV], ["ppo"], {"key": 2**32}, "key = 4294967296"),
        (
            [ENV],
            ["ppo/clip"],
            {"changes": {"objective": "unclipped"}},
            "objective cannot be changed",
        ),
        (["CartPole-v2"], ["ppo"], {}, "did you mean 'CartPole-v1'?"),
        ([ENV], ["ppo"], {"eval_episodes": 0}, "eval_episodes = 0"),
        (
            [ENV],
            ["ppo", "reinforce"],
            {"changes": {"num_steps": 4, "num_minibatches": 1}},
            "set num_steps=5",
        ),
    ],
)
def test_a_mistake_is_refused_before_anything_is_trained_or_written(
    tmp_path, names, algorithms, more, sentence
):
    with pytest.raises(ConfigError) as caught:
        compare(names, algorithms, directory=tmp_path / "new", on_start=pytest.fail, **more)
    assert sentence in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_without_a_budget_all_get_the_largest_tuned_one(monkeypatch):
    planned = compare_module._plan_runs("CartPole-v1", ["ppo", "trpo", "reinforce"], {})
    tuned = [
        Config.for_env("CartPole-v1", algorithm=name).total_timesteps
        for name in ("ppo", "trpo", "reinforce")
    ]
    assert len(set(tuned)) == 3
    assert [config.total_timesteps for *_, config in planned] == [max(tuned)] * 3
    planned = compare_module._plan_runs("CartPole-v1", ["ppo"], {"total_timesteps": 7})
    assert planned[0][2].total_timesteps == 7


def test_ctrl_c_returns_the_entries_so_far_and_marks_the_interrupted_one(monkeypatch):
    def stop(plan):
        os.kill(os.getpid(), signal.SIGINT)

    changes = {**SMALL, "total_timesteps": 400}
    (last,) = compare([ENV], NAMES, seeds=2, eval_episodes=2, changes=changes, on_progress=stop)
    assert last.interrupted
    assert compare_module.rows([last])[0]["algorithm"] == "ppo/unclipped (interrupted)"

    def while_compiling(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_module, "fit", while_compiling)
    assert compare([ENV], NAMES, changes=changes) == []


def test_a_variant_is_the_tuned_config_with_one_field_changed():
    assert variant("CartPole-v1", "ppo") == Config.for_env("CartPole-v1")
    assert variant("CartPole-v1", "ppo/fixed_kl") == Config.for_env(
        "CartPole-v1", objective="fixed_kl"
    )
    assert variant("CartPole-v1", "reinforce/leave_one_out", gamma=1).baseline == "leave_one_out"
