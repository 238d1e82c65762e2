"""Text as an environment: each step appends one token to a prompt."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from numpy.typing import ArrayLike, NDArray

from purejaxppo.types import ConfigError, Discrete, Env, PRNGKey, Step


class TokenState(NamedTuple):
    """The position of an episode in its text."""

    prompt: Int[Array, ""]  # index of the prompt
    position: Int[Array, ""]  # of the current token in the text, from 0


def tokens(
    prompts: ArrayLike,
    lengths: ArrayLike,
    max_new_tokens: int,
    eos: int,
    vocab_size: int,
) -> Env:
    """An environment in which an action is the next token of a text.

    An episode begins with a prompt drawn uniformly from ``prompts`` [n, L]. Row i has
    ``lengths[i]`` tokens, and what follows them is not used. The observation is the current token;
    a model with memory sees the text before it. While the prompt lasts, the next token is that of
    the prompt whatever the action is, and the step is not in the mask. Every later action is
    appended. The episode terminates with the action ``eos``, or with ``max_new_tokens`` appended
    tokens. A token ``eos`` in a prompt does not end it.

    The reward is 0: a ``reward_fn`` scores the text. ``max_episode_steps`` is the bound
    max(lengths) − 1 + max_new_tokens, and nothing truncates.

    Raises `ConfigError` for arguments that are no prompts, lengths, tokens or sizes.
    """
    vocab_size = _size("vocab_size", vocab_size)
    max_new_tokens = _size("max_new_tokens", max_new_tokens)
    texts, sizes = _validated(prompts, lengths, vocab_size)
    if not isinstance(eos, int) or isinstance(eos, bool) or not 0 <= eos < vocab_size:
        raise ConfigError(f"eos = {eos!r}: it must be a token, an integer of 0 … {vocab_size - 1}")
    num_prompts = len(texts)

    def reset(key: PRNGKey) -> tuple[TokenState, Array]:
        prompt = jax.random.randint(key, (), 0, num_prompts, jnp.int32)
        return TokenState(prompt, jnp.int32(0)), jnp.asarray(texts)[prompt, 0]

    def step(key: PRNGKey, state: TokenState, action: Array) -> Step:
        position = state.position + 1
        length = jnp.asarray(sizes)[state.prompt]
        is_chosen = position >= length
        # In a forced step the index is within the prompt; otherwise the result is not used.
        forced = jnp.asarray(texts)[state.prompt, jnp.minimum(position, length - 1)]
        token = jnp.where(is_chosen, action.astype(jnp.int32), forced)
        num_new = position - length + 1
        return Step(
            state=TokenState(state.prompt, position),
            obs=token,
            reward=jnp.zeros((), jnp.result_type(float)),
            terminated=is_chosen & ((token == eos) | (num_new >= max_new_tokens)),
            truncated=jnp.asarray(False),
            mask=is_chosen,
        )

    return Env(
        name="tokens",
        reset=reset,
        step=step,
        observation_space=Discrete(vocab_size),
        action_space=Discrete(vocab_size),
        max_episode_steps=int(sizes.max()) - 1 + max_new_tokens,
        truncates=False,
        settings=None,  # the prompts are arrays
    )


def _size(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} = {value!r}: it must be an integer of at least 1")
    return value


def _validated(
    prompts: ArrayLike, lengths: ArrayLike, vocab_size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The prompts and their lengths as arrays."""
    texts = np.asarray(prompts)
    sizes = np.asarray(lengths)
    if texts.ndim != 2 or texts.dtype.kind not in "iu" or not texts.size:
        raise ConfigError(
            "prompts must be an array [n, L] of tokens with at least one prompt; "
            f"this one has the shape {texts.shape} and the type {texts.dtype}"
        )
    if sizes.shape != texts.shape[:1] or sizes.dtype.kind not in "iu":
        raise ConfigError(
            f"lengths must be one integer for each of {len(texts)} prompts; "
            f"this one has the shape {sizes.shape} and the type {sizes.dtype}"
        )
    outside = (sizes < 1) | (sizes > texts.shape[1])
    if outside.any():
        first = int(outside.argmax())
        raise ConfigError(
            f"prompt {first} has the length {sizes[first]}: it must be 1 … {texts.shape[1]}"
        )
    counts = np.arange(texts.shape[1]) < sizes[:, None]
    unknown = counts & ((texts < 0) | (texts >= vocab_size))
    if unknown.any():
        first = int(unknown.any(axis=1).argmax())
        token = texts[first][unknown[first]][0]
        raise ConfigError(
            f"prompt {first} has the token {token}, which is not in the vocabulary of "
            f"{vocab_size} tokens"
        )
    # Padding may hold any number, and is never used.
    return np.where(counts, texts, 0).astype(np.int32), sizes.astype(np.int32)
