"""`reward_model`: the score of a text, a linear head on a decoder."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from purejaxppo.networks.distributions import Categorical
from purejaxppo.rlhf.language_model import policy_decoder
from purejaxppo.rlhf.supervised import in_batches
from purejaxppo.rlhf.texts import Texts, with_padding_of_zeros
from purejaxppo.rlhf.transformer import Decoder, DecoderSizes
from purejaxppo.types import ConfigError, PRNGKey, PyTree


class RewardModel(NamedTuple):
    """A scalar function of texts. ``params`` is a dict: decoder, head, shift and scale."""

    init: Callable[[PRNGKey], PyTree]  # key -> params
    score: Callable[[PyTree, Array, Array], Array]  # params, tokens [n, L], length [n] -> [n]
    # The same arguments and tokens y [n, L] -> the scores, and log p(y_t | tokens_0 … t) [n, L].
    score_and_log_prob: Callable[[PyTree, Array, Array, Array], tuple[Array, Array]]


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

    def hidden_states(
        params: PyTree, tokens: Int[Array, "n L"], length: Int[Array, "n"]
    ) -> Float[Array, "n L W"]:
        texts = with_padding_of_zeros(Texts(tokens, length, jnp.ones_like(length)))
        hidden: Any = decoder.apply(params["decoder"], *_decoder_inputs(sizes, texts.tokens))[0]
        return hidden

    def score_of(
        params: PyTree, hidden: Float[Array, "n L W"], length: Int[Array, "n"]
    ) -> Float[Array, "n"]:
        last = jnp.clip(length - 1, 0, hidden.shape[1] - 1)
        at_end = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        outputs: Any = head.apply(params["head"], at_end)
        shift = jax.lax.stop_gradient(params["shift"])
        scale = jax.lax.stop_gradient(params["scale"])
        is_text = (length >= 1) & (length <= min(sizes.context, hidden.shape[1]))
        return jnp.where(is_text, (outputs[:, 0] - shift) / scale, jnp.nan)

    def score(
        params: PyTree, tokens: Int[Array, "n L"], length: Int[Array, "n"]
    ) -> Float[Array, "n"]:
        return score_of(params, hidden_states(params, tokens, length), length)

    def score_and_log_prob(
        params: PyTree,
        tokens: Int[Array, "n L"],
        length: Int[Array, "n"],
        following: Int[Array, "n L"],
    ) -> tuple[Float[Array, "n"], Float[Array, "n L"]]:
        hidden = hidden_states(params, tokens, length)
        logits: Any = decoder.apply(params["decoder"], hidden, method="logits")
        return score_of(params, hidden, length), Categorical(logits).log_prob(following)

    return RewardModel(init, score, score_and_log_prob)


def from_policy(params: PyTree, policy: PyTree) -> PyTree:
    """The ``params`` of a reward model with the decoder of a policy, as `language_model` has it.

    Raises `ConfigError` if the decoders have different sizes.
    """
    decoder = policy_decoder(policy)
    shapes = jax.tree.map(jnp.shape, (decoder, params["decoder"]))
    if shapes[0] != shapes[1]:
        raise ConfigError("the decoder of the policy has other sizes than that of the reward model")
    return params | {"decoder": decoder}


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
    nothing = jnp.zeros((n, sizes.num_kv_heads, 0, sizes.head_width), jnp.result_type(float))
    is_causal = jnp.broadcast_to(index[None, :, None] >= index[None, None], (n, width, width))
    return tokens, position, ((nothing, nothing),) * sizes.num_layers, is_causal
