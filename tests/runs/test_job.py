"""A supervised trainer runs, stops, is killed and resumes like the training of agents."""

import csv
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from killed import Killed
from sentences import sentence_of

from purejaxppo.metrics import MetricsDescription
from purejaxppo.runs import chunks
from purejaxppo.runs import job as job_module
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


def uneven(offset=0):
    """A trainer whose members make different progress, 1 … 3 per iteration, from ``offset``."""
    trainer = regression()

    def step(state, frozen=None):
        rate = 1 + jax.random.key_data(state.key)[-1] % 3
        before = state.examples
        state, metrics = trainer.step(state, frozen)
        examples = before + rate.astype(jnp.int32)
        state = state._replace(examples=examples, key=jax.random.key(rate - 1))
        return state, metrics | {"examples": examples + offset, "batches": jnp.int32(1)}

    return Trainer(trainer.init, step)


COUNTED = METRICS._replace(counts={"loss": "batches"})


@pytest.mark.parametrize("seconds", [0, 100])
def test_members_that_end_early_are_padded(tmp_path, monkeypatch, seconds):
    """In chunks of one iteration, and in chunks that no member fills."""
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", seconds)
    job = Job(uneven, ITERATIONS, COUNTED, total=6)
    result = run_job(job, seeds=8, key=1, directory=tmp_path / "run", identity={})
    examples = result.metrics["examples"]
    iterations = 1 + (examples < 6).sum(axis=1)
    assert len(set(iterations)) > 1 and examples.shape == (8, max(iterations))
    for member, count in enumerate(iterations):
        rows = {name: x[member] for name, x in result.metrics.items()}
        assert rows["examples"][count - 1] >= 6 and (rows["examples"][count:] >= 6).all()
        assert rows["batches"].tolist() == [1] * count + [0] * (max(iterations) - count)
        assert np.isnan(rows["loss"][count:]).all() and np.isfinite(rows["loss"][:count]).all()
    table = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    logged = [sum(row["seed"] == str(member) for row in table) for member in range(8)]
    assert logged == iterations.tolist()


def test_every_iteration_is_logged_whatever_its_progress(tmp_path):
    """The progress begins at 0, and need not grow."""
    job = Job(lambda: uneven(offset=-1), 4, METRICS)
    run_job(job, directory=tmp_path / "run", identity={})
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 5


def test_metrics_in_bfloat16_are_logged_and_resumed(tmp_path):
    def trainer_of():
        trainer = regression()

        def step(state, frozen=None):
            state, metrics = trainer.step(state, frozen)
            return state, metrics | {"loss": metrics["loss"].astype(jnp.bfloat16)}

        return Trainer(trainer.init, step)

    job = Job(trainer_of, 6, METRICS)
    options = {"directory": tmp_path / "run", "identity": {}, "checkpoint_seconds": 0.0}

    def kill(chunk):
        if chunk.done == 4:
            raise Killed

    with pytest.raises(Killed):
        run_job(job, on_chunk=kill, **options)
    resumed = run_job(job, resume=True, **options)
    np.testing.assert_array_equal(resumed.metrics["loss"], run_job(job).metrics["loss"])
    assert resumed.resumed_at == 3


def test_a_job_that_diverges_ends():
    job = JOB._replace(trainer_of=lambda: regression(lr=jnp.inf))
    result = run_job(job)
    assert not np.isfinite(result.metrics["loss"][0, -1])
    assert result.metrics["loss"].shape[1] == 2


def with_metric(name, value=1.0):
    def trainer_of():
        trainer = regression()

        def step(state, frozen=None):
            state, metrics = trainer.step(state, frozen)
            return state, metrics | {name: value}

        return Trainer(trainer.init, step)

    return trainer_of


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"trainer_of": with_metric("weights", jnp.ones(3))}, "'weights' has the shape (3,)"),
        ({"trainer_of": with_metric("iteration")}, "the name of a column of files"),
        ({"trainer_of": with_metric("seed")}, "the name of a column of files"),
        ({"trainer_of": with_metric("extra", {"loss": jnp.ones(())})}, "the same name"),
        ({"metrics": METRICS._replace(plotted="los")}, "names 'los', and the trainer has only"),
        ({"metrics": METRICS._replace(progress="steps")}, "names 'steps'"),
        ({"metrics": METRICS._replace(counts={"loss": "number"})}, "names 'number'"),
        ({"metrics": METRICS._replace(counts={"loss": "examples"})}, "both the progress and"),
        ({"total": 0}, "must be at least 1"),
    ],
)
def test_jobs_that_cannot_be_logged_are_refused_before_a_directory_exists(
    changes, sentence, tmp_path
):
    job = JOB._replace(**changes)
    directory = tmp_path / "run"
    message = sentence_of(lambda: run_job(job, directory=directory, identity={}))
    assert sentence in message and not directory.exists()


@pytest.mark.parametrize(
    ("changes", "seeds", "name"),
    [({"num_iterations": 20}, 1, "num_iterations"), ({"total": 99}, 1, "total"), ({}, 2, "seeds")],
)
def test_a_job_resumes_only_with_its_length(changes, seeds, name, tmp_path):
    train(tmp_path / "run", stop=3)
    options = {"directory": tmp_path / "run", "identity": {"task": "regression", "lr": 0.1}}
    message = sentence_of(
        lambda: run_job(JOB._replace(**changes), seeds=seeds, key=4, resume=True, **options)
    )
    assert f"started with other settings: {name} = " in message
    assert "needs an identity" in sentence_of(lambda: run_job(JOB, directory=tmp_path / "new"))


def test_a_log_that_cannot_be_opened_ends_the_run_with_its_error(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no space")

    monkeypatch.setattr(job_module, "open_loggers", fail)
    with pytest.raises(OSError, match="no space"):
        run_job(JOB, directory=tmp_path / "run", identity={})
