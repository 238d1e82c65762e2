"""The natural gradient: Fisher-vector products and the conjugate gradient method.

Source: Schulman et al. 2015, appendix C.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from purejaxppo.types import PyTree

LinearMap = Callable[[PyTree], PyTree]  # v ↦ A v on pytrees with the structure of the parameters


def fisher_vector_product(mean_kl: Callable[[PyTree], Array], theta: PyTree) -> LinearMap:
    """v ↦ F v, where F is the Hessian of the mean KL divergence at ``theta``.

    At θ_old, F equals the Fisher matrix E[∇log π ∇log πᵀ]. The product is exact and does not form
    F: it is the derivative of the gradient along v (forward over reverse). The gradient is
    linearised once for all products.
    """
    return jax.linearize(jax.grad(mean_kl), theta)[1]


def damped(matvec: LinearMap, damping: Array | float) -> LinearMap:
    """v ↦ (F + damping · I) v."""
    return lambda v: jax.tree.map(lambda fv, v: fv + damping * v, matvec(v), v)


def conjugate_gradient(matvec: LinearMap, b: PyTree, iterations: int) -> PyTree:
    """x ≈ A⁻¹ b for the positive definite A with ``matvec(v)`` = A v (Hestenes & Stiefel 1952).

    The number of iterations is fixed. Iterations after the exact solution do not change x.
    """

    def iteration(state: tuple, _: None) -> tuple[tuple, None]:
        x, residual, direction, residual_norm_sq = state
        Ap = matvec(direction)
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

    initial = (jax.tree.map(jnp.zeros_like, b), b, b, optax.tree.vdot(b, b))
    (x, _, _, _), _ = jax.lax.scan(iteration, initial, None, iterations)
    return x


def add_scaled(x: PyTree, scale: Array, y: PyTree) -> PyTree:
    """x + scale · y, in the dtypes of x."""
    return jax.tree.map(lambda x, y: x + (scale * y).astype(x.dtype), x, y)


def cg_residual(Ax: PyTree, b: PyTree) -> Array:
    """The relative residual ‖Ax − b‖ / ‖b‖; ‖Ax‖ if b is 0."""
    norm = optax.tree.norm(b)
    return optax.tree.norm(jax.tree.map(jnp.subtract, Ax, b)) / jnp.where(norm > 0, norm, 1)
