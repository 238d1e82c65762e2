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
    minus the value. Nothing after the end of an episode affects the steps before it, even NaN.

    Returns the advantages and the value targets, both [T, B].
    """
    chex.assert_rank([reward, value, next_value, terminated, truncated], 2)
    chex.assert_equal_shape([reward, value, next_value, terminated, truncated])
    delta = reward + gamma * jnp.where(terminated, 0, next_value) - value
    done = terminated | truncated

    def backward(advantage: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, done = step
        # Not 0 · Â_{t+1}, which would be NaN if a step after the end is NaN.
        advantage = delta + gamma * gae_lambda * jnp.where(done, 0, advantage)
        return advantage, advantage

    _, advantage = jax.lax.scan(backward, jnp.zeros_like(delta[0]), (delta, done), reverse=True)
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


def group_relative(
    returns: Float[Array, "B"], is_member: Bool[Array, "B"], group_size: int, scale: bool
) -> Float[Array, "B"]:
    """The advantage of each episode over its group of G = ``group_size`` consecutive ones (GRPO).

        Â_i = R_i − mean(R),     with ``scale` divided by (standard deviation of R + 1e-4)

    Source: Shao et al. 2024, 'DeepSeekMath', section 4.1.2; Liu et al. 2025 leave out the division,
    which gives prompts with similar returns more weight. The deviation has the divisor n; neither
    that nor the 1e-4, which bounds the amplification of rounding, is from a paper. Mean and
    deviation are those of the episodes with ``is_member``; the others have advantage 0. A group of
    equal returns has advantage exactly 0.
    """
    centred, members = _centred_groups(returns, is_member, group_size)
    if scale:
        count = jnp.maximum(members.sum(axis=1, keepdims=True), 1)
        centred /= jnp.sqrt((centred**2).sum(axis=1, keepdims=True) / count) + 1e-4
    return centred.ravel()


def leave_one_out(
    returns: Float[Array, "B"], is_member: Bool[Array, "B"], group_size: int
) -> Float[Array, "B"]:
    """The return minus the mean return of the other episodes of the group (RLOO).

        Â_i = R_i − 1/(n − 1) Σ_{j ≠ i} R_j = n/(n − 1) (R_i − mean(R))

    Source: Kool et al. 2019; Ahmadian et al. 2024, eq. 6. ``is_member`` and groups are those of
    `group_relative`; the only member of a group has advantage 0.
    """
    centred, members = _centred_groups(returns, is_member, group_size)
    count = members.sum(axis=1, keepdims=True)
    return (centred * count / jnp.maximum(count - 1, 1)).ravel()


def _centred_groups(
    returns: Float[Array, "B"], is_member: Bool[Array, "B"], group_size: int
) -> tuple[Float[Array, "n G"], Bool[Array, "n G"]]:
    """Returns minus the mean of their group, 0 for others than members; and who is a member.

    Differences to the smallest return are averaged, which are exactly 0 if all returns are equal.
    """
    members = is_member.reshape(-1, group_size)
    groups = returns.reshape(-1, group_size)
    smallest = jnp.where(members, groups, jnp.inf).min(axis=1, keepdims=True)
    excess = jnp.where(members, groups - smallest, 0)
    count = jnp.maximum(members.sum(axis=1, keepdims=True), 1)
    return jnp.where(members, excess - excess.sum(axis=1, keepdims=True) / count, 0), members


def estimate_grpo(
    config: Any, transitions: Transition, reward: Float[Array, "T B"]
) -> tuple[Float[Array, "T B"], Float[Array, "T B"]]:
    """`group_relative` of the sums of rewards of a rollout, at every chosen action of an episode.

    Episodes without a chosen action are not members of their group.
    """
    returns, is_member = _episode_returns(transitions, reward)
    advantage = group_relative(returns, is_member, config.group_size, config.normalize_group)
    return _at_chosen_actions(transitions, advantage, returns)


def estimate_rloo(
    config: Any, transitions: Transition, reward: Float[Array, "T B"]
) -> tuple[Float[Array, "T B"], Float[Array, "T B"]]:
    """`leave_one_out` of the sums of rewards of a rollout, at every chosen action of an episode.

    Episodes without a chosen action are not members of their group.
    """
    returns, is_member = _episode_returns(transitions, reward)
    advantage = leave_one_out(returns, is_member, config.group_size)
    return _at_chosen_actions(transitions, advantage, returns)


def _episode_returns(
    transitions: Transition, reward: Float[Array, "T B"]
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """The sum of the rewards of each first episode, and whether it has a chosen action."""
    returns = jnp.where(transitions.valid, reward, 0).sum(axis=0)
    return returns, transitions.mask.any(axis=0)


def _at_chosen_actions(
    transitions: Transition, advantage: Float[Array, "B"], returns: Float[Array, "B"]
) -> tuple[Float[Array, "T B"], Float[Array, "T B"]]:
    """The advantage at each chosen action, and the return as the target of every step."""
    return (
        jnp.where(transitions.mask, advantage[None], 0),
        jnp.broadcast_to(returns[None], transitions.mask.shape),
    )


ADVANTAGES: dict[str, Estimator] = {
    "gae": estimate_gae,
    "returns": estimate_returns,
    "grpo": estimate_grpo,
    "rloo": estimate_rloo,
}
