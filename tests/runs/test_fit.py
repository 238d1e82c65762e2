"""`fit`: the numbers of `make_train`, progress, and a complete run directory."""

import csv
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentences import sentence_of
from small_envs import DISCRETE, LINEAR, counter

from purejaxppo import Config, fit, load_policy, make_train
from purejaxppo.analysis.curves import windowed
from purejaxppo.metrics import with_nan
from purejaxppo.runs import chunks, compilation
from purejaxppo.runs.agents import Progress
from purejaxppo.runs.run import load_policies
from purejaxppo.setup import set_up
from purejaxppo.types import Metrics

TINY = Config(
    num_envs=2,
    num_steps=4,
    num_minibatches=1,
    num_epochs=1,
    total_timesteps=60,
    hidden_sizes=(4,),
    normalize_obs=True,
)
K = 8  # iterations: 60 steps, rounded up to 64
ENV = counter(limit=9, longest=12)  # in some iterations no episode finishes
FIELDS = [name for name in Metrics._fields if name != "extra"]


@pytest.fixture(autouse=True, scope="module")
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Observed:
    """A run with its plans and progress."""

    def __init__(self, directory, chunk_seconds, seeds, config=TINY, key=3):
        self.plans = []
        self.progress = []
        self.directory = directory
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks, "CHUNK_SECONDS", chunk_seconds)
            self.run = fit(
                config,
                seeds=seeds,
                key=key,
                env=ENV,
                directory=directory,
                on_start=self.plans.append,
                on_progress=self.progress.append,
            )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One seed; every chunk is one iteration."""
    return Observed(tmp_path_factory.mktemp("one") / "below" / "run", 0, 1)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three seeds; the fewest chunks possible."""
    return Observed(tmp_path_factory.mktemp("three") / "run", 100, 3)


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """A learning rate that makes any network diverge."""
    return Observed(
        tmp_path_factory.mktemp("diverged") / "run", 0, 1, TINY.replace(lr=1e38, anneal_lr=False)
    )


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# ------------------------------------------------------------------------------ from a `Setup`


def test_a_set_up_contains_the_model(tmp_path):
    setup = set_up(TINY, counter(), LINEAR)
    run = fit(setup, directory=tmp_path / "run")
    assert run.model is LINEAR
    policy = load_policy(tmp_path / "run" / "policy", env=counter(), model=LINEAR)
    obs = np.ones(3, np.float32)
    assert run.policy().act(obs) == policy.act(obs)
    for other in ({"env": counter()}, {"model": LINEAR}, {"reward_fn": lambda *_: 0.0}):
        assert "pass them there" in sentence_of(lambda other=other: fit(setup, **other))


# ------------------------------------------------------------------------------ equal to make_train


@pytest.mark.exact
def test_one_seed_in_many_chunks_equals_make_train_exactly(one):
    result = jax.jit(make_train(TINY, ENV))(jax.random.key(3))
    assert_equal(jax.tree.map(lambda x: x[0], one.run.metrics), with_nan(result.metrics))
    assert_equal(one.run.state.params, result.state.params)
    assert_equal(one.run.state.normalizer, result.state.normalizer)
    assert int(one.run.state.iteration) == K


@pytest.mark.exact
def test_three_seeds_equal_vmapped_make_train_exactly(three):
    result = jax.jit(jax.vmap(make_train(TINY, ENV)))(jax.random.split(jax.random.key(3), 3))
    assert_equal(three.run.metrics, with_nan(result.metrics))
    assert_equal(three.run.state.params, result.state.params)
    assert three.run.metrics.policy_loss.shape == (3, K)
    assert len({float(x) for x in three.run.metrics.policy_loss[:, 0]}) == 3


def test_the_length_of_chunks_depends_on_their_time(one, three):
    """So the two tests above cover every possible boundary, and almost none."""
    assert [now.iterations for now in one.progress] == list(range(1, K + 1))
    assert [now.iterations for now in three.progress] == [1, K]


# --------------------------------------------------------------------------------------- progress


