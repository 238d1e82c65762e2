"""Reward functions with extras, estimators that read the config, and groups that share a start."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_envs import LINEAR, counter

import purejaxppo.losses as losses
from purejaxppo import Config, ConfigError, make_train, make_trainer
from purejaxppo.advantages import ADVANTAGES
from purejaxppo.config import ALGORITHMS, ESTIMATORS
from purejaxppo.envs.vector import vectorize
from purejaxppo.types import Reward, Rewards, Update
from purejaxppo.updates import UPDATES
from purejaxppo.updates.minibatches import as_sequences, shuffled_minibatches

ENV = counter(limit=5, longest=5)
GROUPS = Config(
    algorithm="reinforce",
    advantage="group",
    episodic=True,
    baseline="value",
    normalize_advantage=False,
    anneal_lr=False,
    num_envs=6,
    num_steps=5,
    num_epochs=1,
    num_minibatches=1,
    group_size=3,
    total_timesteps=60,
)


@pytest.fixture
def added(monkeypatch):
    """`added(table, names, name, value)` adds a table entry and allows its name in a config."""

    def add(table, names, name, value):
        monkeypatch.setitem(table, name, value)
        names.append(name)
        undo.append((names, name))

    undo = []
    yield add
    for names, name in undo:
        names.remove(name)


def group_relative(config, transitions, reward):
    """The return of the episode minus the mean return of its group, at each of its steps."""
    returns = jnp.where(transitions.valid, reward, 0).sum(axis=0)
    groups = returns.reshape(-1, config.group_size)
    advantage = (groups - groups.mean(axis=1, keepdims=True)).ravel()
    advantage = jnp.broadcast_to(advantage, reward.shape)
    return advantage, jnp.broadcast_to(returns, reward.shape)


@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
def test_consecutive_environments_of_a_group_share_their_start(group_size):
    state = jax.jit(vectorize(ENV, 6, group_size=group_size).reset)(jax.random.key(0))
    starts = np.asarray(state.env.start).reshape(-1, group_size)
    assert (starts == starts[:, :1]).all() and len(np.unique(starts)) == 6 // group_size
    np.testing.assert_array_equal(np.asarray(state.obs)[:, 0], starts.ravel())


def test_an_estimator_relative_to_a_group_is_one_function_and_one_line(added):
    recorded = {}

    def spy(config, transitions, reward):
        advantage, target = group_relative(config, transitions, reward)
        jax.debug.callback(
            lambda *x: recorded.update(zip("agt", x, strict=True)), advantage, reward, transitions
        )
        return advantage, target

    added(ADVANTAGES, ESTIMATORS, "group", spy)
    trainer = make_trainer(GROUPS, ENV, LINEAR)
    state = jax.jit(trainer.init)(jax.random.key(0))
    _, metrics = jax.block_until_ready(jax.jit(trainer.step)(state))
    assert np.isfinite(metrics.policy_loss)
    valid = np.asarray(recorded["t"].valid)
    returns = np.where(valid, recorded["g"], 0).sum(0)
    expected = [returns[b] - returns[b // 3 * 3 : b // 3 * 3 + 3].mean() for b in range(6)]
    np.testing.assert_allclose(recorded["a"], np.tile(expected, (5, 1)), rtol=1e-5, atol=1e-6)
    starts = np.asarray(recorded["t"].obs)[0, :, 0]
    assert len(np.unique(starts)) == 2 and starts[0] == starts[1] == starts[2] != starts[3]


def reference_kl(config, model, optimizer):
    """One step on r Â minus the mean difference to reference log-probabilities from the extras."""

    def step(key, params, update_state, batch):
        batch = shuffled_minibatches(key, as_sequences(batch), 1)
        batch = jax.tree.map(lambda x: x[0], batch)

        def loss(params):
            distribution, _ = model.unroll(params, batch.carry, batch.obs, batch.reset)
            log_prob = distribution.log_prob(batch.action)
            ratio = losses.probability_ratio(losses.log_ratio(log_prob, batch.log_prob, batch.mask))
            difference = losses.masked_mean(
                log_prob - batch.extras["reference_log_prob"], batch.mask
            )
            surrogate = losses.surrogate(ratio, batch.advantage, batch.mask)
            return -surrogate + 0.1 * difference, {
                "policy_loss": -surrogate,
                "difference": difference,
            }

        gradient, metrics = jax.grad(loss, has_aux=True)(params)
        change, update_state = optimizer.update(gradient, update_state, params)
        metrics["grad_norm"] = optax.tree.norm(gradient)
        return optax.apply_updates(params, change), update_state, metrics

    return Update(optimizer.init, step)


def test_an_objective_reads_reference_log_probabilities_from_the_extras(added):
    """The reference is the initial policy, so that the difference is 0 in the first iteration."""

    def reward_step(state, transitions, config, frozen):
        distribution, _ = LINEAR.unroll(frozen, (), transitions.obs, transitions.reset)
        extras = {"reference_log_prob": distribution.log_prob(transitions.action)}
        return Rewards(transitions.reward, state, {}, extras)

    added(UPDATES, ALGORITHMS, "reference", reference_kl)
    config = Config(
        algorithm="reference",
        num_envs=4,
        num_steps=6,
        num_minibatches=1,
        total_timesteps=4 * 6 * 3,
        lr=0.1,
        anneal_lr=False,
    )
    reward = Reward(lambda config: (), reward_step)
    params = LINEAR.init(jax.random.key(5), jnp.zeros((1, 3)))
    train = jax.jit(make_train(config, counter(), LINEAR, reward))
    metrics = train(jax.random.key(0), params, params).metrics
    difference = np.asarray(metrics.extra["difference"])
    assert abs(difference[0]) < 1e-6 and abs(difference[2]) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"group_size": 4},
            "group_size = 4 does not divide num_envs = 6",
        ),
        (
            {"algorithm": "ppo", "advantage": "gae", "episodic": False},
            "group_size = 3: environments share a start in whole episodes only: set episodic=True, "
            "or group_size=1",
        ),
        (
            {"num_shards": 3},
            "group_size = 3 does not divide num_envs = 6 / num_shards = 3",
        ),
    ],
)
def test_impossible_groups_are_refused_in_one_sentence(changes, message):
    config = GROUPS.replace(**({"advantage": "returns"} | changes))
    with pytest.raises(ConfigError) as error:
        make_train(config, ENV)
    assert str(error.value) == message
