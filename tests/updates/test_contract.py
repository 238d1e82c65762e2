"""The contract of every algorithm, in every variant."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ppo_reference import A, B, T, arrays, parameters, random_batch
from small_envs import BOX, DISCRETE, MULTI, counter, linear_model, memory_model

from purejaxppo import Config, ConfigError, make_train
from purejaxppo.config import ALGORITHMS, BASELINES, OBJECTIVES
from purejaxppo.optimizer import make_optimizer
from purejaxppo.types import Update
from purejaxppo.updates import UPDATES

SIZES = Config(
    num_envs=B,
    num_steps=T,
    num_epochs=2,
    num_minibatches=3,
    total_timesteps=4 * T * B,
    hidden_sizes=(4,),
)
VARIANTS = {
    "ppo": SIZES,
    "ppo early stop": SIZES.replace(early_stop_kl=1e-3, lr=0.02),
    "trpo": SIZES.replace(algorithm="trpo"),
    "trpo subsample": SIZES.replace(algorithm="trpo", fisher_subsample=2),
}
VARIANTS |= {f"ppo {name}": SIZES.replace(objective=name) for name in OBJECTIVES if name != "clip"}
ONCE = SIZES.replace(algorithm="reinforce", num_epochs=1, num_minibatches=1, anneal_lr=False)
VARIANTS |= {f"reinforce {name}": ONCE.replace(baseline=name) for name in BASELINES}
every_variant = pytest.mark.parametrize("name", VARIANTS)
KEY = jax.random.key(5)


@functools.cache
def made(name):
    """The update and its jitted step, compiled once for all tests."""
    config = VARIANTS[name]
    update = UPDATES[config.algorithm](config, linear_model(False, A), make_optimizer(config))
    return update, jax.jit(update.step)


@jax.jit
def on_policy(batch, params):
    distribution, value = linear_model(False, A).unroll(params, (), batch.obs, batch.reset)
    return batch._replace(log_prob=distribution.log_prob(batch.action), value=value)


def test_every_algorithm_is_here():
    assert set(UPDATES) == set(ALGORITHMS) == {config.algorithm for config in VARIANTS.values()}


@every_variant
def test_an_update_keeps_every_shape_and_compiles_once(name):
    config = VARIANTS[name]
    update, step = made(name)
    assert isinstance(update, Update)
    params = parameters()
    state = update.init(params)
    for seed in range(3):
        batch = on_policy(arrays(random_batch(seed)), params)
        before = (params, state)
        params, state, metrics = step(jax.random.key(seed), params, state, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(before, (params, state))
        assert metrics["first_ratio_deviation"] < 1e-5
        assert all(x.shape == () and np.isfinite(x) for x in metrics.values())
    assert step._cache_size() == 1
    if config.early_stop_kl:
        assert 0 < metrics["steps_taken"] < 1  # otherwise the masks would not be tested
    assert {"policy_loss", "entropy", "approx_kl", "grad_norm"} <= metrics.keys()
    assert ("value_loss" in metrics) == (config.baseline == "value")


@every_variant
def test_entries_outside_the_masks_have_no_effect(name):
    params = parameters()
    raw = random_batch(6)
    batch = on_policy(arrays(raw), params)

    def spoiled(name, used):
        return jnp.where(raw[used], getattr(batch, name), jnp.nan)

    changed = batch._replace(
        log_prob=spoiled("log_prob", "mask"),
        advantage=spoiled("advantage", "mask"),
        target=spoiled("target", "valid"),
    )
    update, step = made(name)
    expected, got = (step(KEY, params, update.init(params), x) for x in (batch, changed))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@every_variant
def test_vmapped_updates_are_the_updates_alone(name):
    update, step = made(name)
    members = [parameters(), jax.tree.map(lambda x: 0.5 * x, parameters())]
    batches = [on_policy(arrays(random_batch(seed)), params) for seed, params in enumerate(members)]
    stacked = [jax.tree.map(lambda *x: np.stack(x), *trees) for trees in (members, batches)]
    vmapped = jax.vmap(lambda params, batch: update.step(KEY, params, update.init(params), batch))
    together = jax.tree.map(np.asarray, jax.jit(vmapped)(*stacked))
    for i, (params, batch) in enumerate(zip(members, batches, strict=True)):
        alone = step(KEY, params, update.init(params), batch)
        member = jax.tree.map(lambda x, i=i: x[i], together)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), alone, member
        )


@pytest.mark.parametrize(
    ("name", "space"),
    [("trpo", MULTI), ("trpo", BOX), ("ppo adaptive_kl", BOX), ("reinforce value", DISCRETE)],
    ids=["trpo multi-discrete", "trpo continuous", "adaptive_kl continuous", "reinforce discrete"],
)
def test_whole_runs_keep_the_ratio_at_1_and_stay_finite(name, space):
    """PPO's clipped objective has its own test for every space; here each space occurs once."""
    config = VARIANTS[name].replace(normalize_obs=True)
    state, metrics = jax.jit(jax.vmap(make_train(config, counter(space))))(jax.random.split(KEY, 2))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert metrics.first_ratio_deviation.max() < 1e-4
    assert config.whole_episodes or metrics.timesteps.tolist() == [[15, 30, 45, 60]] * 2
    assert all(x.shape == (2, config.num_iterations) for x in jax.tree.leaves(metrics))


@pytest.mark.parametrize("name", ["trpo subsample", "ppo adaptive_kl", "reinforce running_mean"])
def test_a_model_with_memory_learns_from_whole_sequences(name):
    """PPO's clipped objective has its own test."""
    config = VARIANTS[name]
    model = memory_model(3)
    state, metrics = jax.jit(make_train(config, counter(), model))(KEY)
    assert metrics.first_ratio_deviation.max() < 1e-4
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    with pytest.raises(ConfigError, match="whole sequences"):
        make_train(
            VARIANTS["ppo"].replace(num_envs=4, num_steps=6, num_minibatches=3), counter(), model
        )
