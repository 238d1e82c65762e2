"""`kl_shaped`: the reward of a language model, its score minus the divergence from a reference."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from purejaxppo.losses import k3
from purejaxppo.networks.temperature import with_temperature
from purejaxppo.rlhf.decoding import context_of
from purejaxppo.rlhf.texts import Score, Texts, scores_of
from purejaxppo.types import ConfigError, Model, PyTree, Reward, Rewards, Transition
from purejaxppo.updates.ppo import REF_LOG_PROB


class KLDivergence(NamedTuple):
    """Two estimates of KL(π ‖ π_ref) at each step, in nats; 0 outside the mask (Schulman 2020)."""

    k1: Float[Array, "T B"]  # log π − log π_ref
    k3: Float[Array, "T B"]  # π_ref / π − 1 − log(π_ref / π) ≥ 0


def kl_shaped(
    score: Score,
    model: Model,
    eos: int,
    *,
    score_clip: float | None = None,
    missing_end_penalty: float = 0.0,
) -> Reward:
    """A score of the whole text and a penalty for every token:

        r_t = −β (log π(a_t | s_t) − log π_ref(a_t | s_t)) + [t is the last step] score(text)

    so that the return of an episode is score − β KL(π ‖ π_ref), up to sampling (Ziegler et al.
    2019, eq. 2; Ouyang et al. 2022, eq. 2). The best policy is π* ∝ π_ref · exp(score / β). Only
    chosen tokens are penalised. The estimate k3 is measured but is no reward: its gradient has no
    optimum (tokens that are rarer than in the reference lose all probability).

    With ``config.ref_kl_loss`` the reward is the score alone, and the divergence is a term of the
    loss, which is another objective (`losses.reference_kl`).

    β is ``config.ref_kl_coef``, and with ``config.ref_kl_target`` it adapts (`adapt_ref_kl_coef`).
    The temperature of the config applies to the reference too.

    A token that the reference excludes has the reward −∞, unless β = 0.

    ``frozen`` is a dict: ``reference`` holds the parameters of π_ref, whose model is ``model``, and
    ``score`` those that are passed to the score, if it has any. With β = 0 the reference may be
    missing.

    Metrics are means over the episodes of an iteration: ``episode_return``, the score; ``ref_kl``
    and ``ref_kl_k3``, the sums over an episode of `KLDivergence`, in nats; ``ref_kl_coef``, the β
    of this iteration; ``shaped_return``, the sum of the rewards; ``completion_length``, in tokens;
    ``share_ended``, the share of the texts that end with ``eos``.

    Main arguments:
        score: ``(tokens [B, L], lengths [B], params) -> [B]``, a function that can be traced.
        model: the model of the reference.
        eos: the end-of-text token.

    Other arguments:
        score_clip: bound on the absolute value of the score.
        missing_end_penalty: subtracted from the score of a text without an end.

    Evaluations of the trained policy (``eval_every`` of `fit`) know the environment only, whose
    reward is 0.

    Raises `ConfigError` without whole episodes, for a missing reference, for texts that are longer
    than the context of the model, and for a score of another shape.
    """

    def init(config: Any) -> PyTree:
        if config.ref_kl_target is None:
            return ()
        return jnp.asarray(config.ref_kl_coef, jnp.result_type(float))

    def step(state: PyTree, transitions: Transition, config: Any, frozen: PyTree) -> Rewards:
        if not config.whole_episodes:
            raise ConfigError("kl_shaped scores whole texts: set episodic=True")
        _require_context(model, len(transitions.obs))
        beta = config.ref_kl_coef if config.ref_kl_target is None else state
        has_reference = _has_reference(config, frozen)
        score_params = frozen.get("score") if isinstance(frozen, dict) else None
        texts = texts_of(transitions)
        ended = has_end(transitions, eos)
        raw_score = scores_of(score, texts, score_params)
        bounded = raw_score if score_clip is None else jnp.clip(raw_score, -score_clip, score_clip)
        bounded = jnp.where(ended, bounded, bounded - missing_end_penalty)
        reward = jnp.where(is_last_step(transitions), bounded[None], 0)
        metrics = {
            "episode_return": raw_score.mean(),
            "completion_length": (texts.length - texts.prompt_length).mean(dtype=reward.dtype),
            "share_ended": ended.mean(dtype=reward.dtype),
        }
        is_in_loss = config.ref_kl_loss != "none"
        extras = {}
        if is_in_loss:  # without a reference β is 0
            extras[REF_LOG_PROB] = transitions.log_prob
        if has_reference:
            tempered = with_temperature(model, config.temperature)
            ref_log_prob = _reference_log_prob(tempered, frozen, transitions)
            kl = _divergence(ref_log_prob, transitions)
            if is_in_loss:
                extras[REF_LOG_PROB] = ref_log_prob
            else:
                # Not 0 · k1, which would be NaN where the reference excludes a token.
                reward -= jnp.where(jnp.asarray(beta) > 0, beta * kl.k1, 0)
            metrics["ref_kl"] = kl.k1.sum(axis=0).mean()
            metrics["ref_kl_k3"] = kl.k3.sum(axis=0).mean()
            metrics["ref_kl_coef"] = jnp.asarray(beta, reward.dtype)
            if config.ref_kl_target is not None:
                state = adapt_ref_kl_coef(
                    beta, metrics["ref_kl"], config.ref_kl_target, config.ref_kl_horizon, len(ended)
                )
        metrics["shaped_return"] = reward.sum(axis=0).mean()
        return Rewards(reward, state, metrics, extras)

    return Reward(init, step)


def adapt_ref_kl_coef(
    beta: Float[Array, ""],
    kl: Float[Array, ""],
    target: Float[Array, ""] | float,
    horizon: Float[Array, ""] | float,
    num_episodes: int,
) -> Float[Array, ""]:
    """β (1 + clip(KL / target − 1, ±0.2) · n / horizon), with the KL per episode, in nats.

    n is the number of episodes in which the KL was measured. Ziegler et al. 2019, section 2.2, have
    the factor K_β = 0.1; their code has n / horizon, with which β adapts equally fast per episode
    whatever the batch. The mean of k1 over few episodes can be negative; β then falls, as for any
    KL below the target.
    """
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return beta * (1 + error * num_episodes / horizon)


def texts_of(transitions: Transition) -> Texts:
    """The texts of a rollout of whole episodes in `envs.tokens`, L = T + 1; 0 after their end."""
    # The next token is the action if it was chosen, else the next token of the prompt.
    following = jnp.concatenate([transitions.obs[1:], transitions.action[-1:]])
    following = jnp.where(transitions.mask, transitions.action, following)
    tokens = jnp.concatenate([transitions.obs[:1], jnp.where(transitions.valid, following, 0)])
    num_steps = transitions.valid.sum(axis=0, dtype=jnp.int32)
    num_chosen = transitions.mask.sum(axis=0, dtype=jnp.int32)
    return Texts(
        tokens=tokens.T.astype(jnp.int32),
        length=num_steps + 1,
        prompt_length=num_steps + 1 - num_chosen,
    )


def is_last_step(transitions: Transition) -> Bool[Array, "T B"]:
    """Whether a step appends the last token of its text."""
    valid = transitions.valid
    following = jnp.concatenate([valid[1:], jnp.zeros_like(valid[:1])])
    return valid & ~following


def has_end(transitions: Transition, eos: int) -> Bool[Array, "B"]:
    """Whether the model ended the text by ``eos``; one inside the prompt is no end."""
    return (transitions.mask & (transitions.action == eos)).any(axis=0)


def _require_context(model: Model, num_steps: int) -> None:
    """Raise `ConfigError` if the environment has texts that are longer than the context."""
    if num_steps > context_of(model):
        raise ConfigError(
            f"the episodes of the environment have up to {num_steps} steps, a token each, and the "
            f"context of the model has {context_of(model)}"
        )


def _has_reference(config: Any, frozen: PyTree) -> bool:
    """Whether there is a reference. Raises `ConfigError` if it is missing and β is not 0."""
    if isinstance(frozen, dict) and frozen.get("reference") is not None:
        return True
    is_zero = isinstance(config.ref_kl_coef, float) and config.ref_kl_coef == 0
    if config.ref_kl_target is not None or not is_zero:
        raise ConfigError(
            "the KL penalty needs a reference policy: pass frozen={'reference': params}, or set "
            "ref_kl_coef=0 and no ref_kl_target"
        )
    return False


def _reference_log_prob(
    model: Model, frozen: PyTree, transitions: Transition
) -> Float[Array, "T B"]:
    carry = model.initial_carry(transitions.mask.shape[1])
    reference, _ = model.unroll(frozen["reference"], carry, transitions.obs, transitions.reset)
    return reference.log_prob(transitions.action)


def _divergence(ref_log_prob: Float[Array, "T B"], transitions: Transition) -> KLDivergence:
    """`KLDivergence` from log π_ref(a_t | s_t)."""
    log_ratio = jnp.where(transitions.mask, ref_log_prob - transitions.log_prob, 0)
    return KLDivergence(k1=-log_ratio, k3=k3(log_ratio))
