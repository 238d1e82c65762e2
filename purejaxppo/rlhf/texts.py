"""`Texts`: token sequences of different lengths, and the probabilities that a model gives them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from purejaxppo.types import ConfigError, Distribution, Model, PyTree

# (tokens [n, L], lengths [n], params) -> [n]. Of each text the first ``lengths`` tokens count.
Score = Callable[[Array, Array, PyTree], Array]


class Texts(NamedTuple):
    """Prompts with their completions.

    Every text has at least one token before its completion, the start of the text if nothing else.
    """

    tokens: Int[Array, "n L"]  # arbitrary after ``length``
    length: Int[Array, "n"]  # tokens of prompt and completion, with the end of text if it has one
    prompt_length: Int[Array, "n"]  # tokens of the prompt, at least 1

    @property
    def completion_mask(self) -> Bool[Array, "T n"]:
        """Whether token t + 1 belongs to the completion, for t = 0 … L − 2; time is first."""
        following = jnp.arange(1, self.tokens.shape[1])[:, None]
        return (following >= self.prompt_length[None]) & (following < self.length[None])

    @property
    def text_mask(self) -> Bool[Array, "T n"]:
        """Whether token t + 1 belongs to prompt or completion, for t = 0 … L − 2."""
        return jnp.arange(1, self.tokens.shape[1])[:, None] < self.length[None]

    @property
    def is_padding(self) -> Bool[Array, "n L"]:
        """Whether a token comes after the end of its text."""
        return jnp.arange(self.tokens.shape[1])[None] >= self.length[:, None]


class Pairs(NamedTuple):
    """Judgements: of two completions, one was preferred. The arrays of tokens may differ in L."""

    chosen: Texts
    rejected: Texts
    margin: Float[Array, "n"]  # by how much the score of ``chosen`` should be higher; 0 by default


class Ranked(NamedTuple):
    """Completions with the ratings of several people.

    Of two with the same prompt, one is preferred with the probability that its rating by a random
    person is higher (`preference_of_ratings`).
    """

    texts: Texts
    rating: Float[Array, "n R"]  # of each text by up to R people; NaN: no rating
    prompt: Int[Array, "n"]  # which prompt it is; only equal ones are compared


def with_padding_of_zeros(texts: Texts) -> Texts:
    """The same texts; their padding, which may be any integers, is token 0.

    A token outside the vocabulary has the embedding NaN, and attention multiplies even masked
    values: 0 · NaN is NaN.
    """
    return texts._replace(tokens=jnp.where(texts.is_padding, 0, texts.tokens))


def starts_of_texts(texts: Texts) -> Bool[Array, "n L"]:
    """True at the first token of a text and at every token of its padding.

    Padding consists of texts of one token, so that its positions never exceed the context.
    """
    return texts.is_padding | (jnp.arange(texts.tokens.shape[1])[None] == 0)


def concatenated(first: Texts, second: Texts) -> Texts:
    """The texts of both, ``first`` before ``second``, with the larger of the two L."""
    width = max(first.tokens.shape[1], second.tokens.shape[1])

    def widened(texts: Texts) -> Texts:
        missing = width - texts.tokens.shape[1]
        return texts._replace(tokens=jnp.pad(texts.tokens, ((0, 0), (0, missing))))

    return jax.tree.map(lambda *x: jnp.concatenate(x), widened(first), widened(second))


def unroll_texts(model: Model, params: PyTree, texts: Texts) -> tuple[Distribution, Array]:
    """The distributions of token t + 1 given tokens 0 … t, and the values, both [L − 1, n]."""
    obs = with_padding_of_zeros(texts).tokens[:, :-1].T
    reset = starts_of_texts(texts)[:, :-1].T
    return model.unroll(params, model.initial_carry(obs.shape[1]), obs, reset)


def token_log_probs(model: Model, params: PyTree, texts: Texts) -> Float[Array, "T n"]:
    """log π(token t + 1 | tokens 0 … t) for t = 0 … L − 2, in nats; also outside the masks."""
    distribution, _ = unroll_texts(model, params, texts)
    return distribution.log_prob(with_padding_of_zeros(texts).tokens[:, 1:].T)


def completion_log_prob(model: Model, params: PyTree, texts: Texts) -> Float[Array, "n"]:
    """log π(completion | prompt), the sum over the tokens of the completion, in nats."""
    log_prob = token_log_probs(model, params, texts)
    return jnp.where(texts.completion_mask, log_prob, 0).sum(axis=0)


def scores_of(score: Score, texts: Texts, score_params: PyTree) -> Float[Array, "n"]:
    """The score of each text. Raises `ConfigError` unless it is one number for each."""
    scores = jnp.asarray(score(texts.tokens, texts.length, score_params))
    if scores.shape != texts.length.shape:
        raise ConfigError(
            f"the score of {len(texts.length)} texts has the shape {scores.shape}: it must be "
            f"{texts.length.shape}, one number for each text"
        )
    return scores.astype(jnp.result_type(float))


# ---------------------------------------------------------------------------------------- checks


def require_texts(texts: Texts, vocab_size: int, context: int, name: str = "text") -> None:
    """Raise `ConfigError` unless a model of these sizes can read all texts.

    The arrays must be concrete. ``name`` is what the message calls a text. Without this check, a
    token outside the vocabulary and a text longer than the context can give NaN.
    """
    tokens, length, prompt_length = (np.asarray(x) for x in texts)
    if tokens.ndim != 2 or not len(tokens):
        raise ConfigError(f"there is no {name}: there must be at least one")
    if length.shape != (len(tokens),) or prompt_length.shape != (len(tokens),):
        raise ConfigError(
            f"{len(tokens)} rows of tokens have length of shape {length.shape} and prompt_length "
            f"of shape {prompt_length.shape}: each must be ({len(tokens)},)"
        )
    is_too_long = length > min(context, tokens.shape[1])
    if is_too_long.any():
        i = int(is_too_long.argmax())
        limit = "the context" if length[i] > context else "the array of tokens"
        raise ConfigError(
            f"{name} {i} has {length[i]} tokens: {limit} has {min(context, tokens.shape[1])}"
        )
    has_no_part = (prompt_length < 1) | (prompt_length >= length)
    if has_no_part.any():
        i = int(has_no_part.argmax())
        raise ConfigError(
            f"{name} {i} has {prompt_length[i]} tokens of prompt among {length[i]}: "
            "prompt and completion need at least one each"
        )
    in_text = np.arange(tokens.shape[1]) < length[:, None]
    is_unknown = in_text & ((tokens < 0) | (tokens >= vocab_size))
    if is_unknown.any():
        i, t = (int(x) for x in np.argwhere(is_unknown)[0])
        raise ConfigError(
            f"{name} {i} has the token {tokens[i, t]} at position {t}: "
            f"the tokens of the model are 0 … {vocab_size - 1}"
        )


def require_pairs(pairs: Pairs, vocab_size: int, context: int) -> None:
    """Raise `ConfigError` unless a model of these sizes can read all pairs (`require_texts`)."""
    require_texts(pairs.chosen, vocab_size, context, "chosen text")
    require_texts(pairs.rejected, vocab_size, context, "rejected text")
    sizes = (len(pairs.chosen.length), len(pairs.rejected.length), np.shape(pairs.margin))
    if sizes[0] != sizes[1] or sizes[2] != (sizes[0],):
        raise ConfigError(
            f"pairs have {sizes[0]} chosen and {sizes[1]} rejected texts, and margins of shape "
            f"{sizes[2]}: they must be equally many"
        )
    if not np.isfinite(np.asarray(pairs.margin)).all():
        raise ConfigError("a margin is not finite: margins must be finite numbers")
