"""PPO's other objectives, those of table 1 of the paper, and early stopping."""

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
    numpy_kl,
    numpy_policy,
    parameters,
    random_batch,
)
from small_envs import counter, linear_model

from purejaxppo import Config, ConfigError, make_train, make_trainer
from purejaxppo.config import OBJECTIVES
from purejaxppo.optimizer import make_optimizer
from purejaxppo.types import Box, Env, Step
from purejaxppo.updates import UPDATES
from purejaxppo.updates.ppo import adapt_kl_coef


def descend(config, params, batch, gaussian=False, rate=0.1):
    """The parameters and metrics after an update of plain gradient descent."""
    update = UPDATES["ppo"](config, linear_model(gaussian, A), optax.sgd(rate))
    new, state, metrics = jax.jit(update.step)(
        jax.random.key(0), params, update.init(params), batch
    )
    return new, state, metrics


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("objective", ["unclipped", "fixed_kl", "adaptive_kl"])
def test_the_second_step_follows_the_gradient_of_the_objective(objective, gaussian):
    """The first step does not distinguish them: at θ_old the divergence and its gradient are 0."""
    config = ONE_STEP.replace(objective=objective, kl_coef=3.0)
    params = parameters(gaussian)
    batch = random_batch(7, gaussian)
    policy = jax.tree.map(np.asarray, params["policy"])
    for i in np.ndindex(T, B):
        batch["log_prob"][i] = numpy_policy(policy, batch["obs"][i], batch["action"][i], gaussian)[
            0
        ]
    one, _, _ = descend(config, params, arrays(batch), gaussian)
    two, _, metrics = descend(config.replace(num_epochs=2), params, arrays(batch), gaussian)
    theta = jax.tree.map(np.asarray, one)
    expected = finite_differences(theta, batch, config, gaussian, policy)
    got = jax.flatten_util.ravel_pytree(jax.tree.map(lambda a, b: (a - b) / 0.1, one, two))[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
    other = finite_differences(
        theta, batch, config.replace(objective="unclipped"), gaussian, policy
    )
    assert (np.abs(other - expected).max() > 1e-3) == (objective != "unclipped")
    if objective == "adaptive_kl":
        theta = jax.tree.map(np.asarray, two["policy"])
        kl = [
            numpy_kl(policy, theta, batch["obs"][i], gaussian)
            for i in np.ndindex(T, B)
            if batch["mask"][i]
        ]
        np.testing.assert_allclose(metrics["kl"], np.mean(kl), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_all_objectives_have_the_policy_gradient_at_the_old_policy():
    params = parameters()
    raw = random_batch(8)
    model = linear_model(False, A)
    batch = arrays(raw)
    distribution, _ = model.unroll(params, (), batch.obs, batch.reset)
    batch = batch._replace(log_prob=distribution.log_prob(batch.action))
    config = ONE_STEP.replace(ent_coef=0.0, vf_coef=0.0, normalize_advantage=False)

    def actor_critic(policy):
        log_prob = model.unroll(params | {"policy": policy}, (), batch.obs, batch.reset)[
            0
        ].log_prob(batch.action)
        return jnp.where(batch.mask, log_prob * batch.advantage, 0).sum() / batch.mask.sum()

    expected = jax.grad(actor_critic)(params["policy"])
    for objective in OBJECTIVES:
        new, _, _ = descend(config.replace(objective=objective), params, batch, rate=1.0)
        change = jax.tree.map(lambda new, old: new - old, new["policy"], params["policy"])
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), change, expected
        )


def test_the_penalty_is_halved_doubled_or_kept():
    for kl, factor in (
        (0.0, 0.5),
        (0.0066, 0.5),
        (0.0067, 1.0),
        (0.0149, 1.0),
        (0.0151, 2.0),
        (9.0, 2.0),
    ):
        assert adapt_kl_coef(jnp.asarray(3.0), jnp.asarray(kl), 0.01) == 3.0 * factor
    assert adapt_kl_coef(jnp.asarray(1e6), jnp.asarray(1.0), 0.01) == np.float32(1e6)
    assert adapt_kl_coef(jnp.asarray(1e-6), jnp.asarray(0.0), 0.01) == np.float32(1e-6)
    with pytest.raises(ConfigError, match="must start above 0"):
        make_train(Config(objective="adaptive_kl", kl_coef=0.0))


