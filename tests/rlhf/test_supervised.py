"""Minibatches, the optimiser, resuming and bad settings of the supervised stages."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from killed import Killed
from sentences import sentence_of

from purejaxppo.rlhf.supervised import (
    in_batches,
    make_supervised_train,
    num_examples_of,
    supervised_job,
)
from purejaxppo.rlhf.supervised_settings import SupervisedSettings, learning_rate
from purejaxppo.runs import chunks
from purejaxppo.runs.job import run_job

N = 11
SETTINGS = SupervisedSettings(num_epochs=3, batch_size=4, lr=0.05, weight_decay=0.1)


def squared_error(params, examples, frozen, key):
    x, y = examples
    loss = ((x @ params["w"] - y) ** 2).mean()
    return loss, {"first": x[0, 0], "sum": x[:, 0].sum()}


def make_data(n=N):
    """Column 0 of x numbers the examples."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 2))
    x[:, 0] = np.arange(n)
    return jnp.asarray(x, jnp.float32), jnp.asarray(rng.normal(size=(n, 1)), jnp.float32)


PARAMS: dict[str, Any] = {"w": jnp.array([[0.3], [-0.2]])}


def test_an_epoch_visits_examples_at_most_once_in_a_fresh_order():
    def loss(params, examples, frozen, key):
        seen = jnp.zeros(N).at[examples[0][:, 0].astype(int)].add(1.0)
        return squared_error(params, examples, frozen, key)[0], {
            f"seen{i}": seen[i] for i in range(N)
        }

    settings = SupervisedSettings(num_epochs=40, batch_size=4)
    train = jax.jit(make_supervised_train(settings, loss))
    metrics = train(jax.random.key(0), PARAMS, {"data": make_data()}).metrics
    seen = np.stack([metrics[f"seen{i}"] for i in range(N)], axis=1).reshape(40, 2, N)
    assert (seen.sum(axis=2) == 4).all()  # a minibatch has 4 different examples
    assert seen.sum(axis=1).max() == 1  # the two minibatches of an epoch share none
    share = seen.sum(axis=(0, 1)) / 40  # of epochs in which an example is visited
    assert abs(share - 8 / 11).max() < 5 * np.sqrt(8 / 11 * 3 / 11 / 40)
    assert len(np.unique(seen[:, 0], axis=0)) > 30  # 330 are possible


@pytest.mark.usefixtures("x64")
def test_a_step_is_adamw_on_the_clipped_gradient():
    """Two steps against NumPy: Loshchilov and Hutter 2019, algorithm 2."""
    x, y = (np.asarray(part, np.float64) for part in make_data(4))
    settings = SupervisedSettings(
        num_epochs=2, batch_size=4, lr=0.1, warmup=0.5, decay="linear", max_grad_norm=0.7,
        weight_decay=0.2,
    )  # fmt: skip
    w = np.asarray(PARAMS["w"], np.float64)
    params = {"w": jnp.asarray(w), "value": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    result = make_supervised_train(settings, squared_error)(
        jax.random.key(0), params, {"data": (jnp.asarray(x), jnp.asarray(y))}
    )
    m = np.zeros_like(w)
    v = np.zeros_like(w)
    for t, lr in ((1, 0.1), (2, 0.1)):  # one step of warm-up, and the first step of decay
        gradient = 2 * x.T @ (x @ w - y) / 4
        norm = np.sqrt((gradient**2).sum())
        assert norm > 0.7  # it is clipped
        np.testing.assert_allclose(result.metrics["grad_norm"][t - 1], norm, rtol=1e-12)
        np.testing.assert_allclose(
            result.metrics["loss"][t - 1], ((x @ w - y) ** 2).mean(), rtol=1e-12
        )
        gradient *= 0.7 / norm
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w = w - lr * (step + 0.2 * w)
    np.testing.assert_allclose(result.state.params["w"], w, rtol=1e-10)
    assert result.metrics["lr"].tolist() == [0.1, 0.1]
    assert result.metrics["step"].tolist() == [1, 2]
    # Without a gradient, the value function and the scales of norms do not decay.
    np.testing.assert_array_equal(result.state.params["value"], params["value"])
    np.testing.assert_array_equal(result.state.params["norm"], params["norm"])


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, (1 + np.sqrt(0.5)) / 2, 0.5, (1 - np.sqrt(0.5)) / 2]),
    ],
)
def test_the_learning_rate_warms_up_and_decays(decay, expected):
    settings = SupervisedSettings(lr=2.0, warmup=1 / 3, decay=decay)
    lr = [float(learning_rate(settings, jnp.asarray(k), 6)) for k in range(6)]
    np.testing.assert_allclose(lr, 2 * np.array(expected), rtol=1e-6)


def run(directory=None, stop=None, resume=False, seeds=1):
    """A run with a checkpoint after every iteration; after iteration ``stop`` it is killed."""

    def on_chunk(chunk):
        if chunk.done == stop:
            raise Killed

    try:
        return run_job(
            supervised_job(SETTINGS, N, squared_error),
            seeds=seeds,
            key=4,
            params=PARAMS,
            frozen={"data": make_data()},
            directory=directory,
            identity={"task": "regression"},
            resume=resume,
            checkpoint_seconds=0.0,
            on_chunk=on_chunk,
        )
    except Killed:
        return None


