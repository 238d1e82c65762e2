"""`Texts`: token sequences of different lengths, and the probabilities that a model gives them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from purejaxppo.types import Distribution, Model, PyTree


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


def unroll_texts(model: Model, params: PyTree, texts: Texts) -> tuple[Distribution, Array]:
    """The distributions of token t + 1 given tokens 0 … t, and the values, both [L − 1, n]."""
    obs = texts.tokens[:, :-1].T
    reset = jnp.broadcast_to((jnp.arange(len(obs)) == 0)[:, None], obs.shape)
    return model.unroll(params, model.initial_carry(obs.shape[1]), obs, reset)


def token_log_probs(model: Model, params: PyTree, texts: Texts) -> Float[Array, "T n"]:
    """log π(token t + 1 | tokens 0 … t) for t = 0 … L − 2, in nats; also outside the masks."""
    distribution, _ = unroll_texts(model, params, texts)
    return distribution.log_prob(texts.tokens[:, 1:].T)


def completion_log_prob(model: Model, params: PyTree, texts: Texts) -> Float[Array, "n"]:
    """log π(completion | prompt), the sum over the tokens of the completion, in nats."""
    log_prob = token_log_probs(model, params, texts)
    return jnp.where(texts.completion_mask, log_prob, 0).sum(axis=0)


class Pairs(NamedTuple):
    """Two completions of each prompt, of which the first was preferred."""

    chosen: Texts
    rejected: Texts
    margin: Float[Array, "n"]  # 0 unless given