def test_the_adaptive_penalty_is_carried_from_iteration_to_iteration():
    config = Config(
        objective="adaptive_kl", num_envs=4, num_steps=8, num_minibatches=2, num_epochs=1
    )
    config = config.replace(total_timesteps=128, hidden_sizes=(4,), kl_coef=0.8, anneal_lr=False)
    train = jax.jit(
        jax.vmap(
            lambda config, key: make_train(config, counter())(key),
            (config.axes("lr", "kl_target"), None),
        )
    )
    metrics = train(
        config.replace(lr=jnp.asarray([0.0, 1e-2]), kl_target=jnp.asarray([0.01, 1e-9])),
        jax.random.key(0),
    ).metrics
    np.testing.assert_allclose(
        metrics.extra["kl_coef"], [[0.8, 0.4, 0.2, 0.1], [0.8, 1.6, 3.2, 6.4]], rtol=1e-6
    )
    assert (metrics.extra["kl"][0] == 0).all() and (metrics.extra["kl"][1] > 1e-8).all()


def test_early_stopping_takes_no_step_after_the_limit():
    config = ONE_STEP.replace(num_epochs=4, vf_coef=0.5)
    params = parameters()
    batch = arrays(random_batch(9))
    distribution, _ = linear_model(False, A).unroll(params, (), batch.obs, batch.reset)
    batch = batch._replace(log_prob=distribution.log_prob(batch.action))

    def run(epochs, limit):
        return descend(config.replace(num_epochs=epochs, early_stop_kl=limit), params, batch)

    four = run(4, None)[0]
    single = run(1, None)[0]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    stopped, _, metrics = run(4, 1e-12)  # the first step has a divergence of 0, and is taken
    jax.tree.map(close, stopped, single)
    assert metrics["steps_taken"] == 0.25
    unlimited, _, metrics = run(4, 1e3)
    jax.tree.map(close, unlimited, four)
    assert metrics["steps_taken"] == 1.0
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(four), jax.tree.leaves(single), strict=True)
    )


def test_early_stopping_leaves_the_schedule_of_the_learning_rate_alone():
    config = ONE_STEP.replace(num_epochs=4, early_stop_kl=1e-9, lr=0.1, total_timesteps=1000)
    params = parameters()
    batch = arrays(random_batch(9))
    distribution, _ = linear_model(False, A).unroll(params, (), batch.obs, batch.reset)
    batch = batch._replace(log_prob=distribution.log_prob(batch.action))
    update = UPDATES["ppo"](config, linear_model(False, A), make_optimizer(config))
    _, state, metrics = jax.jit(update.step)(jax.random.key(0), params, update.init(params), batch)
    assert metrics["steps_taken"] == 0.25
    _, (adam, schedule) = state.optimizer
    assert (adam.count, schedule.count) == (1, 4)


@pytest.mark.parametrize("algorithm", ["ppo", "trpo"])
def test_a_single_sample_changes_the_policy(algorithm):
    """Its standardised advantage would be 0.

    PPO gets eight minibatches of one sample each, and TRPO a batch of one sample.
    """
    sizes = (
        {"num_steps": 8, "num_minibatches": 8}
        if algorithm == "ppo"
        else {"num_steps": 1, "num_minibatches": 1}
    )
    config = Config(
        algorithm=algorithm, num_envs=1, total_timesteps=1, num_epochs=1, anneal_lr=False, **sizes
    )
    trainer = make_trainer(config, counter(), linear_model())
    before = jax.jit(trainer.init)(jax.random.key(0))
    after, _ = jax.jit(trainer.step)(before)
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), before.params["policy"], after.params["policy"]
    )
    assert min(jax.tree.leaves(moved)) > 1e-5


def test_many_action_dimensions_do_not_make_the_ratio_overflow():
    """The log-ratio sums 300 dimensions: 20 epochs at lr 0.01 once gave 3.5e29, then NaN."""

    def step(key, state, action):
        obs = jax.random.normal(key, (3,))
        return Step(
            state=obs,
            obs=obs,
            reward=-((action - 0.5) ** 2).mean(),
            terminated=jnp.asarray(False),
            truncated=jnp.asarray(False),
        )

    def reset(key):
        obs = jax.random.normal(key, (3,))
        return obs, obs

    env = Env(
        name="many",
        reset=reset,
        step=step,
        observation_space=Box((3,), -np.inf, np.inf),
        action_space=Box((300,), -np.inf, np.inf),
        max_episode_steps=None,
        truncates=False,
    )
    config = Config(
        num_envs=8, num_steps=32, total_timesteps=6 * 256, num_epochs=20, lr=0.01, anneal_lr=False
    )
    result = jax.jit(make_train(config, env))(jax.random.key(0))
    assert (
        np.isfinite(result.metrics.policy_loss).all()
        and np.isfinite(result.metrics.grad_norm).all()
    )
    assert (result.metrics.extra["largest_ratio_deviation"] <= np.exp(20) * 1.001).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.state.params))
