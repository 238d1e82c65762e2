"""Training and gradients against a task whose 30 texts are enumerated: the optimum is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerated import (
    BETA,
    END,
    ENV,
    NODE,
    PREFIXES,
    PROMPTS,
    RESPONSES,
    TEXTS,
    A,
    B,
    N,
    T,
    V,
    objective,
    optimum,
    policy_of,
    random_params,
    random_scores,
    score,
    share_closed,
    tabular,
    text_log_probs,
    transitions_of,
    values_of,
)

from purejaxppo import Config, losses, make_train
from purejaxppo.advantages import ADVANTAGES
from purejaxppo.envs.vector import vectorize
from purejaxppo.rlhf.language_model import language_model
from purejaxppo.rlhf.shaping import kl_shaped
from purejaxppo.rlhf.transformer import DecoderSizes
from purejaxppo.rollout import make_rollout

MODEL = tabular()
CONFIG = Config(
    num_envs=256,
    num_steps=T,
    episodic=True,
    gamma=1.0,
    gae_lambda=1.0,
    normalize_advantage=False,
    ent_coef=0.0,
    vf_coef=1.0,
    max_grad_norm=10.0,
    ref_kl_coef=BETA,
)
GROUPS = {"group_size": 8, "num_epochs": 4, "num_minibatches": 2, "lr": 0.05, "num_iterations": 80}
ONE_STEP = {"num_epochs": 1, "num_minibatches": 1}
TRPO = {"num_epochs": 5, "num_minibatches": 1, "max_kl": 0.02, "cg_damping": 1e-3}
# For a decoder, whose parameters are shared by all prefixes: larger steps end in a local optimum.
SMALL_STEPS = {"num_epochs": 2, "num_minibatches": 1, "num_envs": 512}
SMALL_STEPS |= {"lr": 0.003, "num_iterations": 300}
CASES = {
    "ppo": (
        {"num_epochs": 4, "num_minibatches": 2, "lr": 0.05, "num_iterations": 80},
        0.98,
    ),
    "trpo": (TRPO | {"num_envs": 512, "lr": 0.1, "num_iterations": 40}, 0.95),
    "rloo": (GROUPS | {"advantage": "rloo"}, 0.95),
    "grpo": (GROUPS | {"advantage": "grpo", "normalize_group": False}, 0.95),
    "reinforce": (ONE_STEP | {"lr": 0.05, "num_iterations": 150}, 0.9),
}


def config_of(case, **changes):
    settings = CASES[case][0] | changes
    algorithm = {"rloo": "ppo", "grpo": "ppo"}.get(case, case)
    iterations = settings.pop("num_iterations")
    config = CONFIG.replace(algorithm=algorithm, **settings)
    return config.replace(total_episodes=iterations * config.num_envs)


def trained(config, model, reference, scores, seeds):
    """Parameters of ``seeds`` agents that start from the reference, and their metrics."""
    train = make_train(config, ENV, model, kl_shaped(score, model, END))
    keys = jax.random.split(jax.random.key(0), seeds)
    frozen = {"reference": reference, "score": jnp.asarray(scores)}
    result = jax.jit(jax.vmap(train, (0, None, None)))(keys, reference, frozen)
    return result.state.params, result.metrics


def member(params, index):
    return jax.tree.map(lambda x: x[index], params)


# ------------------------------------------------------------------------------- the task itself


def test_there_are_15_responses_to_each_prompt():
    assert len(RESPONSES) == N == 15 and len(TEXTS) == 30
    assert [END] in RESPONSES and [A, B, A] in RESPONSES and [B, B, END] in RESPONSES
    assert sum(len(x) == 3 and x[-1] != END for x in RESPONSES) == 8  # cut at the bound
    assert len(PREFIXES) == 1 + 7 * len(PROMPTS) + 1  # 7 choices for each prompt, 1 forced step


@pytest.mark.usefixtures("x64")
def test_the_probabilities_of_texts_are_those_of_a_loop():
    params = random_params(3)
    logits = np.asarray(params["policy"])
    expected = []
    for text in TEXTS:
        prompt = next(x for x in PROMPTS if text[: len(x)] == x)
        total = 0.0
        for n in range(len(prompt), len(text)):
            row = logits[NODE[tuple(text[:n])]]
            total += row[text[n]] - np.log(np.exp(row).sum())
        expected.append(total)
    log_prob = text_log_probs(MODEL, params)
    np.testing.assert_allclose(log_prob.ravel(), expected, rtol=1e-12)
    np.testing.assert_allclose(jnp.exp(log_prob).sum(axis=1), 1, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_no_policy_is_better_than_the_optimum():
    scores = random_scores(1)
    reference = text_log_probs(MODEL, random_params(0))
    best, value = optimum(reference, scores, BETA)
    assert objective(best, reference, scores, BETA) == pytest.approx(value, rel=1e-12)
    assert value - objective(reference, reference, scores, BETA) > 0.25
    optimal = text_log_probs(MODEL, policy_of(best))
    np.testing.assert_allclose(optimal, best, atol=1e-12)
    for seed in range(20):
        near = policy_of(best)
        near["policy"] += 0.1 * random_params(seed)["policy"]
        assert objective(text_log_probs(MODEL, near), reference, scores, BETA) < value


@pytest.mark.usefixtures("x64")
def test_a_rollout_has_the_probabilities_of_the_enumeration():
    """Every text that the environment makes is in the table, as often as it should be."""
    num_envs = 4096
    vector_env = vectorize(ENV, num_envs)
    rollout = make_rollout(ENV, vector_env, MODEL, T, whole_episodes=True)
    params = random_params(0)
    state = vector_env.reset(jax.random.key(0))
    transitions, _, _, _ = jax.jit(rollout)(jax.random.key(1), params, None, state, ())
    frozen = {"score": jnp.arange(30.0)}  # the score of a text is its number
    reward = kl_shaped(score, MODEL, END)
    config = CONFIG.replace(ref_kl_coef=0.0)
    rewards = reward.step((), transitions, config, frozen).reward
    count = np.bincount(np.asarray(rewards.sum(axis=0), int), minlength=30)
    expected = num_envs / 2 * np.exp(np.ravel(text_log_probs(MODEL, params)))
    assert (np.abs(count - expected) < 5 * np.sqrt(expected) + 1).all()


# -------------------------------------------------------------------------------- exact gradients


@jax.jit
def surrogate_gradient(config, params, transitions, reward, weights):
    """The gradient of Σ_i w_i Σ_t r_t Â_t of the library's surrogate for the logits."""
    advantage, _ = ADVANTAGES[config.estimator](config, transitions, reward)

    def weighted_sum(x, mask):
        return jnp.where(mask, x * weights[None], 0).sum()

    def loss(policy):
        carry = MODEL.initial_carry(len(weights))
        distribution, _ = MODEL.unroll(
            params | {"policy": policy}, carry, transitions.obs, transitions.reset
        )
        log_prob = distribution.log_prob(transitions.action)
        log_ratio = losses.log_ratio(log_prob, transitions.log_prob, transitions.mask)
        ratio = losses.probability_ratio(log_ratio)
        return losses.clipped_surrogate(ratio, advantage, transitions.mask, 0.2, mean=weighted_sum)

    return jax.grad(loss)(params["policy"])


