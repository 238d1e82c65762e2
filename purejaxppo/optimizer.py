"""The optimiser of a run and its learning rate."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from purejaxppo.config import Config
from purejaxppo.types import PyTree


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam after clipping the global norm of the gradient.

    With ``anneal_lr`` the learning rate in iteration k = 0, 1, … is `annealed_lr` of k / K, where K
    is the number of iterations. Without a fixed length it is `annealed_lr` of the share of
    ``total_timesteps`` that came before, which `make_trainer` writes into the optimiser's state.
    """
    steps_per_iteration = config.num_epochs * config.num_minibatches

    def schedule(count: Array) -> Array:
        return annealed_lr(config, count // steps_per_iteration, config.num_iterations)

    if not config.anneal_lr:
        adam = optax.adam(config.lr, eps=config.adam_eps)
    elif config.has_fixed_length:
        adam = optax.adam(schedule, eps=config.adam_eps)
    else:
        others = ("b1", "b2", "eps", "eps_root")
        adam = optax.inject_hyperparams(optax.adam, others)(config.lr, eps=config.adam_eps)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adam)


def annealed_lr(config: Config, done: Array, total: int) -> Float[Array, ""]:
    """lr · max(0, 1 − done / total), in the working precision."""
    progress = done.astype(jnp.result_type(float)) / total
    return config.lr * jnp.maximum(0.0, 1 - progress)


def with_learning_rate(config: Config, update_state: PyTree, timesteps: Array) -> PyTree:
    """The state of the update with the annealed learning rate, if the optimiser cannot know it."""
    if config.has_fixed_length or not config.anneal_lr:
        return update_state
    if not optax.tree.get_all_with_path(update_state, "learning_rate"):
        return update_state  # of an algorithm without the optimiser
    lr = annealed_lr(config, timesteps, config.total_timesteps)
    return optax.tree.set(update_state, learning_rate=lr)
