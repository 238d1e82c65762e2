"""The temperature of discrete actions: in rollout, update, reference and evaluation alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerated import (
    CHILD,
    END,
    ENV,
    FIRST,
    T,
    V,
    random_params,
    score,
    tabular,
    text_log_probs,
    transitions_of,
)
from sentences import sentence_of
from small_envs import BOX, MULTI, counter, linear_model

from purejaxppo import Config, Policy, make_train, make_trainer
from purejaxppo.envs.vector import vectorize
from purejaxppo.networks.distributions import Categorical, MultiCategorical
from purejaxppo.networks.temperature import tempered, with_temperature
from purejaxppo.rlhf.shaping import kl_shaped
from purejaxppo.rollout import make_rollout
from purejaxppo.types import Box, Dict, Discrete, Env, Step

MODEL = tabular()
PARAMS = random_params(5)
REINFORCE = {"algorithm": "reinforce", "num_epochs": 1, "num_minibatches": 1}
CONFIG = Config(
    num_envs=64,
    num_steps=T,
    episodic=True,
    total_episodes=128,
    num_epochs=1,
    num_minibatches=1,
    gamma=1.0,
    lr=0.01,
    ref_kl_coef=0.5,
)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_step_and_unroll_have_the_softmax_of_divided_logits(temperature):
    model = with_temperature(MODEL, temperature)
    expected = log_softmax(PARAMS["policy"] / temperature)
    transitions = transitions_of(MODEL, PARAMS)
    plain, value = MODEL.unroll(
        PARAMS, jnp.zeros(30, jnp.int32), transitions.obs, transitions.reset
    )
    unrolled, same_value = model.unroll(
        PARAMS, jnp.zeros(30, jnp.int32), transitions.obs, transitions.reset
    )
    np.testing.assert_array_equal(value, same_value)
    for t, b in np.ndindex(T, 30):
        node = (
            np.abs(log_softmax(PARAMS["policy"]) - np.asarray(plain.logits[t, b])).sum(1).argmin()
        )
        np.testing.assert_allclose(unrolled.logits[t, b], expected[node], rtol=1e-12)
    carry, distribution, _ = model.step(
        PARAMS, model.initial_carry(30), transitions.obs[0], transitions.reset[0]
    )
    np.testing.assert_allclose(distribution.logits, unrolled.logits[0], rtol=1e-12)
    assert carry.shape == (30,)


@pytest.mark.usefixtures("x64")
def test_the_parts_of_a_multi_categorical():
    logits = np.random.default_rng(0).normal(size=(2, 3))
    parts = (Categorical(jnp.asarray(logits[0])), Categorical(jnp.asarray(logits[1])))
    result = tempered(MultiCategorical(parts), 0.3)
    for part, expected in zip(result.parts, log_softmax(logits / 0.3), strict=True):
        np.testing.assert_allclose(part.logits, expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "algorithm",
    [
        "ppo",
        pytest.param("trpo", marks=pytest.mark.learning),
        pytest.param("reinforce", marks=pytest.mark.learning),
    ],
)
def test_the_ratio_is_1_and_the_reference_has_the_temperature(algorithm):
    """One compiled program for three temperatures; the initial policy is its own reference."""
    config = CONFIG.replace(algorithm=algorithm)

    def train(temperature):
        hot = config.replace(temperature=temperature)
        train = make_train(hot, ENV, MODEL, kl_shaped(score, MODEL, END))
        return train(jax.random.key(0), PARAMS, {"reference": PARAMS, "score": jnp.arange(30.0)})

    temperatures = jnp.asarray([0.5, 1.0, 2.0])
    result = jax.jit(jax.vmap(train))(temperatures)
    metrics = result.metrics
    assert (metrics.first_ratio_deviation < 1e-12).all()
    assert (jnp.abs(metrics.extra["ref_kl"][:, 0]) < 1e-12).all()
    assert (jnp.abs(metrics.extra["ref_kl"][:, 1]) > 1e-6).all()  # after a step it is another
    # The entropy grows with the temperature.
    assert (np.diff(metrics.entropy[:, 0]) > 0.05).all()
    if algorithm == "ppo":
        alone = jax.jit(train)(0.5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-9, atol=1e-12),
            (result.state.params, metrics.episode_return),
            (alone.state.params, alone.metrics.episode_return),
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("temperature", [0.5])
def test_the_gradient_is_that_of_the_tempered_policy(temperature):
    """One step of REINFORCE with plain returns, recomputed from its rollout."""
    config = CONFIG.replace(**REINFORCE, temperature=temperature, baseline="none")
    config = config.replace(normalize_advantage=False, max_grad_norm=1e9)
    reward = kl_shaped(score, MODEL, END)
    trainer = make_trainer(config, ENV, MODEL, reward)
    state = jax.jit(trainer.init)(jax.random.key(0), PARAMS)
    frozen = {"reference": random_params(0), "score": jnp.arange(30.0)}
    _, metrics = jax.jit(trainer.step)(state, frozen)

    model = with_temperature(MODEL, temperature)
    rollout = make_rollout(ENV, vectorize(ENV, 64), model, T, whole_episodes=True)
    key_rollout, _, _ = jax.random.split(state.key, 3)
    transitions, _, _, _ = jax.jit(rollout)(key_rollout, PARAMS, None, state.env, state.carry)
    rewards = np.asarray(jax.jit(reward.step)((), transitions, config, frozen).reward)
    to_go = np.cumsum(rewards[::-1], axis=0)[::-1]
    gradient = np.zeros_like(PARAMS["policy"])
    probability = np.exp(log_softmax(PARAMS["policy"] / temperature))
    for b in range(64):
        node = 0
        for t in range(T):
            token = int(transitions.obs[t, b])
            node = FIRST[token] if t == 0 else CHILD[node, token]
            if transitions.mask[t, b]:
                one_hot = np.arange(V) == int(transitions.action[t, b])
                gradient[node] += (one_hot - probability[node]) / temperature * to_go[t, b] / 64
    np.testing.assert_allclose(metrics.grad_norm, np.sqrt((gradient**2).sum()), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_the_frequencies_of_actions():
    """Texts of a rollout at temperature 2 are as frequent as the tempered policy says."""
    temperature = 2.0
    config = CONFIG.replace(temperature=temperature, num_envs=4096, total_episodes=4096, lr=0.0)
    # The score is a one-hot number: its mean counts the text [A, END].
    train = make_train(config.replace(**REINFORCE), ENV, MODEL, kl_shaped(score, MODEL, END))
    frozen = {"reference": PARAMS, "score": jnp.zeros(30).at[0].set(1.0)}
    share = jax.jit(train)(jax.random.key(0), PARAMS, frozen).metrics.episode_return[0]
    for at, is_close in ((temperature, True), (1.0, False)):
        hot = PARAMS | {"policy": PARAMS["policy"] / at}
        expected = jnp.exp(text_log_probs(MODEL, hot))[0, 0] / 2
        deviation = jnp.sqrt(expected * (1 - expected) / 4096)
        assert (abs(share - expected) < 4 * deviation) == is_close


# ---------------------------------------------------------------------------------- action masks


def masked_env():
    """Actions 0 and 2 of 4 are allowed; the others cost 1e6."""
    allowed = np.array([1.0, 0.0, 1.0, 0.0], np.float32)

    def observe(t):
        return {"action_mask": jnp.asarray(allowed), "time": 1.0 * jnp.reshape(t, 1)}

    def step(key, t, action):
        return Step(
            state=t + 1,
            obs=observe(t + 1),
            reward=jnp.where(action % 2 == 1, -1e6, 1.0 * action),
            terminated=t >= 3,
            truncated=jnp.asarray(False),
        )

    space = Dict({"action_mask": Box((4,), 0, 1), "time": Box((1,), 0, np.inf)})
    return Env(
        name="masked",
        reset=lambda key: (jnp.int32(0), observe(jnp.int32(0))),
        step=step,
        observation_space=space,
        action_space=Discrete(4),
        max_episode_steps=4,
        truncates=False,
    )


MASKED = masked_env()


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("trpo", marks=pytest.mark.learning)])
def test_forbidden_actions_stay_excluded(algorithm):
    """At low temperatures too, where the lowest logit divided by T overflows."""
    config = Config(algorithm=algorithm, num_envs=64, num_steps=4, total_timesteps=512)
    config = config.replace(hidden_sizes=(8,), num_minibatches=1, num_epochs=2)
    if algorithm == "ppo":
        config = config.replace(objective="fixed_kl", ent_coef=0.01)

    def train(temperature):
        hot = config.replace(temperature=temperature)
        return make_train(hot, MASKED)(jax.random.key(0))

    result = jax.jit(jax.vmap(train))(jnp.asarray([0.1, 0.5, 5.0]))
    assert (result.metrics.episode_return >= 0).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.state.params))
    for name in ("entropy", "approx_kl", "policy_loss", "grad_norm", "first_ratio_deviation"):
        assert np.isfinite(getattr(result.metrics, name)).all(), name
    assert (result.metrics.entropy <= np.log(2) + 1e-6).all()
    assert (result.metrics.first_ratio_deviation < 1e-5).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("temperature", [0.1, 5.0])
def test_a_forbidden_action_beside_two_allowed_ones(temperature):
    """Probability 0, and finite derivatives of log-probability, entropy and KL."""
    lowest = jnp.finfo(jnp.float64).min

    def policy(x):
        logits = jnp.stack([x[0], x[1], lowest])
        return tempered(Categorical(logits), temperature)

    x = jnp.asarray([0.3, -0.2])
    expected = log_softmax(np.asarray(x) / temperature)
    np.testing.assert_allclose(policy(x).logits[:2], expected, rtol=1e-12)
    assert jnp.exp(policy(x).logits[2]) == 0
    p = np.exp(expected)
    np.testing.assert_allclose(policy(x).entropy(), -(p * expected).sum(), rtol=1e-12)
    keys = jax.random.split(jax.random.key(0), 200)
    assert (jax.vmap(policy(x).sample)(keys) < 2).all()
    other = policy(jnp.asarray([0.1, 0.1]))
    for measure in (
        lambda x: policy(x).log_prob(jnp.int32(0)),
        lambda x: policy(x).entropy(),
        lambda x: policy(x).kl(other),
        lambda x: other.kl(policy(x)),
    ):
        gradient = jax.grad(measure)(x)
        hessian = jax.hessian(measure)(x)
        difference = [
            (measure(x + 1e-6 * unit) - measure(x - 1e-6 * unit)) / 2e-6 for unit in jnp.eye(2)
        ]
        np.testing.assert_allclose(gradient, difference, rtol=1e-5, atol=1e-8)
        assert np.isfinite(hessian).all()


# ------------------------------------------------------------------------- continuous, evaluation


def test_continuous_actions_have_no_temperature():
    config = Config(num_envs=4, num_steps=8, num_minibatches=1, total_timesteps=32)
    model = linear_model(gaussian=True, actions=2)
    sentence = sentence_of(lambda: make_train(config.replace(temperature=0.5), counter(BOX), model))
    assert "temperature = 0.5" in sentence and "continuous" in sentence
    make_train(config.replace(temperature=1), counter(BOX), model)
    make_train(config.replace(temperature=0.5), counter(MULTI))

    def train(config, key):
        return make_train(config, counter(BOX), model)(key).metrics

    lr = config.replace(lr=jnp.asarray([0.0, 0.01]))
    over_lr = jax.vmap(train, (lr.axes("lr"), None))
    assert jax.eval_shape(over_lr, lr, jax.random.key(0)).entropy.shape == (2, 1)
    # Even when everything is traced, the temperature included.
    assert jax.eval_shape(train, config, jax.random.key(0)).entropy.shape == (1,)


def test_a_temperature_must_be_positive():
    for value in (0, -1.0, np.nan, np.inf):
        sentence = sentence_of(lambda value=value: Config.from_dict({"temperature": value}))
        assert "temperature" in sentence and "above 0" in sentence


def test_a_policy_samples_with_its_temperature():
    """The frequencies of 20,000 samples, and the mode, which is that of every temperature."""
    env = counter(Discrete(3))
    model = linear_model(actions=3)
    config = Config(num_envs=4, num_steps=8, num_minibatches=1, total_timesteps=32, lr=0.0)
    key = jax.random.key(1)
    state = jax.jit(make_train(config, env, model))(key).state
    obs = np.array([0.5, 2.0, 1.0], np.float32)
    logits = np.asarray(model.unroll(state.params, (), obs[None, None], None)[0].logits)[0, 0]
    rows = np.tile(obs, (20_000, 1))
    modes = []
    for temperature in (0.5, 1.0, 3.0):
        hot = config.replace(temperature=temperature)
        policy = Policy.from_state(hot, state, env=env, model=model)
        actions = np.asarray(policy.act(rows, jax.random.key(2)))
        expected = np.exp(log_softmax(logits / temperature))
        deviation = np.sqrt(expected * (1 - expected) / len(rows))
        assert (
            np.abs(np.bincount(actions, minlength=3) / len(rows) - expected) < 5 * deviation
        ).all()
        modes.append(int(policy.act(obs)))
    assert set(modes) == {int(logits.argmax())}
    assert np.ptp(logits) > 0.3
