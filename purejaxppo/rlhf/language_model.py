"""`language_model`: a decoder as the `Model` of an agent whose actions are tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Int

from purejaxppo.networks.distributions import Categorical
from purejaxppo.rlhf.transformer import Decoder, DecoderSizes
from purejaxppo.types import Distribution, Model, PRNGKey, PyTree
from purejaxppo.validation import one_of

CRITICS = ("own", "shared", "none")


@functools.cache  # equal models share their compiled programs
def language_model(sizes: DecoderSizes, critic: str = "own") -> Model:
    """The policy softmax(logits) over the next token, and a value function.

    ``critic`` is a second decoder of the same sizes (``own``), a head on the decoder of the policy
    (``shared``), or ``none``: the value is 0, for estimators that compare the texts of a group. The
    value head starts at zero.

    Observations are tokens [B]. The carry holds the keys and values of the text so far, of at most
    C = ``sizes.context`` tokens in each row, and the number of these tokens. ``step`` appends one
    token. ``unroll`` computes the same for a whole rollout in one pass, in which attention is
    limited to the tokens of an episode. A text of more than C tokens gives NaN.
    """
    one_of("critic", critic, CRITICS)
    decoder = Decoder(sizes)
    head = nn.Dense(1, kernel_init=nn.initializers.zeros, param_dtype=jnp.result_type(float))
    decoders = {"own": ("policy", "value"), "shared": ("trunk",), "none": ("policy",)}[critic]

    def init(key: PRNGKey, obs: Int[Array, "B"]) -> PyTree:
        key_head, *keys = jax.random.split(key, len(decoders) + 1)
        carry = initial_carry(len(obs))
        tokens, position, mask = _inputs(obs[None], jnp.zeros_like(obs, bool)[None], carry)
        params: dict[str, Any] = {"policy": {}, "value": {}}
        for name, key_decoder in zip(decoders, keys, strict=True):
            trunk = decoder.init(key_decoder, tokens, position, carry[name], mask)
            params[name] = {"decoder": trunk} if name == "value" else trunk
        if critic != "none":
            hidden = jnp.zeros((1, sizes.width), jnp.result_type(float))
            params["value"] |= {"head": head.init(key_head, hidden)}
        return params

    def initial_carry(batch_size: int) -> PyTree:
        shape = (batch_size, sizes.num_kv_heads, sizes.context, sizes.head_width)
        layer = (jnp.zeros(shape, jnp.result_type(float)),) * 2
        carry: dict[str, Any] = {name: (layer,) * sizes.num_layers for name in decoders}
        return carry | {"size": jnp.zeros(batch_size, jnp.int32)}

    def step(
        params: PyTree, carry: PyTree, obs: Int[Array, "B"], reset: Bool[Array, "B"]
    ) -> tuple[PyTree, Distribution, Array]:
        position = jnp.where(reset, 0, carry["size"])
        is_seen = jnp.arange(sizes.context)[None, None] <= position[:, None, None]
        inputs = (obs[:, None], position[:, None], is_seen)
        distribution, value, caches = forward(params, carry, *inputs, place=position)
        first = jax.tree.map(lambda x: x[0], (distribution, value))
        return caches | {"size": position + 1}, *first

    def unroll(
        params: PyTree, carry: PyTree, obs: Int[Array, "T B"], reset: Bool[Array, "T B"]
    ) -> tuple[Distribution, Array]:
        distribution, value, _ = forward(params, carry, *_inputs(obs, reset, carry))
        return distribution, value

    def forward(
        params: PyTree,
        carry: PyTree,
        tokens: Int[Array, "B S"],
        position: Int[Array, "B S"],
        mask: Bool[Array, "B S K"],
        place: Int[Array, "B"] | None = None,
    ) -> tuple[Distribution, Array, PyTree]:
        """Policy and value [S, B] after each token, and the caches of the decoders."""
        hidden = {}
        caches = {}
        for name in decoders:
            own = params[name]["decoder"] if name == "value" else params[name]
            arguments = (tokens, position, carry[name], mask, place)
            hidden[name], caches[name] = decoder.apply(own, *arguments)
        for_policy = hidden[decoders[0]]
        for_policy = jnp.where(position[..., None] < sizes.context, for_policy, jnp.nan)
        # Time becomes the first axis before the logits, which are many times larger.
        rows = jnp.swapaxes(for_policy, 0, 1).reshape(-1, sizes.width)
        policy_params = params[decoders[0]]
        logits: Any = decoder.apply(policy_params, rows, method="logits")
        logits = logits.reshape((*tokens.T.shape, -1))
        value = jnp.zeros(tokens.T.shape, logits.dtype)
        if critic != "none":
            outputs: Any = head.apply(params["value"]["head"], hidden[decoders[-1]])
            value = outputs[..., 0].T
        return Categorical(logits), value, caches

    return Model(init, initial_carry, step, unroll)


def policy_decoder(params: PyTree) -> PyTree:
    """The parameters of the decoder that predicts tokens, of a model with any critic."""
    return params["trunk"] if "trunk" in params else params["policy"]


def with_critic(
    params: PyTree, sizes: DecoderSizes, critic: str, value_decoder: PyTree = None
) -> PyTree:
    """Parameters for ``language_model(sizes, critic)`` with the policy of other ``params``.

    The value is 0 at first. An own critic starts with the parameters ``value_decoder``, such as
    those of a reward model (Ouyang et al. 2022, appendix C.4); by default with the policy's.
    """
    decoder = policy_decoder(params)
    if critic == "none":
        return {"policy": decoder, "value": {}}
    dtype = jnp.result_type(float)
    kernel = jnp.zeros((sizes.width, 1), dtype)
    head = {"params": {"kernel": kernel, "bias": jnp.zeros(1, dtype)}}
    if critic == "shared":
        return {"policy": {}, "trunk": decoder, "value": {"head": head}}
    own = decoder if value_decoder is None else value_decoder
    return {"policy": decoder, "value": {"decoder": own, "head": head}}


def _inputs(
    obs: Int[Array, "S B"], reset: Bool[Array, "S B"], carry: PyTree
) -> tuple[Int[Array, "B S"], Int[Array, "B S"], Bool[Array, "B S K"]]:
    """Tokens, positions and the attention mask of S tokens that follow the text of the carry.

    Positions count from the last reset. A token attends to itself and to the earlier tokens of its
    episode: those after the last reset and, before the first reset, those in the cache.
    """
    tokens = obs.T
    is_first = reset.T
    size = carry["size"]
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    # The step of the last reset; −1 before the first one.
    start = jax.lax.cummax(jnp.where(is_first, index, -1), axis=1)
    position = jnp.where(start >= 0, index - start, size[:, None] + index)
    caches = [leaf for name, leaf in carry.items() if name != "size"]
    context = jax.tree.leaves(caches)[0].shape[2]
    in_cache = (start < 0)[:, :, None] & (jnp.arange(context)[None] < size[:, None])[:, None]
    is_causal = index[..., None] >= index[:, None]
    in_episode = is_causal & (start[:, :, None] == start[:, None])
    return tokens, position, jnp.concatenate([in_cache, in_episode], axis=2)
