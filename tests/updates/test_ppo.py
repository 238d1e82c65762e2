"""PPO's update against an independent NumPy calculation, and the settings of its optimiser."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ppo_reference import (
    ONE_STEP,
    A,
    B,
    T,
    arrays,
    finite_differences,
    numpy_objective,
    numpy_policy,
    parameters,
    random_batch,
)
from small_envs import BOX, DISCRETE, MULTI, counter, linear_model

from purejaxppo import Config, make_train
from purejaxppo.networks.actor_critic import mlp_actor_critic
from purejaxppo.optimizer import annealed_lr, make_optimizer
from purejaxppo.types import Box
from purejaxppo.updates import UPDATES
from purejaxppo.updates.minibatches import as_sequences, shuffled_minibatches

FEATURES = Box((4,), -np.inf, np.inf)


@functools.cache
def one_step(gaussian, normalize_advantage=True, clip_value=False):
    """One step of plain gradient descent with rate 1: the parameters change by −gradient."""

    def step(config, params, batch):
        update = UPDATES["ppo"](config, linear_model(gaussian, A), optax.sgd(1.0))
        new, _, metrics = update.step(jax.random.key(0), params, update.init(params), batch)
        return jax.tree.map(lambda old, new: old - new, params, new), metrics

    config = ONE_STEP.replace(normalize_advantage=normalize_advantage, clip_value=clip_value)
    return config, jax.jit(step)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("gaussian", "normalize_advantage", "clip_value"),
    [(False, True, False), (True, True, False), (False, False, True)],
)
def test_loss_and_gradient_equal_an_independent_calculation(
    gaussian, normalize_advantage, clip_value, masked
):
    config, step = one_step(gaussian, normalize_advantage, clip_value)
    params = parameters(gaussian)
    theta = jax.tree.map(np.asarray, params)
    for seed in range(2):
        batch = random_batch(seed, gaussian, masked)
        for i in np.ndindex(T, B):
            batch["log_prob"][i] += (
                1.2
                + numpy_policy(theta["policy"], batch["obs"][i], batch["action"][i], gaussian)[0]
            )
        _, parts = numpy_objective(theta, batch, config, gaussian)
        assert 0.1 < parts["clip_fraction"] < 1  # otherwise clipping would not be tested
        gradient, metrics = step(config, params, arrays(batch))
        for name, expected in parts.items():
            np.testing.assert_allclose(metrics[name], expected, rtol=1e-10, err_msg=name)
        flat = jax.flatten_util.ravel_pytree(gradient)[0]
        np.testing.assert_allclose(
            flat, finite_differences(theta, batch, config, gaussian), rtol=1e-5, atol=1e-7
        )
        np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(flat), rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fill", [1e6, np.nan])
@pytest.mark.parametrize(("normalize_advantage", "clip_value"), [(True, False), (False, True)])
def test_masked_entries_have_no_effect(fill, normalize_advantage, clip_value):
    config, step = one_step(False, normalize_advantage, clip_value)
    batch = random_batch(3)
    params = parameters()
    changed = dict(batch)
    for name, used in (
        ("log_prob", "mask"),
        ("advantage", "mask"),
        ("value", "valid"),
        ("target", "valid"),
    ):
        assert not batch[used].all()
        changed[name] = np.where(batch[used], batch[name], fill)
    got, metrics = step(config, params, arrays(changed))
    expected, expected_metrics = step(config, params, arrays(batch))
    jax.tree.map(np.testing.assert_array_equal, (got, metrics), (expected, expected_metrics))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((got, metrics)))


@pytest.mark.usefixtures("x64")
def test_the_first_ratio_deviation_is_the_largest_distance_of_a_ratio_from_1():
    config, step = one_step(False)
    params = parameters()
    batch = arrays(random_batch(4, masked=False))
    distribution, _ = linear_model(False, A).unroll(params, (), batch.obs, batch.reset)
    exact = batch._replace(log_prob=distribution.log_prob(batch.action))
    assert step(config, params, exact)[1]["first_ratio_deviation"] < 1e-12
    shifted = exact._replace(log_prob=exact.log_prob.at[2, 1].add(0.1))
    np.testing.assert_allclose(
        step(config, params, shifted)[1]["first_ratio_deviation"], 1 - np.exp(-0.1), rtol=1e-9
    )


@pytest.mark.usefixtures("x64")
def test_vf_coef_has_an_effect_with_separate_trunks():
    """The value's gradient is proportional to it, and the policy's does not depend on it.

    It has no effect at all in rejax and Stoix.
    """
    config, step = one_step(False)
    params = parameters()
    batch = arrays(random_batch(5))
    one, two, none = (step(config.replace(vf_coef=c), params, batch)[0] for c in (0.7, 1.4, 0.0))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9), one["policy"], two["policy"]
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-9), one["value"], two["value"]
    )
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(one["value"])) > 1e-2
    assert all((x == 0).all() for x in jax.tree.leaves(none["value"]))


# ---------------------------------------------------------------------------------- minibatches


def test_minibatches_are_a_partition_of_steps_or_of_whole_sequences():
    batch = arrays(random_batch(6))
    index = np.arange(T * B).reshape(T, B)
    batch = batch._replace(value=index, target=10 * index, obs=np.stack([index, -index], -1))

    @functools.partial(jax.jit, static_argnums=2)
    def minibatches(seed, batch, count):
        return shuffled_minibatches(jax.random.key(seed), as_sequences(batch), count)

    flat = minibatches(0, batch, 5)
    assert flat.value.shape == (5, 1, 3) and flat.obs.shape == (5, 1, 3, 2)
    np.testing.assert_array_equal(np.sort(flat.value.ravel()), np.arange(T * B))
    np.testing.assert_array_equal(flat.target, 10 * np.asarray(flat.value))
    np.testing.assert_array_equal(flat.obs, np.stack([flat.value, -np.asarray(flat.value)], -1))
    other = minibatches(1, batch, 5)
    assert (np.asarray(flat.value) != other.value).any()
    assert (np.asarray(flat.value).ravel() != np.arange(T * B)).any()

    remembering = batch._replace(carry=(100 * jnp.arange(B),))
    sequences = jax.tree.map(np.asarray, minibatches(0, remembering, B))
    assert sequences.value.shape == (B, T, 1)
    np.testing.assert_array_equal(np.sort(sequences.carry[0].ravel()), [0, 100, 200])
    for m in range(B):
        b = int(sequences.carry[0][m, 0]) // 100
        np.testing.assert_array_equal(sequences.value[m, :, 0], index[:, b])


# ------------------------------------------------------------------------------------- optimiser


def test_max_grad_norm_clips_the_global_norm():
    """rejax clips each element. Adam's first step is lr · g / (|g| + ε), so a large ε reveals g."""
    gradient = {"a": jnp.asarray([3.0, -4.0, 0.1]), "b": jnp.asarray([[12.0]])}
    norm = np.sqrt(9 + 16 + 0.01 + 144)
    for limit, scale in ((0.5, 0.5 / norm), (1e3, 1.0)):
        optimizer = make_optimizer(
            Config(lr=0.1, anneal_lr=False, max_grad_norm=limit, adam_eps=1.0)
        )
        change, _ = jax.jit(optimizer.update)(gradient, jax.jit(optimizer.init)(gradient), gradient)
        for name, g in gradient.items():
            expected = -0.1 * scale * np.asarray(g) / (np.abs(scale * np.asarray(g)) + 1.0)
            np.testing.assert_allclose(change[name], expected, rtol=1e-5)


