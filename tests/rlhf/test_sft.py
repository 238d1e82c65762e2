"""Supervised fine-tuning: its loss, masks, packed rows and bad data."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentences import sentence_of

from purejaxppo.rlhf import sft
from purejaxppo.rlhf.language_model import language_model
from purejaxppo.rlhf.sft import make_sft, one_per_row, pack, sft_job
from purejaxppo.rlhf.supervised_settings import SupervisedSettings
from purejaxppo.rlhf.texts import Texts, require_texts, token_log_probs
from purejaxppo.rlhf.transformer import DecoderSizes
from purejaxppo.runs.programs import first_metrics, require_valid_metrics

SIZES = DecoderSizes(vocab_size=7, context=8, width=16, num_heads=4, num_kv_heads=2, mlp_width=24)
SMALL = dataclasses.replace(SIZES, num_layers=1)
END = 6
N = 9


def make_texts(padding=0, width=10, n=N):
    """Texts of 2 to 8 tokens of 0 … 5 and an end; the width exceeds the context of 8."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 6, (n, 10))
    length = np.append(rng.integers(2, 9, n - 1), 8)
    prompt_length = rng.integers(1, length)
    tokens[np.arange(n), length - 1] = END
    tokens[np.arange(10) >= length[:, None]] = padding
    return Texts(*(jnp.asarray(x, jnp.int32) for x in (tokens[:, :width], length, prompt_length)))


def fresh_params(model, key=None):
    return jax.jit(model.init)(jax.random.key(0) if key is None else key, jnp.zeros(1, jnp.int32))


