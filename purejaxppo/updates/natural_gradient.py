"""The natural gradient: Fisher-vector products and conjugate gradient (Schulman et al. 2015, appendix C)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from purejaxppo.types import PyTree

Product = Callable[[PyTree], PyTree]


def fisher_vector_product(mean_kl: Callable[[PyTree], Array], theta: PyTree) -> Product:
    """v ↦ F v, F the Hessian of the mean divergence at θ_old, where it equals E[∇log π ∇log πᵀ].

    Exact and without forming F: the derivative along v of the gradient (forward over reverse), linearised once for
    all products.
    """
    return jax.linearize(jax.grad(mean_kl), theta)[1]


def damped(product: Product, damping: Array | float) -> Product:
    """v ↦ (F + damping · I) v."""
    return lambda v: jax.tree.map(lambda fv, v: fv + damping * v, product(v), v)


def conjugate_gradient(product: Product, b: PyTree, iterations: int) -> PyTree:
    """x ≈ A⁻¹ b for a positive definite A given by its product (Hestenes & Stiefel 1952).

    The number of iterations is fixed; those after the exact solution change nothing.
    """

    def iteration(state: tuple, _: None) -> tuple[tuple, None]:
        x, residual, direction, residual_norm_sq = state
        Ap = product(direction)
        curvature = optax.tree.vdot(direction, Ap)
        not_done = (residual_norm_sq > 0) & (curvature > 0)
        step_size = jnp.where(not_done, residual_norm_sq / jnp.where(not_done, curvature, 1), 0)
        x = add_scaled(x, step_size, direction)
        residual = add_scaled(residual, -step_size, Ap)
        next_residual_norm_sq = optax.tree.vdot(residual, residual)
        beta = jnp.where(
            not_done, next_residual_norm_sq / jnp.where(not_done, residual_norm_sq, 1), 0
        )
        return (x, residual, add_scaled(residual, beta, direction), next_residual_norm_sq), None

    start = (jax.tree.map(jnp.zeros_like, b), b, b, optax.tree.vdot(b, b))
    (x, _, _, _), _ = jax.lax.scan(iteration, start, None, iterations)
    return x


def add_scaled(x: PyTree, scale: Array, y: PyTree) -> PyTree:
    """x + scale · y in the types of x."""
    return jax.tree.map(lambda x, y: x + (scale * y).astype(x.dtype), x, y)


def cg_residual(x: PyTree, b: PyTree) -> Array:
    """‖x − b‖ / ‖b‖; 0 where b is 0."""
    norm = optax.tree.norm(b)
    return optax.tree.norm(jax.tree.map(jnp.subtract, x, b)) / jnp.where(norm > 0, norm, 1)