def test_there_is_one_plan_and_it_is_that_of_the_run(one, three):
    for observed, seeds in ((one, 1), (three, 3)):
        (plan,) = observed.plans
        assert plan.config == TINY.replace(env=ENV.name)
        assert plan.seeds == seeds and plan == observed.run.plan
        assert plan.device.startswith(jax.devices()[0].platform)
        assert plan.memory_bytes > 0 and plan.compile_seconds > 0
        assert not observed.run.interrupted and observed.run.train_seconds > 0


def test_progress_ends_at_the_last_iteration_with_the_right_steps(one, three):
    for observed in (one, three):
        iterations = [now.iterations for now in observed.progress]
        assert iterations == sorted(set(iterations)) and iterations[-1] == TINY.num_iterations == K
        assert [now.timesteps for now in observed.progress] == [8 * k for k in iterations]
        assert all(now.steps_per_second > 0 for now in observed.progress)


def test_the_return_in_progress_is_nan_where_no_episode_finished(one):
    """Each chunk is one iteration here."""
    expected = np.asarray(one.run.metrics.episode_return[0])
    assert np.isnan(expected).any() and np.isfinite(expected).any()
    np.testing.assert_allclose([now.episode_return for now in one.progress], expected, rtol=1e-6)


def test_the_return_in_progress_is_the_mean_over_the_episodes_of_all_seeds(three):
    first, rest = three.progress
    metrics = three.run.metrics
    for now, part in ((first, slice(0, 1)), (rest, slice(1, None))):
        returns = metrics.episode_return[:, part]
        episodes = metrics.episodes[:, part]
        finished = episodes > 0
        expected = (
            np.average(returns[finished], weights=episodes[finished]) if finished.any() else np.nan
        )
        np.testing.assert_allclose(now.episode_return, expected, rtol=1e-6)
    assert isinstance(rest, Progress) and math.isfinite(rest.episode_return)


# --------------------------------------------------------------------------------------- divergence


def test_a_healthy_run_has_not_diverged(one, three):
    assert (one.run.diverged_at, three.run.diverged_at) == ([None], [None] * 3)


def test_a_diverged_run_names_the_first_bad_iteration_and_stops_early(diverged):
    metrics = diverged.run.metrics
    losses = np.stack([metrics.policy_loss, metrics.value_loss, metrics.grad_norm])
    bad = ~np.isfinite(losses).all(axis=0)
    assert diverged.run.diverged_at == [int(row.argmax()) + 1 for row in bad]
    assert bad.any(axis=1).all()
    done = metrics.timesteps.shape[1]
    assert done == diverged.progress[-1].iterations < K
    np.testing.assert_array_equal(metrics.timesteps[0], 8 * np.arange(1, done + 1))


