"""Training of a reward model: the score of a text, learnt from which texts people prefer."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from purejaxppo.losses import masked_mean
from purejaxppo.rlhf.preference_losses import (
    all_pairs_loss,
    bradley_terry_loss,
    centering_penalty,
    preference_of_ratings,
    share_above,
    weighted_mean,
)
from purejaxppo.rlhf.reward_network import RewardModel, scores
from purejaxppo.rlhf.supervised import (
    Loss,
    SupervisedResult,
    make_supervised_train,
    supervised_job,
)
from purejaxppo.rlhf.supervised_settings import SupervisedSettings
from purejaxppo.rlhf.texts import Pairs, Ranked, Texts, concatenated, with_padding_of_zeros
from purejaxppo.runs.programs import Job
from purejaxppo.types import PRNGKey, PyTree
from purejaxppo.validation import NOT_NEGATIVE, UNIT, checked_leaf


def make_reward_model(
    settings: SupervisedSettings,
    model: RewardModel,
    centering_coef: float | Array = 0.0,
    token_dropout: float | Array = 0.0,
    lm_coef: float | Array = 0.0,
) -> Callable[[PRNGKey, PyTree, Pairs | Ranked], SupervisedResult]:
    """``train(key, params, data) -> SupervisedResult``: pure, for jit, and for vmap over keys.

    ``data`` are `Pairs`, with the mean of `bradley_terry_loss` over the pairs of a minibatch as the
    loss, or `Ranked` texts, with the `all_pairs_loss` of their ratings. Either way all texts of a
    minibatch go through the decoder together. The mean `centering_penalty` of the compared texts is
    added with the coefficient ``centering_coef``. ``params=None`` starts from new parameters; see
    `from_policy`.

    Two arguments help with small data. ``token_dropout`` is the probability with which a token
    between the first and the last of a text is replaced by token 0 (Iyyer et al. 2015, 'Deep
    unordered composition', section 3.1). ``lm_coef`` is the coefficient of the mean cross-entropy
    of the next token of the texts, which keeps the decoder a language model (Radford et al. 2018,
    'Improving language understanding by generative pre-training', eq. 5).

    The metrics are those of `make_supervised_trainer` and ``accuracy`` (the share of comparisons
    whose chosen text has the higher score; a tie counts half), ``score_difference`` (mean of
    r_w − r_l) and ``score`` (mean of all scores). Check the data with `require_pairs` first.
    """
    loss = _loss(model, centering_coef, token_dropout, lm_coef)
    train_on = make_supervised_train(settings, loss, model.init)

    def train(key: PRNGKey, params: PyTree, data: Pairs | Ranked) -> SupervisedResult:
        return train_on(key, params, {"data": data})

    return train


def reward_model_job(
    settings: SupervisedSettings,
    model: RewardModel,
    num_examples: int,
    centering_coef: float | Array = 0.0,
    token_dropout: float | Array = 0.0,
    lm_coef: float | Array = 0.0,
) -> Job:
    """`make_reward_model` for ``run_job(job, params=..., frozen={"data": data})``."""
    loss = _loss(model, centering_coef, token_dropout, lm_coef)
    return supervised_job(settings, num_examples, loss, model.init)


def evaluate(
    model: RewardModel, params: PyTree, pairs: Pairs, batch_size: int = 64
) -> dict[str, Float[Array, ""]]:
    """``loss`` (margins included), ``accuracy`` and ``score_difference`` on held-out pairs."""
    chosen = scores(model, params, pairs.chosen, batch_size)
    rejected = scores(model, params, pairs.rejected, batch_size)
    return {
        "loss": bradley_terry_loss(chosen, rejected, jnp.asarray(pairs.margin)).mean(),
        "accuracy": share_above(chosen, rejected),
        "score_difference": (chosen - rejected).mean(),
    }


# ------------------------------------------------------------------------------------------ parts


def _loss(
    model: RewardModel,
    centering_coef: float | Array,
    token_dropout: float | Array,
    lm_coef: float | Array,
) -> Loss:
    checked_leaf("centering_coef", centering_coef, NOT_NEGATIVE)
    checked_leaf("lm_coef", lm_coef, NOT_NEGATIVE)
    checked_leaf("token_dropout", token_dropout, UNIT)

    def loss(
        params: PyTree, examples: Pairs | Ranked, frozen: Mapping[str, Any], key: PRNGKey
    ) -> tuple[Array, dict[str, Array]]:
        texts = _texts_of(examples)
        tokens = _with_dropped_tokens(key, texts, token_dropout)
        has_language_loss = not isinstance(lm_coef, float | int) or lm_coef > 0
        if has_language_loss:
            score, language_loss = _score_and_language_loss(model, params, texts, tokens)
        else:
            score = model.score(params, tokens, texts.length)
            language_loss = jnp.zeros((), score.dtype)
        if isinstance(examples, Ranked):
            weight = preference_of_ratings(examples.rating, examples.prompt)
            value = all_pairs_loss(score, weight)
            chosen, rejected = jnp.broadcast_arrays(score[:, None], score[None])
        else:
            chosen, rejected = jnp.split(score, 2)
            value = bradley_terry_loss(chosen, rejected, examples.margin).mean()
            weight = jnp.ones_like(chosen)
        metrics = {
            "accuracy": weighted_mean((1 + jnp.sign(chosen - rejected)) / 2, weight),
            "score_difference": weighted_mean(chosen - rejected, weight),
            "score": score.mean(),
        }
        penalty = weighted_mean(centering_penalty(chosen, rejected), weight)
        return value + centering_coef * penalty + lm_coef * language_loss, metrics

    return loss


def _score_and_language_loss(
    model: RewardModel, params: PyTree, texts: Texts, tokens: Int[Array, "n L"]
) -> tuple[Float[Array, "n"], Float[Array, ""]]:
    """The scores, and the mean cross-entropy of the next token given ``tokens``, in nats."""
    following = jnp.roll(with_padding_of_zeros(texts).tokens, -1, axis=1)
    score, log_prob = model.score_and_log_prob(params, tokens, texts.length, following)
    return score, -masked_mean(log_prob[:, :-1], texts.text_mask.T)


def _texts_of(examples: Pairs | Ranked) -> Texts:
    """All texts of a minibatch; of pairs, first those that were chosen."""
    if isinstance(examples, Ranked):
        return examples.texts
    return concatenated(examples.chosen, examples.rejected)


def _with_dropped_tokens(
    key: PRNGKey, texts: Texts, probability: float | Array
) -> Int[Array, "n L"]:
    """The tokens; random ones between the first and the last of a text are replaced by 0."""
    if isinstance(probability, float | int) and probability == 0:
        return texts.tokens
    index = jnp.arange(texts.tokens.shape[1])[None]
    is_inside = (index > 0) & (index < texts.length[:, None] - 1)
    is_dropped = jax.random.bernoulli(key, probability, texts.tokens.shape)
    return jnp.where(is_dropped & is_inside, 0, texts.tokens)