@jax.jit
def exact_gradient(params, reference, scores):
    """∇J for the logits, by differentiating the sum over all texts."""
    ref_log_prob = text_log_probs(MODEL, reference)

    def value(policy):
        log_prob = text_log_probs(MODEL, params | {"policy": policy})
        return objective(log_prob, ref_log_prob, scores, BETA)

    return jax.grad(value)(params["policy"])


@jax.jit
def shaped_rewards(transitions, reference, scores):
    frozen = {"reference": reference, "score": jnp.asarray(scores)}
    return kl_shaped(score, MODEL, END).step((), transitions, CONFIG, frozen).reward


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("estimator", ["returns", "gae"])
def test_the_expected_gradient_is_that_of_the_objective(estimator):
    """With GAE for any λ, because the values are exact."""
    config = CONFIG.replace(advantage=estimator, gae_lambda=0.3)
    reference = random_params(0)
    scores = random_scores(1)
    params = random_params(5)
    if estimator == "gae":
        params["value"] = values_of(params, reference, scores, BETA)
    transitions = transitions_of(MODEL, params)
    reward = shaped_rewards(transitions, reference, scores)
    weights = jnp.exp(text_log_probs(MODEL, params)).ravel() / len(PROMPTS)
    gradient = surrogate_gradient(config, params, transitions, reward, weights)
    expected = exact_gradient(params, reference, scores)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-13)
    assert jnp.abs(expected).max() > 0.01


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("estimator", "factor"), [("rloo", 1.0), ("grpo", 0.5)])
def test_the_expected_gradient_over_all_pairs(estimator, factor):
    """RLOO is unbiased; the mean of GRPO includes the episode itself: a factor 1 − 1/G."""
    config = CONFIG.replace(advantage=estimator, group_size=2, normalize_group=False)
    reference = random_params(0)
    scores = random_scores(1)
    params = random_params(5)
    pairs = [(p * N + i, p * N + j) for p in range(2) for i in range(N) for j in range(N)]
    columns = np.array(pairs).ravel()
    transitions = transitions_of(MODEL, params, columns)
    reward = shaped_rewards(transitions, reference, scores)
    probability = jnp.exp(text_log_probs(MODEL, params)).ravel()
    of_pair = probability[columns].reshape(-1, 2).prod(axis=1) / len(PROMPTS)
    weights = jnp.repeat(of_pair, 2) / 2
    gradient = surrogate_gradient(config, params, transitions, reward, weights)
    expected = factor * exact_gradient(params, reference, scores)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_the_expected_gradient_vanishes_at_the_optimum():
    config = CONFIG.replace(advantage="returns")
    reference = random_params(0)
    scores = random_scores(1)
    best, value = optimum(text_log_probs(MODEL, reference), scores, BETA)
    params = policy_of(best)
    transitions = transitions_of(MODEL, params)
    reward = shaped_rewards(transitions, reference, scores)
    # At the optimum every text has the same return: β log Z of its prompt.
    returns = np.asarray(reward.sum(axis=0)).reshape(-1, N)
    np.testing.assert_allclose(returns, returns[:, :1] * np.ones((1, N)), atol=1e-12)
    assert returns[:, 0].mean() == pytest.approx(value, abs=1e-12)
    weights = jnp.exp(jnp.ravel(best)) / len(PROMPTS)
    gradient = surrogate_gradient(config, params, transitions, reward, weights)
    assert jnp.abs(gradient).max() < 1e-8


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
def test_one_token_responses(beta):
    """Three responses of one token: k1 in the reward is stationary at π_ref exp(r / β) / Z."""
    config = CONFIG.replace(advantage="returns", ref_kl_coef=beta)
    reference = random_params(0)
    scores = jnp.asarray([0.7, -0.4, 1.3])
    node = NODE[(A,)]
    unnormalized = jax.nn.log_softmax(reference["policy"])[node] + scores / beta
    log_prob = unnormalized - jax.nn.logsumexp(unnormalized)
    params = random_params(0)
    params["policy"][node] = log_prob
    texts = transitions_of(MODEL, params, [RESPONSES.index([END])] * V)
    one_token = jax.tree.map(lambda x: x[:1], texts)._replace(
        action=jnp.arange(V, dtype=jnp.int32)[None], log_prob=log_prob[None]
    )
    reward = kl_shaped(lambda tokens, _, scores: scores[tokens[:, 1]], MODEL, END)
    frozen = {"reference": reference, "score": scores}
    rewards = reward.step((), one_token, config, frozen).reward
    gradient = surrogate_gradient(config, params, one_token, rewards, jnp.exp(log_prob))
    assert jnp.abs(gradient).max() < 1e-8

    # The test can fail: the estimator k3 as a reward is not stationary there.
    difference = jax.nn.log_softmax(reference["policy"])[node] - log_prob
    k3 = jnp.exp(difference) - 1 - difference
    wrong = (scores - beta * k3)[None]
    gradient = surrogate_gradient(config, params, one_token, wrong, jnp.exp(log_prob))
    assert jnp.abs(gradient).max() > 1e-3


