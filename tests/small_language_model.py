"""A language model with 15 possible responses, whose probabilities are enumerated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxppo.rlhf.language_model import language_model
from purejaxppo.rlhf.transformer import DecoderSizes

SIZES = DecoderSizes(vocab_size=3, context=6, width=16, num_layers=1, num_heads=2, mlp_width=24)
END = 2  # of the vocabulary {0, 1, 2}


def perturbed(model, seed=0, scale=0.4):
    """Parameters far from their initial values."""
    params = model.init(jax.random.key(seed), jnp.zeros(1, jnp.int32))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    noisy = [x + scale * jax.random.normal(key, x.shape, x.dtype) for x, key in pairs]
    return jax.tree.unflatten(structure, noisy)


MODEL = language_model(SIZES, "none")
PARAMS = perturbed(MODEL)
PROMPTS = [(0, 1), (1,)]


def responses(vocab_size=3, longest=3):
    """All completions: they end with the end of text, or after ``longest`` tokens."""
    every = (itertools.product(range(vocab_size), repeat=size) for size in range(1, longest + 1))
    return [
        response
        for response in itertools.chain.from_iterable(every)
        if END not in response[:-1] and (response[-1] == END or len(response) == longest)
    ]


RESPONSES = responses()
PREFIXES = sorted({response[:size] for response in RESPONSES for size in range(len(response))})


@jax.jit
def logits_of_texts(params, obs):
    reset = jnp.broadcast_to((jnp.arange(len(obs)) == 0)[:, None], obs.shape)
    carry = MODEL.initial_carry(obs.shape[1])
    return MODEL.unroll(params, carry, obs, reset)[0].logits


def probabilities(params, prompt, temperature=1.0, keep=lambda p: p):
    """P(response | prompt) by enumeration: the product of float64 softmaxes after each prefix."""
    rows = [(prompt + prefix + (0,) * 4)[:4] for prefix in PREFIXES]
    logits = np.float64(logits_of_texts(params, jnp.array(rows).T))
    after = {}
    for i, prefix in enumerate(PREFIXES):
        weights = np.exp(logits[len(prompt + prefix) - 1, i] / temperature)
        kept = keep(weights / weights.sum())
        after[prefix] = kept / kept.sum()
    p = [np.prod([after[r[:t]][r[t]] for t in range(len(r))]) for r in RESPONSES]
    assert sum(p) == pytest.approx(1)
    return np.array(p)
