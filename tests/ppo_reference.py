"""PPO's objective in plain NumPy, one sample at a time, for a linear policy and value function."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from small_envs import linear_model

from purejaxppo import Config
from purejaxppo.types import Batch

T = 5  # steps
B = 3  # environments
F = 4  # features of an observation
A = 3  # actions, or dimensions of one
ONE_STEP = Config(
    num_envs=B,
    num_steps=T,
    num_epochs=1,
    num_minibatches=1,
    ent_coef=0.03,
    vf_coef=0.7,
    clip_eps=0.15,
)


# ----------------------------------------------------- loss and gradient, following the paper


def numpy_policy(theta, obs, action, gaussian):
    """log π(action | obs) and the entropy, for one observation."""
    out = obs @ theta["w"] + theta["b"]
    if gaussian:
        z = (action - out) / np.exp(theta["log_std"])
        log_prob = np.sum(-0.5 * z**2 - theta["log_std"] - 0.5 * np.log(2 * np.pi))
        return log_prob, np.sum(theta["log_std"] + 0.5 * np.log(2 * np.pi * np.e))
    log_p = out - np.log(np.exp(out).sum())
    return log_p[action], -(np.exp(log_p) * log_p).sum()


def numpy_kl(old, new, obs, gaussian):
    """KL(π_old ‖ π_new) at one observation."""
    old_out, new_out = (obs @ theta["w"] + theta["b"] for theta in (old, new))
    if gaussian:
        old_std = np.exp(old["log_std"])
        new_std = np.exp(new["log_std"])
        return np.sum(
            np.log(new_std / old_std)
            + (old_std**2 + (old_out - new_out) ** 2) / (2 * new_std**2)
            - 0.5
        )
    log_p = old_out - np.log(np.exp(old_out).sum())
    log_q = new_out - np.log(np.exp(new_out).sum())
    return (np.exp(log_p) * (log_p - log_q)).sum()


def random_batch(seed, gaussian=False, masked=True):
    """A batch of NumPy arrays. Its ratios leave the clipping interval on both sides."""
    rng = np.random.default_rng(seed)
    batch = {
        "obs": rng.normal(size=(T, B, F)),
        "action": rng.normal(size=(T, B, A)) if gaussian else rng.integers(0, A, (T, B)),
        "log_prob": rng.normal(-1.2, 0.3, (T, B)),
        "value": rng.normal(size=(T, B)),
        "advantage": rng.normal(1.0, 2.0, (T, B)),
        "target": rng.normal(size=(T, B)),
        "reset": rng.random((T, B)) < 0.2,
        "mask": rng.random((T, B)) < 0.7 if masked else np.ones((T, B), bool),
        "valid": rng.random((T, B)) < 0.9 if masked else np.ones((T, B), bool),
        "carry": (),
    }
    # An invalid step has no action that counts.
    return batch | {"mask": batch["mask"] & batch["valid"]}


def numpy_objective(theta, batch, config, gaussian, old_policy=None):
    """−(L − c1 L_VF + c2 S) and its parts: eq. 6 to 9 of the paper, by sample, with ½ in L_VF."""
    surrogate = []
    value_loss = []
    entropy = []
    clipped = []
    kl = []
    kept = batch["advantage"][batch["mask"]]
    mean, deviation = (kept.mean(), kept.std() + 1e-8) if config.normalize_advantage else (0.0, 1.0)
    low = 1 - config.clip_eps
    high = 1 + config.clip_eps
    for i in np.ndindex(T, B):
        x = batch["obs"][i]
        log_prob, s = numpy_policy(theta["policy"], x, batch["action"][i], gaussian)
        if batch["mask"][i]:
            ratio = np.exp(log_prob - batch["log_prob"][i])
            advantage = (batch["advantage"][i] - mean) / deviation
            if config.objective == "clip":
                surrogate.append(min(ratio * advantage, np.clip(ratio, low, high) * advantage))
            else:
                penalty = numpy_kl(old_policy or theta["policy"], theta["policy"], x, gaussian)
                surrogate.append(
                    ratio * advantage - (config.objective != "unclipped") * config.kl_coef * penalty
                )
            entropy.append(s)
            clipped.append(abs(ratio - 1) > config.clip_eps)
            kl.append(ratio - 1 - np.log(ratio))
        if batch["valid"][i]:
            v = x @ theta["value"]["w"] + theta["value"]["b"]
            old = batch["value"][i]
            target = batch["target"][i]
            error = (v - target) ** 2
            if config.clip_value:
                error = max(
                    error, (old + np.clip(v - old, -config.clip_eps, config.clip_eps) - target) ** 2
                )
            value_loss.append(0.5 * error)
    parts = {
        "policy_loss": -np.mean(surrogate),
        "value_loss": np.mean(value_loss),
        "entropy": np.mean(entropy),
        "clip_fraction": np.mean(clipped),
        "approx_kl": np.mean(kl),
    }
    loss = (
        parts["policy_loss"]
        + config.vf_coef * parts["value_loss"]
        - config.ent_coef * parts["entropy"]
    )
    return loss, parts


def finite_differences(theta, batch, config, gaussian, old_policy=None, h=1e-6):
    flat, rebuild = jax.flatten_util.ravel_pytree(theta)
    flat = np.asarray(flat, np.float64)
    gradient = np.zeros(flat.size)

    def loss_at(x):
        return numpy_objective(
            jax.tree.map(np.asarray, rebuild(jnp.asarray(x))), batch, config, gaussian, old_policy
        )[0]

    for i in range(flat.size):
        step = h * np.eye(1, flat.size, i)[0]
        gradient[i] = (loss_at(flat + step) - loss_at(flat - step)) / (2 * h)
    return gradient


def arrays(batch):
    return Batch(**jax.tree.map(jnp.asarray, batch))


def parameters(gaussian=False):
    params = linear_model(gaussian, A).init(jax.random.key(1), jnp.zeros((1, F)))
    # Weak types would be strong after the first step, and the second step would compile again.
    return jax.tree.map(lambda x: jnp.asarray(x, x.dtype), params)
