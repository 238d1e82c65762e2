"""Texts from a language model: `generate`, and the best of n by a score, `best_of_n`."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from purejaxppo.networks.distributions import Categorical
from purejaxppo.networks.inverse_cdf import sample_by_inverse_cdf
from purejaxppo.rlhf.decoding import (
    logits_of,
    require_decoding,
    require_prompts,
    sampling_logits,
    vocab_size_of,
)
from purejaxppo.rlhf.texts import Score, Texts, scores_of
from purejaxppo.types import Model, PRNGKey, PyTree
from purejaxppo.validation import integer


class GenerationState(NamedTuple):
    """The loop of `generate`, after one more token of each text."""

    carry: PyTree  # [n, ...] of the model
    token: Int[Array, "n"]  # the newest token
    num_new: Int[Array, "n"]  # tokens of the completion so far
    ended: Bool[Array, "n"]  # the completion has its end of text
    log_prob: Float[Array, "n"]  # of the completion so far, in nats


class Best(NamedTuple):
    """For each prompt the completion with the highest score."""

    texts: Texts  # n texts
    score: Float[Array, "n"]


def generate(
    model: Model,
    params: PyTree,
    key: PRNGKey,
    prompts: Int[ArrayLike, "n L"],
    lengths: Int[ArrayLike, "n"],
    max_new_tokens: int,
    eos: int,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Texts:
    """Sample one completion for each prompt, of at most ``max_new_tokens`` tokens with its ``eos``.

    A token is drawn from softmax(z / ``temperature``), truncated to ``top_k`` tokens and then to
    the nucleus of mass ``top_p`` (`purejaxppo.rlhf.decoding.truncate`). z are the logits of the
    model, which include its own temperature. The temperature 0, as a Python number, takes the most
    probable token.

    Prompts are forced through ``model.step``, as in `purejaxppo.envs.tokens`, so probabilities are
    those of a rollout. Row i has its own random stream, ``fold_in(key, i)``, and its completion
    depends on no other row. All arguments but params, key, arrays and temperature are static.

    Arguments:
        prompts: tokens, also of NumPy; those after the length are not used.
        lengths: tokens of each prompt, at least 1.
        eos: the end of text. In a prompt it does not end the text.

    Returns texts of width L + ``max_new_tokens``, filled with ``eos``. Raises `ConfigError` for
    invalid arguments, and if L − 1 + ``max_new_tokens`` tokens, all but the last of a text, exceed
    the context of the model.
    """
    arguments = (params, key, prompts, lengths, max_new_tokens, eos, temperature, top_k, top_p)
    return generate_with_log_prob(model, *arguments)[0]


def generate_with_log_prob(
    model: Model,
    params: PyTree,
    key: PRNGKey,
    prompts: Int[ArrayLike, "n L"],
    lengths: Int[ArrayLike, "n"],
    max_new_tokens: int,
    eos: int,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Texts, Float[Array, "n"]]:
    """The texts of `generate`, and log p(completion) [n] in nats.

    p is the distribution from which the tokens were drawn, with temperature and truncation. For the
    temperature 0 it is 1.
    """
    prompts = jnp.asarray(prompts)
    lengths = jnp.asarray(lengths)
    max_new_tokens = integer("max_new_tokens", max_new_tokens, 1)
    vocab_size = vocab_size_of(model, params, prompts, max_new_tokens)
    require_prompts(prompts, lengths, eos, vocab_size)
    require_decoding(temperature, top_k, top_p, vocab_size)
    rows = jnp.arange(len(prompts))
    uniform = jax.vmap(partial(_uniform_stream, key, max_new_tokens))(rows)

    def append(state: GenerationState, position: Array) -> tuple[GenerationState, Array]:
        """``position`` is that of the next token."""
        is_first = jnp.broadcast_to(position == 1, rows.shape)
        carry, distribution, _ = model.step(params, state.carry, state.token, is_first)
        logits = sampling_logits(logits_of(distribution), temperature, top_k, top_p)
        index = position - lengths  # of the next token in the completion
        is_new = (index >= 0) & (index < max_new_tokens) & ~state.ended
        column = jnp.clip(index, 0, max_new_tokens - 1)[:, None]
        drawn = sample_by_inverse_cdf(logits, jnp.take_along_axis(uniform, column, axis=1)[:, 0])
        forced = prompts[:, jnp.minimum(position, prompts.shape[1] - 1)]
        token = jnp.where(is_new, drawn, jnp.where(index < 0, forced, eos)).astype(jnp.int32)
        log_prob = jnp.where(is_new, Categorical(logits).log_prob(drawn), 0)
        state = GenerationState(
            carry=carry,
            token=token,
            num_new=state.num_new + is_new,
            ended=state.ended | (is_new & (drawn == eos)),
            log_prob=state.log_prob + log_prob.astype(state.log_prob.dtype),
        )
        return state, token

    start = GenerationState(
        carry=model.initial_carry(len(prompts)),
        token=prompts[:, 0].astype(jnp.int32),
        num_new=jnp.zeros(len(prompts), jnp.int32),
        ended=jnp.zeros(len(prompts), bool),
        log_prob=jnp.zeros(len(prompts), jnp.result_type(float)),
    )
    positions = jnp.arange(1, prompts.shape[1] + max_new_tokens)
    end, following = jax.lax.scan(append, start, positions)
    tokens = jnp.concatenate([start.token[None], following]).T
    lengths = lengths.astype(jnp.int32)
    return Texts(tokens, lengths + end.num_new, lengths), end.log_prob


def best_of_n(
    model: Model,
    params: PyTree,
    key: PRNGKey,
    prompts: Int[ArrayLike, "P L"],
    lengths: Int[ArrayLike, "P"],
    n: int,
    score: Score,
    score_params: PyTree,
    max_new_tokens: int,
    eos: int,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> dict[int, Best]:
    """The best completion of the first 1, 2, 4, … and n of the same n draws for each prompt.

    Draw d is that of `generate` with ``fold_in(key, d)``, so more draws do not change the earlier
    ones. The best has the highest ``score(tokens, lengths, score_params)``; of equal scores it is
    the first. Draws are made one after another, which bounds the memory.

    Raises `ConfigError` for invalid arguments, and for scores that are not one for each text.
    """
    sizes = sorted({1 << power for power in range(integer("n", n, 1).bit_length())} | {n})

    def draw(index: Array) -> Best:
        key_draw = jax.random.fold_in(key, index)
        arguments = (prompts, lengths, max_new_tokens, eos, temperature, top_k, top_p)
        texts = generate(model, params, key_draw, *arguments)
        return Best(texts, scores_of(score, texts, score_params))

    draws = jax.lax.map(draw, jnp.arange(n))
    row = jnp.arange(jnp.shape(prompts)[0])

    def best_of_first(size: int) -> Best:
        best = jnp.argmax(draws.score[:size], axis=0)
        return jax.tree.map(lambda x: x[best, row], draws)

    return {size: best_of_first(size) for size in sizes}


def best_of_n_kl(n: int) -> float:
    """log n − (n − 1) / n, in nats: an upper bound of KL(best of n ‖ the policy of the draws).

    It is exact in the limit in which no text has a large probability (Beirami et al. 2024,
    arXiv:2401.01879).
    """
    return math.log(integer("n", n, 1)) - (n - 1) / n


def _uniform_stream(key: PRNGKey, length: int, row: Array) -> Float[Array, "length"]:
    """Random numbers of [0, 1) that depend on the key, the row and their index only."""
    key_row = jax.random.fold_in(key, row)
    return jax.vmap(lambda j: jax.random.uniform(jax.random.fold_in(key_row, j)))(
        jnp.arange(length)
    )
