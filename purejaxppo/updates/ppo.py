"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from purejaxppo import losses
from purejaxppo.config import Config
from purejaxppo.types import Batch, Model, PRNGKey, PyTree, Update
from purejaxppo.updates.minibatches import as_sequences, shuffled_minibatches


def make_update(config: Config, model: Model, optimizer: optax.GradientTransformation) -> Update:
    """K epochs of minibatch steps on the clipped surrogate with value loss and entropy bonus (eq. 9):

        maximise   L_CLIP − c1 · L_VF + c2 · S

    with c1 = ``vf_coef`` and c2 = ``ent_coef``. ``update_state`` is the state of the optimiser. Every metric is the
    mean over all minibatches, but ``first_ratio_deviation``, which is of the first one, before any step.
    """

    def loss(params: PyTree, batch: Batch) -> tuple[Array, tuple[dict[str, Array], Array]]:
        distribution, value = model.unroll(params, batch.carry, batch.obs, batch.reset)
        ratio = losses.probability_ratio(distribution.log_prob(batch.action), batch.log_prob, batch.mask)
        advantage = batch.advantage
        if config.normalize_advantage:
            advantage = losses.standardize(advantage, batch.mask)

        surrogate = losses.clipped_surrogate(ratio, advantage, batch.mask, config.clip_eps)
        if config.clip_value:
            value_loss = losses.clipped_value_loss(value, batch.value, batch.target, batch.valid, config.clip_eps)
        else:
            value_loss = losses.value_loss(value, batch.target, batch.valid)
        entropy = losses.masked_mean(distribution.entropy(), batch.mask)

        objective = surrogate - config.vf_coef * value_loss + config.ent_coef * entropy
        return -objective, ({"policy_loss": -surrogate, "value_loss": value_loss, "entropy": entropy}, ratio)

    def minibatch_step(carry: tuple[PyTree, PyTree], batch: Batch) -> tuple[tuple[PyTree, PyTree], tuple]:
        params, opt_state = carry
        gradient, (metrics, ratio) = jax.grad(loss, has_aux=True)(params, batch)
        change, opt_state = optimizer.update(gradient, opt_state, params)
        metrics["grad_norm"] = optax.tree.norm(gradient)
        return (optax.apply_updates(params, change), opt_state), (metrics, ratio)

    def step(
        key: PRNGKey, params: PyTree, update_state: PyTree, batch: Batch
    ) -> tuple[PyTree, PyTree, dict[str, Array]]:
        sequences = as_sequences(batch)

        def epoch(carry: tuple[PyTree, PyTree], key: PRNGKey) -> tuple[tuple[PyTree, PyTree], dict[str, Array]]:
            minibatches = shuffled_minibatches(key, sequences, config.num_minibatches)
            carry, (metrics, ratio) = jax.lax.scan(minibatch_step, carry, minibatches)
            # What nothing is differentiated through is measured for all minibatches at once: it is faster.
            return carry, metrics | {
                "approx_kl": losses.approximate_kl(ratio, minibatches.mask),
                "clip_fraction": losses.clip_fraction(ratio, minibatches.mask, config.clip_eps),
                "ratio_deviation": jnp.abs(ratio - 1).max(axis=(1, 2)),
            }

        keys = jax.random.split(key, config.num_epochs)
        (params, update_state), metrics = jax.lax.scan(epoch, (params, update_state), keys)
        deviation = metrics.pop("ratio_deviation")  # [epochs, minibatches]
        ends = {"first_ratio_deviation": deviation[0, 0], "largest_ratio_deviation": deviation.max()}
        return params, update_state, jax.tree.map(jnp.mean, metrics) | ends

    return Update(optimizer.init, step)
