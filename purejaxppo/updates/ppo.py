"""Proximal policy optimisation with the four objectives of table 1 of the paper.

Source: Schulman et al. 2017, arXiv:1707.06347.
"""

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
from purejaxppo.updates.minibatches import as_sequences, shuffled_minibatches

# Names among the extras of a batch.
OLD_POLICY = "old_policy"
REF_LOG_PROB = "ref_log_prob"  # of a reward function, for ``ref_kl_loss``


class PPOState(NamedTuple):
    """State of PPO between iterations."""

    optimizer: PyTree  # state of the optimiser
    kl_coef: PyTree  # [] β if ``objective`` is adaptive_kl, else ()


class LoopState(NamedTuple):
    """State of the loop over gradient steps."""

    params: PyTree
    optimizer: PyTree  # state of the optimiser
    is_active: Array  # [] bool, false once early stopping has triggered


def make_update(config: Config, model: Model, optimizer: optax.GradientTransformation) -> Update:
    """K epochs of minibatch steps on a surrogate with value loss and entropy bonus (eq. 9):

        maximise   L − c1 · L_VF + c2 · S

    with c1 = ``vf_coef`` and c2 = ``ent_coef``. (Our L_VF has a factor ½ that eq. 9 does not have.)
    ``objective`` chooses L:

    - ``clip``: L_CLIP (eq. 7).
    - ``unclipped``: L_CPI (eq. 6).
    - ``fixed_kl``, ``adaptive_kl``: L_KLPEN = L_CPI − β KL(π_old ‖ π) (eq. 8). β starts at
      ``kl_coef``. With ``adaptive_kl`` it changes after each iteration to keep the KL near
      ``kl_target`` (`adapt_kl_coef`).

    With ``ref_kl_loss``, ``ref_kl_coef`` times `losses.reference_kl` is subtracted from L. The
    means are taken as ``loss_reduction`` says (`losses.REDUCTIONS`). L_VF is left out for
    estimators that compare the episodes of a group.

    With ``early_stop_kl``, the first minibatch with a larger estimated KL ends the updates of the
    iteration. Its step and the later steps are computed and measured but not applied, so that the
    update can be vmapped.

    Metrics are means over all minibatches, except these: ``first_ratio_deviation`` is measured on
    the first minibatch, before any step, and ``largest_ratio_deviation`` is the maximum. With
    ``adaptive_kl``, ``kl`` is the exact KL on the whole batch after the last step, and ``kl_coef``
    is the β of this iteration.
    """
    is_penalised = config.objective in ("fixed_kl", "adaptive_kl")
    is_adaptive = config.objective == "adaptive_kl"
    loss = make_loss(config, model)

    def init(params: PyTree) -> PPOState:
        return PPOState(
            optimizer.init(params),
            jnp.asarray(config.kl_coef, jnp.result_type(float)) if is_adaptive else (),
        )

    def step(
        key: PRNGKey, params: PyTree, update_state: PPOState, batch: Batch
    ) -> tuple[PyTree, PPOState, dict[str, Array]]:
        sequences = as_sequences(batch, config.num_shards)
        kl_coef: Any = update_state.kl_coef if is_adaptive else config.kl_coef

        def policy(params: PyTree) -> Distribution:
            return model.unroll(params, sequences.carry, sequences.obs, sequences.reset)[0]

        if is_penalised:
            extras = sequences.extras | {OLD_POLICY: policy(params)}
            sequences = sequences._replace(extras=extras)

        def minibatch_step(loop: LoopState, minibatch: Batch) -> tuple[LoopState, dict[str, Array]]:
            gradient, metrics = jax.grad(loss, has_aux=True)(loop.params, minibatch, kl_coef)
            deltas, opt_state = optimizer.update(gradient, loop.optimizer, loop.params)
            metrics["grad_norm"] = optax.tree.norm(gradient)
            next_loop = LoopState(
                optax.apply_updates(loop.params, deltas), opt_state, loop.is_active
            )
            if config.early_stop_kl is not None:
                is_active = loop.is_active & (metrics["approx_kl"] <= config.early_stop_kl)
                next_loop = where_except_schedules(is_active, next_loop, loop)._replace(
                    is_active=is_active
                )
                # Its mean is the fraction of the steps that were applied.
                metrics["steps_taken"] = is_active.astype(metrics["approx_kl"].dtype)
            return next_loop, metrics

        def epoch(loop: LoopState, key: PRNGKey) -> tuple[LoopState, dict[str, Array]]:
            minibatches = shuffled_minibatches(
                key, sequences, config.num_minibatches, config.num_shards
            )
            return jax.lax.scan(minibatch_step, loop, minibatches)

        keys = jax.random.split(key, config.num_epochs)
        loop, metrics = scan_keys(
            epoch, LoopState(params, update_state.optimizer, jnp.asarray(True)), keys
        )
        ratio_deviation = metrics.pop("ratio_deviation")  # [epochs, minibatches]
        mean_metrics = jax.tree.map(jnp.mean, metrics)
        mean_metrics |= {
            "first_ratio_deviation": ratio_deviation[0, 0],
            "largest_ratio_deviation": ratio_deviation.max(),
        }
        if not is_adaptive:
            return loop.params, PPOState(loop.optimizer, ()), mean_metrics
        kl = losses.masked_mean(
            sequences.extras[OLD_POLICY].kl(policy(loop.params)), sequences.mask
        )
        state = PPOState(loop.optimizer, adapt_kl_coef(kl_coef, kl, config.kl_target))
        return loop.params, state, mean_metrics | {"kl": kl, "kl_coef": kl_coef}

    return Update(init, step)