def test_a_diverged_run_is_never_plotted_as_a_return_of_0(diverged):
    curve = windowed(diverged.run.metrics)
    for row, iteration in zip(curve.returns, diverged.run.diverged_at, strict=True):
        assert np.isnan(row[iteration - 1 :]).all()
    assert (diverged.directory / "learning_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_divergence_is_reported_for_each_seed(three):
    """Metrics by hand: the first of two agents diverges in iteration 2."""
    ones = np.ones((2, 3))
    fields = dict.fromkeys(Metrics._fields, ones) | {"extra": {}}
    metrics = Metrics(**fields | {"grad_norm": np.array([[1.0, np.inf, 1.0], [1, 1, 1]])})
    assert dataclasses.replace(three.run, seeds=2, metrics=metrics).diverged_at == [2, None]


# ------------------------------------------------------------------------------------ run directory


def rows_of(directory):
    with (directory / "metrics.csv").open(newline="") as file:
        return sorted(
            csv.DictReader(file), key=lambda row: (int(row["seed"]), int(row["iteration"]))
        )


def test_a_run_directory_has_exactly_the_expected_files(one, three):
    names = ["config.json", "learning_curve.png", "metrics.csv", "policy"]
    for observed, policies in (
        (one, ["params.npz", "policy.json"]),
        (three, ["seed_0", "seed_1", "seed_2"]),
    ):
        assert sorted(path.name for path in observed.directory.iterdir()) == names
        assert sorted(path.name for path in (observed.directory / "policy").iterdir()) == policies
        assert (observed.directory / "learning_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_configuration_can_be_read_back(one, three):
    for observed, seeds in ((one, 1), (three, 3)):
        description = json.loads((observed.directory / "config.json").read_text())
        assert Config.from_dict(description["config"]) == TINY.replace(env=ENV.name)
        assert (description["seeds"], description["key"]) == (seeds, 3)
        assert description["jax"] == jax.__version__


def test_there_is_a_row_of_exact_values_per_seed_and_iteration(one, three):
    for observed, seeds in ((one, 1), (three, 3)):
        rows = rows_of(observed.directory)
        metrics = observed.run.metrics
        assert [(int(row["seed"]), int(row["iteration"])) for row in rows] == [
            (seed, k) for seed in range(seeds) for k in range(1, K + 1)
        ]
        assert set(rows[0]) == {"seed", "iteration", *FIELDS, *metrics.extra}
        columns = {name: getattr(metrics, name) for name in FIELDS} | metrics.extra
        for name, x in columns.items():
            written = np.array([np.float32(row[name] or "nan") for row in rows])
            np.testing.assert_array_equal(written, np.asarray(x, np.float32).ravel(), err_msg=name)


def test_the_saved_policies_are_the_trained_ones(one, three):
    obs = jnp.asarray(
        np.random.default_rng(0).normal(size=(20, *ENV.observation_space.shape)), jnp.float32
    )
    (policy,) = load_policies(one.directory)
    assert_equal(policy.params, one.run.state.params)
    assert policy.action_space == DISCRETE
    loaded = load_policies(three.directory)
    assert len(loaded) == 3
    for seed, policy in enumerate(loaded):
        assert_equal(policy.params, jax.tree.map(lambda x, i=seed: x[i], three.run.state.params))
        np.testing.assert_array_equal(policy.act(obs), three.run.policy(seed).act(obs))
    assert_equal(
        load_policy(three.directory / "policy" / "seed_1").obs_moments, loaded[1].obs_moments
    )


# -------------------------------------------------------------------------------------- bad input


def contents(directory):
    return {
        str(path): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


@pytest.fixture
def no_training(monkeypatch):
    def fail(*arguments):
        raise AssertionError("training was compiled")

    monkeypatch.setattr(compilation, "ThreadPoolExecutor", fail)


@pytest.mark.usefixtures("no_training")
def test_an_existing_directory_is_refused_before_training(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("of an earlier run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for name in ("run", "empty", "file"):
        message = sentence_of(lambda name=name: fit(TINY, env=ENV, directory=tmp_path / name))
        expected = (
            f"{tmp_path / name} exists already, and a run never overwrites: "
            "choose another directory"
        )
        assert message == expected
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("no_training")
def test_a_directory_that_cannot_be_made_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    directory = tmp_path / "file" / "below" / "run"
    message = sentence_of(lambda: fit(TINY, env=ENV, directory=directory))
    assert message == f"cannot make the run directory {directory}: Not a directory"
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("seeds", [0, -1, True])
def test_seeds_are_a_positive_integer(seeds, tmp_path):
    message = sentence_of(lambda: fit(TINY, seeds=seeds, env=ENV, directory=tmp_path / "run"))
    assert message == f"seeds = {seeds!r}: it must be an integer of at least 1 and below 2**32"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"num_envs": 0}, "num_envs = 0: it must be an integer of at least 1"),
        ({"LR": math.nan}, "lr = nan: it must be a finite number of at least 0"),
        ({"env": "CartPole-v2"}, "did you mean 'CartPole-v1'?"),
    ],
)
def test_a_wrong_configuration_makes_no_directory(config, part, tmp_path):
    assert part in sentence_of(lambda: fit(config, directory=tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_batched_configuration_makes_no_directory(tmp_path):
    for config in (
        TINY.replace(lr=np.array([1e-3, 1e-4])),
        TINY.replace(env="MountainCarContinuous-v0", lr=jnp.ones(2)),
    ):
        assert "lr is an array of shape (2,)" in sentence_of(
            lambda config=config: fit(config, env=ENV, directory=tmp_path / "run")
        )
        assert list(tmp_path.iterdir()) == []