def test_the_learning_rate_is_annealed_linearly_to_0_and_never_below():
    config = Config(
        lr=0.1, num_envs=4, num_steps=8, total_timesteps=100, num_epochs=3, num_minibatches=2
    )
    assert config.num_iterations == 4
    optimizer = make_optimizer(config.replace(max_grad_norm=1e9))
    g = jnp.ones(())
    # A constant gradient of 1 makes every step of Adam lr / (1 + ε).
    state = optimizer.init(g)
    rates = []
    update = jax.jit(optimizer.update)
    for _ in range(6 * 6):
        change, state = update(g, state)
        rates.append(-float(change))
    expected = np.repeat([0.1, 0.075, 0.05, 0.025, 0.0, 0.0], 6)
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-9)
    assert min(rates) >= 0

    constant = make_optimizer(config.replace(anneal_lr=False, max_grad_norm=1e9))
    state = constant.init(g)
    for _ in range(30):
        change, state = jax.jit(constant.update)(g, state)
    np.testing.assert_allclose(-change, 0.1, rtol=1e-4)


# ---------------------------------------------------------------------------------------- networks


def test_a_shared_trunk_is_one_trunk_and_separate_ones_are_two():
    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    hidden = 4 * 8 + 8 + 8 * 8 + 8
    policy = 8 * 3 + 3
    value = 8 + 1
    for shared in (True, False):
        model = mlp_actor_critic(FEATURES, DISCRETE, hidden_sizes=(8, 8), shared_trunk=shared)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4)))
        params = jax.tree.map(lambda x: np.full(x.shape, 0.1, np.float32), shapes)
        assert set(params) == ({"policy", "value", "trunk"} if shared else {"policy", "value"})
        assert count(params) == hidden * (1 if shared else 2) + policy + value

        def value_of(params, model=model):
            return model.step(params, (), jnp.ones((2, 4)), jnp.zeros(2, bool))[2].sum()

        gradient = jax.jit(jax.grad(value_of))(params)
        gradient = jax.tree.map(np.asarray, gradient)
        assert all((x == 0).all() for x in jax.tree.leaves(gradient["policy"]))
        assert not shared or max(np.abs(x).max() for x in jax.tree.leaves(gradient["trunk"])) > 1e-3


