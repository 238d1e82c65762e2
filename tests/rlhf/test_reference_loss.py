"""The divergence from the reference in the loss: another objective than in the reward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerated import END, A, V, random_params, tabular
from enumerated import NODE as NODES
from sentences import sentence_of

from purejaxppo import Config, losses, make_train
from purejaxppo.envs.tokens import tokens
from purejaxppo.rlhf.shaping import kl_shaped

MODEL = tabular()
ENV = tokens([[A]], [1], 1, END, V)  # responses of one token
NODE = NODES[(A,)]
SCORES = np.array([0.7, -0.4, 1.3])
REFERENCE = random_params(0)
REWARD = kl_shaped(lambda tokens, lengths, scores: scores[tokens[:, 1]], MODEL, END)
CONFIG = Config(
    num_envs=512,
    num_steps=1,
    episodic=True,
    total_episodes=512 * 150,
    num_epochs=2,
    num_minibatches=1,
    lr=0.03,
    gamma=1.0,
    gae_lambda=1.0,
    normalize_advantage=False,
    ref_kl_coef=0.5,
)


def optimum_in_loss(ref_log_prob, beta):
    """β π_ref / (λ − r), where the λ for which it sums to 1 is found by bisection."""
    ref = beta * jnp.exp(ref_log_prob)
    low, high = jnp.asarray(SCORES.max()), jnp.asarray(SCORES.max() + beta)
    for _ in range(200):  # the sum falls with λ
        middle = (low + high) / 2
        is_above = (ref / (middle - SCORES)).sum() > 1
        low, high = jnp.where(is_above, middle, low), jnp.where(is_above, high, middle)
    return ref / (high - SCORES)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_the_exact_gradient_of_k3_vanishes_at_another_optimum_and_that_of_k1_is_0(beta):
    ref_log_prob = jax.nn.log_softmax(jnp.asarray(REFERENCE["policy"]))[NODE]
    probability = optimum_in_loss(ref_log_prob, beta)
    assert probability.sum() == pytest.approx(1, abs=1e-12)

    def gradient(estimator):
        def objective(logits):
            def expected(x, mask):
                return (jnp.where(mask, x, 0) * probability).sum()

            log_prob = jax.nn.log_softmax(logits)
            ratio = jnp.exp(log_prob - jnp.log(probability))
            mask = jnp.ones(V, bool)
            kl = losses.reference_kl(log_prob, ref_log_prob, mask, estimator, expected)
            return losses.surrogate(ratio, jnp.asarray(SCORES), mask, expected) - beta * kl

        return jax.grad(objective)(jnp.log(probability))

    assert jnp.abs(gradient("k3")).max() < 1e-8
    of_scores = probability * (SCORES - (probability * SCORES).sum())
    np.testing.assert_allclose(gradient("k1"), of_scores, atol=1e-12)
    assert jnp.abs(of_scores).max() > 0.01


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("estimator", ["none", "k3"])
def test_training_ends_at_the_optimum_of_its_objective(estimator):
    ref_log_prob = jax.nn.log_softmax(jnp.asarray(REFERENCE["policy"]))[NODE]
    in_reward = jax.nn.softmax(ref_log_prob + SCORES / CONFIG.ref_kl_coef)
    in_loss = optimum_in_loss(ref_log_prob, CONFIG.ref_kl_coef)
    assert jnp.abs(in_reward - in_loss).max() > 0.03
    config = CONFIG.replace(ref_kl_loss=estimator)
    frozen = {"reference": REFERENCE, "score": jnp.asarray(SCORES)}
    train = jax.jit(make_train(config, ENV, MODEL, REWARD))
    result = train(jax.random.key(0), jax.tree.map(jnp.asarray, REFERENCE), frozen)
    learnt = jax.nn.softmax(result.state.params["policy"][NODE])
    expected = in_reward if estimator == "none" else in_loss
    np.testing.assert_allclose(learnt, expected, atol=0.015)
    # The reward is then the score alone; the divergence is measured in both cases.
    shaped, score = result.metrics.extra["shaped_return"], result.metrics.episode_return
    assert bool((shaped == score).all()) == (estimator == "k3")
    assert result.metrics.extra["ref_kl"][-1] > 0.05


def test_estimates_leave_out_what_is_not_in_the_mask():
    log_prob = jnp.log(jnp.asarray([0.5, 0.2, jnp.nan]))
    ref_log_prob = jnp.log(jnp.asarray([0.25, 0.1, 0.1]))
    mask = jnp.asarray([True, True, False])
    k1 = losses.reference_kl(log_prob, ref_log_prob, mask, "k1")
    k3 = losses.reference_kl(log_prob, ref_log_prob, mask, "k3")
    assert k1 == pytest.approx(np.log(2))
    assert k3 == pytest.approx(0.5 - 1 + np.log(2))


@pytest.mark.parametrize(
    ("changes", "reward", "message"),
    [
        (
            {"ref_kl_target": 1.0},
            REWARD,
            "ref_kl_loss = 'k3': ref_kl_target adapts the coefficient of the reward only: "
            "leave one of them out",
        ),
        (
            {"algorithm": "trpo"},
            REWARD,
            "ref_kl_loss = 'k3' is for ppo only: leave it out, or set algorithm='ppo'",
        ),
        (
            {},
            None,
            "ref_kl_loss = 'k3' needs the log-probabilities of a reference policy: "
            "train with the reward function kl_shaped",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(changes, reward, message):
    config = CONFIG.replace(ref_kl_loss="k3", **changes)
    frozen = {"reference": REFERENCE, "score": jnp.asarray(SCORES)}

    def run():
        jax.eval_shape(make_train(config, ENV, MODEL, reward), jax.random.key(0), None, frozen)

    assert sentence_of(run) == message


def test_the_coefficient_0_needs_no_finite_divergence():
    reference = REFERENCE["policy"].copy()
    reference[NODE, 0] = -np.inf  # a token that the reference excludes
    frozen = {"reference": REFERENCE | {"policy": reference}, "score": jnp.asarray(SCORES)}
    config = CONFIG.replace(ref_kl_loss="k3", ref_kl_coef=0.0, total_episodes=1024)
    result = jax.jit(make_train(config, ENV, MODEL, REWARD))(jax.random.key(0), None, frozen)
    assert np.isfinite(result.metrics.policy_loss).all()
    assert np.isfinite(result.state.params["policy"]).all()


def test_without_a_reference_the_coefficient_0_is_needed():
    config = CONFIG.replace(ref_kl_loss="k3", ref_kl_coef=0.0, total_episodes=1024)
    frozen = {"score": jnp.asarray(SCORES)}
    result = jax.jit(make_train(config, ENV, MODEL, REWARD))(jax.random.key(0), None, frozen)
    assert np.isfinite(result.metrics.policy_loss).all()
    train = make_train(config.replace(ref_kl_coef=0.1), ENV, MODEL, REWARD)
    message = sentence_of(lambda: jax.eval_shape(train, jax.random.key(0), None, frozen))
    assert "needs a reference policy" in message
