"""Advantage estimators: formulas on plain arrays, and `ADVANTAGES`, the estimators by name."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from purejaxppo.types import Estimator, Transition


def gae(
    reward: Float[Array, "T B"],
    value: Float[Array, "T B"],
    next_value: Float[Array, "T B"],
    terminated: Bool[Array, "T B"],
    truncated: Bool[Array, "T B"],
    gamma: Float[Array, ""] | float,
    gae_lambda: Float[Array, ""] | float,
) -> tuple[Float[Array, "T B"], Float[Array, "T B"]]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), correct at episode ends.

        δ_t = r_t + γ (1 − terminated_t) V(s'_t) − V(s_t)
        Â_t = δ_t + γ λ (1 − terminated_t) (1 − truncated_t) Â_{t+1}
        target_t = Â_t + V(s_t)

    for t = T − 1, …, 0, with 0 in place of Â_{t+1} after the last step. ``next_value[t]`` is the
    value of s'_t, the true successor of step t; at a termination it is not used. At a truncation it
    is the value of the final observation, never of the first one of the next episode.
    Only termination removes the bootstrap; termination and truncation both cut the λ-sum. Pardo et
    al. 2018 show the cost of treating a time limit as a termination. With λ = 0 the advantage is
    the TD error. With λ = 1 it is the Monte-Carlo return, bootstrapped at the end of the data,
    minus the value.

    Returns the advantages and the value targets, both [T, B].
    """
    chex.assert_rank([reward, value, next_value, terminated, truncated], 2)
    chex.assert_equal_shape([reward, value, next_value, terminated, truncated])
    delta = reward + gamma * jnp.where(terminated, 0, next_value) - value
    decay = gamma * gae_lambda * jnp.where(terminated | truncated, 0, jnp.ones_like(value))

    def backward(advantage: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, decay = step
        advantage = delta + decay * advantage
        return advantage, advantage

    _, advantage = jax.lax.scan(backward, jnp.zeros_like(delta[0]), (delta, decay), reverse=True)
    return advantage, advantage + value


def returns(
    reward: Float[Array, "T B"],
    value: Float[Array, "T B"],
    next_value: Float[Array, "T B"],
    terminated: Bool[Array, "T B"],
    truncated: Bool[Array, "T B"],
    gamma: Float[Array, ""] | float,
    gae_lambda: Float[Array, ""] | float,
) -> tuple[Float[Array, "T B"], Float[Array, "T B"]]:
    """Returns-to-go of whole episodes, without bootstrapping.

        G_t = r_t + γ (1 − done_t) G_{t+1},     done = terminated or truncated
        Â_t = G_t − V(s_t)

    Source: Williams 1992; Sutton & Barto 2018, section 13.3. The objective is the return up to the
    end of the episode, so a time limit ends it like a termination. Nothing is bootstrapped, so the
    estimate is unbiased. ``next_value`` and ``gae_lambda`` are not used. Every episode must end
    within the data, which ``whole_episodes`` ensures.

    Returns the advantages and G, both [T, B].
    """
    done = terminated | truncated
    zero = jnp.zeros_like(value)
    # With V = 0 and λ = 1, the advantage and the target are both G.
    _, G = gae(reward, zero, zero, done, jnp.zeros_like(done), gamma, 1.0)
    return G - value, G


def estimate_gae(
    config: Any, transitions: Transition, reward: Float[Array, "T B"]
) -> tuple[Float[Array, "T B"], Float[Array, "T B"]]:
    """`gae` of a rollout."""
    return gae(
        reward,
        transitions.value,
        transitions.next_value,
        transitions.terminated,
        transitions.truncated,
        config.gamma,
        config.gae_lambda,
    )


def estimate_returns(
    config: Any, transitions: Transition, reward: Float[Array, "T B"]
) -> tuple[Float[Array, "T B"], Float[Array, "T B"]]:
    """`returns` of a rollout."""
    return returns(
        reward,
        transitions.value,
        transitions.next_value,
        transitions.terminated,
        transitions.truncated,
        config.gamma,
        config.gae_lambda,
    )


ADVANTAGES: dict[str, Estimator] = {"gae": estimate_gae, "returns": estimate_returns}