# --------------------------------------------------------------------------------- the whole loop


@pytest.mark.parametrize("kind", ["discrete", "multi-discrete", "gaussian", "tanh-gaussian"])
@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-4), (np.float64, 1e-9)])
def test_the_first_minibatch_of_every_update_has_ratio_1(kind, dtype, bound):
    """Observations of size 1e3 are normalised by moments that change in every iteration.

    Brax's default fails this test.
    """
    space = {"discrete": DISCRETE, "multi-discrete": MULTI}.get(kind, BOX)
    config = Config(
        num_envs=4,
        num_steps=8,
        total_timesteps=4 * 32,
        num_epochs=1,
        num_minibatches=2,
        hidden_sizes=(4,),
        lr=0.03,
        normalize_obs=True,
        squash_actions=kind == "tanh-gaussian",
    )
    with jax.enable_x64(dtype == np.float64):
        train = jax.jit(make_train(config, env=counter(space)))
        state, metrics = train(jax.random.key(0))
    assert state.params["value"]["head"]["params"]["Dense_0"]["kernel"].dtype == dtype
    assert metrics.first_ratio_deviation.shape == (4,)
    assert metrics.first_ratio_deviation.max() < bound
    assert metrics.extra["largest_ratio_deviation"].min() > 1e-3  # later ones do move


@pytest.mark.usefixtures("x64")
def test_the_annealed_learning_rate_has_the_working_precision():
    """1 − k / K in float32 has an error of 1e-8."""
    config = Config(num_envs=1, num_steps=1, num_minibatches=1, total_timesteps=7, lr=0.3)
    rates = [float(annealed_lr(config, jnp.int32(k), config.num_iterations)) for k in range(9)]
    np.testing.assert_allclose(
        rates, [0.3 * max(0, 1 - k / 7) for k in range(9)], rtol=1e-15, atol=0
    )
