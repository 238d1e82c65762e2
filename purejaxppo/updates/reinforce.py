"""REINFORCE (Williams 1992, 'Simple statistical gradient-following algorithms')."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

import purejaxppo.losses as losses
from purejaxppo.config import Config
from purejaxppo.types import Batch, Distribution, Model, PRNGKey, PyTree, Update
from purejaxppo.updates.minibatches import as_sequences, take_sequences

# The change of the policy is measured on one in MOST_SKIPPED sequences, or more of them if that is
# fewer than LEAST_MEASURED steps.
MOST_SKIPPED = 8
LEAST_MEASURED = 4096


class RunningMean(NamedTuple):
    """The mean return-to-go of the batches before this one, with weights that decay by age."""

    total: Float[Array, ""]  # Σ weight · mean
    weight: Float[Array, ""]  # Σ weight


class ReinforceState(NamedTuple):
    """The state of REINFORCE between iterations."""

    optimizer: PyTree
    running_mean: RunningMean | None  # None unless it is the baseline


def make_update(config: Config, model: Model, optimizer: optax.GradientTransformation) -> Update:
    """One step along the gradient of the return, estimated from B episodes, each batch used once:

        ∇J ≈ 1/B Σ_i Σ_t ∇log π(a_t | s_t) (G_t − b_t)

    The sum over a batch is divided by the number of episodes, which is constant. The number of
    steps depends on the actions, and dividing by it would add bias. None of the baselines adds
    bias, because none depends on the action (Greensmith et al. 2004):

        none           b = 0
        leave_one_out  the mean of G_t over the other episodes that last until step t, or 0
        running_mean   the mean of G over all steps of earlier batches, each iteration with
                       ``baseline_decay`` times the weight of the next one; 0 at first
        value          V(s_t), fitted to G_t in the same step with the coefficient ``vf_coef``

    With γ < 1, G_t is discounted, and the factor γ^t of the discounted objective is omitted, as is
    usual (Nota & Thomas 2020). These options make the estimator biased: ``normalize_advantage``
    standardises G − b over the batch; ``normalize_reward`` scales the rewards with statistics of
    the same batch; with ``shared_trunk`` the value loss moves the policy; and ``advantage="gae"``
    bootstraps from V, so that a window may cut episodes. ``ent_coef`` is the coefficient of the sum
    of the entropies, which is divided by B too.
    """

    def loss(
        params: PyTree, batch: Batch, num_episodes: int
    ) -> tuple[Array, tuple[dict[str, Array], Distribution]]:
        distribution, value = model.unroll(params, batch.carry, batch.obs, batch.reset)
        log_prob = distribution.log_prob(batch.action)
        score = jnp.where(batch.mask, log_prob * batch.advantage, 0).sum() / num_episodes
        entropy = jnp.where(batch.mask, distribution.entropy(), 0).sum() / num_episodes
        metrics = {
            "policy_loss": -score,
            "entropy": losses.masked_mean(distribution.entropy(), batch.mask),
        }
        ratio = losses.probability_ratio(losses.log_ratio(log_prob, batch.log_prob, batch.mask))
        metrics["first_ratio_deviation"] = jnp.abs(ratio - 1).max()
        objective = score + config.ent_coef * entropy
        if config.fits_value:
            metrics["value_loss"] = losses.value_loss(value, batch.target, batch.valid)
            objective -= config.vf_coef * metrics["value_loss"]
        return -objective, (metrics, distribution)

    def init(params: PyTree) -> ReinforceState:
        zero = jnp.zeros((), jnp.result_type(float))
        return ReinforceState(
            optimizer.init(params),
            RunningMean(zero, zero) if config.baseline == "running_mean" else None,
        )

    def step(
        key: PRNGKey, params: PyTree, update_state: ReinforceState, batch: Batch
    ) -> tuple[PyTree, ReinforceState, dict[str, Array]]:
        advantage, running_mean = subtract_baseline(config, update_state.running_mean, batch)
        batch = batch._replace(advantage=advantage)
        num_episodes = batch.mask.shape[1]
        if config.num_shards > 1:
            # As N rows, which the network needs, the arrays [T, B] would leave their devices.
            batch = as_sequences(batch, config.num_shards)
        gradient, (metrics, old) = jax.grad(loss, has_aux=True)(params, batch, num_episodes)
        change, opt_state = optimizer.update(gradient, update_state.optimizer, params)
        new = optax.apply_updates(params, change)

        part = sample_of_batch(batch, num_episodes, config.num_shards)
        if part is not batch:
            old, _ = model.unroll(params, part.carry, part.obs, part.reset)
        after, _ = model.unroll(new, part.carry, part.obs, part.reset)
        log_prob = after.log_prob(part.action)
        ratio = losses.probability_ratio(losses.log_ratio(log_prob, part.log_prob, part.mask))
        metrics |= {
            "grad_norm": optax.tree.norm(gradient),
            "approx_kl": losses.masked_mean(old.kl(after), part.mask),
            "clip_fraction": losses.clip_fraction(ratio, part.mask, config.clip_eps),
            "largest_ratio_deviation": jnp.abs(ratio - 1).max(),
        }
        return new, ReinforceState(opt_state, running_mean), metrics

    return Update(init, step)


def sample_of_batch(batch: Batch, num_episodes: int, num_shards: int) -> Batch:
    """Every k-th sequence of a batch, on which the change of the policy is measured.

    The gradient needs one pass of the model over the batch. The KL divergence between the old and
    the new policy needs another, because the new policy is known only after the step. It is an
    average, so a part of the batch suffices: k ≤ 8 is the largest k that leaves 4,096 steps. Which
    sequences are chosen does not depend on them, so the estimate is unbiased.
    """
    num_sequences = batch.mask.shape[1] // num_shards
    k = min(MOST_SKIPPED, batch.mask.size // LEAST_MEASURED, num_episodes // num_shards)
    if k <= 1:
        return batch
    rows = jnp.arange(0, num_sequences, k)
    return take_sequences(jnp.broadcast_to(rows, (num_shards, len(rows))), batch)


def subtract_baseline(
    config: Config, running_mean: RunningMean | None, batch: Batch
) -> tuple[Float[Array, "T B"], RunningMean | None]:
    """The advantages G − b, 0 outside the mask, and the running mean with this batch in it."""
    if config.baseline == "value":  # or that of a group
        advantage = batch.advantage
    elif config.baseline == "leave_one_out":
        advantage = batch.target - leave_one_out_baseline(batch.target, batch.valid)
    elif running_mean is not None:
        advantage = batch.target - running_mean.total / jnp.maximum(running_mean.weight, 1)
        decay = config.baseline_decay
        mean = losses.masked_mean(batch.target, batch.valid)
        total = decay * running_mean.total + mean
        running_mean = RunningMean(total, decay * running_mean.weight + 1)
    else:
        advantage = batch.target
    advantage = jnp.where(batch.mask, advantage, 0)
    if config.normalize_advantage:
        advantage = losses.standardize(advantage, batch.mask)
    return advantage, running_mean


def leave_one_out_baseline(
    x: Float[Array, "T B"], valid: Bool[Array, "T B"]
) -> Float[Array, "T B"]:
    """At each step the mean over the other valid episodes; 0 where there are none."""
    x = jnp.where(valid, x, 0)
    total = x.sum(axis=1, keepdims=True) - x
    count = valid.sum(axis=1, keepdims=True) - valid
    return total / jnp.maximum(count, 1)
