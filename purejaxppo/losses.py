"""The terms of the objective on plain arrays. Every mean is over the entries where a mask is true.

Entries where the mask is false affect neither a loss nor its gradient, even if they are NaN. They
are replaced before the arithmetic, not only after it, because the gradient of ``where`` multiplies
by 0, and 0 · NaN is NaN.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Scalar = Float[Array, ""]
Coefficient = Float[Array, ""] | float
Reduction = Callable[[Array, Array], Array]  # (x, mask) -> scalar; one of `REDUCTIONS`

MAX_LOG_RATIO = 20.0  # nats; e²⁰ ≈ 5 · 10⁸


def masked_mean(x: Float[Array, "*n"], mask: Bool[Array, "*n"]) -> Scalar:
    """Σ mask x / Σ mask; 0 if the mask is empty."""
    return jnp.where(mask, x, 0).sum() / jnp.maximum(mask.sum(), 1)


def mean_of_sequence_means(x: Float[Array, "T B"], mask: Bool[Array, "T B"]) -> Scalar:
    """1/|I| Σ_{i ∈ I} (1/n_i) Σ_t mask x over the sequences I with n_i > 0 entries in the mask.

    Every sequence has the same weight, whatever its length is (Shao et al. 2024, eq. 3).
    """
    count = mask.sum(axis=0)
    means = jnp.where(mask, x, 0).sum(axis=0) / jnp.maximum(count, 1)
    return masked_mean(means, count > 0)


def sum_over_size(x: Float[Array, "T B"], mask: Bool[Array, "T B"]) -> Scalar:
    """Σ mask x / (T B): the weight of an entry does not depend on the lengths of the sequences.

    Source: Liu et al. 2025, 'Understanding R1-Zero-like training', section 3.2. Their constant is
    the largest number of chosen actions; T also counts forced steps, such as those of a prompt.
    """
    return jnp.where(mask, x, 0).sum() / x.size


REDUCTIONS: dict[str, Reduction] = {
    "token": masked_mean,
    "sequence": mean_of_sequence_means,
    "constant": sum_over_size,
}


def standardize(x: Float[Array, "*n"], mask: Bool[Array, "*n"]) -> Float[Array, "*n"]:
    """(x − mean) / (standard deviation + 1e-8), both over the mask; 0 outside the mask.

    A single entry is returned unchanged: standardised, it would be 0 and give no gradient.
    """
    x = jnp.where(mask, x, 0)
    centred = jnp.where(mask, x - masked_mean(x, mask), 0)
    standardized = centred / (jnp.sqrt(masked_mean(centred**2, mask)) + 1e-8)
    return jnp.where(mask.sum() == 1, x, standardized)


def log_ratio(
    log_prob: Float[Array, "*n"], old_log_prob: Float[Array, "*n"], mask: Bool[Array, "*n"]
) -> Float[Array, "*n"]:
    """log r = log π(a|s) − log π_old(a|s), in nats; 0 outside the mask."""
    return jnp.where(mask, log_prob - old_log_prob, 0)


def probability_ratio(log_ratio: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """r = π(a|s) / π_old(a|s) = exp(log r) (Schulman et al. 2017, section 3), within e^±20.

    Without the bound, exp overflows in float32 for log r > 88. Where L_CLIP then has gradient 0,
    the chain rule would give 0 · ∞ = NaN. Outside the bound the gradient is 0.
    """
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def surrogate(
    ratio: Float[Array, "*n"],
    advantage: Float[Array, "*n"],
    mask: Bool[Array, "*n"],
    mean: Reduction = masked_mean,
) -> Scalar:
    """L_CPI = E[r Â] of conservative policy iteration, to be maximised.

    Source: Schulman et al. 2017, eq. 6.
    """
    return mean(ratio * jnp.where(mask, advantage, 0), mask)


def clipped_surrogate(
    ratio: Float[Array, "*n"],
    advantage: Float[Array, "*n"],
    mask: Bool[Array, "*n"],
    clip_eps: Coefficient,
    clip_eps_high: Coefficient | None = None,
    mean: Reduction = masked_mean,
) -> Scalar:
    """L_CLIP = E[min(r Â, clip(r, 1 − ε, 1 + ε) Â)], to be maximised.

    Source: Schulman et al. 2017, eq. 7. With ``clip_eps_high`` the upper bound is 1 + ε_high, which
    lets improbable actions gain more probability (Yu et al. 2025, 'DAPO', section 3.1).
    """
    advantage = jnp.where(mask, advantage, 0)
    high = clip_eps if clip_eps_high is None else clip_eps_high
    clipped = jnp.clip(ratio, 1 - clip_eps, 1 + high)
    return mean(jnp.minimum(ratio * advantage, clipped * advantage), mask)


def value_loss(
    value: Float[Array, "*n"],
    target: Float[Array, "*n"],
    valid: Bool[Array, "*n"],
    mean: Reduction = masked_mean,
) -> Scalar:
    """L_VF = ½ E[(V − target)²].

    The L_VF of the PPO paper (eq. 9) has no ½: its c1 = 0.5 corresponds to ``vf_coef = 1``.
    """
    return 0.5 * mean(jnp.where(valid, value - target, 0) ** 2, valid)


def clipped_value_loss(
    value: Float[Array, "*n"],
    old_value: Float[Array, "*n"],
    target: Float[Array, "*n"],
    valid: Bool[Array, "*n"],
    clip_eps: Coefficient,
    mean: Reduction = masked_mean,
) -> Scalar:
    """½ E[max((V − target)², (V_old + clip(V − V_old, −ε, ε) − target)²)].

    From OpenAI baselines (ppo2), not from the PPO paper. Engstrom et al. 2020 and Andrychowicz et
    al. 2021 found no benefit.
    """
    change = jnp.where(valid, value - old_value, 0)
    error = jnp.where(valid, value - target, 0)
    # error − change = V_old − target
    clipped_error = error - change + jnp.clip(change, -clip_eps, clip_eps)
    return 0.5 * mean(jnp.maximum(error**2, clipped_error**2), valid)


def k3(log_d: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """d − 1 − log d ≥ 0, with d at most e²⁰ as in `probability_ratio`.

    Its mean over actions of q is KL(q ‖ p), in nats, for d = p / q (Schulman 2020, 'Approximating
    KL divergence').
    """
    return jnp.expm1(jnp.minimum(log_d, MAX_LOG_RATIO)) - log_d


def approximate_kl(log_ratio: Float[Array, "*n"], mask: Bool[Array, "*n"]) -> Scalar:
    """E[r − 1 − log r], a non-negative estimate of KL(π_old ‖ π), in nats (`k3`)."""
    return masked_mean(k3(jnp.where(mask, log_ratio, 0)), mask)


def reference_kl(
    log_prob: Float[Array, "*n"],
    ref_log_prob: Float[Array, "*n"],
    mask: Bool[Array, "*n"],
    estimator: str,
    mean: Reduction = masked_mean,
) -> Scalar:
    """An estimate of KL(π ‖ π_ref) from actions of π, in nats, as a term of a loss:

        k1    E[log π(a|s) − log π_ref(a|s)]
        k3    E[d − 1 − log d], d = π_ref(a|s) / π(a|s) (`k3`)

    Both have the right mean, but actions were drawn before the gradient is taken, so neither has
    the gradient of that mean. In the first step on a batch, k1 has the expected gradient 0 and
    regularises nothing. k3 has that of KL(π_ref ‖ π). For one action and rewards r, the optimum is
    then β π_ref / (λ − r) with Σ π = 1, instead of π_ref exp(r / β) / Z. GRPO has k3 in its loss
    (Shao et al. 2024, eqs. 3 and 4).
    """
    log_d = jnp.where(mask, ref_log_prob - log_prob, 0)
    if estimator == "k1":
        return mean(-log_d, mask)
    return mean(k3(log_d), mask)


def clip_fraction(
    ratio: Float[Array, "*n"],
    mask: Bool[Array, "*n"],
    clip_eps: Coefficient,
    clip_eps_high: Coefficient | None = None,
) -> Scalar:
    """The fraction of samples with a ratio outside [1 − ε, 1 + ε], or [1 − ε, 1 + ε_high]."""
    high = clip_eps if clip_eps_high is None else clip_eps_high
    is_outside = (ratio - 1 > high) | (1 - ratio > clip_eps)
    return masked_mean(is_outside.astype(ratio.dtype), mask)


def explained_variance(
    value: Float[Array, "*n"],
    target: Float[Array, "*n"],
    valid: Bool[Array, "*n"],
    undefined: Coefficient = jnp.nan,
) -> Scalar:
    """1 − Var(target − value) / Var(target): 1 is perfect, 0 is no better than a constant.

    The result is ``undefined`` if all targets are equal.
    """

    def variance(x: Array) -> Array:
        return masked_mean(jnp.where(valid, x - masked_mean(x, valid), 0) ** 2, valid)

    value = jnp.where(valid, value, 0)
    target = jnp.where(valid, target, 0)
    total = variance(target)
    return jnp.where(
        total > 0, 1 - variance(target - value) / jnp.where(total > 0, total, 1), undefined
    )
