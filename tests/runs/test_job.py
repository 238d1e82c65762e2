"""A supervised trainer runs, stops, is killed and resumes like the training of agents."""

import csv
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from killed import Killed

from purejaxppo.metrics import MetricsDescription
from purejaxppo.runs import chunks
from purejaxppo.runs.job import run_job
from purejaxppo.runs.programs import Job
from purejaxppo.runs.session import Evaluator
from purejaxppo.types import ConfigError, Trainer

ITERATIONS = 12
BATCH = 32
SLOPE = jnp.array([2.0, -1.0, 0.5])
METRICS = MetricsDescription(
    progress="examples",
    plotted="loss",
    is_finite=lambda metrics: jnp.isfinite(metrics["loss"]),
    groups={"loss": "fit"},
)


class Regression(NamedTuple):
    """The state of a linear regression, which shares no field with that of an agent."""

    weights: Any
    optimizer: Any
    key: Any
    examples: Any


def regression(lr=0.1):
    """Adam on batches of y = SLOPE · x + noise. ``params`` are initial weights."""
    optimizer = optax.adam(lr)

    def init(key, params=None):
        weights = jnp.zeros(3) if params is None else params
        zero = jax.random.key_data(key)[0].astype(jnp.int32) * 0  # batched if the key is
        return Regression(weights + zero, optimizer.init(weights + zero), key, zero)

    def step(state, frozen=None):
        key_x, key_noise, key = jax.random.split(state.key, 3)
        x = jax.random.normal(key_x, (BATCH, 3))
        y = x @ (SLOPE if frozen is None else frozen) + 0.1 * jax.random.normal(key_noise, (BATCH,))
        loss, gradient = jax.value_and_grad(lambda w: ((x @ w - y) ** 2).mean())(state.weights)
        change, opt_state = optimizer.update(gradient, state.optimizer)
        examples = state.examples + BATCH
        metrics = {"loss": loss, "examples": examples, "grad_norm": optax.tree.norm(gradient)}
        return Regression(state.weights + change, opt_state, key, examples), metrics

    return Trainer(init, step)


JOB = Job(regression, ITERATIONS, METRICS)


@pytest.fixture(autouse=True)
def one_iteration_per_chunk(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 0)


def assert_same(got, expected):
    data = [jax.random.key_data(x.key) for x in (got.state, expected.state)]
    np.testing.assert_array_equal(*data)
    jax.tree.map(
        np.testing.assert_array_equal,
        (got.state._replace(key=0), got.metrics, got.best),
        (expected.state._replace(key=0), expected.metrics, expected.best),
    )


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_job_is_its_trainer_in_a_scan(seeds):
    result = run_job(JOB, seeds=seeds, key=4)

    def train(key):
        step = regression().step
        return jax.lax.scan(lambda state, _: step(state), regression().init(key), None, ITERATIONS)

    keys = jax.random.split(jax.random.key(4), seeds)
    run = jax.vmap(train) if seeds > 1 else train
    state, metrics = jax.jit(run)(keys if seeds > 1 else jax.random.key(4))
    np.testing.assert_array_equal(result.state.weights, state.weights)
    for name in ("loss", "examples", "grad_norm"):
        np.testing.assert_array_equal(result.metrics[name].squeeze(), metrics[name])
    assert result.metrics["loss"][0, -1] < result.metrics["loss"][0, 0]


def test_params_and_frozen_reach_the_trainer():
    result = run_job(JOB, params=jnp.ones(3), frozen=jnp.ones(3))
    assert result.metrics["loss"][0, 0] < 0.05  # the noise alone
    assert run_job(JOB, params=jnp.ones(3)).metrics["loss"][0, 0] > 1


