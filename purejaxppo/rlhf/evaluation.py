"""Measurements of a language model and its texts: score, KL, win rate, lengths and diversity."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from purejaxppo.analysis.statistics import Estimate
from purejaxppo.networks.distributions import Categorical
from purejaxppo.rlhf.decoding import logits_of
from purejaxppo.rlhf.sampling import generate
from purejaxppo.rlhf.texts import (
    Score,
    Texts,
    scores_of,
    unroll_texts,
    with_padding_of_zeros,
)
from purejaxppo.types import ConfigError, Model, PRNGKey, PyTree

# The names of `evaluate_texts`.
MEASUREMENTS = ("score", "kl", "kl_k1", "length", "ended", "distinct_2", "entropy")
NORMAL_975 = 1.959964  # the 0.975 quantile of the normal distribution


class SequenceKL(NamedTuple):
    """Estimates of KL(π ‖ π_ref) of whole completions, in nats; each text gives one."""

    k1: Float[Array, "n"]
    k3: Float[Array, "n"]
    exact: Float[Array, "n"]


def sequence_kl(
    model: Model,
    params: PyTree,
    reference: PyTree,
    texts: Texts,
    temperature: float | Array = 1.0,
) -> SequenceKL:
    """Three unbiased estimates of KL(π(· | prompt) ‖ π_ref(· | prompt)) from texts drawn from π.

    With d_t = log π(a_t | s_t) − log π_ref(a_t | s_t), summed over the completion,

        k1 = Σ d_t,    k3 = Σ (exp(−d_t) − 1 + d_t),    exact = Σ KL(π(· | s_t) ‖ π_ref(· | s_t)).

    ``exact`` is the Rao-Blackwellised k1: each term is its expectation over the token, so only the
    states are sampled, and its variance is smaller. k1 can be negative, the others cannot. k3 is
    that of Schulman (2020, http://joschu.net/blog/kl-approx.html), for each token.

    π and π_ref are softmax(logits / ``temperature``) with the parameters ``params`` and
    ``reference`` of one model. Texts must be drawn at this temperature without truncation.
    """
    texts = with_padding_of_zeros(texts)
    policy = _distributions(model, params, texts, temperature)
    return _sequence_kl(policy, _distributions(model, reference, texts, temperature), texts)


def win_rate(scores_a: ArrayLike, scores_b: ArrayLike) -> Estimate:
    """The share of pairs in which a has the higher score, ties counted half, with a 95 % interval.

    Scores [n] of the same index are those of one prompt. The interval is that of Wilson (1927),
    which is not empty for a share of 0 or 1. Ties reduce the variance below that of a binomial
    share, so with ties the interval is wider than necessary. A NaN gives NaN.

    Raises `ConfigError` unless the scores are pairs, at least one.
    """
    a = np.asarray(scores_a, float)
    b = np.asarray(scores_b, float)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ConfigError(
            f"scores_a and scores_b have the shapes {a.shape} and {b.shape}: they must be one "
            "score for each of the same prompts, at least one"
        )
    has_nan = np.isnan(a).any() or np.isnan(b).any()
    share = np.nan if has_nan else np.mean((a > b) + 0.5 * (a == b))
    z2 = NORMAL_975**2 / len(a)
    middle = (share + z2 / 2) / (1 + z2)
    half_width = np.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    low, high = np.clip([middle - half_width, middle + half_width], 0, 1)  # of rounding
    return Estimate(np.float64(share), low, high)


def distinct_n(texts: Texts, n: int = 2) -> float:
    """The number of distinct n-grams of tokens over that of all n-grams in the completions.

    As in Li et al. (2016, arXiv:1510.03055), distinct among all texts; they divide by the number of
    tokens. The end of text is a token. NaN without any n-gram, and `ConfigError` unless n ≥ 1.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigError(f"n = {n!r}: it must be an integer of at least 1")
    tokens = np.asarray(texts.tokens)
    if tokens.shape[1] < n:
        return float("nan")
    windows = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1)  # [texts, starts, n]
    start = np.arange(windows.shape[1])[None]
    first = np.asarray(texts.prompt_length)[:, None]
    end = np.asarray(texts.length)[:, None]
    grams = windows[(start >= first) & (start + n <= end)]
    return len(np.unique(grams, axis=0)) / len(grams) if len(grams) else float("nan")


