"""A decoder-only transformer in the style of Llama (Touvron et al. 2023, arXiv:2302.13971)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from purejaxppo.types import ConfigError
from purejaxppo.validation import POSITIVE, POSITIVE_INT, checked_int, checked_number

# (keys, values) [B, num_kv_heads, K, head width] of one layer; the keys are rotated.
LayerCache = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class DecoderSizes:
    """The sizes of a decoder. Raises `ConfigError` if they do not fit together."""

    vocab_size: int
    context: int  # C, the largest number of tokens in a text
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2  # each is shared by num_heads / num_kv_heads heads (Ainslie et al. 2023)
    mlp_width: int = 352
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("rope_base", "norm_eps"):
                converted: float = checked_number(field.name, value, POSITIVE)
            else:
                converted = checked_int(field.name, value, POSITIVE_INT)
            object.__setattr__(self, field.name, converted)
        if self.width % (2 * self.num_heads):
            raise ConfigError(
                f"width = {self.width}: it must be a multiple of 2 · num_heads = "
                f"{2 * self.num_heads}, because rotary positions rotate pairs"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


class Decoder(nn.Module):
    """RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied embeddings; no biases.

    ``__call__`` returns the hidden states of tokens, and the caches with their keys and values.
    ``logits`` multiplies hidden states with the embeddings.
    """

    sizes: DecoderSizes

    def setup(self) -> None:
        sizes = self.sizes
        dtype = jnp.result_type(float)
        init = nn.initializers.normal(0.02)
        self.embedding = nn.Embed(
            sizes.vocab_size, sizes.width, embedding_init=init, param_dtype=dtype
        )
        self.blocks = [Block(sizes) for _ in range(sizes.num_layers)]
        self.norm = nn.RMSNorm(sizes.norm_eps, param_dtype=dtype)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        position: Int[Array, "B S"],
        cache: tuple[LayerCache, ...],
        mask: Bool[Array, "B S K"],
        place: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B S W"], tuple[LayerCache, ...]]:
        """The hidden states, and the K keys and values of each layer.

        Without ``place`` these are those of the cache followed by those of the tokens. With
        ``place`` they are the cache, into which the one token of each row is written (`extended`).
        ``mask`` says to which of them a token attends.
        """
        x = self.embedding(tokens)
        caches = []
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x, layer_cache = block(x, position, layer_cache, mask, place)
            caches.append(layer_cache)
        return self.norm(x), tuple(caches)

    def logits(self, hidden: Float[Array, "*n W"]) -> Float[Array, "*n V"]:
        return self.embedding.attend(hidden)


class Block(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    sizes: DecoderSizes

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S W"],
        position: Int[Array, "B S"],
        cache: LayerCache,
        mask: Bool[Array, "B S K"],
        place: Int[Array, "B"] | None,
    ) -> tuple[Float[Array, "B S W"], LayerCache]:
        sizes = self.sizes
        dtype = jnp.result_type(float)
        # The output of 2 · num_layers sublayers is added up, so each begins smaller.
        init_out = nn.initializers.normal(sizes.width**-0.5 / (2 * sizes.num_layers) ** 0.5)

        def linear(name: str, *features: int) -> Any:
            init = nn.initializers.normal(sizes.width**-0.5)
            return nn.DenseGeneral(
                features, use_bias=False, name=name, kernel_init=init, param_dtype=dtype
            )

        h = nn.RMSNorm(sizes.norm_eps, name="attention_norm", param_dtype=dtype)(x)
        query = rotate(linear("query", sizes.num_heads, sizes.head_width)(h), position, sizes)
        key = rotate(linear("key", sizes.num_kv_heads, sizes.head_width)(h), position, sizes)
        value = linear("value", sizes.num_kv_heads, sizes.head_width)(h)
        keys = extended(cache[0], jnp.swapaxes(key, 1, 2), place)
        values = extended(cache[1], jnp.swapaxes(value, 1, 2), place)
        attended = attention(query, keys, values, mask)
        x += nn.DenseGeneral(
            sizes.width,
            axis=(-2, -1),
            use_bias=False,
            name="attention_out",
            kernel_init=init_out,
            param_dtype=dtype,
        )(attended)

        h = nn.RMSNorm(sizes.norm_eps, name="mlp_norm", param_dtype=dtype)(x)
        gated = nn.silu(linear("gate", sizes.mlp_width)(h)) * linear("up", sizes.mlp_width)(h)
        x += nn.Dense(
            sizes.width, use_bias=False, name="down", kernel_init=init_out, param_dtype=dtype
        )(gated)
        return x, (keys, values)


def extended(
    cache: Float[Array, "B G C D"], new: Float[Array, "B G S D"], place: Int[Array, "B"] | None
) -> Float[Array, "B G K D"]:
    """The cache and then the new entries; with ``place``, the cache with S = 1 new entry there.

    A place outside the cache changes nothing. Within a loop the cache is not copied.
    """
    if place is None:
        return jnp.concatenate([cache, new], axis=2)
    return cache.at[jnp.arange(len(cache)), :, place].set(new[:, :, 0], mode="drop")


def attention(
    query: Float[Array, "B S H D"],
    keys: Float[Array, "B G K D"],
    values: Float[Array, "B G K D"],
    mask: Bool[Array, "B S K"],
) -> Float[Array, "B S H D"]:
    """softmax(q kᵀ / √D) v over the keys in the mask; H / G heads share each of G keys and values.

    (`jax.nn.dot_product_attention` has its softmax in float32 even for float64.)
    """
    batch, num_steps, num_heads, width = query.shape
    num_shared = keys.shape[1]  # G
    shape = (batch, num_shared, num_heads // num_shared, num_steps)
    # Heads and steps become the n = H / G · S rows of one matrix. On a CPU, products with more axes
    # take twice as long for a single step.
    rows = query.reshape((batch, num_steps, num_shared, -1, width)).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape((batch, num_shared, -1, width))
    scores = jnp.einsum("bgnd,bgkd->bgnk", rows, keys).reshape((*shape, -1)) / width**0.5
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(values.dtype)
    weights = weights.reshape((batch, num_shared, -1, weights.shape[-1]))
    attended = jnp.einsum("bgnk,bgkd->bgnd", weights, values).reshape((*shape, width))
    return attended.transpose(0, 3, 1, 2, 4).reshape(query.shape)


def rotate(
    x: Float[Array, "B S H D"], position: Int[Array, "B S"], sizes: DecoderSizes
) -> Float[Array, "B S H D"]:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Pair i of the D / 2 pairs (x_i, x_{i + D/2}) is rotated by the angle position · base^(−2i/D), so
    that the product of a query and a key depends on the difference of their positions. Positions
    are below C.
    """
    half = x.shape[-1] // 2
    frequency = sizes.rope_base ** (-jnp.arange(half, dtype=x.dtype) / half)
    # Few positions occur in many tokens, so their functions are computed once.
    angle = jnp.arange(sizes.context, dtype=x.dtype)[:, None] * frequency[None]
    cos = jnp.cos(angle)[position, None]
    sin = jnp.sin(angle)[position, None]
    first = x[..., :half]
    second = x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