def make_loss(config: Config, model: Model) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """``(params, batch, kl_coef) -> (loss, metrics)`` of one minibatch.

    With a KL penalty, the extra `OLD_POLICY` of the batch is π_old. With ``ref_kl_loss``, the extra
    `REF_LOG_PROB` is log π_ref(a|s), from the reward function; raises `ConfigError` without it.
    """
    mean = losses.REDUCTIONS[config.loss_reduction]

    def loss(
        params: PyTree, batch: Batch, kl_coef: Array | float
    ) -> tuple[Array, dict[str, Array]]:
        distribution, value = model.unroll(params, batch.carry, batch.obs, batch.reset)
        log_prob = distribution.log_prob(batch.action)
        log_ratio = losses.log_ratio(log_prob, batch.log_prob, batch.mask)
        ratio = losses.probability_ratio(log_ratio)
        advantage = batch.advantage
        if config.normalize_advantage:
            advantage = losses.standardize(advantage, batch.mask)

        if config.objective == "clip":
            surrogate = losses.clipped_surrogate(
                ratio, advantage, batch.mask, config.clip_eps, config.clip_eps_high, mean
            )
        else:
            surrogate = losses.surrogate(ratio, advantage, batch.mask, mean)
        if config.objective in ("fixed_kl", "adaptive_kl"):
            old = batch.extras[OLD_POLICY]
            surrogate -= kl_coef * mean(old.kl(distribution), batch.mask)
        if config.ref_kl_loss != "none":
            _require_reference(config, batch)
            # Not 0 · KL, which would be NaN where the reference excludes an action.
            ref_log_prob = jnp.where(
                jnp.asarray(config.ref_kl_coef) > 0, batch.extras[REF_LOG_PROB], batch.log_prob
            )
            surrogate -= config.ref_kl_coef * losses.reference_kl(
                log_prob, ref_log_prob, batch.mask, config.ref_kl_loss, mean
            )
        objective = surrogate
        measured = {}
        if config.fits_value:
            measured["value_loss"] = value_loss(value, batch)
            objective -= config.vf_coef * measured["value_loss"]
        entropy = distribution.entropy()
        objective += config.ent_coef * mean(entropy, batch.mask)
        return -objective, measured | {
            "policy_loss": -surrogate,
            "entropy": losses.masked_mean(entropy, batch.mask),
            "approx_kl": losses.approximate_kl(log_ratio, batch.mask),
            "clip_fraction": losses.clip_fraction(
                ratio, batch.mask, config.clip_eps, config.clip_eps_high
            ),
            "ratio_deviation": jnp.abs(ratio - 1).max(),
        }

    def value_loss(value: Array, batch: Batch) -> Array:
        if config.clip_value:
            return losses.clipped_value_loss(
                value, batch.value, batch.target, batch.valid, config.clip_eps, mean
            )
        return losses.value_loss(value, batch.target, batch.valid, mean)

    return loss


def _require_reference(config: Config, batch: Batch) -> None:
    if REF_LOG_PROB not in batch.extras:
        raise ConfigError(
            f"ref_kl_loss = {config.ref_kl_loss!r} needs the log-probabilities of a reference "
            "policy: train with the reward function kl_shaped"
        )


def where_except_schedules(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` if the condition holds, else ``old``; the state of schedules is always ``new``.

    The learning rate then follows its schedule whether or not steps are applied.
    """

    def is_schedule(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    def choose(new: Any, old: Any) -> Any:
        return new if is_schedule(new) else jnp.where(condition, new, old)

    return jax.tree.map(choose, new, old, is_leaf=is_schedule)


def adapt_kl_coef(kl_coef: Array, kl: Array, target: Array | float) -> Array:
    """β / 2 if KL < target / 1.5, 2 β if KL > 1.5 target, else β.

    The result is clipped to [1e-6, 1e6]: a β of 0 or infinity could not change again.

    Source: Schulman et al. 2017, section 4.
    """
    return jnp.clip(
        kl_coef * jnp.where(kl < target / 1.5, 0.5, jnp.where(kl > 1.5 * target, 2.0, 1.0)),
        1e-6,
        1e6,
    )
