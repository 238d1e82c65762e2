"""Generated texts have the probabilities of the model, whatever else is in the batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentences import sentence_of
from small_language_model import END, RESPONSES, perturbed, probabilities
from small_language_model import MODEL as SMALL_MODEL
from small_language_model import PARAMS as SMALL_PARAMS
from small_language_model import PROMPTS as SMALL_PROMPTS

from purejaxppo.envs.tokens import tokens
from purejaxppo.envs.vector import vectorize
from purejaxppo.networks.distributions import Categorical, DiagonalGaussian
from purejaxppo.networks.inverse_cdf import _first_above, sample_by_inverse_cdf
from purejaxppo.networks.temperature import with_temperature
from purejaxppo.rlhf.decoding import truncate
from purejaxppo.rlhf.language_model import language_model
from purejaxppo.rlhf.sampling import best_of_n, best_of_n_kl, generate, generate_with_log_prob
from purejaxppo.rlhf.texts import Texts, completion_log_prob, unroll_texts
from purejaxppo.rlhf.transformer import DecoderSizes

SIZES = DecoderSizes(vocab_size=7, context=12, width=16, num_layers=1, num_heads=2, mlp_width=24)
PROMPTS = jnp.array([[1, 2, 3, 0], [4, 0, 0, 0], [5, 5, 0, 0], [0, 6, 1, 2], [3, 3, 3, 0]])
LENGTHS = jnp.array([3, 1, 2, 4, 3])
STATIC = ("model", "max_new_tokens", "eos", "top_k", "top_p")
jitted = jax.jit(generate_with_log_prob, static_argnames=STATIC)
jitted_greedy = jax.jit(partial(generate_with_log_prob, temperature=0.0), static_argnames=STATIC)
MODEL = language_model(SIZES, "none")
PARAMS = perturbed(MODEL)


def counts_of(texts, prompt_length):
    """How often each of the responses occurs."""
    rows = np.asarray(texts.tokens)[:, prompt_length:]
    sizes = np.asarray(texts.length - texts.prompt_length)
    responses = [tuple(row[:size].tolist()) for row, size in zip(rows, sizes, strict=True)]
    found = [RESPONSES.index(response) for response in responses]
    return np.bincount(found, minlength=len(RESPONSES))


def assert_frequencies(counts, p):
    """Within 5 standard errors, and never a response of probability 0."""
    n = counts.sum()
    assert (counts[p == 0] == 0).all()
    assert (np.abs(counts / n - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()


def copies(prompt, count):
    prompts = jnp.broadcast_to(jnp.array(prompt), (count, len(prompt)))
    return prompts, jnp.full(count, len(prompt))


def test_there_are_15_responses():
    assert len(RESPONSES) == 15


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("prompt", SMALL_PROMPTS)
def test_responses_have_their_enumerated_probabilities(prompt, temperature):
    n = 20_000
    p = probabilities(SMALL_PARAMS, prompt, temperature)
    arguments = (SMALL_MODEL, SMALL_PARAMS, jax.random.key(0), *copies(prompt, n), 3, END)
    texts, log_prob = jitted(*arguments, temperature)
    counts = counts_of(texts, len(prompt))
    assert_frequencies(counts, p)
    assert np.ptp(p) > 0.05
    # Far from the other temperature, so the bound has power.
    other = probabilities(SMALL_PARAMS, prompt, 1.5 - temperature)
    assert (np.abs(counts / n - other) > 5 * np.sqrt(other * (1 - other) / n)).any()
    found = np.repeat(np.log(p), counts)
    np.testing.assert_allclose(np.sort(log_prob), np.sort(found), atol=1e-5)


@pytest.mark.parametrize(
    ("top_k", "top_p", "keep"),
    [
        (2, None, lambda p: p * (p > p.min())),
        (None, 0.7, lambda p: p * (p > p.min()) if p.max() < 0.7 else p * (p == p.max())),
    ],
)
def test_truncated_distributions_have_their_probabilities(top_k, top_p, keep):
    prompt = (0, 1)
    p = probabilities(SMALL_PARAMS, prompt, 0.8, keep)
    arguments = (SMALL_MODEL, SMALL_PARAMS, jax.random.key(1), *copies(prompt, 10_000), 3, END)
    texts, log_prob = jitted(*arguments, 0.8, top_k, top_p)
    counts = counts_of(texts, 2)
    assert_frequencies(counts, p)
    found = np.repeat(np.log(p[counts > 0]), counts[counts > 0])
    np.testing.assert_allclose(np.sort(log_prob), np.sort(found), atol=1e-5)


@pytest.mark.parametrize(
    ("p", "top_k", "top_p", "kept"),
    [
        ([0.1, 0.4, 0.3, 0.2], 1, None, [1]),
        ([0.1, 0.4, 0.3, 0.2], 3, None, [1, 2, 3]),
        ([0.1, 0.4, 0.3, 0.2], None, 0.39, [1]),
        ([0.1, 0.4, 0.3, 0.2], None, 0.41, [1, 2]),
        ([0.1, 0.4, 0.3, 0.2], None, 0.69, [1, 2]),
        ([0.1, 0.4, 0.3, 0.2], None, 0.71, [1, 2, 3]),
        ([0.1, 0.4, 0.3, 0.2], None, 1.0, [0, 1, 2, 3]),
        ([0.1, 0.4, 0.3, 0.2], None, 1e-9, [1]),
        # Of the two tokens of top-k, the first has probability 4/7 = 0.571.
        ([0.1, 0.4, 0.3, 0.2], 2, 0.56, [1]),
        ([0.1, 0.4, 0.3, 0.2], 2, 0.58, [1, 2]),
        ([0.25, 0.25, 0.25, 0.25], 2, None, [0, 1]),  # ties: the first ones
        ([0.25, 0.25, 0.25, 0.25], None, 0.6, [0, 1, 2]),
        ([0.0, 0.5, 0.0, 0.5], 3, None, [1, 3]),  # a forbidden token stays forbidden
    ],
)
def test_truncation_keeps_the_most_probable_tokens(p, top_k, top_p, kept):
    logits = np.log(np.array(p, np.float32), where=np.array(p) > 0, out=np.full(4, -np.inf, "f"))
    got = np.asarray(truncate(jnp.stack([jnp.asarray(logits)] * 2), top_k, top_p))
    expected = np.where(np.isin(np.arange(4), kept), logits, -np.inf)
    np.testing.assert_array_equal(got, np.stack([expected] * 2))


@pytest.mark.parametrize("x64", [False, True])
def test_truncation_equals_sorting(x64):
    """Random distributions, some with ties and forbidden tokens, against NumPy."""
    with jax.enable_x64(x64):
        logits = np.random.default_rng(0).normal(scale=2, size=(3, 50, 101)).astype("f8")
        logits[1] = np.round(logits[1])
        logits[2, :, ::3] = -np.inf
        given = jnp.asarray(logits, jnp.result_type(float))
        kept = np.asarray(jnp.isfinite(jax.jit(truncate, static_argnums=(1, 2))(given, 20, 0.83)))
    order = np.argsort(-logits, axis=-1, kind="stable")
    p = np.exp(np.take_along_axis(logits, order, axis=-1))
    p[..., 20:] = 0
    before = (np.cumsum(p, axis=-1) - p) / p.sum(axis=-1, keepdims=True)
    expected = np.zeros_like(kept)
    np.put_along_axis(expected, order, (before < 0.83) & (np.arange(101) < 20), axis=-1)
    np.testing.assert_array_equal(kept, expected)
    assert 1 <= expected.sum(axis=-1).min() < expected.sum(axis=-1).max() < 20


def test_a_rollout_with_the_tokens_has_the_same_numbers_and_ends():
    """The token environment, given the tokens of `generate` as actions, returns its texts."""
    temperature = 0.5
    n = 64
    prompt = (0, 6, 1, 2)
    arguments = (MODEL, PARAMS, jax.random.key(2), *copies(prompt, n), 5, 6)
    texts, log_prob = jitted(*arguments, temperature)
    policy = with_temperature(language_model(SIZES, "none"), temperature)
    vector_env = vectorize(tokens([prompt], [4], 5, 6, 7), n)

    def body(loop, action):
        state, carry = loop
        carry, distribution, _ = policy.step(PARAMS, carry, state.obs, state.reset)
        log_prob = distribution.log_prob(action)
        new, timestep = vector_env.step(jax.random.key(1), state, action)
        return (new, carry), (state.obs, log_prob * timestep.mask, timestep.terminated)

    start = (vector_env.reset(jax.random.key(0)), policy.initial_carry(n))
    run = jax.jit(lambda actions: jax.lax.scan(body, start, actions)[1])
    obs, of_rollout, terminated = run(texts.tokens[:, 1:].T)
    steps = np.asarray(texts.length) - 1
    is_step = np.arange(8)[:, None] < steps
    np.testing.assert_array_equal(terminated.argmax(axis=0), steps - 1)
    assert terminated.any(axis=0).all() and len(set(steps)) > 2
    np.testing.assert_array_equal(obs[is_step], texts.tokens[:, :-1].T[is_step])
    total = np.where(is_step, of_rollout, 0).sum(axis=0)
    np.testing.assert_allclose(log_prob, total, atol=1e-5)
    expected = jax.jit(partial(completion_log_prob, policy))(PARAMS, texts)
    np.testing.assert_allclose(log_prob, expected, atol=1e-5)


def test_a_vectorised_rollout_has_the_same_distribution():
    prompt = (0, 1)
    n = 20_000
    vector_env = vectorize(tokens([prompt], [2], 3, END, 3), n)

    @jax.jit
    def rollout(params):
        state = vector_env.reset(jax.random.key(0))
        loop = (state, SMALL_MODEL.initial_carry(n))

        def body(loop, key):
            state, carry = loop
            carry, distribution, _ = SMALL_MODEL.step(params, carry, state.obs, state.reset)
            key_action, key_step = jax.random.split(key)
            action = distribution.sample(key_action)
            state, timestep = vector_env.step(key_step, state, action)
            return (state, carry), (action, timestep.terminated)

        return jax.lax.scan(body, loop, jax.random.split(jax.random.key(1), 4))[1]

    action, terminated = rollout(SMALL_PARAMS)
    size = 1 + jnp.argmax(terminated[1:], axis=0)  # step 0 is forced
    start = jnp.broadcast_to(jnp.array(prompt)[:, None], (2, n))
    texts = Texts(jnp.concatenate([start, action[1:]]).T, size + 2, jnp.full(n, 2))
    of_rollout = counts_of(texts, 2) / n
    arguments = (SMALL_MODEL, SMALL_PARAMS, jax.random.key(3), *copies(prompt, n), 3, END)
    of_generate = counts_of(jitted(*arguments, 1.0)[0], 2) / n
    p = (of_rollout + of_generate) / 2
    assert (np.abs(of_rollout - of_generate) <= 5 * np.sqrt(2 * p * (1 - p) / n)).all()


def test_texts_end_at_the_first_end_or_at_the_bound():
    prompts, lengths = copies((1, 6, 2, 3), 64)  # an end of text in the prompt ends nothing
    texts, _ = jitted(MODEL, PARAMS, jax.random.key(0), prompts, lengths, 5, 6, 1.0)
    assert texts.tokens.shape == (64, 9) and (texts.prompt_length == 4).all()
    np.testing.assert_array_equal(texts.tokens[:, :4], prompts)
    sizes = np.asarray(texts.length) - 4
    assert len(set(sizes)) > 3 and max(sizes) == 5
    for row, size in zip(np.asarray(texts.tokens)[:, 4:], sizes, strict=True):
        assert 6 not in row[: size - 1]
        assert row[size - 1] == 6 or size == 5
        assert (row[size:] == 6).all()


def test_a_completion_depends_on_its_row_only():
    """Other prompts, more rows, wider padding and a later bound change no token."""
    run = partial(jitted, MODEL, PARAMS, jax.random.key(5))
    texts, log_prob = run(PROMPTS, LENGTHS, 5, 6, 1.0)
    changed, log_prob_changed = run(PROMPTS.at[1:].set(3), LENGTHS.at[1:].set(1), 5, 6, 1.0)
    np.testing.assert_array_equal(changed.tokens[0], texts.tokens[0])
    assert log_prob_changed[0] == pytest.approx(float(log_prob[0]), abs=1e-5)

    padded = jnp.pad(PROMPTS, ((0, 0), (0, 1)))
    noise = jnp.where(jnp.arange(5)[None] < LENGTHS[:, None], padded, -9)
    other, other_log_prob = run(jnp.tile(noise, (3, 1)), jnp.tile(LENGTHS, 3), 8, 6)
    for row in range(5):
        size = int(texts.length[row])
        np.testing.assert_array_equal(other.tokens[row, :size], texts.tokens[row, :size])
        if texts.tokens[row, size - 1] == 6:
            assert other.length[row] == size
            assert other_log_prob[row] == pytest.approx(float(log_prob[row]), abs=1e-5)
    # Rows with the same prompt differ in their random streams.
    completions = np.asarray(run(*copies((1, 2, 3, 4), 64), 5, 6, 1.0)[0].tokens)
    assert len(np.unique(completions, axis=0)) > 8


def test_the_temperature_0_takes_the_most_probable_tokens():
    texts, log_prob = jitted_greedy(MODEL, PARAMS, jax.random.key(0), PROMPTS, LENGTHS, 5, 6)
    distribution, _ = jax.jit(partial(unroll_texts, MODEL))(PARAMS, texts)
    best = np.asarray(distribution.logits).argmax(axis=-1).T
    mask = np.asarray(texts.completion_mask).T
    np.testing.assert_array_equal(np.asarray(texts.tokens)[:, 1:][mask], best[mask])
    assert mask.sum() >= 10 and not log_prob.any()
    by_k, _ = jitted(MODEL, PARAMS, jax.random.key(1), PROMPTS, LENGTHS, 5, 6, 1.0, 1)
    np.testing.assert_array_equal(by_k.tokens, texts.tokens)


# ------------------------------------------------------------------------------------ inverse CDF


@pytest.mark.parametrize("vocab_size", [1, 3, 65, 200])
def test_the_inverse_cdf_gives_each_token_its_share_of_the_uniform_numbers(vocab_size):
    """A grid of 2^17 numbers: a share differs from p by at most one number, and by rounding."""
    size = 2**17
    logits = np.random.default_rng(vocab_size).normal(size=vocab_size).astype(np.float32)
    logits[1::5] = -np.inf
    uniform = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size
    rows = jnp.broadcast_to(jnp.asarray(logits), (size, vocab_size))
    drawn = np.asarray(jax.jit(sample_by_inverse_cdf)(rows, uniform))
    assert (np.diff(drawn) >= 0).all()  # tokens in their order, as a quantile function
    p = np.exp(np.float64(logits))
    p /= p.sum()
    share = np.bincount(drawn, minlength=vocab_size) / size
    assert (np.abs(share - p) < 1.5 / size + 2e-6).all()
    assert (share[p == 0] == 0).all()


@pytest.mark.parametrize("sample", [sample_by_inverse_cdf, None])
def test_100000_draws_have_their_probabilities(sample):
    """Also of `Categorical.sample`, against which it is measured."""
    n = 100_000
    logits = 1.5 * jax.random.normal(jax.random.key(0), (40,)).at[::7].set(-jnp.inf)
    rows = jnp.broadcast_to(logits, (n, 40))
    if sample is None:
        drawn = jax.vmap(Categorical(logits).sample)(jax.random.split(jax.random.key(1), n))
    else:
        drawn = jax.jit(sample)(rows, jax.random.uniform(jax.random.key(1), (n,)))
    p = np.exp(np.float64(logits))
    assert_frequencies(np.bincount(np.asarray(drawn), minlength=40), p / p.sum())


def test_a_token_with_probability_0_is_never_drawn():
    """At the smallest and largest numbers, between them, and where rounding passes the sum."""
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=4, size=(1000, 2048)).astype(np.float32)
    share = rng.uniform(0, 1, size=(1000, 1)) ** 4
    logits[rng.uniform(size=logits.shape) > share] = -np.inf
    logits[:, -1000:] = -np.inf
    logits[:500, :500] = -np.inf
    logits[np.arange(1000), rng.integers(500, 1000, 1000)] = 1.0  # at least one token
    sample = jax.jit(sample_by_inverse_cdf)
    largest = np.nextafter(np.float32(1), np.float32(0))
    positive = np.isfinite(logits)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    row = np.arange(1000)
    for value in [0.0, 2**-24, largest, 1 - 2**-23, 1.0, *rng.uniform(size=8)]:
        drawn = np.asarray(sample(jnp.asarray(logits), jnp.full(1000, value, jnp.float32)))
        assert positive[row, drawn].all()
        if value == 0:
            np.testing.assert_array_equal(drawn, positive.argmax(axis=1))
        if value >= 1 - 2**-23:  # all of the mass is at the token or before it
            after = np.where(np.arange(2048) > drawn[:, None], weights, 0).sum(axis=1)
            assert (after < 1e-6).all()


def test_the_first_token_above_the_target_by_hand():
    """Also of targets that rounding took below 0, where a block starts, or above the sum."""
    weights = jnp.array([0.0, 0.0, 2.0, 0.0, 1.0, 0.0])
    targets = jnp.array([-1e-7, 0.0, 1.9, 2.0, 2.5, 3.0, 3.1])
    index, remainder = _first_above(jnp.tile(weights, (7, 1)), targets)
    assert index.tolist() == [2, 2, 2, 4, 4, 4, 4]
    np.testing.assert_allclose(remainder, [-1e-7, 0, 1.9, 0, 0.5, 1, 1.1], atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_the_inverse_cdf_of_float64_equals_numpy():
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=3, size=(500, 300))
    uniform = rng.uniform(size=500)
    p = np.exp(logits)
    expected = (np.cumsum(p, axis=1) <= uniform[:, None] * p.sum(axis=1, keepdims=True)).sum(axis=1)
    sample = jax.jit(sample_by_inverse_cdf)
    got = sample(jnp.asarray(logits), jnp.asarray(uniform))
    np.testing.assert_array_equal(got, expected)
    shaped = sample(jnp.asarray(logits).reshape(5, 100, 300), jnp.asarray(uniform).reshape(5, 100))
    np.testing.assert_array_equal(shaped.reshape(-1), expected)
    assert sample(jnp.full(5, jnp.nan), jnp.asarray(0.5)) == 0
    assert sample(jnp.asarray(logits[0]), jnp.asarray(uniform[0])) == expected[0]


# -------------------------------------------------------------------------------------- best of n


def count_of_a(tokens, lengths, params):
    """``params`` for each token 0 of the text."""
    is_text = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    return params * ((tokens == 0) & is_text).sum(axis=1)


def test_the_best_of_the_first_draws_are_nested_maxima():
    n = 6
    key = jax.random.key(4)
    arguments = (count_of_a, 0.5, 5, 6)
    run = jax.jit(
        lambda params, n: best_of_n(MODEL, params, key, PROMPTS, LENGTHS, n, *arguments),
        static_argnums=1,
    )
    found = run(PARAMS, n)
    assert list(found) == [1, 2, 4, 6]
    draws = [
        jitted(MODEL, PARAMS, jax.random.fold_in(key, i), PROMPTS, LENGTHS, 5, 6)[0]
        for i in range(n)
    ]
    scores = np.array([count_of_a(x.tokens, x.length, 0.5) for x in draws])
    assert any(len(set(column)) < n for column in scores.T)  # with ties
    for size, best in found.items():
        first = scores[:size].argmax(axis=0)
        np.testing.assert_array_equal(best.score, scores[:size].max(axis=0))
        for row, draw in enumerate(first):
            np.testing.assert_array_equal(best.texts.tokens[row], draws[draw].tokens[row])
            assert best.texts.length[row] == draws[draw].length[row]
    fewer = run(PARAMS, 2)
    jax.tree.map(np.testing.assert_array_equal, fewer, {size: found[size] for size in (1, 2)})


def test_the_best_of_4_has_its_distribution_and_its_kl_is_below_the_bound():
    """Scores without ties: P(best = y) = F(y)^4 − F(y − 1)^4, F the distribution of the score."""
    prompt = (0, 1)
    n = 20_000
    p = probabilities(SMALL_PARAMS, prompt)
    code = jnp.array([sum((1 + t) * 4 ** (2 - i) for i, t in enumerate(r)) for r in RESPONSES])

    def score(tokens, lengths, params):
        is_response = jnp.arange(2, 5)[None] < lengths[:, None]
        digits = jnp.where(is_response, tokens[:, 2:5] + 1, 0)
        return (digits * jnp.array([[16, 4, 1]])).sum(axis=1) * params

    run = jax.jit(
        lambda params: best_of_n(
            SMALL_MODEL, params, jax.random.key(0), *copies(prompt, n), 4, score, 1.0, 3, END
        )
    )
    best = run(SMALL_PARAMS)
    order = np.argsort(code)
    for size in (1, 2, 4):
        cumulative = np.concatenate([[0], np.cumsum(p[order])]) ** size
        expected = np.empty(15)
        expected[order] = np.diff(cumulative)
        assert_frequencies(counts_of(best[size].texts, 2), expected)
        kl = (expected * np.log(expected / p)).sum()
        assert kl < best_of_n_kl(size) + 1e-9
    assert 0.5 * best_of_n_kl(4) < kl


def test_the_bound_of_best_of_n():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(0.6931472 - 0.5)
    assert best_of_n_kl(16) == pytest.approx(2.7725887 - 0.9375)


# ----------------------------------------------------------------------------------------- errors


def run(prompts=PROMPTS, lengths=LENGTHS, max_new_tokens=5, eos=6, model=MODEL, **options):
    return generate(
        model, PARAMS, jax.random.key(0), prompts, lengths, max_new_tokens, eos, **options
    )


def gaussian_step(params, carry, obs, reset):
    return carry, DiagonalGaussian(jnp.zeros((len(obs), 1)), jnp.zeros((len(obs), 1))), 0.0 * reset


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: run(max_new_tokens=10),
            "prompts of 4 tokens and max_new_tokens = 10 need a context of 13 tokens; that of the "
            "model is 12",
        ),
        (lambda: run(max_new_tokens=0), "max_new_tokens = 0: it must be an integer of at least 1"),
        (lambda: run(eos=7), "eos = 7: it must be a token, an integer of 0 … 6"),
        (lambda: run(eos=True), "eos = True"),
        (lambda: run(temperature=-1.0), "temperature = -1.0: it must be a finite number"),
        (lambda: run(temperature=float("nan")), "temperature = nan"),
        (lambda: run(top_k=0), "top_k = 0: it must be an integer of at least 1"),
        (lambda: run(top_k=8), "top_k = 8: it must be None or 1 … 7"),
        (lambda: run(top_p=0.0), "top_p = 0.0: it must be None, or above 0 and at most 1"),
        (lambda: run(top_p=1.1), "top_p = 1.1"),
        (lambda: run(lengths=LENGTHS.at[1].set(0)), "prompt 1 has the length 0: it must be 1 … 4"),
        (lambda: run(lengths=LENGTHS.at[2].set(5)), "prompt 2 has the length 5"),
        (
            lambda: run(prompts=PROMPTS.at[0, 1].set(9)),
            "prompt 0 has the token 9, which is not in the vocabulary of 7 tokens",
        ),
        (
            lambda: run(jnp.zeros((2, 0), jnp.int32), jnp.zeros(2, jnp.int32)),
            "prompts have the shape (2, 0)",
        ),
        (
            lambda: run(model=MODEL._replace(step=gaussian_step)),
            "the model must have one categorical distribution",
        ),
        (lambda: best_of_n_kl(0), "n = 0: it must be an integer of at least 1"),
        (
            lambda: best_of_n(
                *(MODEL, PARAMS, jax.random.key(0), PROMPTS, LENGTHS, 2),
                *(lambda tokens, lengths, params: tokens.sum(), None, 5, 6),
            ),
            "the score of 5 texts has the shape (): it must be (5,), one number for each text",
        ),
    ],
)
def test_invalid_arguments_are_refused(make, sentence):
    assert sentence in sentence_of(make)


def test_prompts_of_numpy_need_no_jit():
    arguments = (MODEL, PARAMS, jax.random.key(0))
    texts = generate(*arguments, np.asarray(PROMPTS), np.asarray(LENGTHS), 3, 6)
    expected = generate(*arguments, PROMPTS, LENGTHS, 3, 6)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, texts, expected)))


def test_the_longest_text_that_fits_is_generated():
    texts, log_prob = jitted(MODEL, PARAMS, jax.random.key(0), PROMPTS, LENGTHS, 9, 0)
    assert texts.tokens.shape == (5, 13)
    assert np.isfinite(log_prob).all()
