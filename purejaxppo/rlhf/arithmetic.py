"""Two-digit addition: a task whose reward can be verified and whose optimum is known exactly.

A text is ``12+34=46`` and an end-of-text token. Tokens 0 … 9 are the digits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike, NDArray

from purejaxppo.envs.tokens import tokens
from purejaxppo.rlhf.texts import Texts
from purejaxppo.types import Env, PRNGKey, PyTree
from purejaxppo.validation import POSITIVE, checked_leaf

PLUS = 10
EQUALS = 11
END = 12
VOCAB_SIZE = 13
PROMPT_LENGTH = 6  # two digits, +, two digits, =
MAX_NEW_TOKENS = 4  # the longest answer, 198, and the end
CHARACTERS = "0123456789+=."  # "." shows the end


def make_prompts() -> NDArray[np.int32]:
    """The 10,000 prompts [10000, 6], from ``00+00=`` to ``99+99=``."""
    a, b = np.divmod(np.arange(10_000), 100)
    plus = np.full_like(a, PLUS)
    equals = np.full_like(a, EQUALS)
    return np.stack([a // 10, a % 10, plus, b // 10, b % 10, equals], axis=1).astype(np.int32)


def answers(prompts: Int[Array, "n L"]) -> Int[Array, "n 4"]:
    """The right answers: the digits of the sum without leading zeros, padded with ends of text."""
    total = 10 * (prompts[:, 0] + prompts[:, 3]) + prompts[:, 1] + prompts[:, 4]
    hundreds = total // 100
    tens = total // 10 % 10
    ones = total % 10
    end = jnp.full_like(total, END)
    one_digit = jnp.stack([ones, end, end, end], axis=1)
    two_digits = jnp.stack([tens, ones, end, end], axis=1)
    three_digits = jnp.stack([hundreds, tens, ones, end], axis=1)
    longer = jnp.where((total >= 100)[:, None], three_digits, two_digits)
    return jnp.where((total >= 10)[:, None], longer, one_digit)


def demonstrations(
    key: PRNGKey, prompts: Int[Array, "n L"], wrong: float = 0.6
) -> Int[Array, "n 4"]:
    """Answers with one digit redrawn in a share ``wrong`` of them.

    The new digit is uniform, so a tenth of these answers stays right.
    """
    key_wrong, key_position, key_digit = jax.random.split(key, 3)
    right = answers(prompts)
    count = (right != END).sum(axis=1)
    position = jax.random.randint(key_position, count.shape, 0, count)
    digit = jax.random.randint(key_digit, count.shape, 0, 10)
    is_redrawn = jax.random.bernoulli(key_wrong, wrong, count.shape)
    here = is_redrawn[:, None] & (jnp.arange(right.shape[1])[None] == position[:, None])
    return jnp.where(here, digit[:, None], right)


def make_env(prompts: NDArray[np.int32] | None = None) -> Env:
    """The `tokens` environment of these prompts, by default of all."""
    prompts = make_prompts() if prompts is None else prompts
    lengths = np.full(len(prompts), PROMPT_LENGTH)
    return tokens(prompts, lengths, MAX_NEW_TOKENS, END, VOCAB_SIZE)


def as_texts(prompts: Int[Array, "n L"], completions: Int[Array, "n 4"]) -> Texts:
    """Prompts and completions, up to the first end of text of each completion."""
    length = PROMPT_LENGTH + 1 + (completions != END).cumprod(axis=1).sum(axis=1)
    length = jnp.minimum(length, PROMPT_LENGTH + MAX_NEW_TOKENS)
    return Texts(
        tokens=jnp.concatenate([prompts, completions], axis=1),
        length=length,
        prompt_length=jnp.full_like(length, PROMPT_LENGTH),
    )


def score(tokens: Int[Array, "B L"], lengths: Int[Array, "B"], params: PyTree) -> Float[Array, "B"]:
    """1 for the right answer with its end of text, else 0; ``params`` are not used."""
    expected = as_texts(tokens[:, :PROMPT_LENGTH], answers(tokens))
    width = min(tokens.shape[1], expected.tokens.shape[1])
    is_same = tokens[:, :width] == expected.tokens[:, :width]
    is_needed = jnp.arange(width)[None] < expected.length[:, None]
    right = (lengths == expected.length) & (is_same | ~is_needed).all(axis=1)
    return right.astype(jnp.result_type(float))


def decode(tokens: ArrayLike) -> str:
    """The characters up to the first end of text."""
    characters = "".join(CHARACTERS[token] for token in np.ravel(tokens))
    return characters.split(CHARACTERS[END])[0]


def optimum(p0: Float[Array, "*n"], beta: float) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """The best policy for reward 1 if right and 0 else, with a KL penalty to a reference policy:

        maximise   q − β KL(π ‖ π_ref)
        q* = p₀ e^{1/β} / (1 − p₀ + p₀ e^{1/β}),     J* = β log(1 − p₀ + p₀ e^{1/β})

    where p₀ and q are the probabilities of the one right answer under π_ref and π, and β > 0. The
    optimum is π* ∝ π_ref · e^{r/β} (Rafailov et al. 2023, eq. 4). Returns q* and J*. Raises
    `ConfigError` unless β > 0.
    """
    checked_leaf("beta", beta, POSITIVE)
    log_right = jnp.log(p0) + 1 / beta
    log_total = jnp.logaddexp(jnp.log1p(-p0), log_right)
    return jnp.exp(log_right - log_total), beta * log_total