def perturbed_params(model):
    """Parameters far from their initial values, so that attention is not uniform."""
    leaves, structure = jax.tree.flatten(fresh_params(model))
    keys = jax.random.split(jax.random.key(8), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    noisy = [x + 0.3 * jax.random.normal(key, x.shape, x.dtype) for x, key in pairs]
    return jax.tree.unflatten(structure, noisy)


def loss_and_gradient(model, params, data, mask_prompts):
    loss = jax.jit(jax.value_and_grad(sft._loss(model, mask_prompts), has_aux=True))
    (value, metrics), gradient = loss(params, data, {}, jax.random.key(0))
    return value, metrics, gradient


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mask_prompts", [True, False])
def test_the_loss_is_the_mean_negative_log_likelihood_of_the_tokens_in_the_mask(mask_prompts):
    """Against one text at a time, in NumPy."""
    model = language_model(SMALL, "none")
    params = perturbed_params(model)
    texts = make_texts()
    unroll = jax.jit(lambda obs, reset: model.unroll(params, model.initial_carry(1), obs, reset))
    total = 0.0
    count = 0
    correct = 0
    for tokens, length, prompt_length in zip(*(np.asarray(x) for x in texts), strict=True):
        obs = jnp.asarray(tokens[:7, None])  # causal: what follows a text comes after it
        distribution, _ = unroll(obs, (jnp.arange(7) == 0)[:, None])
        logits = np.asarray(distribution.logits)[:, 0]
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for t in range(prompt_length if mask_prompts else 1, length):
            total -= log_p[t - 1, tokens[t]]
            correct += logits[t - 1].argmax() == tokens[t]
            count += 1
    value, metrics, _ = loss_and_gradient(model, params, texts, mask_prompts)
    assert count == metrics["tokens"]
    np.testing.assert_allclose(value, total / count, rtol=1e-12)
    np.testing.assert_allclose(metrics["perplexity"], np.exp(total / count), rtol=1e-12)
    np.testing.assert_allclose(metrics["accuracy"], correct / count, rtol=1e-12)
    assert 0 < correct < count
    evaluate = jax.jit(lambda data: sft.evaluate(model, params, data, 4, mask_prompts))
    held_out = evaluate(pack(texts, 12) if mask_prompts else texts)  # 4 does not divide 9 texts
    assert set(held_out) == {"loss", "perplexity", "accuracy"}
    for name, x in held_out.items():
        expected = {"loss": value, **metrics}[name]
        np.testing.assert_allclose(x, expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mask_prompts", [True, False])
def test_packed_rows_have_the_loss_and_the_gradient_of_their_texts(mask_prompts):
    model = language_model(SIZES, "none")
    params = perturbed_params(model)
    texts = make_texts(padding=5)
    rows = pack(texts, 13)
    assert len(rows.tokens) < N
    expected = loss_and_gradient(model, params, texts, mask_prompts)
    assert_close(loss_and_gradient(model, params, rows, mask_prompts), expected, 1e-9)
    largest = max(float(abs(x).max()) for x in jax.tree.leaves(expected[2]))
    assert largest > 0.01


def test_packing_keeps_every_text_and_wastes_little():
    texts = make_texts(n=200)
    rows = pack(texts, 16)
    length = np.asarray(texts.length)
    found = []
    for tokens, reset, in_text, in_completion in zip(*rows, strict=True):
        starts = [t for t in range(16) if reset[t] and (t == 15 or not reset[t + 1])]
        for start in starts:
            end = next((t for t in range(start + 1, 16) if reset[t]), 16)
            if end - start > 1:
                size = in_completion[start:end].sum()
                found.append((end - start - size, *tokens[start:end]))
                assert not in_text[start] and in_text[start + 1 : end].all()
        is_padding = ~in_text & ~np.append(in_text[1:], False)
        assert (tokens[is_padding] == 0).all() and reset[is_padding].all()
    expected = [
        (int(prompt), *row[:size])
        for row, size, prompt in zip(
            np.asarray(texts.tokens).tolist(), length, texts.prompt_length, strict=True
        )
    ]
    assert sorted(found) == sorted(expected)
    assert len(rows.tokens) <= 1.05 * length.sum() / 16 + 1


def test_what_follows_a_text_changes_nothing():
    """Not even tokens outside the vocabulary, whose embedding is NaN, and a row beyond the context.

    The widths differ between the two, so the sums have another order.
    """
    model = language_model(SMALL, "none")
    params = perturbed_params(model)
    gradient_of = partial(loss_and_gradient, model, params, mask_prompts=True)
    expected = gradient_of(make_texts())
    got = gradient_of(make_texts(padding=99))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert_close(gradient_of(make_texts(width=8)), expected, 1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))
    log_probs_of = jax.jit(partial(token_log_probs, model, params))
    log_probs = log_probs_of(make_texts(padding=99))
    np.testing.assert_array_equal(log_probs, log_probs_of(make_texts()))
    assert np.isfinite(log_probs).all()


def test_the_end_of_text_is_learnt():
    """The gradient raises its logit after the last other token, and lowers it before."""
    model = language_model(SMALL, "none")
    params = fresh_params(model)
    tokens = jnp.array([[1, 2, 3, END, 0, 0]])
    texts = Texts(tokens, jnp.array([4]), jnp.array([1]))

    @jax.jit
    def end_log_prob(params):
        distribution, _ = model.unroll(
            params, model.initial_carry(1), tokens[:, :3].T, (jnp.arange(3) == 0)[:, None]
        )
        return distribution.log_prob(jnp.full((3, 1), END))[:, 0]

    _, _, gradient = loss_and_gradient(model, params, texts, True)
    _, change = jax.jvp(end_log_prob, (params,), (jax.tree.map(jnp.negative, gradient),))
    assert change[2] > 0.01 and change[2] > change[:2].max()
    settings = SupervisedSettings(num_epochs=60, batch_size=1, lr=0.02)
    result = jax.jit(make_sft(settings, model))(jax.random.key(1), params, texts)
    np.testing.assert_array_less(np.log(0.9), end_log_prob(result.state.params)[2])
    np.testing.assert_array_less(end_log_prob(result.state.params)[:2], np.log(0.1))


def test_training_vmaps_over_keys_and_is_a_job():
    """The next token is the last one plus 1, modulo 6."""
    model = language_model(SMALL, "own")
    tokens = np.zeros((128, 8), int)
    tokens[:] = (np.random.default_rng(0).integers(0, 6, (128, 1)) + np.arange(8)) % 6
    texts = Texts(jnp.asarray(tokens), jnp.full(128, 8), jnp.full(128, 2))
    settings = SupervisedSettings(num_epochs=8, batch_size=16, lr=0.02, weight_decay=0.1)
    train = jax.jit(jax.vmap(make_sft(settings, model), in_axes=(0, None, None)))
    result = train(jax.random.split(jax.random.key(0), 2), None, texts)
    metrics = result.metrics
    assert metrics["loss"].shape == (2, 64)
    assert (metrics["loss"][:, 0] > 1.5).all() and (metrics["loss"][:, -8:].mean(1) < 0.2).all()
    assert (metrics["accuracy"][:, -1] > 0.9).all() and (metrics["tokens"] == 16 * 6).all()
    first = jax.tree.map(lambda x: x[0], result.state.params)
    key_params, _ = jax.random.split(jax.random.split(jax.random.key(0), 2)[0])
    fresh = fresh_params(model, key_params)
    assert_close(first["value"], fresh["value"], 1e-6)  # weight decay leaves the critic alone

    job = sft_job(settings, model, 128)
    assert job.num_iterations == 64
    inputs = (job.trainer_of(), jax.random.key(1), None, {"data": texts})
    row = jax.eval_shape(lambda: first_metrics(*inputs))
    require_valid_metrics(job, row)
    assert set(row) == set(metrics)


TEXTS = make_texts()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: require_texts(TEXTS._replace(tokens=TEXTS.tokens.at[3, 1].set(7)), 7, 8),
            "text 3 has the token 7 at position 1: the tokens of the model are 0 … 6",
        ),
        (
            lambda: require_texts(TEXTS._replace(tokens=TEXTS.tokens.at[3, 1].set(-1)), 7, 8),
            "text 3 has the token -1 at position 1",
        ),
        (lambda: require_texts(TEXTS, 7, 7), "has 8 tokens: the context has 7"),
        (
            lambda: require_texts(TEXTS._replace(length=TEXTS.length.at[0].set(11)), 7, 20),
            "text 0 has 11 tokens: the array of tokens has 10",
        ),
        (
            lambda: require_texts(TEXTS._replace(prompt_length=TEXTS.length), 7, 8),
            "prompt and completion need at least one each",
        ),
        (
            lambda: require_texts(TEXTS._replace(prompt_length=TEXTS.length * 0), 7, 8),
            "text 0 has 0 tokens of prompt",
        ),
        (
            lambda: require_texts(jax.tree.map(lambda x: x[:0], TEXTS), 7, 8),
            "there is no text: there must be at least one",
        ),
        (
            lambda: require_texts(TEXTS._replace(length=TEXTS.length[1:]), 7, 8),
            "9 rows of tokens have length of shape (8,)",
        ),
        (lambda: pack(TEXTS, 7), "has 8 tokens: row_length is 7"),
    ],
)
def test_texts_that_a_model_cannot_read_are_refused(make, sentence):
    assert sentence in sentence_of(make)


def test_texts_that_it_can_read_are_not():
    require_texts(make_texts(padding=99), 7, 8)
    assert one_per_row(TEXTS).tokens.shape == (N, 10)
