"""Action distributions: categorical, multi-categorical, Gaussian and tanh-squashed Gaussian.

Each is an immutable pytree whose arrays may have leading batch axes ``[...]``. ``log_prob``,
``entropy`` and ``kl`` return one number per batch element, in nats.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from purejaxppo.networks.inverse_cdf import sample_by_inverse_cdf

# The largest number of actions that is sampled with Gumbel noise, one random number per action.
MOST_GUMBEL_SAMPLED = 64
LOG_2PI = float(np.log(2 * np.pi))


@jax.tree_util.register_pytree_node_class
class Categorical:
    """p(a) = softmax(logits)_a. An action with logit −∞ has probability 0.

    The attribute ``logits`` holds the normalised logits, log p.
    """

    def __init__(self, logits: Float[Array, "*batch n"]) -> None:
        self.logits = jax.nn.log_softmax(logits)

    def tree_flatten(self) -> tuple[tuple[Array], None]:
        return (self.logits,), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: tuple[Array]) -> "Categorical":
        # Skips __init__: the leaf is already normalised, and JAX may pass objects, not arrays.
        distribution = object.__new__(cls)
        (distribution.logits,) = leaves
        return distribution

    def sample(self, key: jax.Array) -> Int[Array, "*batch"]:
        """A sample; of many actions by the inverse CDF, which is faster (`inverse_cdf`)."""
        if self.logits.shape[-1] <= MOST_GUMBEL_SAMPLED:
            return jax.random.categorical(key, self.logits)
        logits = self.logits.astype(jnp.promote_types(self.logits.dtype, jnp.float32))
        uniform = jax.random.uniform(key, logits.shape[:-1], logits.dtype)
        return sample_by_inverse_cdf(logits, uniform)

    def mode(self) -> Int[Array, "*batch"]:
        return jnp.argmax(self.logits, axis=-1)

    def log_prob(self, action: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
        """log p(a)."""
        # A comparison instead of an index: the gradient of indexing is a scatter, which is slow.
        chosen = jax.nn.one_hot(action, self.logits.shape[-1], dtype=bool)
        return jnp.where(chosen, self.logits, 0).sum(-1)

    def entropy(self) -> Float[Array, "*batch"]:
        """H = −Σ p log p."""
        return -self._expectation(self.logits)

    def kl(self, other: "Categorical") -> Float[Array, "*batch"]:
        """KL(self ‖ other) = Σ p (log p − log q)."""
        return self._expectation(self.logits - other.logits)

    def _expectation(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
        """Σ p x. Forbidden actions (p = 0) contribute 0, even if their x is not finite."""
        allowed = self.logits > -jnp.inf
        return jnp.where(allowed, jnp.exp(self.logits) * jnp.where(allowed, x, 0), 0).sum(-1)


class MultiCategorical(NamedTuple):
    """Independent categoricals: p(a) = Π_i p_i(a_i). Actions have shape ``[..., len(parts)]``."""

    parts: tuple[Categorical, ...]

    def sample(self, key: jax.Array) -> Int[Array, "*batch k"]:
        keys = jax.random.split(key, len(self.parts))
        return jnp.stack(
            [part.sample(k) for part, k in zip(self.parts, keys, strict=True)], axis=-1
        )

    def mode(self) -> Int[Array, "*batch k"]:
        return jnp.stack([part.mode() for part in self.parts], axis=-1)

    def log_prob(self, action: Int[Array, "*batch k"]) -> Float[Array, "*batch"]:
        return sum(part.log_prob(action[..., i]) for i, part in enumerate(self.parts))  # type: ignore[return-value]

    def entropy(self) -> Float[Array, "*batch"]:
        return sum(part.entropy() for part in self.parts)  # type: ignore[return-value]

    def kl(self, other: "MultiCategorical") -> Float[Array, "*batch"]:
        return sum(p.kl(q) for p, q in zip(self.parts, other.parts, strict=True))  # type: ignore[return-value]


class DiagonalGaussian(NamedTuple):
    """a = mean + exp(log_std) ε with ε ~ N(0, I). The last axis is the action dimension."""

    mean: Float[Array, "*batch k"]
    log_std: Float[Array, "*batch k"]

    def sample(self, key: jax.Array) -> Float[Array, "*batch k"]:
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(
            key, self.mean.shape, self.mean.dtype
        )

    def mode(self) -> Float[Array, "*batch k"]:
        return self.mean

    def log_prob(self, action: Float[Array, "*batch k"]) -> Float[Array, "*batch"]:
        """log p(a) = −½ Σ [((a − mean) / std)² + 2 log std + log 2π]."""
        standardized = (action - self.mean) * jnp.exp(-self.log_std)
        return -0.5 * (standardized**2 + 2 * self.log_std + LOG_2PI).sum(-1)

    def entropy(self) -> Float[Array, "*batch"]:
        """H = Σ [log std + ½ (1 + log 2π)]."""
        return (self.log_std + 0.5 * (1 + LOG_2PI)).sum(-1)

    def kl(self, other: "DiagonalGaussian") -> Float[Array, "*batch"]:
        """KL = Σ [log(σ₂/σ₁) + (σ₁² + (μ₁ − μ₂)²) / (2 σ₂²) − ½]."""
        variance_ratio = jnp.exp(2 * (self.log_std - other.log_std))
        distance = ((self.mean - other.mean) * jnp.exp(-other.log_std)) ** 2
        return (other.log_std - self.log_std + 0.5 * (variance_ratio + distance - 1)).sum(-1)


class TanhGaussian(NamedTuple):
    """The action is tanh(u) with Gaussian u (Haarnoja et al. 2018, appendix C).

    ``sample`` and ``mode`` return **u**, and ``log_prob`` expects u. The environment applies the
    tanh (`envs.wrappers.bound_actions`). Recovering u from tanh(u) would lose all precision where
    the tanh saturates, and the probability ratio of an unchanged policy would not be 1.
    """

    mean: Float[Array, "*batch k"]
    log_std: Float[Array, "*batch k"]

    @property
    def gaussian(self) -> DiagonalGaussian:
        """The distribution of u."""
        return DiagonalGaussian(self.mean, self.log_std)

    def sample(self, key: jax.Array) -> Float[Array, "*batch k"]:
        return self.gaussian.sample(key)

    def mode(self) -> Float[Array, "*batch k"]:
        """The mean of u. Its tanh is the median action, which deterministic policies take."""
        return self.mean

    def log_prob(self, action: Float[Array, "*batch k"]) -> Float[Array, "*batch"]:
        """log p(tanh u) = log N(u) − Σ log(1 − tanh² u), the density of the action in [−1, 1]."""
        return self.gaussian.log_prob(action) - _log_tanh_derivative(action).sum(-1)

    def entropy(self) -> Float[Array, "*batch"]:
        """H = H(N) + Σ E[log(1 − tanh² u)].

        The expectation has no closed form. Gauss-Hermite quadrature with 32 nodes needs no random
        key and is differentiable. Its error is below 1e-3 nats for standard deviations up to 2.
        """
        points, masses = np.polynomial.hermite_e.hermegauss(32)
        nodes = jnp.asarray(points, self.mean.dtype)
        weights = jnp.asarray(masses / masses.sum(), self.mean.dtype)
        # [..., k, nodes]
        u = self.mean[..., None] + jnp.tensordot(jnp.exp(self.log_std), nodes, axes=0)
        return self.gaussian.entropy() + (_log_tanh_derivative(u) @ weights).sum(-1)

    def kl(self, other: "TanhGaussian") -> Float[Array, "*batch"]:
        """KL of the two Gaussians: a bijection such as tanh leaves the divergence unchanged."""
        return self.gaussian.kl(other.gaussian)


def _log_tanh_derivative(u: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 − tanh² u) = 2 (log 2 − u − softplus(−2u)).

    The right-hand side neither overflows nor loses precision for large |u|.
    """
    return 2 * (np.log(2.0).item() - u - jax.nn.softplus(-2 * u))
