"""Healthy runs with JAX's switches `jax_debug_nans`, `jax_debug_key_reuse` and `disable_jit`.

`jax_debug_nans` raises where the result of a compiled program contains a NaN. Users nevertheless
see NaN for a value that does not exist. Other implementations of random keys are tested here too.
"""

import contextlib
import dataclasses
import functools
import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from small_envs import counter, linear_model

from purejaxppo import (
    Config,
    ConfigError,
    Exchange,
    evaluate,
    fit,
    losses,
    make_train,
    make_trainer,
    sweep,
)
from purejaxppo.keys import random_key
from purejaxppo.metrics import iteration_metrics, with_nan, without_nan
from purejaxppo.runs import chunks, compilation, processes, run_directory
from purejaxppo.types import UNDEFINED, Batch, EpisodeSums, Metrics, nan_where_undefined

ENDLESS = counter(limit=60, longest=0)  # no episode ends within a run of these tests
SHORT = counter()  # episodes of at most 5 steps
PPO = Config(num_envs=2, num_steps=4, total_timesteps=16, num_minibatches=2, num_epochs=2)
TRPO = PPO.replace(algorithm="trpo", normalize_obs=True, normalize_reward=True, fisher_subsample=2)
REINFORCE = PPO.replace(
    algorithm="reinforce",
    baseline="none",
    num_minibatches=1,
    num_epochs=1,
    num_steps=5,
    anneal_lr=False,
)
ADAPTIVE = PPO.replace(objective="adaptive_kl", early_stop_kl=1e-12, normalize_obs=True)
IMPLEMENTATIONS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}


def leaves_with_nan(tree):
    arrays = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(bool(np.isnan(x).any()) for x in arrays)


@contextlib.contextmanager
def all_switches():
    with jax.debug_nans(True), jax.debug_key_reuse(True):
        yield


# -------------------------------------------------------------------------------------- metrics


def is_defined(metrics, field):
    return metrics[Metrics._fields.index(field)] != UNDEFINED


def metrics_with(**fields):
    return Metrics(**dict.fromkeys(Metrics._fields, jnp.ones(3)) | {"extra": {}} | fields)


def test_an_undefined_value_reads_as_nan_and_is_stored_as_a_number():
    stored = jnp.array([1.0, UNDEFINED, 3.0])
    metrics = metrics_with(episode_return=stored, timesteps=jnp.arange(3))
    expected = [1, np.nan, 3]
    with jax.debug_nans(True):
        assert leaves_with_nan(metrics) == 0
        np.testing.assert_array_equal(metrics.episode_return, expected)
        np.testing.assert_array_equal(metrics._asdict()["episode_return"], expected)
        assert "episode_return=Array([ 1., nan,  3.]" in repr(metrics)
        copies = (
            jax.tree.map(lambda x: x[1:], metrics),
            pickle.loads(pickle.dumps(metrics)),
            metrics._replace(extra={}),
        )
        for copy in copies:
            assert type(copy) is Metrics and leaves_with_nan(copy) == 0
            np.testing.assert_array_equal(
                copy.episode_return, expected[-len(copy.episode_return) :]
            )
    np.testing.assert_array_equal(
        jax.jit(lambda metrics: metrics.episode_return)(metrics), expected
    )
    np.testing.assert_array_equal(is_defined(metrics, "episode_return"), [True, False, True])
    assert metrics.timesteps.dtype == jnp.int32
    assert jax.eval_shape(lambda: metrics).episode_return.shape == (3,)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_undefined_is_found_in_every_precision(dtype, x64):
    for array in (np, jnp):
        x = jnp.asarray([UNDEFINED, 2]).astype(dtype)
        got = nan_where_undefined(x if array is jnp else np.asarray(x))
        assert got.dtype == dtype and np.isnan(got[0]) and got[1] == 2
    assert np.isnan(nan_where_undefined(np.float32(UNDEFINED))) and nan_where_undefined(7) == 7


