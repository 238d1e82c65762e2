"""Runs in shards: equal numbers on any number of devices, without exchange of rollout data."""

import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ppo_reference import arrays, random_batch
from quick import FAST_FLAGS
from small_envs import counter, linear_model, memory_model

from purejaxppo import Config, ConfigError, make_train, make_trainer
from purejaxppo.envs.vector import vectorize
from purejaxppo.normalize import merge, moments_of, no_moments, pooled
from purejaxppo.rollout import in_shards, make_rollout, reset_shards
from purejaxppo.shards import join_shards, make_mesh, split_shards, state_sharding
from purejaxppo.updates.minibatches import as_sequences, random_order, shuffled_minibatches
from purejaxppo.updates.trpo import subsample_sequences

KEY = jax.random.key(7)
CONFIG = Config(num_envs=12, num_steps=10, num_epochs=1, num_minibatches=2, total_timesteps=240)


# ------------------------------------------------------------------------------------------ devices


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The output of `runs_on_devices.py`."""
    script = Path(__file__).with_name("runs_on_devices.py")
    path = tmp_path_factory.mktemp("runs") / "runs.pkl"
    done = subprocess.run(
        [sys.executable, script, path],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST_FLAGS},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return pickle.loads(path.read_bytes())


@pytest.mark.devices
@pytest.mark.parametrize(
    ("name", "devices"), [("ppo", 2), ("ppo", 4), ("trpo", 4), ("reinforce", 4)]
)
def test_whole_runs_in_float64_are_the_same_on_any_number_of_devices(runs, name, devices):
    one = runs[name, 1]
    several = runs[name, devices]
    close = {"rtol": 1e-9, "atol": 1e-11}
    for a, b in zip(several["state"], one["state"], strict=True):
        np.testing.assert_allclose(a, b, **close)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **close), several["metrics"], one["metrics"]
    )
    assert (several["metrics"]["episodes"] > 0).any() and one["metrics"][
        "policy_loss"
    ].dtype == np.float64


@pytest.mark.devices
def test_five_iterations_in_float32_are_close_on_any_number_of_devices(runs):
    one = runs["memory", 1]["metrics"]
    two = runs["memory", 2]["metrics"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), two, one)
    assert one["policy_loss"].shape == (5,) and one["policy_loss"].dtype == np.float32


@pytest.mark.devices
def test_ratios_start_at_1(runs):
    for (name, _), run in runs.items():
        bound = 1e-4 if name == "memory" else 1e-12
        assert np.nanmax(run["metrics"]["first_ratio_deviation"]) < bound


@pytest.mark.devices
@pytest.mark.parametrize(
    ("name", "devices", "loops"),
    [
        ("ppo", 4, ("iterations", "epochs", "minibatches")),
        ("ppo", 2, ("iterations", "epochs", "minibatches")),
        ("trpo", 4, ("iterations", "conjugate gradient", "line search", "epochs", "minibatches")),
        ("reinforce", 4, ("iterations",)),
        ("memory", 2, ("iterations", "epochs", "minibatches", "gradient over time")),
    ],
)
def test_devices_exchange_sums_of_the_update_only(runs, name, devices, loops):
    """Only these loops communicate, not the rollout's, and only small arrays are exchanged."""
    run = runs[name, devices]
    assert run["kinds"] == ["all-reduce"]
    assert run["communicating"] == len(loops) < run["loops"]
    # The linear policy has 9 weights; REINFORCE also exchanges 5 counts of running episodes.
    assert run["largest"] <= 9
    envs = 16 // devices
    obs, *sharded = run["parts"]
    assert obs == (4 // devices, 4, 3) and set(sharded) == {(envs,)}
    assert runs[name, 1]["kinds"] == [] and runs[name, 1]["communicating"] == 0


def test_the_number_of_devices_in_a_mesh_divides_the_number_of_shards():
    assert make_mesh(6).size == 1 == make_mesh(1, jax.devices()[:1]).size
    with pytest.raises(ConfigError, match="num_shards = 3 cannot be divided among 2 devices"):
        make_mesh(3, jax.devices() * 2)


def test_only_the_states_of_environments_are_sharded():
    config = CONFIG.replace(num_shards=2, normalize_reward=True, normalize_obs=True)
    state = jax.eval_shape(make_trainer(config, counter(), memory_model(3)).init, KEY)
    mesh = jax.sharding.AbstractMesh((2,), ("shards",))
    shardings = state_sharding(mesh, state)
    sharded = {
        jax.tree_util.keystr(path)
        for path, x in jax.tree.leaves_with_path(shardings)
        if x.spec != jax.P()
    }
    outside_env = {path for path in sharded if not path.startswith(".env")}
    assert outside_env == {".carry[0]", ".normalizer.reward.discounted_return"}
    assert len(sharded - outside_env) == len(jax.tree.leaves(state.env))
    assert all(x.shape[0] == 2 for x in jax.tree.leaves(state.env))
    assert state.carry[0].shape == state.normalizer.reward.discounted_return.shape == (12,)


# -------------------------------------------------------------------------------------- minibatches


def numbered_batch(T, B, memory):
    """A batch whose values number the steps and whose carry numbers the environments."""
    batch = jax.tree.map(
        lambda x: np.broadcast_to(x[:1, :1], (T, B, *x.shape[2:])), random_batch(0)
    )
    return arrays(
        batch
        | {"value": np.arange(T * B).reshape(T, B), "carry": (np.arange(B),) if memory else ()}
    )


@functools.cache
def minibatch_function(T, B, M, S, memory):
    batch = numbered_batch(T, B, memory)
    return jax.jit(lambda key: shuffled_minibatches(key, as_sequences(batch, S), M, S))


@given(
    st.sampled_from([(4, 2, 2, True), (12, 2, 3, False), (6, 3, 2, False)]),
    st.integers(0, 2**32 - 1),
)
def test_minibatches_partition_the_samples_with_equally_many_from_every_shard(sizes, seed):
    T = 3
    B, M, S, memory = sizes
    minibatches = minibatch_function(T, *sizes)(jax.random.key(seed))
    values = np.asarray(minibatches.value)
    np.testing.assert_array_equal(np.sort(values.ravel()), np.arange(T * B))
    shard = values % B // (B // S)
    for m in range(M):
        np.testing.assert_array_equal(
            np.bincount(shard[m].ravel(), minlength=S), np.full(S, T * B // S // M)
        )
        assert (np.diff(shard[m]) >= 0).all()  # shard after shard, as on the devices
    if memory:
        np.testing.assert_array_equal(values[:, 0], minibatches.carry[0])
        np.testing.assert_array_equal(
            values[:, 1:] - values[:, :-1], np.full((M, T - 1, B // M), B)
        )


def test_each_shard_has_its_own_order_and_a_single_shard_the_global_order():
    order = np.asarray(jax.jit(random_order, static_argnums=1)(KEY, 128))
    expected = np.arange(128)[order].reshape(4, 1, 32)
    np.testing.assert_array_equal(minibatch_function(2, 64, 4, 1, False)(KEY).value, expected)
    order = np.asarray(minibatch_function(2, 64, 1, 2, False)(KEY).value).reshape(2, 64)
    assert (order[0] != order[1] - 32).any()


@pytest.mark.parametrize("memory", [False, True])
def test_a_subsample_of_one_in_k_takes_one_in_k_from_every_shard(memory):
    batch = as_sequences(numbered_batch(3, 12, memory), 2)
    subsample = np.asarray(
        jax.jit(subsample_sequences, static_argnums=(0, 3))(4, KEY, batch, 2).value
    )
    shard = subsample % 12 // 6
    # From each shard ⌈6 / 4⌉ sequences of 3 steps, or ⌈18 / 4⌉ steps.
    assert len(np.unique(subsample)) == subsample.size == (12 if memory else 10)
    assert np.bincount(shard.ravel()).tolist() == [subsample.size // 2] * 2


def test_splitting_and_joining_are_inverse():
    x = {"a": jnp.arange(24).reshape(2, 6, 2)}
    shards = split_shards(x, 3, axis=1)
    assert shards["a"].shape == (2, 3, 2, 2)
    np.testing.assert_array_equal(shards["a"][:, 1], x["a"][:, 2:4])
    np.testing.assert_array_equal(join_shards(shards, axis=1)["a"], x["a"])


# --------------------------------------------------------------------------------------- statistics


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("num_valid", [[3, 5, 2], [4, 0, 1], [0, 0, 0]])
def test_pooled_moments_equal_merged_moments_and_those_of_all_samples(num_valid):
    rng = np.random.default_rng(1)
    x = rng.normal(1e4, 3, (3, 5, 2))
    valid = np.arange(5)[None] < np.asarray(num_valid)[:, None]
    parts = jax.jit(jax.vmap(moments_of))(x, valid)
    total = jax.jit(pooled)(parts)
    merged = no_moments((2,))
    for i in range(3):
        merged = jax.jit(merge)(merged, jax.tree.map(lambda x, i=i: np.asarray(x)[i], parts))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), total, merged
    )
    if samples := sum(num_valid):
        assert total.samples == samples
        np.testing.assert_allclose(total.mean, x[valid].mean(0), rtol=1e-12)
        np.testing.assert_allclose(total.variance, x[valid].var(0), rtol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("masked", [False, True])
def test_moments_over_steps_and_environments(masked):
    rng = np.random.default_rng(2)
    x = rng.normal(5, 2, (4, 6, 3))
    valid = rng.random((4, 6)) < 0.6 if masked else np.ones((4, 6), bool)
    moments = jax.jit(lambda x, valid: moments_of(x, valid if masked else None, num_axes=2))(
        x, valid
    )
    assert moments.samples == valid.sum()
    np.testing.assert_allclose(moments.mean, x[valid].mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, x[valid].var(axis=0), rtol=1e-12)


def test_a_sharded_rollout_equals_each_shards_rollout_and_pools_the_moments():
    env = counter(limit=5, longest=8)
    model = linear_model()
    S = 3
    T = 10
    size = 4
    vector_env = vectorize(env, size)
    rollout = make_rollout(env, vector_env, model, T)
    state, obs = jax.jit(lambda: reset_shards(vector_env, KEY, S))()
    params = model.init(KEY, obs)
    run = jax.jit(in_shards(rollout, S))
    transitions, after, carry, moments = run(KEY, params, no_moments((3,)), state, ())
    assert transitions.obs.shape == (T, S * size, 3) and obs.shape == (S * size, 3) and carry == ()
    raw = np.asarray(transitions.obs).reshape(-1, 3)  # empty moments do not normalise
    np.testing.assert_allclose(moments.samples, T * S * size)
    np.testing.assert_allclose(moments.mean, raw.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.variance, raw.var(0), rtol=1e-4)
    done = transitions.terminated | transitions.truncated
    np.testing.assert_array_equal(
        after.finished.episodes, np.asarray(done).reshape(T, S, size).sum((0, 2))
    )

    second = jax.tree.map(lambda x: x[1], state)
    alone, *_ = jax.jit(rollout)(jax.random.split(KEY, S)[1], params, no_moments((3,)), second, ())
    shard = jax.tree.map(lambda x: x[:, size : 2 * size], transitions)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), shard, alone)
    starts = np.asarray(transitions.obs[0, :, 0])
    assert len(np.unique(starts)) == S * size  # all environments differ


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_shards": 0}, "num_shards = 0: it must be an integer of at least 1"),
        ({"num_shards": 5}, "num_shards = 5 does not divide num_envs = 12"),
        (
            {"num_shards": 4, "num_minibatches": 4},
            "does not divide the 30 samples of each of 4 shards",
        ),
        (
            {"num_shards": 4, "algorithm": "trpo", "fisher_subsample": 31},
            "only 30 samples in each shard",
        ),
        (
            {
                "num_shards": 2,
                "num_steps": 16,
                "num_minibatches": 8,
                "episodic": True,
                "anneal_lr": False,
            },
            "num_minibatches = 8 does not divide num_envs * 5 / num_shards = 2",
        ),
    ],
)
def test_impossible_shards_are_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        make_train(CONFIG.replace(**changes), counter())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_model_with_memory_needs_whole_sequences_of_every_shard_in_every_minibatch():
    with pytest.raises(ConfigError, match="num_envs = 12 / num_shards = 4: a model with memory"):
        make_train(CONFIG.replace(num_shards=4), counter(), memory_model(3))
    make_train(CONFIG.replace(num_shards=2), counter(), memory_model(3))
