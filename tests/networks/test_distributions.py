"""The four distributions against formulas, enumeration, quadrature and sampling, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxppo.networks.distributions import (
    Categorical,
    DiagonalGaussian,
    MultiCategorical,
    TanhGaussian,
)

pytestmark = pytest.mark.usefixtures("x64")

rng = np.random.default_rng(0)
LOGITS, OTHER = 2 * rng.normal(size=(2, 3, 4))
SIZES = (2, 3, 4)
MULTI, MULTI_OTHER = ([rng.normal(size=(3, n)) for n in SIZES] for _ in range(2))
MEAN, LOG_STD, MEAN_2, LOG_STD_2 = 0.7 * rng.normal(size=(4, 3, 2))
DRAWS = 10_000


def softmax(x):
    e = np.exp(x)
    return e / e.sum(-1, keepdims=True)


def categorical(logits=LOGITS):
    return Categorical(jnp.asarray(logits))


def multi(parts):
    return MultiCategorical(tuple(Categorical(jnp.asarray(part)) for part in parts))


def gaussian(kind=DiagonalGaussian, mean=MEAN, log_std=LOG_STD):
    return kind(jnp.asarray(mean), jnp.asarray(log_std))


def draw(distribution):
    """Samples [DRAWS, batch, ...]."""
    return np.asarray(
        jax.jit(jax.vmap(distribution.sample))(jax.random.split(jax.random.key(1), DRAWS))
    )


def log_probs(distribution, actions):
    """log_prob of each of the actions [n, batch, ...]."""
    return jax.vmap(distribution.log_prob)(actions)


def close(x, expected, tolerance=1e-12):
    assert np.asarray(x).dtype == np.float64
    np.testing.assert_allclose(x, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------ categorical


def test_categorical_probabilities_are_the_softmax_and_sum_to_1():
    p = np.stack([np.exp(categorical().log_prob(jnp.full(3, a))) for a in range(4)], axis=-1)
    close(p, softmax(LOGITS))
    close(p.sum(-1), np.ones(3))


def test_categorical_entropy_and_kl():
    p = softmax(LOGITS)
    q = softmax(OTHER)
    close(categorical().entropy(), -(p * np.log(p)).sum(-1))
    close(categorical().kl(categorical(OTHER)), (p * np.log(p / q)).sum(-1))
    close(categorical().kl(categorical(LOGITS + 5.0)), np.zeros(3))


def test_categorical_samples_and_mode():
    samples = draw(categorical())
    p = softmax(LOGITS)
    frequency = np.stack([(samples == a).mean(0) for a in range(4)], axis=-1)
    assert (np.abs(frequency - p) < 5 * np.sqrt(p * (1 - p) / DRAWS)).all()
    np.testing.assert_array_equal(categorical().mode(), LOGITS.argmax(-1))


def test_a_forbidden_action_is_never_taken_and_leaves_everything_finite():
    logits = LOGITS.copy()
    other = OTHER.copy()
    logits[:, 1] = other[:, 1] = -np.inf
    allowed = [0, 2, 3]
    p = softmax(logits[:, allowed])
    q = softmax(other[:, allowed])
    close(categorical(logits).entropy(), -(p * np.log(p)).sum(-1))
    close(categorical(logits).kl(categorical(other)), (p * np.log(p / q)).sum(-1))
    close(categorical(logits).log_prob(jnp.full(3, 2)), np.log(p[:, 1]))
    assert (draw(categorical(logits)) != 1).all()

    def total(logits, other):
        p = Categorical(logits)
        q = Categorical(other)
        return (p.entropy() + p.kl(q) + p.log_prob(jnp.full(3, 2))).sum()

    for gradient in jax.grad(total, argnums=(0, 1))(jnp.asarray(logits), jnp.asarray(other)):
        assert np.isfinite(gradient).all()
        assert (gradient[:, 1] == 0).all() and np.abs(gradient[:, 0]).min() > 1e-6


def test_all_but_one_action_forbidden_has_entropy_0():
    distribution = categorical([[-np.inf, 0.3, -np.inf]])
    close(distribution.entropy(), [0.0])
    close(distribution.log_prob(jnp.asarray([1])), [0.0])
    assert np.isfinite(
        jax.grad(lambda x: Categorical(x).entropy().sum())(distribution.logits)
    ).all()


# ----------------------------------------------------------------------------- several categoricals


def test_multi_categorical_is_the_product_of_its_parts():
    actions = list(itertools.product(*map(range, SIZES)))
    log_p = np.stack([multi(MULTI).log_prob(jnp.tile(jnp.asarray(a), (3, 1))) for a in actions])
    log_q = np.stack(
        [multi(MULTI_OTHER).log_prob(jnp.tile(jnp.asarray(a), (3, 1))) for a in actions]
    )
    parts = [softmax(logits) for logits in MULTI]
    close(
        np.exp(log_p),
        [np.prod([p[:, i] for p, i in zip(parts, a, strict=True)], axis=0) for a in actions],
    )
    close(np.exp(log_p).sum(0), np.ones(3))
    close(multi(MULTI).entropy(), -(np.exp(log_p) * log_p).sum(0))
    close(multi(MULTI).kl(multi(MULTI_OTHER)), (np.exp(log_p) * (log_p - log_q)).sum(0))


def test_multi_categorical_samples_its_parts_independently():
    samples = draw(multi(MULTI))
    assert samples.shape == (DRAWS, 3, 3)
    for i, logits in enumerate(MULTI):
        p = softmax(logits)
        frequency = np.stack([(samples[..., i] == a).mean(0) for a in range(SIZES[i])], axis=-1)
        assert (np.abs(frequency - p) < 5 * np.sqrt(p * (1 - p) / DRAWS)).all()
    joint = (samples[..., 0] == 1) & (samples[..., 1] == 1)
    first = samples[..., 0] == 1
    second = samples[..., 1] == 1
    assert np.abs(joint.mean(0) - first.mean(0) * second.mean(0)).max() < 5 * 0.5 / np.sqrt(DRAWS)
    np.testing.assert_array_equal(multi(MULTI).mode(), np.stack([x.argmax(-1) for x in MULTI], -1))


# ------------------------------------------------------------------------------------- Gaussians


def grid(low, high, n=20_001):
    x = np.linspace(low, high, n)
    return x, x[1] - x[0]


def one_dimensional(kind, i, j, mean=MEAN, log_std=LOG_STD):
    return gaussian(kind, mean[i, j : j + 1], log_std[i, j : j + 1])


def test_gaussian_log_prob_is_the_density_and_integrates_to_1():
    action = rng.normal(size=(3, 2))
    std = np.exp(LOG_STD)
    density = np.prod(
        np.exp(-0.5 * ((action - MEAN) / std) ** 2) / (std * np.sqrt(2 * np.pi)), axis=-1
    )
    close(np.exp(gaussian().log_prob(jnp.asarray(action))), density)
    x, dx = grid(-30, 30)
    p = np.exp(log_probs(one_dimensional(DiagonalGaussian, 0, 0), jnp.asarray(x[:, None])))
    close(p.sum() * dx, 1.0, 1e-10)


@pytest.mark.parametrize(("i", "j"), [(0, 0), (1, 1), (2, 0)])
def test_gaussian_entropy_and_kl_equal_quadrature(i, j):
    p = one_dimensional(DiagonalGaussian, i, j)
    q = one_dimensional(DiagonalGaussian, i, j, MEAN_2, LOG_STD_2)
    x, dx = grid(-30, 30)
    log_p = log_probs(p, jnp.asarray(x[:, None]))
    log_q = log_probs(q, jnp.asarray(x[:, None]))
    close(p.entropy(), -(np.exp(log_p) * log_p).sum() * dx, 1e-9)
    close(p.kl(q), (np.exp(log_p) * (log_p - log_q)).sum() * dx, 1e-9)


def test_gaussian_dimensions_add_up():
    p = gaussian()
    q = gaussian(mean=MEAN_2, log_std=LOG_STD_2)
    single = [
        (
            one_dimensional(DiagonalGaussian, 1, j),
            one_dimensional(DiagonalGaussian, 1, j, MEAN_2, LOG_STD_2),
        )
        for j in range(2)
    ]
    close(p.entropy()[1], sum(a.entropy() for a, _ in single))
    close(p.kl(q)[1], sum(a.kl(b) for a, b in single))


def test_gaussian_samples_and_mode():
    samples = draw(gaussian())
    std = np.exp(LOG_STD)
    assert (np.abs(samples.mean(0) - MEAN) < 5 * std / np.sqrt(DRAWS)).all()
    assert (np.abs(samples.std(0) / std - 1) < 5 / np.sqrt(2 * DRAWS)).all()
    correlation = np.corrcoef(samples.reshape(DRAWS, -1).T) - np.eye(6)
    assert np.abs(correlation).max() < 5 / np.sqrt(DRAWS)
    close(gaussian().mode(), MEAN)


# --------------------------------------------------------------------------- tanh-squashed Gaussian


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.8, -1.0), (-1.5, 0.3)])
def test_squashed_density_integrates_to_1_over_the_open_interval(mean, log_std):
    """∫ p(a) da with a = tanh(u): log_prob takes u, and the density is that of the action a."""
    distribution = gaussian(TanhGaussian, [mean], [log_std])
    edges = np.tanh(np.linspace(-18, 18, 40_001))  # closer together towards ±1
    middle = (edges[1:] + edges[:-1]) / 2
    width = np.diff(edges)
    is_inside = np.abs(middle) < 1
    density = np.exp(log_probs(distribution, jnp.asarray(np.arctanh(middle[is_inside])[:, None])))
    close((density * width[is_inside]).sum(), 1.0, 1e-6)


def test_squashed_density_is_that_of_the_action_in_a_histogram():
    distribution = gaussian(TanhGaussian, [0.4], [-0.3])
    actions = np.tanh(draw(distribution)[:, 0])
    for low in (-0.6, 0.0, 0.5, 0.8):
        a = np.linspace(low, low + 0.1, 1001)
        p = np.exp(log_probs(distribution, jnp.asarray(np.arctanh(a)[:, None]))).mean() * 0.1
        frequency = ((actions >= low) & (actions < low + 0.1)).mean()
        assert abs(frequency - p) < 5 * np.sqrt(p / DRAWS)


def test_squashed_entropy_equals_quadrature():
    for mean, log_std in ((0.0, 0.0), (0.8, -1.0), (-1.5, 0.3), (2.0, 0.69)):
        distribution = gaussian(TanhGaussian, [mean], [log_std])
        u, du = grid(-40, 40, 80_001)
        density = np.exp(
            log_probs(gaussian(DiagonalGaussian, [mean], [log_std]), jnp.asarray(u[:, None]))
        )
        log_p = log_probs(distribution, jnp.asarray(u[:, None]))
        close(distribution.entropy(), -(density * log_p).sum() * du, 1e-3)


def test_squashed_entropy_has_the_gradient_of_the_quadrature():
    def reference(mean, log_std):
        u, du = grid(-40, 40, 80_001)
        p, squashed = (kind(mean[None], log_std[None]) for kind in (DiagonalGaussian, TanhGaussian))
        points = jnp.asarray(u[:, None])
        return -(jnp.exp(log_probs(p, points)) * log_probs(squashed, points)).sum() * du

    at = jnp.asarray(0.8), jnp.asarray(-0.2)
    expected = jax.grad(reference, argnums=(0, 1))(*at)
    got = jax.grad(lambda m, s: TanhGaussian(m[None], s[None]).entropy(), argnums=(0, 1))(*at)
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_squashed_kl_is_the_expected_difference_of_log_probabilities():
    p = gaussian(TanhGaussian)
    q = gaussian(TanhGaussian, MEAN_2, LOG_STD_2)
    u = jnp.asarray(draw(p))
    difference = np.asarray(log_probs(p, u) - log_probs(q, u))
    error = difference.std(0) / np.sqrt(DRAWS)
    assert (np.abs(p.kl(q) - difference.mean(0)) < 5 * error).all()
    assert (np.asarray(p.kl(q)) > 10 * error).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_squashed_log_prob_is_finite_and_right_where_the_tanh_saturates(dtype):
    u = np.asarray([[-20.0], [20.0]], dtype)
    mean = jnp.zeros((2, 1), dtype)
    log_std = jnp.full((2, 1), 1.0, dtype)

    def log_prob(u, mean, log_std):
        return TanhGaussian(mean, log_std).log_prob(u)

    # 1 − tanh² u = 4 e^(−2|u|) / (1 + e^(−2|u|))², whose logarithm is log 4 − 40 to 17 digits.
    gaussian = -0.5 * (400 * np.exp(-2.0) + 2 + np.log(2 * np.pi))
    np.testing.assert_allclose(
        log_prob(jnp.asarray(u), mean, log_std), gaussian - (np.log(4) - 40), rtol=1e-6
    )
    gradients = jax.grad(lambda *x: log_prob(*x).sum(), argnums=(0, 1, 2))(
        jnp.asarray(u), mean, log_std
    )
    np.testing.assert_allclose(gradients[0], -u * np.exp(-2.0) + 2 * np.sign(u), rtol=1e-5)
    assert all(np.isfinite(g).all() for g in gradients)