def test_the_host_stores_nan_and_returns_it_to_a_program_as_a_number():
    metrics = metrics_with(
        episode_return=np.array([UNDEFINED, 2.0]), policy_loss=np.array([np.nan, 1.0])
    )
    host = with_nan(metrics)
    assert leaves_with_nan(host) == 2
    with jax.debug_nans(True):
        back = without_nan(with_nan(jax.tree.map(np.asarray, metrics)))
    assert leaves_with_nan(back) == 0
    np.testing.assert_array_equal(back[Metrics._fields.index("episode_return")], [UNDEFINED, 2])
    assert not np.isfinite(back.policy_loss[0])  # a run that diverged has still diverged


def test_missing_values_are_undefined_and_diverged_values_are_nan():
    one = jnp.ones((2, 2))
    batch = Batch(**dict.fromkeys(Batch._fields, one) | {"valid": one > 0})
    none = EpisodeSums(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32))
    with jax.debug_nans(True):
        measured = dict.fromkeys(("value_loss", "policy_loss"), jnp.ones(()))
        metrics = iteration_metrics(jnp.int32(4), none, batch, measured)
        assert leaves_with_nan(metrics) == 0
    missing = {
        name for name in Metrics._fields if name != "extra" and not is_defined(metrics, name)
    }
    # The targets are equal, so that explained_variance is missing too.
    assert missing == set(Metrics._fields) - {"timesteps", "episodes", "extra", *measured}
    lost = iteration_metrics(jnp.int32(4), none, batch, {"policy_loss": jnp.asarray(jnp.nan)})
    assert is_defined(lost, "policy_loss") and np.isnan(lost.policy_loss)
    some = iteration_metrics(
        jnp.int32(4), EpisodeSums(jnp.float32(6), jnp.float32(9), jnp.int32(3)), batch, {}
    )
    assert (some.episode_return, some.episode_length) == (2, 3)


def test_without_the_switch_a_mean_over_seeds_that_lack_a_value_is_nan():
    """Users apply `jax.tree.map` to metrics: a number in place of NaN would distort the mean."""
    none = EpisodeSums(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32))
    some = EpisodeSums(jnp.float32(6), jnp.float32(9), jnp.int32(3))
    ones = jnp.ones((2, 2))
    batch = Batch(**dict.fromkeys(Batch._fields, ones) | {"valid": ones > 0})
    rows = [iteration_metrics(jnp.int32(4), finished, batch, {}) for finished in (none, some)]
    seeds = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    mean, nanmean = (jax.tree.map(f, seeds) for f in (jnp.mean, jnp.nanmean))
    assert np.isnan(tuple(mean)[1]) and tuple(nanmean)[1] == nanmean.episode_return == 2
    assert np.isnan(seeds.value_loss).all()


def test_explained_variance_of_equal_targets_and_of_invalid_entries():
    valid = jnp.array([True, True, False])
    with jax.debug_nans(True):
        assert losses.explained_variance(jnp.ones(3), jnp.array([2.0, 2, 5]), valid, -7.0) == -7
    assert np.isnan(losses.explained_variance(jnp.ones(3), jnp.array([2.0, 2, 5]), valid))
    got = losses.explained_variance(jnp.array([1.0, 2, np.nan]), jnp.array([1.0, 3, np.inf]), valid)
    np.testing.assert_allclose(got, 1 - 0.25 / 1)


# ----------------------------------------------------------------------------------- whole runs


@functools.cache
def result_of(config):
    """The result of a whole run with both switches on, and the output of ``debug``."""
    with all_switches(), contextlib.redirect_stdout(io.StringIO()) as printed:
        train = make_train(dataclasses.replace(config, debug=True), ENDLESS, linear_model())
        result = jax.block_until_ready(jax.jit(train)(jax.random.key(1)))
        jax.effects_barrier()
    return result, printed.getvalue()


