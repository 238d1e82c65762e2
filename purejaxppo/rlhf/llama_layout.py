"""The layout of Hugging Face's Llama and of llama.cpp: names, sizes and the order of axes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from purejaxppo.rlhf.language_model import language_model
from purejaxppo.rlhf.transformer import DecoderSizes
from purejaxppo.trees import from_named, named_leaves
from purejaxppo.types import ConfigError, PyTree

# Rows of names: ours, those of Hugging Face's Llama, and those of llama.cpp.
HUGGING_FACE = 1
LLAMA_CPP = 2
EMBEDDING = "embedding/embedding"
OUTER_NAMES = (
    (EMBEDDING, "model.embed_tokens.weight", "token_embd.weight"),
    ("norm/scale", "model.norm.weight", "output_norm.weight"),
)
LAYER_NAMES = (
    ("attention_norm/scale", "input_layernorm.weight", "attn_norm.weight"),
    ("query/kernel", "self_attn.q_proj.weight", "attn_q.weight"),
    ("key/kernel", "self_attn.k_proj.weight", "attn_k.weight"),
    ("value/kernel", "self_attn.v_proj.weight", "attn_v.weight"),
    ("attention_out/kernel", "self_attn.o_proj.weight", "attn_output.weight"),
    ("mlp_norm/scale", "post_attention_layernorm.weight", "ffn_norm.weight"),
    ("gate/kernel", "mlp.gate_proj.weight", "ffn_gate.weight"),
    ("up/kernel", "mlp.up_proj.weight", "ffn_up.weight"),
    ("down/kernel", "mlp.down_proj.weight", "ffn_down.weight"),
)
SIZE_NAMES = (
    ("context", "max_position_embeddings", "llama.context_length"),
    ("width", "hidden_size", "llama.embedding_length"),
    ("num_layers", "num_hidden_layers", "llama.block_count"),
    ("num_heads", "num_attention_heads", "llama.attention.head_count"),
    ("num_kv_heads", "num_key_value_heads", "llama.attention.head_count_kv"),
    ("mlp_width", "intermediate_size", "llama.feed_forward_length"),
    ("rope_base", "rope_theta", "llama.rope.freq_base"),
    ("norm_eps", "rms_norm_eps", "llama.attention.layer_norm_rms_epsilon"),
)


def hugging_face_arrays(decoder: PyTree) -> dict[str, NDArray[Any]]:
    """The parameters of a `transformer.Decoder` under the names that Hugging Face's Llama has.

    Matrices are [outputs, inputs] there, the transpose of ours.
    """
    named = {name: np.asarray(x) for name, x in named_leaves(decoder["params"]).items()}
    names = parameter_names(sum(name.endswith("query/kernel") for name in named))
    arrays = {}
    for ours, theirs, _ in names:
        x = named[ours]
        is_matrix = x.ndim > 1 and ours != EMBEDDING
        matrix = x.reshape(_num_inputs(ours, x), -1).T if is_matrix else x
        arrays[theirs] = np.ascontiguousarray(matrix)
    return arrays


def read_sizes(
    path: Any,
    described: Mapping[str, Any],
    form: int,
    vocab_size: int | None,
    context: int | None,
) -> DecoderSizes:
    """The sizes that a file describes under the names of its form, with another context."""
    names = {row[0]: row[form] for row in SIZE_NAMES}
    given = {ours: described.get(theirs) for ours, theirs in names.items()}
    for ours, theirs in names.items():
        if given[ours] is None:
            raise ConfigError(f"{path} has no {theirs}")
    if vocab_size is None:
        raise ConfigError(f"{path} has no vocab_size")
    if context is not None:
        given["context"] = context
    try:
        return DecoderSizes(vocab_size=vocab_size, **given)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"the sizes in {path} cannot be used: {error}") from None


def read_decoder(
    path: Any,
    sizes: DecoderSizes,
    form: int,
    arrays: Mapping[str, Any],
    array: Callable[[str], NDArray[Any]] | None = None,
) -> tuple[DecoderSizes, PyTree]:
    """The decoder from the arrays of a file, which have the names of its form.

    ``array`` gives the array with a name; by default it is that in ``arrays``.
    """
    names = {row[0]: row[form] for row in parameter_names(sizes.num_layers)}
    missing = sorted(set(names.values()) - set(arrays))
    if missing:
        raise ConfigError(f"{path} has no array {missing[0]}")
    unknown = sorted(name for name in set(arrays) - set(names.values()) if "inv_freq" not in name)
    if unknown:
        raise ConfigError(f"{path} has the array {unknown[0]}, which this decoder does not have")
    like = decoder_shapes(sizes)["params"]
    named = {}
    for ours, x in named_leaves(like).items():
        theirs = names[ours]
        matrix = arrays[theirs] if array is None else array(theirs)
        is_matrix = x.ndim > 1 and ours != EMBEDDING
        shape = (x.size // _num_inputs(ours, x), _num_inputs(ours, x)) if is_matrix else x.shape
        if matrix.shape != shape:
            raise ConfigError(
                f"{theirs} in {path} has the shape {matrix.shape}: with the sizes there it must be "
                f"{shape}"
            )
        named[ours] = jnp.asarray((matrix.T if is_matrix else matrix).reshape(x.shape), x.dtype)
    return sizes, {"policy": {"params": from_named(named, like)}, "value": {}}


def decoder_shapes(sizes: DecoderSizes) -> PyTree:
    """The shapes of the parameters of a decoder."""
    model = language_model(sizes, "none")
    init = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(1, jnp.int32)))
    return init["policy"]


def parameter_names(num_layers: int) -> list[tuple[str, str, str]]:
    """Our name of every parameter, that of Hugging Face, and that of llama.cpp."""
    return [*OUTER_NAMES] + [
        (f"blocks_{i}/{ours}", f"model.layers.{i}.{hugging_face}", f"blk.{i}.{llama_cpp}")
        for i in range(num_layers)
        for ours, hugging_face, llama_cpp in LAYER_NAMES
    ]


def _num_inputs(name: str, x: Any) -> int:
    """The inputs of a matrix: its first axis, or in the output of attention all but its last."""
    return x.size // x.shape[-1] if "attention_out" in name else x.shape[0]
