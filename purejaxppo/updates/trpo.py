"""Trust region policy optimisation (Schulman et al. 2015, arXiv:1502.05477)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import purejaxppo.losses as losses
from purejaxppo.config import Config
from purejaxppo.keys import scan_keys
from purejaxppo.types import Batch, ConfigError, Distribution, Model, PRNGKey, PyTree, Update
from purejaxppo.updates.minibatches import (
    as_sequences,
    shard_permutations,
    shuffled_minibatches,
    take_sequences,
)
from purejaxppo.updates.natural_gradient import (
    add_scaled,
    cg_residual,
    conjugate_gradient,
    damped,
    fisher_vector_product,
)


class LineSearchState(NamedTuple):
    """The last candidate of the line search."""

    theta: PyTree  # policy parameters
    num_backtracks: Array  # [] how often the full step was shrunk
    accepted: Array  # [] bool
    surrogate: Array  # [] L(θ) on the whole batch
    kl: Array  # [] mean KL(π_old ‖ π_θ) on the whole batch, in nats
    ratio: Array  # [T, B] r(θ)


def make_update(config: Config, model: Model, optimizer: optax.GradientTransformation) -> Update:
    """A natural-gradient step of the policy in a trust region, then steps on the value loss.

    The policy step approximately solves eq. 14 with δ = ``max_kl``:

        maximise   L(θ) = E[r(θ) Â]   subject to   E[KL(π_old ‖ π_θ)] ≤ δ

    1. The direction is x ≈ A⁻¹ g with A = F + ``cg_damping`` · I and g = ∇L(θ_old). It comes from
       ``cg_iterations`` iterations of the conjugate gradient method. F is the Fisher matrix on a
       random 1 / ``fisher_subsample`` of the batch.
    2. The full step is √(2δ / xᵀAx) x. The line search multiplies it by ``line_search_shrink``
       until L exceeds L(θ_old) and the constraint holds on the whole batch (appendix C). If all
       ``line_search_steps`` candidates fail, the policy stays at θ_old and
       ``line_search_failed`` is 1.

    ``params["policy"]`` and ``params["value"]`` share no parameters. ``optimizer`` fits the value
    function in ``num_epochs`` epochs of ``num_minibatches`` minibatches. ``update_state`` is the
    state of ``optimizer``.
    """
    policy_step = make_policy_step(config, model)
    value_steps = make_value_steps(config, model, optimizer)

    def init(params: PyTree) -> PyTree:
        if not isinstance(params, dict) or set(params) != {"policy", "value"}:
            actual = sorted(params) if isinstance(params, dict) else f"a {type(params).__name__}"
            raise ConfigError(
                "trpo needs params with the keys 'policy' and 'value' only; "
                f"this model has {actual}"
            )
        return optimizer.init(params["value"])

    def step(
        key: PRNGKey, params: PyTree, update_state: PyTree, batch: Batch
    ) -> tuple[PyTree, PyTree, dict[str, Array]]:
        sequences = as_sequences(batch, config.num_shards)
        key_policy, key_value = jax.random.split(key)
        policy, metrics = policy_step(key_policy, params, sequences)
        value = params["value"]
        if config.fits_value:
            value, update_state, metrics["value_loss"] = value_steps(
                key_value, params, update_state, sequences
            )
        return {"policy": policy, "value": value}, update_state, metrics

    return Update(init, step)


def make_policy_step(
    config: Config, model: Model
) -> Callable[..., tuple[PyTree, dict[str, Array]]]:
    """``(key, params, batch) -> (policy_params, metrics)``: natural gradient and line search."""

    def policy_step(key: PRNGKey, params: PyTree, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        theta_old = params["policy"]

        def policy(theta: PyTree, batch: Batch) -> Distribution:
            return model.unroll(params | {"policy": theta}, batch.carry, batch.obs, batch.reset)[0]

        def mean_kl(theta: PyTree) -> Array:
            return losses.masked_mean(
                fisher_old_policy.kl(policy(theta, fisher_batch)), fisher_batch.mask
            )

        def surrogate(theta: PyTree) -> tuple[Array, tuple[Array, Distribution]]:
            distribution = policy(theta, batch)
            log_prob = distribution.log_prob(batch.action)
            ratio = losses.probability_ratio(losses.log_ratio(log_prob, batch.log_prob, batch.mask))
            return losses.surrogate(ratio, advantage, batch.mask), (ratio, distribution)

        fisher_batch = subsample_sequences(config.fisher_subsample, key, batch, config.num_shards)
        fisher_old_policy = policy(theta_old, fisher_batch)
        advantage = (
            losses.standardize(batch.advantage, batch.mask)
            if config.normalize_advantage
            else batch.advantage
        )
        (old_surrogate, (ratio, old_policy)), gradient = jax.value_and_grad(
            surrogate, has_aux=True
        )(theta_old)

        fisher = damped(fisher_vector_product(mean_kl, theta_old), config.cg_damping)
        direction = conjugate_gradient(fisher, gradient, config.cg_iterations)
        fisher_direction = fisher(direction)
        curvature = optax.tree.vdot(direction, fisher_direction)
        full_step = jnp.where(
            curvature > 0, jnp.sqrt(2 * config.max_kl / jnp.where(curvature > 0, curvature, 1)), 0
        )

        def try_step(num_backtracks: Array) -> LineSearchState:
            step_size = full_step * config.line_search_shrink**num_backtracks
            theta = add_scaled(theta_old, step_size, direction)
            new_surrogate, (ratio, distribution) = surrogate(theta)
            kl = losses.masked_mean(old_policy.kl(distribution), batch.mask)
            return LineSearchState(
                theta=theta,
                num_backtracks=num_backtracks,
                accepted=(kl <= config.max_kl) & (new_surrogate > old_surrogate),
                surrogate=new_surrogate,
                kl=kl,
                ratio=ratio,
            )

        # Under vmap, the loop runs until every member has accepted or exhausted its candidates.
        result = jax.lax.while_loop(
            lambda state: ~state.accepted & (state.num_backtracks + 1 < config.line_search_steps),
            lambda state: try_step(state.num_backtracks + 1),
            try_step(jnp.zeros((), jnp.int32)),
        )

        def if_accepted(new: Any, otherwise: Any) -> Array:
            return jnp.where(result.accepted, new, otherwise)

        return jax.tree.map(if_accepted, result.theta, theta_old), {
            "policy_loss": -if_accepted(result.surrogate, old_surrogate),
            "entropy": losses.masked_mean(old_policy.entropy(), batch.mask),
            "approx_kl": if_accepted(result.kl, 0.0),
            "grad_norm": optax.tree.norm(gradient),
            "first_ratio_deviation": jnp.abs(ratio - 1).max(),
            "largest_ratio_deviation": if_accepted(jnp.abs(result.ratio - 1).max(), 0.0),
            "cg_residual": cg_residual(fisher_direction, gradient),
            "step_fraction": if_accepted(config.line_search_shrink**result.num_backtracks, 0.0),
            "line_search_failed": if_accepted(0.0, 1.0),
        }

    return policy_step


def make_value_steps(
    config: Config, model: Model, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[PyTree, PyTree, Array]]:
    """Epochs of minibatch steps on L_VF.

    The result is ``(key, params, opt_state, batch) -> (value_params, opt_state, mean_loss)``.
    """

    def value_steps(
        key: PRNGKey, params: PyTree, opt_state: PyTree, batch: Batch
    ) -> tuple[PyTree, PyTree, Array]:
        def loss(theta: PyTree, batch: Batch) -> Array:
            _, value = model.unroll(params | {"value": theta}, batch.carry, batch.obs, batch.reset)
            return losses.value_loss(value, batch.target, batch.valid)

        def minibatch_step(
            carry: tuple[PyTree, PyTree], batch: Batch
        ) -> tuple[tuple[PyTree, PyTree], Array]:
            theta, opt_state = carry
            value_loss, gradient = jax.value_and_grad(loss)(theta, batch)
            updates, opt_state = optimizer.update(gradient, opt_state, theta)
            return (optax.apply_updates(theta, updates), opt_state), value_loss

        def epoch(
            carry: tuple[PyTree, PyTree], key: PRNGKey
        ) -> tuple[tuple[PyTree, PyTree], Array]:
            minibatches = shuffled_minibatches(
                key, batch, config.num_minibatches, config.num_shards
            )
            return jax.lax.scan(minibatch_step, carry, minibatches)

        keys = jax.random.split(key, config.num_epochs)
        (theta, opt_state), value_loss = scan_keys(epoch, (params["value"], opt_state), keys)
        return theta, opt_state, value_loss.mean()

    return value_steps


def subsample_sequences(k: int, key: PRNGKey, batch: Batch, num_shards: int = 1) -> Batch:
    """⌈n / k⌉ random sequences out of the n sequences of each shard."""
    if k == 1:
        return batch
    order = shard_permutations(key, batch.mask.shape[1], num_shards)
    return take_sequences(order[:, : -(-order.shape[1] // k)], batch)
