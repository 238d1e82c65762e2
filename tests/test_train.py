"""`make_train`, a pure function: determinism, chunks, vmap, compilations, counts and arguments."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from purejaxrl import PPO, PPO_CONTINUOUS
from small_envs import BOX, DISCRETE, LINEAR, counter

from purejaxppo import Config, make_train, make_trainer
from purejaxppo.networks.distributions import Categorical
from purejaxppo.types import Model, Reward, Rewards

ENV = counter()
CONFIG = Config(
    num_envs=4,
    num_steps=8,
    total_timesteps=128,
    num_epochs=2,
    num_minibatches=2,
    hidden_sizes=(8,),
    normalize_obs=True,
)
KEY = jax.random.key(3)


def without_keys(tree):
    """Replaces typed keys by their numbers, for comparisons."""
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, without_keys(a), without_keys(b))


def in_chunks(trainer, *arguments, batched=False):
    """A host loop over jitted pieces, joined to the result of `make_train`."""
    vmap = jax.vmap if batched else lambda f: f
    state = jax.jit(vmap(trainer.init))(*arguments)
    step = jax.jit(vmap(trainer.step), donate_argnums=0)
    rows = []
    for _ in range(CONFIG.num_iterations):
        state, metrics = step(state)
        rows.append(jax.tree.map(np.asarray, metrics))
    axis = 1 if batched else 0
    return state, jax.tree.map(lambda *x: np.stack(x, axis), *rows)


@pytest.fixture(scope="module")
def single():
    """One agent: the function, compiled, and its result."""
    train = jax.jit(make_train(CONFIG, ENV, LINEAR))
    return train, train(KEY)


@pytest.fixture(scope="module")
def seeds():
    """Three agents; the second has the key of `single`."""
    keys = jnp.stack([jax.random.key(1), KEY, jax.random.key(2)])
    return keys, jax.jit(jax.vmap(make_train(CONFIG, ENV, LINEAR)))(keys)


# ------------------------------------------------------------------------------ equivalent runs


@pytest.mark.exact
def test_two_runs_with_one_key_are_identical_and_other_keys_give_other_runs(single):
    train, result = single
    assert_identical(train(KEY), result)
    other = train(jax.random.key(4))
    assert not np.array_equal(other.metrics.policy_loss, result.metrics.policy_loss)


@pytest.mark.exact
def test_a_run_in_chunks_equals_the_one_shot_run(single):
    assert_identical(in_chunks(make_trainer(CONFIG, ENV, LINEAR), KEY), tuple(single[1]))


def test_a_vmapped_run_in_chunks_equals_the_one_shot_run(seeds):
    keys, result = seeds
    assert_identical(
        in_chunks(make_trainer(CONFIG, ENV, LINEAR), keys, batched=True), tuple(result)
    )


def test_a_batched_config_in_chunks_equals_the_one_shot_run():
    """One key, three learning rates: all leaves are batched, not only those that depend on them."""
    batch = CONFIG.replace(lr=jnp.asarray([1e-4, 1e-3, 1e-2]))
    axes = (CONFIG.axes("lr"), None)
    one_shot = jax.jit(
        jax.vmap(lambda config, key: make_train(config, ENV, LINEAR)(key), in_axes=axes)
    )(batch, KEY)
    init = jax.jit(
        jax.vmap(lambda config, key: make_trainer(config, ENV, LINEAR).init(key), in_axes=axes)
    )
    step = jax.jit(
        jax.vmap(
            lambda config, state: make_trainer(config, ENV, LINEAR).step(state),
            in_axes=(axes[0], 0),
        )
    )
    state = init(batch, KEY)
    for _ in range(CONFIG.num_iterations):
        state, metrics = step(batch, state)
    assert_identical(
        (state, metrics), (one_shot.state, jax.tree.map(lambda x: x[:, -1], one_shot.metrics))
    )
    losses = one_shot.metrics.value_loss
    assert len(np.unique(losses[:, 1])) == 3  # the traced rate has an effect


def test_a_vmapped_seed_equals_the_seed_alone(single, seeds):
    alone = single[1].metrics
    together = jax.tree.map(lambda x: x[1], seeds[1].metrics)
    for name in ("policy_loss", "value_loss", "entropy", "episode_return", "grad_norm"):
        a = getattr(alone, name)
        b = getattr(together, name)
        np.testing.assert_allclose(a[:3], b[:3], rtol=1e-4, atol=1e-4, err_msg=name)


def test_a_vmapped_seed_equals_the_seed_alone_for_ten_iterations_in_float64(x64):
    train = make_train(CONFIG.replace(total_timesteps=320), ENV, LINEAR)
    alone = jax.jit(train)(KEY)
    together = jax.jit(jax.vmap(train))(jnp.stack([jax.random.key(1), KEY]))
    assert alone.metrics.value_loss.shape == (10,) and alone.metrics.value_loss.dtype == np.float64
    a, b = without_keys((alone, jax.tree.map(lambda x: x[1], together)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), a, b)


def test_vmapped_metrics_keep_one_row_for_each_seed(seeds):
    """In JaxMARL (issue 95) seeds collapse into one curve in the log."""
    metrics = seeds[1].metrics
    assert all(x.shape == (3, 4) for x in jax.tree.leaves(metrics))
    assert len({tuple(row) for row in np.asarray(metrics.policy_loss)}) == 3
    np.testing.assert_array_equal(metrics.timesteps, np.tile([32, 64, 96, 128], (3, 1)))


# -------------------------------------------------------------------------- counts and metrics


def test_the_number_of_steps_is_the_requested_one_rounded_up(single):
    """rejax exceeds it fourfold, PureJaxRL reduces it silently."""
    for total, iterations in ((128, 4), (97, 4), (96, 3), (1, 1)):
        config = CONFIG.replace(total_timesteps=total)
        assert (config.num_iterations, config.actual_timesteps) == (iterations, 32 * iterations)
        timesteps = jax.eval_shape(make_train(config, ENV, LINEAR), KEY).metrics.timesteps
        assert timesteps.shape == (iterations,)
    np.testing.assert_array_equal(
        single[1].metrics.timesteps, [32, 64, 96, CONFIG.actual_timesteps]
    )
    assert single[1].state.iteration == 4


def test_memory_of_the_metrics_depends_neither_on_steps_nor_on_environments():
    """PureJaxRL (issues 13, 22 and 38) returns the per-step info of the whole run."""

    def shapes(num_envs, num_steps):
        config = CONFIG.replace(
            num_envs=num_envs, num_steps=num_steps, total_timesteps=4 * num_envs * num_steps
        )
        return jax.tree.map(
            lambda x: (x.shape, x.dtype),
            jax.eval_shape(make_train(config, ENV, LINEAR), KEY).metrics,
        )

    small = shapes(4, 8)
    assert shapes(256, 8) == shapes(4, 512) == small
    assert all(
        x.shape == (4,)
        for x in jax.tree.leaves(jax.eval_shape(make_train(CONFIG, ENV, LINEAR), KEY).metrics)
    )


def test_the_run_learns_something_and_its_numbers_are_finite(single):
    metrics = single[1].metrics
    finite = jax.tree.map(lambda x: np.isfinite(x).all(), metrics)
    assert all(jax.tree.leaves(finite)), finite
    assert (np.asarray(metrics.episodes) > 0).all() and (metrics.episode_length <= 5).all()
    assert (metrics.entropy <= np.log(3) + 1e-6).all()


# ------------------------------------------------------------------------------------ compilations


def test_one_compilation_for_all_seeds_and_all_traced_hyper_parameters():
    chex.clear_trace_counter()
    run = jax.jit(
        chex.assert_max_traces(
            lambda config, key: make_train(config, ENV, LINEAR)(key).state.params, n=1
        )
    )
    first = run(CONFIG, KEY)
    changes = (
        {"lr": 1e-2},
        {"gamma": 0.5, "gae_lambda": 0.3},
        {"clip_eps": 0.01, "ent_coef": 0.5},
        {"vf_coef": 2.0, "max_grad_norm": 1e-3},
    )
    results = [run(CONFIG.replace(**change), KEY) for change in changes] + [
        run(CONFIG, jax.random.key(9))
    ]
    for other in results:
        assert any(
            (a != b).any()
            for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
        )
    with pytest.raises(AssertionError, match="traced"):
        run(CONFIG.replace(num_steps=16), KEY)


@pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["discrete", "continuous"])
def test_the_program_lowers_for_other_platforms(space):
    train = make_train(CONFIG.replace(normalize_reward=True), counter(space))
    text = jax.jit(train).trace(KEY).lower(lowering_platforms=("tpu", "cuda")).as_text()
    assert "stablehlo.while" in text and "mhlo.num_partitions = 1" in text


# ------------------------------------------------------------------------- arguments of make_train


def test_purejaxrls_config_runs_and_is_not_changed():
    """The dictionaries of its ppo.py and ppo_continuous_action.py; fewer steps are run."""
    for mapping, iterations in ((PPO, 977), (PPO_CONTINUOUS, 2442)):
        before = dict(mapping)
        shapes = jax.eval_shape(make_train(mapping), KEY)
        assert mapping == before
        assert shapes.metrics.timesteps.shape == (iterations,)
        config = Config.from_dict(mapping)
        assert (config.lr, config.num_epochs, config.clip_value) == (mapping["LR"], 4, True)
        assert config.normalize_obs == config.normalize_reward == (mapping is PPO_CONTINUOUS)

    result = jax.jit(make_train(PPO | {"TOTAL_TIMESTEPS": 1e3}))(KEY)
    assert result.metrics.timesteps[-1] == 1024
    assert (
        np.isfinite(result.metrics.value_loss).all() and 5 < result.metrics.episode_return[0] < 60
    )


def test_reward_fn_replaces_the_rewards_and_sees_config_and_frozen():
    """Rewards 100 · γ · frozen change the value targets, but not the episode statistics."""

    def reward_fn(transitions, config, frozen):
        assert transitions.reward.shape == (8, 4)
        return jnp.zeros_like(transitions.reward) + 100 * config.gamma * frozen["scale"]

    config = CONFIG.replace(gae_lambda=0.0, normalize_obs=False, total_timesteps=32, lr=0.0)
    state = jax.jit(make_trainer(config, ENV, LINEAR, reward_fn).init)(KEY)
    step = jax.jit(
        lambda state, gamma, frozen: make_trainer(
            config.replace(gamma=gamma), ENV, LINEAR, reward_fn
        ).step(state, frozen)[1]
    )
    loss = {(g, s): step(state, g, {"scale": s}) for g, s in ((0.5, 1.0), (0.5, 0.0), (0.0, 1.0))}
    # L_VF = ½ E[(100 γ scale + γ V' − V)²] ≈ 50² / 2, as V is of the order 1.
    assert abs(loss[0.5, 1.0].value_loss / 1250 - 1) < 0.3
    assert loss[0.5, 0.0].value_loss < 30 and loss[0.0, 1.0].value_loss < 30
    assert loss[0.5, 1.0].episode_return == loss[0.0, 1.0].episode_return <= 15


def test_a_reward_with_memory_keeps_it_and_reports_metrics():
    def step(state, transitions, config, frozen):
        return Rewards(transitions.reward * state, state + 1, {"coefficient": state}, {})

    reward = Reward(init=lambda config: jnp.asarray(10.0), step=step)
    config = CONFIG.replace(total_timesteps=96, num_epochs=1)
    result = jax.jit(make_train(config, ENV, LINEAR, reward))(KEY)
    np.testing.assert_array_equal(result.metrics.extra["coefficient"], [10, 11, 12])
    assert result.state.reward == 13


def test_training_starts_from_the_given_parameters(single):
    trainer = make_trainer(CONFIG, ENV, LINEAR)
    params = jax.tree.map(lambda x: 2 * x + 1, single[1].state.params)
    state = jax.jit(trainer.init)(KEY, params)
    assert_identical(state.params, params)
    shapes = jax.eval_shape(make_train(CONFIG, ENV, LINEAR), KEY, params)
    assert jax.tree.structure(shapes.state.params) == jax.tree.structure(params)


def gru_model(actions=3, width=5) -> Model:
    """A user's recurrent actor-critic."""
    cell = nn.GRUCell(width)
    head = nn.Dense(actions + 1)

    def forward(params, carry, obs, reset):
        carry = jnp.where(reset[:, None], 0, carry)
        carry, features = cell.apply(params["policy"], carry, obs)
        out = head.apply(params["value"], features)
        return carry, Categorical(out[:, :actions]), out[:, actions]

    def init(key, obs):
        key_cell, key_head = jax.random.split(key)
        carry = jnp.zeros((obs.shape[0], width))
        return {"policy": cell.init(key_cell, carry, obs), "value": head.init(key_head, carry)}

    def step(params, carry, obs, reset):
        h, distribution, value = forward(params, carry[0], obs, reset)
        return (h,), distribution, value

    def unroll(params, carry, obs, reset):
        def body(h, inputs):
            h, distribution, value = forward(params, h, *inputs)
            return h, (distribution, value)

        return jax.lax.scan(body, carry[0], (obs, reset))[1]

    return Model(init, lambda batch_size: (jnp.zeros((batch_size, width)),), step, unroll)


def test_a_model_with_memory_starts_every_update_with_ratio_1():
    """Stoix stores the carry after the step, interleaves time and sets done flags one step late."""
    config = CONFIG.replace(lr=0.03, num_minibatches=4)
    state, metrics = jax.jit(make_train(config, counter(limit=3, longest=6), gru_model()))(KEY)
    assert metrics.first_ratio_deviation.max() < 1e-4
    assert metrics.extra["largest_ratio_deviation"].min() > 1e-3
    assert state.carry[0].shape == (4, 5) and np.abs(state.carry[0]).max() > 0