@pytest.mark.parametrize(
    "config", [PPO, ADAPTIVE, TRPO], ids=lambda config: f"{config.algorithm}-{config.objective}"
)
def test_a_healthy_run_makes_no_nan_and_shows_nan_where_no_episode_ended(config):
    result, printed = result_of(config)
    assert leaves_with_nan(result) == 0 and "timesteps 16: episode return nan" in printed
    assert (
        np.isnan(result.metrics.episode_return).all()
        and np.isnan(result.metrics.episode_length).all()
    )
    assert np.isfinite(result.metrics.value_loss).all() and (result.metrics.episodes == 0).all()


def test_a_nan_in_a_program_compiled_ahead_of_time_is_explained():
    def raising(x):
        raise ValueError("something else")

    compiled = compilation.telling_nan(jax.jit(jnp.log).lower(1.0).compile())
    with jax.debug_nans(True):
        assert compiled(1.0) == 0
        with pytest.raises(
            FloatingPointError, match=r"with jax\.disable_jit too it names the operation"
        ):
            compiled(-1.0)
        with pytest.raises(ValueError, match="something else"):
            compilation.telling_nan(raising)(1.0)


def test_a_run_of_whole_episodes_resumes_after_an_interruption(tmp_path, monkeypatch):
    """REINFORCE without a value function, with both switches on and one iteration per chunk.

    The run is killed when one agent has completed its steps and the other has not.
    """
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 0)

    class Killed(Exception):
        pass

    def kill(progress):
        if progress.iterations == 3:
            raise Killed

    options = {
        "seeds": 2,
        "key": jax.random.key(5),
        "env": SHORT,
        "model": linear_model(),
        "directory": tmp_path / "run",
    }
    with all_switches():
        with pytest.raises(Killed):
            fit(
                REINFORCE,
                on_progress=kill,
                checkpoint_seconds=0.0,
                **options | {"key": jax.random.key(5)},
            )
        run = fit(REINFORCE, resume=True, **options)
    assert run.resumed_at == 2 and run.state.iteration.tolist() == [2, 3]
    assert np.isnan(run.metrics.value_loss).all() and run.diverged_at == [None, None]
    rows = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert rows["value_loss"].isna().all() and rows["episode_return"].notna().all()


def test_a_population_with_evaluation_passes_both_switches():
    """The members copy one another; in every second iteration no episode finishes."""
    config = PPO.replace(num_steps=2, total_timesteps=16, num_minibatches=1)
    with all_switches():
        result = sweep(
            config,
            2,
            {"lr": [1e-3, 1e-2]},
            env=SHORT,
            model=linear_model(),
            exchange=Exchange(every=1),
            eval_episodes=2,
        )
        played = evaluate(result.policy(0), SHORT, jax.random.key(2), 3, deterministic=False)
    assert np.isfinite(result.scores["score"]).all() and played.returns.shape == (3,)


# ----------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "config",
    [
        PPO.replace(num_shards=2, hidden_sizes=(4,)),
        PPO.replace(num_shards=2, shared_trunk=True, hidden_sizes=(4,)),
        TRPO.replace(hidden_sizes=(4,)),
        REINFORCE.replace(baseline="value", hidden_sizes=(4,)),
    ],
    ids=lambda config: f"{config.algorithm}-{config.num_shards}-{config.shared_trunk}",
)
def test_every_key_is_used_once(config):
    """JAX's checker traces the program without compiling it, alone and vmapped."""
    train = make_train(config, SHORT)
    with jax.debug_key_reuse(True):
        jax.jit(train).lower(jax.random.key(0))
        jax.jit(jax.vmap(train)).lower(jax.random.split(jax.random.key(0), 2))
        jax.jit(jax.vmap(lambda key, lr: make_train(config.replace(lr=lr), SHORT)(key))).lower(
            jax.random.split(jax.random.key(1), 2), jnp.ones(2)
        )


def test_the_checker_still_finds_a_key_that_the_caller_uses_twice():
    init = make_trainer(PPO, SHORT, linear_model()).init
    with jax.debug_key_reuse(True), pytest.raises(jax.errors.KeyReuseError):
        jax.jit(lambda key: (init(key), jax.random.normal(key))).lower(jax.random.key(0))


