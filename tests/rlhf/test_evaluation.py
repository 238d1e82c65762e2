"""Measurements of texts: exact values by enumeration, and real tokens only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentences import sentence_of
from small_language_model import (
    END,
    MODEL,
    PARAMS,
    RESPONSES,
    logits_of_texts,
    perturbed,
    probabilities,
)

from purejaxppo.rlhf.evaluation import (
    completion_ended,
    distinct_n,
    evaluate_policy,
    evaluate_texts,
    sequence_kl,
    win_rate,
)
from purejaxppo.rlhf.sampling import generate
from purejaxppo.rlhf.texts import Texts

PROMPT = (0, 1)
jitted_kl = jax.jit(sequence_kl, static_argnames="model")
TEMPERATURE = 0.7


def texts_of(prompt, completions, width=None, padding=0):
    """The texts of these completions; tokens after the end are ``padding``."""
    rows = [prompt + tuple(completion) for completion in completions]
    sizes = [len(row) for row in rows]
    width = max(sizes) if width is None else width
    tokens = [row + (padding,) * (width - len(row)) for row in rows]
    return Texts(jnp.array(tokens), jnp.array(sizes), jnp.full(len(rows), len(prompt)))


def count_of_a(tokens, lengths, params):
    is_text = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    return params * ((tokens == 0) & is_text).sum(axis=1)


@pytest.mark.usefixtures("x64")
def test_all_estimates_of_the_kl_are_unbiased():
    """Expectations over the 15 responses, against the KL of their distributions."""
    params = jax.tree.map(lambda x: jnp.asarray(x, float), PARAMS)
    reference = perturbed(MODEL, seed=5)
    texts = texts_of(PROMPT, RESPONSES)
    p = probabilities(params, PROMPT, TEMPERATURE)
    q = probabilities(reference, PROMPT, TEMPERATURE)
    kl = (p * np.log(p / q)).sum()
    assert kl > 0.3
    estimates = jitted_kl(MODEL, params, reference, texts, TEMPERATURE)
    deviation = {}
    for name, estimate in estimates._asdict().items():
        mean = (p * np.asarray(estimate)).sum()
        assert mean == pytest.approx(kl, abs=1e-9), name
        deviation[name] = np.sqrt((p * (estimate - mean) ** 2).sum())
    np.testing.assert_allclose(estimates.k1, np.log(p / q), atol=1e-9)
    assert deviation["exact"] < deviation["k1"] and min(deviation.values()) > 0.01
    assert min(estimates.k3.min(), estimates.exact.min()) > 0 > estimates.k1.min()


@pytest.mark.usefixtures("x64")
def test_the_estimates_of_one_text_by_hand():
    """Of ``0 2`` after ``0 1``: two tokens, each with its own distribution."""
    params = jax.tree.map(lambda x: jnp.asarray(x, float), PARAMS)
    reference = perturbed(MODEL, seed=5)
    obs = jnp.array([[0], [1], [0]])
    reset = jnp.array([[True], [False], [False]])

    @jax.jit
    def log_probs(params):
        return MODEL.unroll(params, MODEL.initial_carry(1), obs, reset)[0].logits[1:, 0]

    log_p = np.asarray(log_probs(params))
    log_q = np.asarray(log_probs(reference))
    difference = (log_p - log_q)[[0, 1], [0, 2]]
    k1, k3, exact = jitted_kl(MODEL, params, reference, texts_of(PROMPT, [(0, 2)]))
    assert k1[0] == pytest.approx(difference.sum())
    assert k3[0] == pytest.approx((np.exp(-difference) - 1 + difference).sum())
    assert exact[0] == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum())


def test_the_kl_to_itself_is_0():
    texts = texts_of(PROMPT, RESPONSES)
    for estimate in jitted_kl(MODEL, PARAMS, PARAMS, texts, TEMPERATURE):
        np.testing.assert_array_equal(estimate, 0)


def test_tokens_after_the_end_change_nothing():
    """Wider texts, and padding that is in the vocabulary or not."""
    reference = perturbed(MODEL, seed=5)
    score = count_of_a

    def measured(texts):
        numbers = evaluate_texts(MODEL, PARAMS, reference, texts, END, score, 1.0, TEMPERATURE)
        kl = jitted_kl(MODEL, PARAMS, reference, texts, TEMPERATURE)
        return numbers, [np.asarray(x) for x in kl]

    numbers, kl = measured(texts_of(PROMPT, RESPONSES, 6))
    assert np.isfinite([*numbers.values()]).all()
    for padding in (1, 2, -1, 1000):
        same, same_kl = measured(texts_of(PROMPT, RESPONSES, 6, padding))
        assert same == numbers
        jax.tree.map(np.testing.assert_array_equal, same_kl, kl)
    narrower, narrower_kl = measured(texts_of(PROMPT, RESPONSES, 5))
    assert narrower == pytest.approx(numbers, abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), narrower_kl, kl)


def test_lengths_ends_scores_and_entropy_by_hand():
    completions = [(2,), (0, 0, 2), (0, 1, 0), (1, 1, 1)]
    texts = texts_of((2, 0), completions, padding=END)  # an end in the prompt is none
    numbers = evaluate_texts(MODEL, PARAMS, PARAMS, texts, END, count_of_a, 0.5)
    assert numbers["length"] == 2.5
    assert numbers["ended"] == 0.5
    assert completion_ended(texts, END).tolist() == [True, True, False, False]
    assert numbers["score"] == pytest.approx(0.5 * (1 + 3 + 3 + 1) / 4)
    assert numbers["distinct_2"] == pytest.approx(5 / 6)  # 00 02 01 10 11 11
    assert numbers["kl"] == 0 and numbers["kl_k1"] == 0
    entropies = []
    for completion in completions:
        row = jnp.array((2, 0, *completion, 0, 0)[:5])[:, None]
        logits = np.asarray(logits_of_texts(PARAMS, row))[1 : 1 + len(completion), 0]
        entropies += (-np.exp(logits) * logits).sum(axis=1).tolist()
    assert len(entropies) == 10
    assert numbers["entropy"] == pytest.approx(np.mean(entropies), abs=1e-5)


def test_an_unfinished_prompt_is_no_end():
    texts = Texts(jnp.array([[1, 2, 0]]), jnp.array([2]), jnp.array([2]))
    assert not completion_ended(texts, END).any()


def test_a_policy_is_evaluated_on_its_own_texts():
    """The numbers are near their expectations over all responses."""
    n = 4000
    reference = perturbed(MODEL, seed=5)
    prompts = jnp.broadcast_to(jnp.array(PROMPT), (n, 2))
    lengths = jnp.full(n, 2)
    key = jax.random.key(0)
    arguments = (prompts, lengths, 3, END, count_of_a, 1.0, TEMPERATURE)
    numbers = evaluate_policy(MODEL, PARAMS, reference, key, *arguments)
    p = probabilities(PARAMS, PROMPT, TEMPERATURE)
    q = probabilities(reference, PROMPT, TEMPERATURE)
    of_response = {
        "score": np.array([1 + r.count(0) for r in RESPONSES]),  # 1 in the prompt
        "kl_k1": np.log(p / q),
        "length": np.array([len(r) for r in RESPONSES]),
        "ended": np.array([r[-1] == END for r in RESPONSES]),
    }
    for name, values in of_response.items():
        mean = (p * values).sum()
        error = np.sqrt((p * (values - mean) ** 2).sum() / n)
        assert abs(numbers[name] - mean) < 5 * error, name
    assert abs(numbers["kl"] - (p * np.log(p / q)).sum()) < 5 * np.log(p / q).std() / np.sqrt(n)
    entropy = -(p * np.log(p)).sum() / (p * of_response["length"]).sum()
    assert numbers["entropy"] == pytest.approx(entropy, abs=0.02)
    assert all(type(value) is float for value in numbers.values())
    again = evaluate_policy(MODEL, PARAMS, reference, key, *arguments)
    assert again == numbers
    texts = generate(MODEL, PARAMS, key, prompts, lengths, 3, END, TEMPERATURE)
    own = evaluate_texts(MODEL, PARAMS, reference, texts, END, count_of_a, 1.0, TEMPERATURE)
    assert own == pytest.approx(numbers, abs=1e-5)


def test_win_rates_count_ties_half():
    a = [1.0, 2.0, 3.0, 0.0, 5.0]
    b = [0.0, 2.0, 4.0, -1.0, 5.0]
    rate = win_rate(a, b)
    assert rate.point == pytest.approx(0.6)  # 2 wins, 2 ties, 1 loss
    assert win_rate(b, a).point == pytest.approx(0.4)
    assert rate.low == pytest.approx(1 - win_rate(b, a).high)


def test_the_interval_of_a_win_rate_is_wilsons():
    """The textbook example of 81 wins in 263: 0.2553 to 0.3662 (Newcombe 1998, table I)."""
    rate = win_rate(np.arange(263) < 81, np.full(263, 0.5))
    assert (rate.low, rate.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    certain = win_rate(np.ones(20), np.zeros(20))
    assert (certain.point, certain.high) == (1, 1)
    assert certain.low == pytest.approx(1 / (1 + 1.959964**2 / 20))
    assert np.isnan(win_rate([1.0, np.nan], [0.0, 0.0])).all()


def test_the_interval_covers_the_true_share():
    """With wins, losses and ties: in at least 95 % of 2,000 repetitions, up to 5 errors."""
    rng = np.random.default_rng(0)
    outcomes = rng.choice([1, -1, 0], p=[0.5, 0.3, 0.2], size=(2000, 100))
    intervals = [win_rate(row, np.zeros(100)) for row in outcomes]
    covered = np.mean([low <= 0.6 <= high for _, low, high in intervals])
    assert covered > 0.95 - 5 * np.sqrt(0.95 * 0.05 / 2000)


@pytest.mark.parametrize(("n", "expected"), [(1, 3 / 8), (2, 3 / 4), (3, 2 / 2), (4, np.nan)])
def test_distinct_n_grams_by_hand(n, expected):
    """The bigrams are 01 12, 11 12: no n-gram crosses texts, prompts or ends."""
    texts = texts_of((0, 1), [(0, 1, 2), (2,), (1, 1, 2), (2,)], width=8, padding=1)
    assert distinct_n(texts, n) == pytest.approx(expected, nan_ok=True)


def test_repetition_lowers_distinct_2():
    assert distinct_n(texts_of((0,), [(1, 1, 1, 1, 1)])) == 1 / 4
    assert distinct_n(texts_of((0,), [(1, 0, 2), (1, 0, 2)])) == 1 / 2
    assert np.isnan(distinct_n(texts_of((0,), [(1,)])))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: win_rate([], []), "scores_a and scores_b have the shapes (0,) and (0,)"),
        (lambda: win_rate([1.0], [1.0, 2.0]), "have the shapes (1,) and (2,)"),
        (lambda: distinct_n(texts_of((0,), [(1,)]), 0), "n = 0: it must be an integer of at least"),
        (
            lambda: evaluate_texts(
                *(MODEL, PARAMS, PARAMS, texts_of((0,), [(1,)]), END, count_of_a, 1.0, 0.0)
            ),
            "temperature = 0.0: it must be above 0, as a KL needs",
        ),
        (
            lambda: evaluate_texts(
                *(MODEL, PARAMS, PARAMS, texts_of((0,), [(1,)]), END),
                lambda tokens, lengths, params: tokens,
            ),
            "the score of 1 texts has the shape (1, 2): it must be (1,)",
        ),
    ],
)
def test_invalid_arguments_are_refused(make, sentence):
    assert sentence in sentence_of(make)
