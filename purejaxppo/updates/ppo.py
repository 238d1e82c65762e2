"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), in the four variants of its table 1."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import purejaxppo.losses as losses
from purejaxppo.config import Config
from purejaxppo.keys import scan_keys
from purejaxppo.types import Batch, Distribution, Model, PRNGKey, PyTree, Update
from purejaxppo.updates.minibatches import as_sequences, shuffled_minibatches


class PPOState(NamedTuple):
    """What PPO remembers between iterations."""

    optimizer: PyTree
    kl_coef: PyTree  # β where ``objective`` is adaptive_kl, else ()


class Loop(NamedTuple):
    """What goes from one gradient step to the next."""

    params: PyTree
    optimizer: PyTree
    continues: Array  # false once early stopping has ended the iteration's updates


def make_update(config: Config, model: Model, optimizer: optax.GradientTransformation) -> Update:
    """K epochs of minibatch steps on a surrogate with value loss and entropy bonus (eq. 9):

        maximise   L − c1 · L_VF + c2 · S

    with c1 = ``vf_coef``, c2 = ``ent_coef`` and L by ``objective``: ``clip`` (L_CLIP, eq. 7), ``unclipped`` (L_CPI,
    eq. 6), ``fixed_kl`` and ``adaptive_kl`` (L_KLPEN = L_CPI − β KL(π_old ‖ π), eq. 8). β starts at ``kl_coef``; the
    adaptive one is halved after an iteration whose KL is below ``kl_target`` / 1.5 and doubled above 1.5 ``kl_target``.

    With ``early_stop_kl`` the first minibatch whose estimated KL exceeds it ends the iteration's updates: the steps
    that are left are computed and measured but not taken, so that it vmaps. Metrics are means over all minibatches,
    but ``first_ratio_deviation``, of the first one before any step, ``largest_ratio_deviation``, and ``kl``, which is
    exact and of the whole batch after the last step.
    """
    penalised = config.objective in ("fixed_kl", "adaptive_kl")
    adaptive = config.objective == "adaptive_kl"

    loss = make_loss(config, model)

    def init(params: PyTree) -> PPOState:
        return PPOState(
            optimizer.init(params),
            jnp.asarray(config.kl_coef, jnp.result_type(float)) if adaptive else (),
        )

    def step(
        key: PRNGKey, params: PyTree, update_state: PPOState, batch: Batch
    ) -> tuple[PyTree, PPOState, dict[str, Array]]:
        sequences = as_sequences(batch, config.num_shards)
        kl_coef: Any = update_state.kl_coef if adaptive else config.kl_coef

        def policy(params: PyTree) -> Distribution:
            return model.unroll(params, sequences.carry, sequences.obs, sequences.reset)[0]

        if penalised:
            extras = sequences.extras | {"old_policy": policy(params)}
            sequences = sequences._replace(extras=extras)

        def minibatch_step(loop: Loop, minibatch: Batch) -> tuple[Loop, dict[str, Array]]:
            gradient, metrics = jax.grad(loss, has_aux=True)(loop.params, minibatch, kl_coef)
            change, opt_state = optimizer.update(gradient, loop.optimizer, loop.params)
            metrics["grad_norm"] = optax.tree.norm(gradient)
            after = Loop(optax.apply_updates(loop.params, change), opt_state, loop.continues)
            if config.early_stop_kl is not None:
                continues = loop.continues & (metrics["approx_kl"] <= config.early_stop_kl)
                after = where_except_schedules(continues, after, loop)._replace(continues=continues)
                metrics["steps_taken"] = continues.astype(metrics["approx_kl"].dtype)
            return after, metrics

        def epoch(loop: Loop, key: PRNGKey) -> tuple[Loop, dict[str, Array]]:
            minibatches = shuffled_minibatches(
                key, sequences, config.num_minibatches, config.num_shards
            )
            return jax.lax.scan(minibatch_step, loop, minibatches)

        keys = jax.random.split(key, config.num_epochs)
        loop, metrics = scan_keys(
            epoch, Loop(params, update_state.optimizer, jnp.asarray(True)), keys
        )
        deviation = metrics.pop("ratio_deviation")  # [epochs, minibatches]
        measured = jax.tree.map(jnp.mean, metrics)
        measured |= {
            "first_ratio_deviation": deviation[0, 0],
            "largest_ratio_deviation": deviation.max(),
        }
        if not adaptive:
            return loop.params, PPOState(loop.optimizer, ()), measured
        kl = losses.masked_mean(
            sequences.extras["old_policy"].kl(policy(loop.params)), sequences.mask
        )
        state = PPOState(loop.optimizer, adapted(kl_coef, kl, config.kl_target))
        return loop.params, state, measured | {"kl": kl, "kl_coef": kl_coef}

    return Update(init, step)


def make_loss(config: Config, model: Model) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """``(params, batch, kl_coef) -> (loss, metrics)`` of one minibatch.

    Where the KL is penalised, the batch has π_old as the extra ``old_policy``.
    """

    def loss(
        params: PyTree, batch: Batch, kl_coef: Array | float
    ) -> tuple[Array, dict[str, Array]]:
        distribution, value = model.unroll(params, batch.carry, batch.obs, batch.reset)
        log_ratio = losses.log_ratio(
            distribution.log_prob(batch.action), batch.log_prob, batch.mask
        )
        ratio = losses.probability_ratio(log_ratio)
        advantage = batch.advantage
        if config.normalize_advantage:
            advantage = losses.standardize(advantage, batch.mask)

        if config.objective == "clip":
            surrogate = losses.clipped_surrogate(ratio, advantage, batch.mask, config.clip_eps)
        else:
            surrogate = losses.surrogate(ratio, advantage, batch.mask)
        if "old_policy" in batch.extras:
            old = batch.extras["old_policy"]
            surrogate -= kl_coef * losses.masked_mean(old.kl(distribution), batch.mask)
        if config.clip_value:
            value_loss = losses.clipped_value_loss(
                value, batch.value, batch.target, batch.valid, config.clip_eps
            )
        else:
            value_loss = losses.value_loss(value, batch.target, batch.valid)
        entropy = losses.masked_mean(distribution.entropy(), batch.mask)

        objective = surrogate - config.vf_coef * value_loss + config.ent_coef * entropy
        return -objective, {
            "policy_loss": -surrogate,
            "value_loss": value_loss,
            "entropy": entropy,
            "approx_kl": losses.approximate_kl(log_ratio, batch.mask),
            "clip_fraction": losses.clip_fraction(ratio, batch.mask, config.clip_eps),
            "ratio_deviation": jnp.abs(ratio - 1).max(),
        }

    return loss


def where_except_schedules(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` where the condition holds, else ``old``; but the count of a schedule, which goes by time, goes on."""

    def is_schedule(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    def choose(new: Any, old: Any) -> Any:
        return new if is_schedule(new) else jnp.where(condition, new, old)

    return jax.tree.map(choose, new, old, is_leaf=is_schedule)


def adapted(kl_coef: Array, kl: Array, target: Array | float) -> Array:
    """β / 2 where KL < target / 1.5, 2 β where KL > 1.5 target, else β (Schulman et al. 2017, section 4).

    Within 1e-6 … 1e6, so that a β gone to 0 or infinity does not stay there.
    """
    return jnp.clip(
        kl_coef * jnp.where(kl < target / 1.5, 0.5, jnp.where(kl > 1.5 * target, 2.0, 1.0)),
        1e-6,
        1e6,
    )