@pytest.mark.parametrize(("implementation", "size"), IMPLEMENTATIONS.items())
def test_a_key_of_the_default_implementation_may_be_raw_or_typed(implementation, size):
    with jax.default_prng_impl(implementation):
        raw = jax.random.PRNGKey(7)
        typed = jax.random.key(7)
        assert raw.shape == (size,)
        for key in (raw, np.asarray(raw), typed):
            got, described = random_key(key)
            assert got.dtype == typed.dtype and described == np.asarray(raw).tolist()
            np.testing.assert_array_equal(jax.random.key_data(got), raw)
        assert random_key(7)[0] == typed
        others = [name for name in IMPLEMENTATIONS if name != implementation]
        wrong = [jax.random.key(7, impl=name) for name in others]
        wrong += [
            jax.random.split(typed),
            raw[:-1],
            np.zeros(6 - size, np.uint32),
            np.zeros(size, np.int32),
            0.5,
        ]
        for key in wrong:
            with pytest.raises(
                ConfigError, match=rf"one random key of JAX's default kind, {implementation}$"
            ) as error:
                random_key(key)
            assert "\n" not in str(error.value)


def test_a_run_resumes_only_with_the_same_key_implementation(tmp_path):
    def open_run(directory, implementation, resume=True):
        with (
            jax.default_prng_impl(implementation),
            run_directory.open_run_directory(directory, {"seeds": 1}, 0, resume),
        ):
            pass

    for index, original in enumerate(IMPLEMENTATIONS):
        directory = tmp_path / str(index)
        open_run(directory, original, resume=False)
        open_run(directory, original)
        for other in set(IMPLEMENTATIONS) - {original}:
            with pytest.raises(
                ConfigError, match=f"prng_impl = '{original}' there and '{other}' here"
            ):
                open_run(directory, other)
    # A directory written before prng_impl was recorded used threefry.
    config = tmp_path / "0" / "config.json"
    config.write_text(config.read_text().replace('"prng_impl": "threefry2x32",', ""))
    assert "prng_impl" not in config.read_text()
    open_run(tmp_path / "0", "threefry2x32")
    with pytest.raises(ConfigError, match="prng_impl = 'threefry2x32' there and 'rbg' here"):
        open_run(tmp_path / "0", "rbg")


# ---------------------------------------------------------------------------------- without jit


def test_fit_and_evaluate_work_without_jit_and_no_operation_makes_a_nan():
    """Without jit `jax_debug_nans` checks every intermediate value, also those not selected."""
    plans = []
    with jax.debug_nans(True), jax.disable_jit():
        run = fit(TRPO, key=1, env=ENDLESS, model=linear_model(), on_start=plans.append)
        policy = run.policy()
        policy = dataclasses.replace(policy, observation_space=SHORT.observation_space)
        played = evaluate(policy, SHORT, jax.random.key(2), 2)
    assert (
        plans[0].memory_bytes == 0 and (played.lengths >= 1).all() and (played.lengths <= 5).all()
    )
    expected = with_nan(result_of(TRPO)[0].metrics)
    for name in (
        "timesteps",
        "episodes",
        "episode_return",
        "value_loss",
        "entropy",
        "approx_kl",
        "grad_norm",
    ):
        got = getattr(run.metrics, name)[0]
        np.testing.assert_allclose(got, getattr(expected, name), rtol=1e-3, atol=1e-5, err_msg=name)


def test_without_jit_programs_stay_as_they_are_and_use_one_device():
    functions = jax.jit(jnp.sin), jax.jit(jnp.cos)
    with jax.disable_jit():
        assert compilation.compile_all(*((f, (1.0,)) for f in functions)) == list(functions)
        assert compilation.memory_of(functions[0]) == 0 and compilation.mesh_of(1, 64).size == 1


def test_several_processes_refuse_to_run_without_jit(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "connected", lambda: True)
    with (
        jax.disable_jit(),
        pytest.raises(ConfigError, match="disable_jit works with one process only"),
    ):
        fit(PPO, env=SHORT, model=linear_model(), directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()
