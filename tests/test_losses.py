"""The formulas of the objective against NumPy loops over the unmasked entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from purejaxppo import losses

shapes = st.sampled_from([(6,), (1, 5), (4, 3)])
seeds = st.integers(0, 2**32 - 1)


def random_batch(seed, shape):
    """value, old_value, target, advantage, log-ratio and a mask that is not empty; all [*shape]."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < rng.choice([0.3, 0.8, 1.0])
    mask.flat[0] = True
    return *rng.normal(size=(4, *shape)), 0.4 * rng.normal(size=shape), mask


def mean_over(mask, function, *arrays):
    """Mean of function(entry, entry, ...) over the entries where the mask is true."""
    return np.mean([function(*(x[i] for x in arrays)) for i in np.ndindex(mask.shape) if mask[i]])


def clip(x, low, high):
    return min(max(x, low), high)


@jax.jit
def every_formula(value, old_value, target, advantage, log_ratio, mask):
    ratio = losses.probability_ratio(log_ratio)
    return {
        "masked_mean": losses.masked_mean(value, mask),
        "surrogate": losses.clipped_surrogate(ratio, advantage, mask, 0.2),
        "value_loss": losses.value_loss(value, target, mask),
        "clipped_value_loss": losses.clipped_value_loss(value, old_value, target, mask, 0.2),
        "kl": losses.approximate_kl(log_ratio, mask),
        "clip_fraction": losses.clip_fraction(ratio, mask, 0.2),
    }


@given(seeds, shapes)
def test_every_formula_equals_a_loop_over_the_entries_of_the_mask(seed, shape):
    value, old_value, target, advantage, log_ratio, mask = random_batch(seed, shape)
    eps = 0.2
    ratio = np.exp(log_ratio)
    expected = {
        "masked_mean": mean_over(mask, lambda x: x, value),
        "surrogate": mean_over(
            mask, lambda r, a: min(r * a, clip(r, 1 - eps, 1 + eps) * a), ratio, advantage
        ),
        "value_loss": mean_over(mask, lambda v, g: 0.5 * (v - g) ** 2, value, target),
        "clipped_value_loss": mean_over(
            mask,
            lambda v, o, g: 0.5 * max((v - g) ** 2, (o + clip(v - o, -eps, eps) - g) ** 2),
            value,
            old_value,
            target,
        ),
        "kl": mean_over(mask, lambda x: np.exp(x) - 1 - x, log_ratio),
        "clip_fraction": mean_over(mask, lambda r: float(not 1 - eps <= r <= 1 + eps), ratio),
    }
    with jax.enable_x64(True):
        got = every_formula(value, old_value, target, advantage, log_ratio, mask)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-12, atol=1e-14, err_msg=name)


@given(seeds, shapes)
def test_standardized_advantages_have_mean_0_and_deviation_1_over_the_mask(seed, shape):
    *_, advantage, _, mask = random_batch(seed, shape)
    with jax.enable_x64(True):
        out = np.asarray(jax.jit(losses.standardize)(advantage, mask))
    chosen = advantage[mask]
    expected = (chosen - chosen.mean()) / (chosen.std() + 1e-8) if len(chosen) > 1 else chosen
    np.testing.assert_allclose(out[mask], expected, rtol=1e-9, atol=1e-12)
    assert (out[~mask] == 0).all()


@pytest.mark.parametrize("mask", [[True], [False, True, False]])
def test_the_only_advantage_is_left_as_it_is(mask):
    """Standardised it would be 0, and minibatches of one sample would teach nothing."""
    mask = jnp.asarray(mask)
    out = losses.standardize(jnp.full(mask.shape, -3.5), mask)
    np.testing.assert_array_equal(out, jnp.where(mask, -3.5, 0))


@given(seeds, shapes)
def test_explained_variance_equals_numpys(seed, shape):
    value, _, target, _, _, mask = random_batch(seed, shape)
    mask.flat[1] = True
    with jax.enable_x64(True):
        got = jax.jit(losses.explained_variance)(value, target, mask)
    expected = 1 - np.var(target[mask] - value[mask]) / np.var(target[mask])
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


def test_explained_variance_in_the_known_cases():
    target = jnp.asarray([1.0, 2.0, 4.0])
    mask = jnp.ones(3, bool)
    assert losses.explained_variance(target, target, mask) == 1
    assert losses.explained_variance(jnp.full(3, 7.0), target, mask) == pytest.approx(0, abs=1e-6)
    assert np.isnan(losses.explained_variance(target, jnp.full(3, 7.0), mask))