def train(directory, stop=None, resume=False, seeds=1):
    """Train with a checkpoint after every iteration; after iteration ``stop`` the run is killed."""

    def on_chunk(chunk):
        if chunk.done == stop:
            raise Killed

    try:
        return run_job(
            JOB,
            seeds=seeds,
            key=4,
            directory=directory,
            identity={"task": "regression", "lr": 0.1},
            resume=resume,
            checkpoint_seconds=0.0,
            loggers=["tensorboard"],
            evaluator_of=smallest_weight_error,
            on_chunk=on_chunk,
        )
    except Killed:
        return None


def smallest_weight_error(programs, keys):
    """Every fifth iteration the distance to the true weights; ``best`` is the smallest so far."""

    def error(state):
        return np.linalg.norm(np.asarray(state.weights) - np.asarray(SLOPE), axis=-1)

    def step(best, chunk):
        now = error(chunk.state)
        column = np.reshape(now, (-1, 1))
        examples = np.asarray(chunk.metrics["examples"][:, -1:])
        rows = {"iteration": np.full(column.shape, chunk.done), "examples": examples}
        return jnp.minimum(best, now), rows | {"error": column}

    return Evaluator(5, lambda state: jnp.full(state.examples.shape, jnp.inf), step)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_killed_job_resumes_bit_for_bit_with_its_logs(tmp_path, seeds):
    expected = train(tmp_path / "whole", seeds=seeds)
    assert train(tmp_path / "killed", stop=8, seeds=seeds) is None
    assert len(list((tmp_path / "killed" / "checkpoints").glob("*.json"))) == 2
    resumed = train(tmp_path / "killed", resume=True, seeds=seeds)
    assert resumed.resumed_at == 7
    assert_same(resumed, expected)
    assert resumed.evaluations["iteration"].tolist() == [[5, 10]] * seeds
    for name in ("metrics.csv", "evaluations.csv"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "killed" / name).read_bytes() == whole
    rows = list(csv.DictReader((tmp_path / "whole" / "metrics.csv").open()))
    assert list(rows[0]) == ["seed", "iteration", "examples", "grad_norm", "loss"]
    assert len(rows) == ITERATIONS * seeds
    assert [float(row["loss"]) for row in rows if row["seed"] == "0"] == pytest.approx(
        expected.metrics["loss"][0].tolist()
    )
    assert (tmp_path / "whole" / "learning_curve.png").stat().st_size > 1000
    assert not (tmp_path / "killed" / "checkpoints").exists()


def test_tensorboard_has_the_groups_of_the_metrics(tmp_path):
    train(tmp_path / "run")
    content = b"".join(
        path.read_bytes() for path in (tmp_path / "run" / "tensorboard" / "seed_0").iterdir()
    )
    assert b"fit/loss" in content and b"extra/grad_norm" in content
    assert b"evaluation/error" in content


def test_a_job_resumes_only_with_its_identity(tmp_path):
    train(tmp_path / "run", stop=3)
    with pytest.raises(
        ConfigError, match=r"started with other settings: lr = 0\.1 there and 0\.2 here"
    ):
        run_job(
            JOB,
            key=4,
            directory=tmp_path / "run",
            identity={"task": "regression", "lr": 0.2},
            resume=True,
        )


def test_a_job_ends_at_its_total_progress():
    result = run_job(JOB._replace(total=5 * BATCH - 1), seeds=2)
    assert result.metrics["examples"].tolist() == [[32, 64, 96, 128, 160]] * 2


def test_a_job_that_diverges_ends():
    job = JOB._replace(trainer_of=lambda: regression(lr=jnp.inf))
    result = run_job(job)
    assert not np.isfinite(result.metrics["loss"][0, -1])
    assert result.metrics["loss"].shape[1] == 2


def test_a_metric_that_is_no_number_is_refused(tmp_path):
    def trainer_of():
        trainer = regression()

        def step(state, frozen=None):
            state, metrics = trainer.step(state, frozen)
            return state, metrics | {"weights": state.weights}

        return Trainer(trainer.init, step)

    with pytest.raises(ConfigError, match=r"metric 'weights' has the shape \(3,\)"):
        run_job(JOB._replace(trainer_of=trainer_of))
