"""The losses of pairs, for reward models and direct preference optimisation, on plain arrays.

``chosen`` (w) and ``rejected`` (l) are scores, or log-probabilities of completions in nats: sums
over their tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def bradley_terry_loss(
    chosen: Float[Array, "n"], rejected: Float[Array, "n"], margin: Float[Array, "n"]
) -> Float[Array, "n"]:
    """−log σ(r_w − r_l − m) for each pair.

    Without the margin m this is the negative log-likelihood of Bradley and Terry (1952), in nats.
    The margin is that of Touvron et al. (2023, arXiv:2307.09288, section 3.2.2, eq. 2).
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def centering_penalty(
    chosen: Float[Array, "*n"], rejected: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """(r_w + r_l)² for each pair. Preferences determine scores only up to a constant.

    The penalty makes their mean 0 (Eisenstein et al. 2023, arXiv:2312.09244).
    """
    return (chosen + rejected) ** 2


def all_pairs_loss(score: Float[Array, "n"], preference: Float[Array, "n n"]) -> Float[Array, ""]:
    """Σ p_ij (−log σ(r_i − r_j)) / Σ p_ij over the texts of a batch; 0 without any comparison.

    ``preference`` p_ij is the probability that text i is preferred to text j in a comparison of the
    two, so the loss is the expected one of `bradley_terry_loss`. Comparing all texts of a batch
    costs no more passes of the model than comparing each with one other (Ouyang et al. 2022,
    section 3.5, eq. 1).
    """
    losses = -jax.nn.log_sigmoid(score[:, None] - score[None])
    return weighted_mean(losses, preference)


def preference_of_ratings(
    rating: Float[Array, "n R"], prompt: Int[Array, "n"]
) -> Float[Array, "n n"]:
    """The probability that a rating of text i, drawn at random, is above one of text j.

    ``rating`` has the ratings of each text by up to R people; NaN stands for no rating. Only
    different texts with the same ``prompt`` are compared; other pairs have the probability 0.
    """
    is_above = rating[:, None, :, None] > rating[None, :, None, :]  # False for NaN
    count = jnp.maximum(jnp.isfinite(rating).sum(axis=1), 1)
    share = is_above.sum(axis=(2, 3)) / (count[:, None] * count[None])
    is_compared = (prompt[:, None] == prompt[None]) & ~jnp.eye(len(prompt), dtype=bool)
    return jnp.where(is_compared, share, 0)


def weighted_mean(x: Float[Array, "*n"], weight: Float[Array, "*n"]) -> Float[Array, ""]:
    """Σ w x / Σ w; 0 if all weights are 0. An entry with weight 0 does not count, NaN included."""
    total = weight.sum()
    return jnp.where(weight > 0, weight * x, 0).sum() / jnp.where(total > 0, total, 1)


def dpo_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    reference_chosen: Float[Array, "n"],
    reference_rejected: Float[Array, "n"],
    beta: Float[Array, ""] | float,
    label_smoothing: Float[Array, "*n"] | float = 0.0,
) -> Float[Array, "n"]:
    """−(1 − ε) log σ(βh) − ε log σ(−βh) for each pair, with h from the log-probabilities.

    For ε = 0 this is eq. 7 of Rafailov et al. (2023, arXiv:2305.18290). ε = ``label_smoothing`` is
    the probability that a label is wrong (conservative DPO; Mitchell 2023). If ε is σ(r_l − r_w),
    as a number or one for each pair, it is the expected loss, with its minimum at βh = r_w − r_l.
    """
    scaled = beta * log_ratio_difference(chosen, rejected, reference_chosen, reference_rejected)
    correct = jax.nn.log_sigmoid(scaled)
    wrong = jax.nn.log_sigmoid(-scaled)
    return -(1 - label_smoothing) * correct - label_smoothing * wrong


def ipo_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    reference_chosen: Float[Array, "n"],
    reference_rejected: Float[Array, "n"],
    beta: Float[Array, ""] | float,
) -> Float[Array, "n"]:
    """(h − 1 / (2β))² for each pair (Azar et al. 2023, arXiv:2310.12036, eq. 17, β = τ).

    Its minimum is at a finite h even if all labels agree, where that of DPO is at h = ∞.
    """
    h = log_ratio_difference(chosen, rejected, reference_chosen, reference_rejected)
    return (h - 1 / (2 * beta)) ** 2


def log_ratio_difference(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    reference_chosen: Float[Array, "n"],
    reference_rejected: Float[Array, "n"],
) -> Float[Array, "n"]:
    """h = (log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l))."""
    return (chosen - reference_chosen) - (rejected - reference_rejected)


def share_above(first: Float[Array, "n"], second: Float[Array, "n"]) -> Float[Array, ""]:
    """The share of pairs whose first number is larger; a tie counts half."""
    return (jnp.sign(first - second).mean() + 1) / 2