def test_the_ratio_is_1_where_masked_and_exponential_elsewhere():
    log_prob = jnp.asarray([-1.0, jnp.nan, 500.0])
    old = jnp.asarray([-1.5, 0.0, 0.0])
    log_ratio = losses.log_ratio(log_prob, old, jnp.asarray([True, False, False]))
    got = losses.probability_ratio(log_ratio)
    np.testing.assert_allclose(got, [np.exp(0.5), 1, 1], rtol=1e-6)


@pytest.mark.parametrize("log_ratio", [-1e4, -120.0, -89.0, 20.5, 88.0, 89.0, 1e4])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_ratios_of_any_size_have_finite_losses_and_gradients(log_ratio, advantage):
    """exp(89) is infinite in float32, and 0 · ∞ in the gradient of a clipped entry is NaN."""
    mask = jnp.ones(2, bool)
    advantages = jnp.full(2, advantage)

    def clipped(x):
        return losses.clipped_surrogate(losses.probability_ratio(x), advantages, mask, 0.2)

    def unclipped(x):
        return losses.surrogate(losses.probability_ratio(x), advantages, mask)

    x = jnp.asarray([log_ratio, 0.1])
    bounded = np.clip(np.float64([log_ratio, 0.1]), -20, 20)
    ratio = np.exp(bounded)
    expected = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage).mean()
    value, gradient = jax.value_and_grad(clipped)(x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, [0, advantage * ratio[1] / 2], rtol=1e-5)
    value, gradient = jax.value_and_grad(unclipped)(x)
    np.testing.assert_allclose(value, (ratio * advantage).mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient, [0, advantage * ratio[1] / 2], rtol=1e-5)
    kl = losses.approximate_kl(x, mask)
    exact = np.mean([np.exp(bounded[0]) - 1 - log_ratio, np.expm1(0.1) - 0.1])
    np.testing.assert_allclose(kl, exact, rtol=1e-5)


def test_the_divergence_is_estimated_where_an_action_has_become_impossible():
    """exp(−120) − 1 + 120 = 119, and 0.0052 for 0.1.

    An estimate from the ratio, which is 0 in float32, was infinite.
    """
    kl = losses.approximate_kl(jnp.asarray([0.0, -120.0, 0.1, 0.0]), jnp.ones(4, bool))
    np.testing.assert_allclose(kl, (119 + np.exp(0.1) - 1.1) / 4, rtol=1e-6)  # 29.75


def test_a_small_divergence_keeps_its_digits():
    """The result is x² / 2 for small x; the error of exp(x) − 1 − x in float32 is far larger."""
    x = np.float32([1e-2, -1e-2, 3e-3])
    got = losses.approximate_kl(jnp.asarray(x), jnp.ones(3, bool))
    np.testing.assert_allclose(got, (np.expm1(np.float64(x)) - np.float64(x)).mean(), rtol=1e-4)


def test_a_mean_over_an_empty_mask_is_0_and_has_gradient_0():
    value, gradient = jax.value_and_grad(losses.masked_mean)(jnp.ones(3), jnp.zeros(3, bool))
    assert value == 0 and (gradient == 0).all()


def test_masked_entries_change_neither_the_losses_nor_their_gradients():
    """Not even if they are NaN: 0 · NaN would be NaN in the gradient."""
    value, old_value, target, advantage, old_log_probs, mask = map(
        jnp.asarray, random_batch(5, (4, 3))
    )
    assert 0 < mask.sum() < mask.size

    def total(value, fill):
        old, goal, adv, old_log_prob = (
            jnp.where(mask, x, fill) for x in (old_value, target, advantage, old_log_probs)
        )
        log_ratio = losses.log_ratio(value, old_log_prob, mask)
        ratio = losses.probability_ratio(log_ratio)
        return (
            losses.value_loss(value, goal, mask)
            + losses.clipped_value_loss(value, old, goal, mask, 0.2)
            + losses.clipped_surrogate(ratio, losses.standardize(adv, mask), mask, 0.2)
            + losses.clipped_surrogate(ratio, adv, mask, 0.2)
            + losses.approximate_kl(log_ratio, mask)
        )

    for fill in (1e6, jnp.nan, jnp.inf):
        expected, expected_gradient = jax.value_and_grad(total)(value, 0.0)
        loss, gradient = jax.value_and_grad(total)(value, fill)
        np.testing.assert_array_equal(loss, expected)
        np.testing.assert_array_equal(gradient, expected_gradient)
        assert np.isfinite(gradient).all() and (gradient[~mask] == 0).all()
