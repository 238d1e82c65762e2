"""Reward models: scores that depend on the text alone, the losses, and learning a preference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentences import sentence_of

from purejaxppo.rlhf import reward_model as module
from purejaxppo.rlhf.language_model import language_model
from purejaxppo.rlhf.preference_losses import (
    all_pairs_loss,
    bradley_terry_loss,
    centering_penalty,
    preference_of_ratings,
)
from purejaxppo.rlhf.reward_model import make_reward_model, reward_model_job
from purejaxppo.rlhf.reward_network import from_policy, reward_model, scores, standardize
from purejaxppo.rlhf.supervised_settings import SupervisedSettings
from purejaxppo.rlhf.texts import (
    Pairs,
    Ranked,
    Texts,
    concatenated,
    require_pairs,
    token_log_probs,
)
from purejaxppo.rlhf.transformer import DecoderSizes
from purejaxppo.runs.programs import first_metrics, require_valid_metrics

SIZES = DecoderSizes(
    vocab_size=7, context=8, width=16, num_layers=1, num_heads=4, num_kv_heads=2, mlp_width=24
)
MODEL = reward_model(SIZES)
SETTINGS = SupervisedSettings(num_epochs=6, batch_size=32, lr=0.01)


def make_texts(seed, n=12, width=8):
    rng = np.random.default_rng(seed)
    length = np.append(rng.integers(2, width, n - 1), width)
    tokens = rng.integers(0, 7, (n, width))
    return Texts(*(jnp.asarray(x, jnp.int32) for x in (tokens, length, np.ones(n))))


def make_pairs(seed=0, n=12):
    rng = np.random.default_rng(seed)
    return Pairs(make_texts(2 * seed, n), make_texts(2 * seed + 1, n), jnp.asarray(rng.random(n)))


def perturbed_params(model=MODEL, scale=0.3):
    """Parameters far from their initial values, with a head that is not zero."""
    leaves, structure = jax.tree.flatten(jax.jit(model.init)(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(9), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    noisy = [x + scale * jax.random.normal(key, x.shape, x.dtype) for x, key in pairs]
    return jax.tree.unflatten(structure, noisy)


def policy_params(model):
    return jax.jit(model.init)(jax.random.key(3), jnp.zeros(1, jnp.int32))


def test_the_score_of_a_text_depends_on_nothing_else():
    """Alone, in a batch, with more padding, and with padding outside the vocabulary."""
    params = perturbed_params(scale=0.1)
    texts = make_texts(0)
    score = jax.jit(MODEL.score)
    expected = score(params, texts.tokens, texts.length)
    assert np.ptp(expected) > 0.5 and np.isfinite(expected).all()
    longer = jnp.pad(texts.tokens, ((0, 0), (0, 5)), constant_values=99)
    longer = jnp.where(jnp.arange(13)[None] < texts.length[:, None], longer, 99)
    np.testing.assert_allclose(score(params, longer, texts.length), expected, atol=1e-6)
    for i in (0, 11):
        length = int(texts.length[i])
        alone = score(params, texts.tokens[i : i + 1, :length], texts.length[i : i + 1])
        np.testing.assert_allclose(alone[0], expected[i], atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(lambda x: scores(MODEL, params, x, 5))(texts), expected, atol=1e-6
    )


def test_the_score_is_that_of_the_last_real_token():
    """Every token of a text has an influence, also the last; an earlier end has its own score."""
    params = perturbed_params()
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    score = jax.jit(lambda tokens, n: MODEL.score(params, tokens, jnp.array([n]))[0])
    full = float(score(tokens, 5))
    for t in range(5):
        assert abs(float(score(tokens.at[0, t].set(6), 5)) - full) > 1e-4
    assert float(score(tokens.at[0, 5].set(6), 5)) == full
    assert abs(float(score(tokens, 4)) - full) > 1e-3
    for length in (0, 7):
        assert np.isnan(score(tokens, length))
    too_long = jnp.zeros((1, 9), jnp.int32)
    assert np.isnan(MODEL.score(params, too_long, jnp.array([9]))[0])


@pytest.mark.usefixtures("x64")
def test_the_loss_is_bradley_terrys_with_margins_and_centring():
    coef = 0.3
    model = reward_model(SIZES)
    params = perturbed_params(model)
    pairs = make_pairs()
    loss = jax.jit(jax.value_and_grad(module._loss(model, coef, 0.0, 0.0), has_aux=True))
    (value, metrics), gradient = loss(params, pairs, {}, jax.random.key(0))
    score = jax.jit(lambda texts: model.score(params, texts.tokens, texts.length))
    w = np.asarray(score(pairs.chosen))
    l = np.asarray(score(pairs.rejected))  # noqa: E741
    m = np.asarray(pairs.margin)
    sigmoid = 1 / (1 + np.exp(-(w - l - m)))
    expected = (-np.log(sigmoid) + coef * (w + l) ** 2).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(metrics["accuracy"], (w > l).mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["score_difference"], (w - l).mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["score"], (w + l).mean() / 2, rtol=1e-12)
    assert gradient["shift"] == 0 and gradient["scale"] == 0
    assert abs(gradient["head"]["params"]["kernel"]).max() > 1e-3

    held_out = jax.jit(lambda params: module.evaluate(model, params, pairs, 5))(params)
    np.testing.assert_allclose(held_out["loss"], -np.log(sigmoid).mean(), rtol=1e-12)
    np.testing.assert_allclose(held_out["accuracy"], (w > l).mean(), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_losses_of_plain_arrays():
    """By hand: −log σ(log 3) = log(4 / 3); large differences do not overflow."""
    w = jnp.array([np.log(3.0), 1.0, 0.0, -1e4])
    l = jnp.array([0.0, 0.5, 0.0, 1e4])  # noqa: E741
    margin = jnp.array([0.0, 0.5, -np.log(3.0), 0.0])
    expected = [np.log(4 / 3), np.log(2), np.log(4 / 3), 2e4]
    np.testing.assert_allclose(bradley_terry_loss(w, l, margin), expected, rtol=1e-12)
    np.testing.assert_allclose(centering_penalty(w, l)[:3], [np.log(3) ** 2, 2.25, 0.0])
    gradient = jax.grad(lambda w: bradley_terry_loss(w, l, margin).sum())(w)
    np.testing.assert_allclose(gradient, [-0.25, -0.5, -0.25, -1.0], rtol=1e-12)


def test_a_new_model_scores_0_and_starts_from_a_policy():
    texts = make_texts(0)
    fresh = jax.jit(MODEL.init)(jax.random.key(0))
    for critic in ("shared", "none"):
        policy = policy_params(language_model(SIZES, critic))
        params = from_policy(fresh, policy)
        source = policy["trunk" if critic == "shared" else "policy"]
        jax.tree.map(np.testing.assert_array_equal, params["decoder"], source)
    assert not np.any(jax.jit(MODEL.score)(params, texts.tokens, texts.length))
    other = DecoderSizes(vocab_size=9, context=8, width=16)
    policy = policy_params(language_model(other, "none"))
    sentence = sentence_of(lambda: from_policy(params, policy))
    assert "has other sizes than that of the reward model" in sentence


def test_the_decoder_sees_the_text_as_the_policy_does():
    """With the embedding of a token as head, the score is the logit of that token."""
    policy_model = language_model(SIZES, "none")
    policy = policy_params(policy_model)
    params = from_policy(perturbed_params(), policy) | {"shift": 0.0, "scale": 1.0}
    embedding = policy["policy"]["params"]["embedding"]["embedding"]
    texts = make_texts(0)
    reset = jnp.broadcast_to((jnp.arange(8) == 0)[:, None], (8, 12))
    unroll = jax.jit(policy_model.unroll)
    distribution, _ = unroll(policy, policy_model.initial_carry(12), texts.tokens.T, reset)
    log_p = distribution.logits[texts.length - 1, jnp.arange(12)]

    @jax.jit
    def score(token):
        head = {"params": {"kernel": embedding[token][:, None]}}
        return MODEL.score(params | {"head": head}, texts.tokens, texts.length)

    np.testing.assert_allclose(score(2) - score(5), log_p[:, 2] - log_p[:, 5], atol=1e-5)


def test_scores_are_standardised_on_given_texts():
    params = perturbed_params()
    texts = make_texts(5)
    all_scores = jax.jit(lambda params: scores(MODEL, params, texts))
    before = all_scores(params)
    changed = jax.jit(lambda params: standardize(MODEL, params, texts, 5))(params)
    after = all_scores(changed)
    expected = (np.asarray(before) - np.mean(before)) / np.std(before)
    np.testing.assert_allclose(after, expected, atol=1e-5)
    again = standardize(MODEL, changed, texts)
    np.testing.assert_allclose(again["shift"], changed["shift"], rtol=1e-4)
    np.testing.assert_allclose(again["scale"], changed["scale"], rtol=1e-4)
    fresh = jax.jit(MODEL.init)(jax.random.key(0))
    assert "they cannot be given deviation 1" in sentence_of(
        lambda: standardize(MODEL, fresh, texts)
    )


def pairs_by_count(seed, n):
    """The text with more tokens 3 is preferred."""
    pairs = make_pairs(seed, n)

    def count(texts):
        return ((texts.tokens == 3) & ~texts.is_padding).sum(axis=1)

    a, b = pairs.chosen, pairs.rejected
    first_wins = count(a) > count(b)

    def where(x, y):
        return jnp.where(first_wins.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    chosen = jax.tree.map(where, a, b)
    rejected = jax.tree.map(where, b, a)
    differ = np.asarray(count(a) != count(b))
    return jax.tree.map(lambda x: x[differ], Pairs(chosen, rejected, jnp.zeros(n)))


def test_a_preference_is_learnt_and_scores_are_centred():
    pairs = pairs_by_count(0, 512)
    n = len(pairs.margin)
    train = jax.jit(make_reward_model(SETTINGS, MODEL, 0.01))
    result = train(jax.random.key(1), None, pairs)
    assert result.metrics["loss"][0] == pytest.approx(np.log(2), abs=1e-6)
    assert result.metrics["accuracy"][0] == 0.5  # all scores are equal
    unseen = pairs_by_count(7, 256)
    held_out = jax.jit(lambda params: module.evaluate(MODEL, params, unseen))(result.state.params)
    assert held_out["accuracy"] > 0.95 and held_out["loss"] < 0.2
    assert abs(result.metrics["score"][-10:].mean()) < 0.3
    assert held_out["score_difference"] > 2
    assert (result.state.params["shift"], result.state.params["scale"]) == (0, 1)
    job = reward_model_job(SETTINGS, MODEL, n, 0.01)
    assert job.num_iterations == len(result.metrics["loss"])
    inputs = (job.trainer_of(), jax.random.key(1), None, {"data": pairs})
    row = jax.eval_shape(lambda: first_metrics(*inputs))
    require_valid_metrics(job, row)
    assert set(row) == set(result.metrics)


PAIRS = make_pairs()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: require_pairs(
                PAIRS._replace(chosen=make_texts(0)._replace(tokens=PAIRS.chosen.tokens + 7)), 7, 8
            ),
            "chosen text 0 has the token",
        ),
        (lambda: require_pairs(PAIRS, 7, 7), "has 8 tokens: the context has 7"),
        (
            lambda: require_pairs(PAIRS._replace(rejected=make_texts(1, 11)), 7, 8),
            "pairs have 12 chosen and 11 rejected texts",
        ),
        (
            lambda: require_pairs(PAIRS._replace(margin=PAIRS.margin.at[0].set(np.nan)), 7, 8),
            "a margin is not finite",
        ),
        (
            lambda: require_pairs(jax.tree.map(lambda x: x[:0], PAIRS), 7, 8),
            "there is no chosen text",
        ),
        (
            lambda: make_reward_model(SETTINGS, MODEL, -1.0),
            "centering_coef = -1.0: it must be a finite number of at least 0",
        ),
        (
            lambda: make_reward_model(SETTINGS, MODEL)(jax.random.key(0), None, PAIRS),
            "batch_size = 32 exceeds the number of examples, 12",
        ),
    ],
)
def test_pairs_that_do_not_fit_are_refused(make, sentence):
    assert sentence in sentence_of(make)


@pytest.mark.usefixtures("x64")
def test_all_texts_of_a_prompt_are_compared():
    """Against a loop over the pairs of ratings; equal ones are no comparison, nor are NaN."""
    rng = np.random.default_rng(0)
    score = rng.normal(size=9)
    rating = rng.integers(-2, 3, (9, 3)).astype(float)
    rating[2, 1:] = rating[5, 2] = np.nan
    prompt = np.array([0, 0, 0, 0, 1, 1, 1, 2, 0])
    losses, weights = [], []
    for i in range(9):
        for j in range(9):
            people = [rating[k][np.isfinite(rating[k])] for k in (i, j)]
            share = np.mean([x > y for x in people[0] for y in people[1]])
            if prompt[i] == prompt[j] and i != j and share > 0:
                losses.append(np.log1p(np.exp(score[j] - score[i])))
                weights.append(share)
    preference = preference_of_ratings(jnp.asarray(rating), jnp.asarray(prompt))
    loss = all_pairs_loss(jnp.asarray(score), preference)
    assert len(losses) == int((preference > 0).sum()) > 5
    assert float(loss) == pytest.approx(np.average(losses, weights=weights), rel=1e-12)
    assert float(all_pairs_loss(jnp.ones(2), jnp.zeros((2, 2)))) == 0


def test_two_ranked_texts_are_a_pair():
    """The loss, its gradient and the metrics are those of the pair."""
    params = perturbed_params()
    pairs = make_pairs(n=1)
    both = concatenated(pairs.chosen, pairs.rejected)
    ranked = Ranked(both, jnp.array([[2.0], [-1.0]]), jnp.zeros(2, jnp.int32))
    pairs = pairs._replace(margin=jnp.zeros(1))
    loss = jax.jit(jax.value_and_grad(module._loss(MODEL, 0.3, 0.0, 0.0), has_aux=True))
    results = [loss(params, data, {}, jax.random.key(0)) for data in (pairs, ranked)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), *results)


@pytest.mark.usefixtures("x64")
def test_the_language_loss_is_that_of_fine_tuning():
    """The mean cross-entropy of all texts, of the policy with the same decoder."""
    params = jax.tree.map(lambda x: x.astype(jnp.float64), perturbed_params())
    pairs = make_pairs(n=6)
    texts = concatenated(pairs.chosen, pairs.rejected)
    policy = {"policy": params["decoder"], "value": {}}
    log_probs = jax.jit(partial(token_log_probs, language_model(SIZES, "none")))
    expected = -np.asarray(log_probs(policy, texts))[np.asarray(texts.text_mask)].mean()

    def loss(lm_coef, pairs):
        return module._loss(MODEL, 0.0, 0.0, lm_coef)(params, pairs, {}, jax.random.key(0))[0]

    without = jax.jit(partial(loss, 0.0))(pairs)
    loss = jax.jit(loss)
    assert float(loss(0.5, pairs) - without) == pytest.approx(0.5 * expected, rel=1e-9)
    padded = pairs._replace(
        chosen=pairs.chosen._replace(
            tokens=jnp.where(pairs.chosen.is_padding, 99, pairs.chosen.tokens)
        )
    )
    assert float(loss(0.5, padded)) == float(loss(0.5, pairs))
    assert float(loss(0.0, pairs)) == pytest.approx(float(without), rel=1e-12)


def test_dropped_tokens_are_inside_a_text():
    texts = Texts(jnp.full((500, 8), 5), jnp.full(500, 6), jnp.ones(500, jnp.int32))
    dropped = np.asarray(module._with_dropped_tokens(jax.random.key(0), texts, 0.3)) == 0
    assert not dropped[:, [0, 5, 6, 7]].any()
    share = dropped[:, 1:5].mean()
    assert abs(share - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 2000)
    assert module._with_dropped_tokens(jax.random.key(0), texts, 0.0) is texts.tokens
