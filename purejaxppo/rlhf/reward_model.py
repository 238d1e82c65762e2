"""A reward model: the score of a text, learnt from which of two texts people prefer."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from purejaxppo.rlhf.language_model import policy_decoder
from purejaxppo.rlhf.preference_losses import (
    all_pairs_loss,
    bradley_terry_loss,
    centering_penalty,
    preference_of_ratings,
    share_above,
    weighted_mean,
)
from purejaxppo.rlhf.supervised import (
    Loss,
    SupervisedResult,
    in_batches,
    make_supervised_train,
    supervised_job,
)
from purejaxppo.rlhf.supervised_settings import SupervisedSettings
from purejaxppo.rlhf.texts import Pairs, Ranked, Texts, concatenated, with_padding_of_zeros
from purejaxppo.rlhf.transformer import Decoder, DecoderSizes
from purejaxppo.runs.programs import Job
from purejaxppo.types import ConfigError, PRNGKey, PyTree
from purejaxppo.validation import NOT_NEGATIVE, UNIT, checked_leaf


class RewardModel(NamedTuple):
    """A scalar function of texts. ``params`` is a dict: decoder, head, shift and scale."""

    init: Callable[[PRNGKey], PyTree]  # key -> params
    score: Callable[[PyTree, Array, Array], Array]  # params, tokens [n, L], length [n] -> [n]


def reward_model(sizes: DecoderSizes) -> RewardModel:
    """A linear head on the decoder's hidden state h at the last token of a text, its true end:

        score = (w · h − shift) / scale

    w is zero at first. ``shift`` and ``scale`` are 0 and 1 until `standardize` sets them, and have
    no gradient. The padding of a text has no influence. A text without tokens, or with more than
    ``sizes.context``, has the score NaN.
    """
    decoder = Decoder(sizes)
    dtype = jnp.result_type(float)
    head = nn.Dense(1, use_bias=False, kernel_init=nn.initializers.zeros, param_dtype=dtype)

    def init(key: PRNGKey) -> PyTree:
        key_decoder, key_head = jax.random.split(key)
        inputs = _decoder_inputs(sizes, jnp.zeros((1, 1), jnp.int32))
        return {
            "decoder": decoder.init(key_decoder, *inputs),
            "head": head.init(key_head, jnp.zeros((1, sizes.width), dtype)),
            "shift": jnp.zeros((), dtype),
            "scale": jnp.ones((), dtype),
        }

    def score(
        params: PyTree, tokens: Int[Array, "n L"], length: Int[Array, "n"]
    ) -> Float[Array, "n"]:
        texts = with_padding_of_zeros(Texts(tokens, length, jnp.ones_like(length)))
        inputs = _decoder_inputs(sizes, texts.tokens)
        hidden: Any = decoder.apply(params["decoder"], *inputs)[0]
        last = jnp.clip(length - 1, 0, tokens.shape[1] - 1)
        at_end = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        outputs: Any = head.apply(params["head"], at_end)
        shift = jax.lax.stop_gradient(params["shift"])
        scale = jax.lax.stop_gradient(params["scale"])
        is_text = (length >= 1) & (length <= min(sizes.context, tokens.shape[1]))
        return jnp.where(is_text, (outputs[:, 0] - shift) / scale, jnp.nan)

    return RewardModel(init, score)


def from_policy(params: PyTree, policy: PyTree) -> PyTree:
    """The ``params`` of a reward model with the decoder of a policy, as `language_model` has it.

    Raises `ConfigError` if the decoders have different sizes.
    """
    decoder = policy_decoder(policy)
    shapes = jax.tree.map(jnp.shape, (decoder, params["decoder"]))
    if shapes[0] != shapes[1]:
        raise ConfigError("the decoder of the policy has other sizes than that of the reward model")
    return params | {"decoder": decoder}


def make_reward_model(
    settings: SupervisedSettings,
    model: RewardModel,
    centering_coef: float | Array = 0.0,
    token_dropout: float | Array = 0.0,
) -> Callable[[PRNGKey, PyTree, Pairs | Ranked], SupervisedResult]:
    """``train(key, params, data) -> SupervisedResult``: pure, for jit, and for vmap over keys.

    ``data`` are `Pairs`, with the mean of `bradley_terry_loss` over the pairs of a minibatch as the
    loss, or `Ranked` texts, with the `all_pairs_loss` of their ratings. Either way all texts of a
    minibatch go through the decoder together. The mean `centering_penalty` of the compared texts is
    added with the coefficient ``centering_coef``. ``token_dropout`` is the probability with which a
    token between the first and the last of a text is replaced by token 0, a regulariser for small
    data (Iyyer et al. 2015, 'Deep unordered composition', section 3.1). ``params=None`` starts from
    new parameters; see `from_policy`.

    The metrics are those of `make_supervised_trainer` and ``accuracy`` (the share of comparisons
    whose chosen text has the higher score; a tie counts half), ``score_difference`` (mean of
    r_w − r_l) and ``score`` (mean of all scores). Check the data with `require_pairs` first.
    """
    loss = _loss(model, centering_coef, token_dropout)
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
) -> Job:
    """`make_reward_model` for ``run_job(job, params=..., frozen={"data": data})``."""
    loss = _loss(model, centering_coef, token_dropout)
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


def scores(
    model: RewardModel, params: PyTree, texts: Texts, batch_size: int = 64
) -> Float[Array, "n"]:
    """The score of each text, ``batch_size`` texts at a time."""
    return in_batches(lambda x: model.score(params, x.tokens, x.length), texts, batch_size)


def standardize(model: RewardModel, params: PyTree, texts: Texts, batch_size: int = 64) -> PyTree:
    """``params`` with the shift and scale that give the scores of ``texts`` mean 0 and deviation 1.

    ``texts`` are samples of the policy that PPO starts from (Ziegler et al. 2019,
    arXiv:1909.08593, section 2.1). Raises `ConfigError` if all scores are equal; under jit they are
    then not finite.
    """
    x = scores(model, params, texts, batch_size)
    deviation = x.std()
    if not isinstance(deviation, jax.core.Tracer) and not np.asarray(deviation) > 0:
        raise ConfigError(
            f"the scores have the deviation {float(deviation)}: they cannot be given deviation 1"
        )
    shift = params["shift"] + params["scale"] * x.mean()
    return params | {"shift": shift, "scale": params["scale"] * deviation}


# ------------------------------------------------------------------------------------------ parts


def _decoder_inputs(sizes: DecoderSizes, tokens: Int[Array, "n L"]) -> tuple[Any, ...]:
    """Tokens, positions, an empty cache for each layer, and the causal mask."""
    n, width = tokens.shape
    index = jnp.arange(width, dtype=jnp.int32)
    position = jnp.broadcast_to(index[None], (n, width))
    nothing = jnp.zeros((n, 0, sizes.num_kv_heads, sizes.head_width), jnp.result_type(float))
    is_causal = jnp.broadcast_to(index[None, :, None] >= index[None, None], (n, width, width))
    return tokens, position, ((nothing, nothing),) * sizes.num_layers, is_causal


def _loss(model: RewardModel, centering_coef: float | Array, token_dropout: float | Array) -> Loss:
    checked_leaf("centering_coef", centering_coef, NOT_NEGATIVE)
    checked_leaf("token_dropout", token_dropout, UNIT)

    def loss(
        params: PyTree, examples: Pairs | Ranked, frozen: Mapping[str, Any], key: PRNGKey
    ) -> tuple[Array, dict[str, Array]]:
        texts = _texts_of(examples)
        tokens = _with_dropped_tokens(key, texts, token_dropout)
        score = model.score(params, tokens, texts.length)
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
        return value + centering_coef * penalty, metrics

    return loss


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