# --------------------------------------------------------------------------------------- training


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case",
    [
        "ppo",
        "grpo",
        "reinforce",
        pytest.param("trpo", marks=pytest.mark.learning),
        pytest.param("rloo", marks=pytest.mark.learning),
    ],
)
def test_training_closes_the_span(case):
    """Of every seed; share 0 is the reference, from which training starts, and 1 the optimum."""
    reference = random_params(0)
    scores = random_scores(1)
    assert share_closed(MODEL, reference, reference, scores) == 0
    params, metrics = trained(config_of(case), MODEL, reference, scores, 2)
    for seed in range(2):
        share = share_closed(MODEL, member(params, seed), reference, scores)
        assert CASES[case][1] < share <= 1
    assert (metrics.first_ratio_deviation < 1e-12).all()
    last = metrics.extra["shaped_return"][:, -20:].mean()
    _, best = optimum(text_log_probs(MODEL, reference), scores, BETA)
    assert last == pytest.approx(best, abs=0.05)


@pytest.mark.learning
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
def test_training_a_language_model_closes_the_span(case):
    """The same with a small decoder. It can represent almost every policy on these texts:

    exact gradient ascent on J closes 0.9975 of the span (0.962 with a width of 16).
    """
    sizes = DecoderSizes(
        vocab_size=V, context=T + 1, width=32, num_layers=1, num_heads=4, mlp_width=64
    )
    model = language_model(sizes, "none" if case in ("rloo", "grpo") else "own")
    reference = perturbed(model.init(jax.random.key(7), jnp.zeros(1, jnp.int32)))
    log_prob = text_log_probs(model, reference)
    assert jnp.ptp(log_prob, axis=1).min() > 5  # far from uniform
    scores = random_scores(1)
    changes = {
        "trpo": {"num_envs": 1024, "max_kl": 0.01, "num_iterations": 60},
        "reinforce": {"lr": 0.005, "num_iterations": 400},
    }.get(case, SMALL_STEPS)
    config = config_of(case, **changes)
    params, _ = trained(config, model, reference, scores, 2)
    for seed in range(2):
        share = share_closed(model, member(params, seed), reference, scores)
        assert CASES[case][1] < share <= 1


def perturbed(params):
    """The policy with matrices of noise, so that attention and probabilities are not uniform."""
    leaves, structure = jax.tree.flatten(params["policy"])
    keys = jax.random.split(jax.random.key(9), len(leaves))
    noisy = [
        (0.1 * x if x.ndim > 1 else x) + 0.3 * jax.random.normal(key, x.shape, x.dtype)
        for x, key in zip(leaves, keys, strict=True)
    ]
    return params | {"policy": jax.tree.unflatten(structure, noisy)}