def assert_same(got, expected):
    for state in (got, expected):
        assert state.step.dtype == jnp.int32
    keys = [jax.random.key_data(state.key) for state in (got, expected)]
    np.testing.assert_array_equal(*keys)
    jax.tree.map(np.testing.assert_array_equal, got._replace(key=0), expected._replace(key=0))


def test_a_killed_job_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 0)
    expected = run()
    assert run(tmp_path / "run", stop=4) is None  # within the second epoch of 2 steps
    resumed = run(tmp_path / "run", resume=True)
    assert resumed.resumed_at == 3
    assert_same(resumed.state, expected.state)
    jax.tree.map(np.testing.assert_array_equal, resumed.metrics, expected.metrics)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_job_is_the_scan(monkeypatch, seeds):
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 0)
    expected = run(seeds=seeds)
    train = make_supervised_train(SETTINGS, squared_error)
    key = jax.random.key(4)
    on_keys = train if seeds == 1 else jax.vmap(train, in_axes=(0, None, None))
    keys = key if seeds == 1 else jax.random.split(key, seeds)
    result = jax.jit(on_keys)(keys, PARAMS, {"data": make_data()})
    assert_same(expected.state, result.state)
    assert set(result.metrics) == {"step", "loss", "grad_norm", "lr", "first", "sum"}
    for name, x in result.metrics.items():
        np.testing.assert_array_equal(expected.metrics[name].squeeze(), x)
    if seeds == 3:
        assert len(set(result.metrics["sum"][:, 0].tolist())) == 3  # each has an order of its own


def test_a_job_takes_hyperparameters_of_a_sweep():
    job = supervised_job(SETTINGS, N, squared_error)

    def first_step(lr):
        trainer = job.trainer_of(lr=lr)
        state, metrics = trainer.step(trainer.init(jax.random.key(0), PARAMS), {"data": data})
        return state.params["w"], metrics["lr"]

    data = make_data()
    w, lr = jax.jit(jax.vmap(first_step))(jnp.array([0.0, 0.01, 0.02]))
    np.testing.assert_allclose(lr, [0.0, 0.01, 0.02])
    np.testing.assert_array_equal(w[0], PARAMS["w"])
    np.testing.assert_allclose(w[2] - w[0], 2 * (w[1] - w[0]), rtol=1e-4)


def test_a_run_that_diverges_ends():
    job = supervised_job(SETTINGS, N, squared_error)
    data = (make_data()[0] * jnp.nan, make_data()[1])
    result = run_job(job, params=PARAMS, frozen={"data": data})
    assert not np.isfinite(result.metrics["loss"][0, -1])
    assert result.metrics["loss"].shape[1] < 6


def test_rows_in_batches_are_the_rows_at_once():
    data = {"x": jnp.arange(14.0).reshape(7, 2)}
    doubled = in_batches(lambda rows: {"y": 2 * rows["x"]}, data, 3)
    np.testing.assert_array_equal(doubled["y"], 2 * data["x"])


def test_keys_are_used_once():
    with jax.debug_key_reuse(True):
        train = jax.jit(make_supervised_train(SETTINGS, squared_error))
        train(jax.random.key(0), PARAMS, {"data": make_data()})


def train_with(n=N, params=PARAMS, **changes):
    settings = SupervisedSettings(**{"batch_size": 4} | changes)
    return make_supervised_train(settings, squared_error)(
        jax.random.key(0), params, {"data": make_data(n)}
    )


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: train_with(0), "the data are empty"),
        (lambda: train_with(3), "batch_size = 4 exceeds the number of examples, 3"),
        (lambda: train_with(params=None), "there are no params"),
        (lambda: train_with(num_epochs=0), "num_epochs = 0: it must be an integer of at least 1"),
        (lambda: train_with(batch_size=0), "batch_size = 0: it must be an integer of at least 1"),
        (lambda: train_with(lr=-1.0), "lr = -1.0: it must be a finite number of at least 0"),
        (lambda: train_with(warmup=1.5), "warmup = 1.5: it must be a number between 0 and 1"),
        (lambda: train_with(max_grad_norm=0.0), "max_grad_norm = 0.0: it must be a finite number"),
        (lambda: train_with(weight_decay=-1.0), "weight_decay = -1.0: it must be"),
        (lambda: train_with(decay="step"), "decay = 'step': it must be one of cosine, linear"),
        (
            lambda: num_examples_of((jnp.zeros(3), jnp.zeros(4))),
            "the arrays of the data have [3, 4] examples",
        ),
        (
            lambda: run_job(supervised_job(SETTINGS, N, squared_error), params=PARAMS),
            "there are no data",
        ),
        (
            lambda: run_job(
                supervised_job(SETTINGS, N, squared_error),
                params=PARAMS,
                frozen={"data": make_data(N + 1)},
            ),
            "the data have 12 examples, and the trainer was made for 11",
        ),
    ],
)
def test_settings_and_data_that_do_not_fit_are_refused(make, sentence):
    assert sentence in sentence_of(make)