def evaluate_policy(
    model: Model,
    params: PyTree,
    reference: PyTree,
    key: PRNGKey,
    prompts: Int[Array, "n L"],
    lengths: Int[Array, "n"],
    max_new_tokens: int,
    eos: int,
    score: Score,
    score_params: PyTree = None,
    temperature: float = 1.0,
) -> dict[str, float]:
    """The measurements of `evaluate_texts` on one completion of each prompt, drawn from the policy.

    Programs are compiled once for the same model, score, sizes and temperature.
    """
    _require_positive(temperature)
    arguments = (model, params, key, prompts, lengths, max_new_tokens, eos, temperature)
    texts = _generate(*arguments)
    return evaluate_texts(
        model, params, reference, texts, eos, score, score_params, temperature=temperature
    )


def evaluate_texts(
    model: Model,
    params: PyTree,
    reference: PyTree,
    texts: Texts,
    eos: int,
    score: Score,
    score_params: PyTree = None,
    temperature: float = 1.0,
) -> dict[str, float]:
    """Measurements of texts that the policy wrote, as means over texts.

    ``score`` gets (tokens, lengths, ``score_params``). The numbers are

    - ``score``: the mean score;
    - ``kl``: KL(π ‖ π_ref) in nats per sequence, the ``exact`` one of `sequence_kl`, and ``kl_k1``,
      its estimate from the drawn tokens alone;
    - ``length``: tokens of the completion with its end of text;
    - ``ended``: the share of completions with an end of text;
    - ``distinct_2``: distinct bigrams over all bigrams;
    - ``entropy``: of the next token, in nats, as a mean over the tokens of all completions.

    Tokens after the end of a text change nothing. Raises `ConfigError` for a temperature of 0, for
    which the KL is not defined, and for scores that are not one for each text.
    """
    _require_positive(temperature)
    measured = _measure(model, score, params, reference, texts, eos, score_params, temperature)
    numbers = {name: float(value) for name, value in measured.items()}
    return numbers | {"distinct_2": distinct_n(texts, 2)}


def completion_ended(texts: Texts, eos: int | Array) -> Bool[Array, "n"]:
    """Whether each completion has its end of text [n]; an ``eos`` in the prompt is none."""
    last = jnp.take_along_axis(texts.tokens, texts.length[:, None] - 1, axis=1)[:, 0]
    return (texts.length > texts.prompt_length) & (last == eos)


_generate = jax.jit(generate, static_argnames=("model", "max_new_tokens", "eos", "temperature"))


@partial(jax.jit, static_argnames=("model", "score"))
def _measure(
    model: Model,
    score: Score,
    params: PyTree,
    reference: PyTree,
    texts: Texts,
    eos: int | Array,
    score_params: PyTree,
    temperature: float | Array,
) -> dict[str, Array]:
    texts = with_padding_of_zeros(texts)
    policy = _distributions(model, params, texts, temperature)
    other = _distributions(model, reference, texts, temperature)
    kl = _sequence_kl(policy, other, texts)
    mask = texts.completion_mask
    return {
        "score": scores_of(score, texts, score_params).mean(),
        "kl": kl.exact.mean(),
        "kl_k1": kl.k1.mean(),
        "length": (texts.length - texts.prompt_length).mean(),
        "ended": completion_ended(texts, eos).mean(),
        "entropy": jnp.where(mask, policy.entropy(), 0).sum() / mask.sum(),
    }


def _distributions(
    model: Model, params: PyTree, texts: Texts, temperature: float | Array
) -> Categorical:
    """π(token t + 1 | tokens 0 … t) [L − 1, n]."""
    distribution, _ = unroll_texts(model, params, texts)
    return Categorical(logits_of(distribution) / temperature)


def _sequence_kl(policy: Categorical, other: Categorical, texts: Texts) -> SequenceKL:
    action = texts.tokens[:, 1:].T
    difference = policy.log_prob(action) - other.log_prob(action)

    def over_completion(terms: Array) -> Array:
        return jnp.where(texts.completion_mask, terms, 0).sum(axis=0)

    return SequenceKL(
        k1=over_completion(difference),
        k3=over_completion(jnp.expm1(-difference) + difference),
        exact=over_completion(policy.kl(other)),
    )


def _require_positive(temperature: float) -> None:
    if not temperature > 0:
        raise ConfigError(f"temperature = {temperature!r}: it must be above 0, as a KL needs")
