"""Decoders in the formats of others: safetensors as Hugging Face's Llama has them, and GGUF.

Both need the extra ``rlhf``. Embeddings must be tied, and all other parts those of `transformer`.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from purejaxppo.rlhf.extra import import_extra
from purejaxppo.rlhf.language_model import language_model, policy_decoder
from purejaxppo.rlhf.transformer import DecoderSizes
from purejaxppo.trees import from_named, named_leaves
from purejaxppo.types import ConfigError, PyTree

Arrays = Mapping[str, NDArray[Any]]

# Our names of the parameters, those of Hugging Face's Llama, and those of llama.cpp.
OUTER_NAMES = (
    ("embedding/embedding", "model.embed_tokens.weight", "token_embd.weight"),
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
# Sizes, their names in Hugging Face's config.json, and in the metadata of GGUF after ``llama.``.
SIZE_NAMES = (
    ("width", "hidden_size", "embedding_length"),
    ("num_layers", "num_hidden_layers", "block_count"),
    ("num_heads", "num_attention_heads", "attention.head_count"),
    ("num_kv_heads", "num_key_value_heads", "attention.head_count_kv"),
    ("mlp_width", "intermediate_size", "feed_forward_length"),
    ("rope_base", "rope_theta", "rope.freq_base"),
    ("norm_eps", "rms_norm_eps", "attention.layer_norm_rms_epsilon"),
)
# What Hugging Face's config.json must say, where it says it.
REQUIRED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}


def save_safetensors(directory: str | os.PathLike, sizes: DecoderSizes, params: PyTree) -> Path:
    """Write the decoder that predicts tokens, for ``LlamaForCausalLM.from_pretrained(directory)``.

    The directory is new and holds ``config.json`` and ``model.safetensors``; it is written
    atomically. Raises `ConfigError` if it exists.
    """
    numpy_format = import_extra("safetensors.numpy")
    directory = Path(directory)
    if directory.exists():
        raise ConfigError(f"{directory} exists already: choose another directory for the weights")
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], **REQUIRED}
    config |= {theirs: getattr(sizes, ours) for ours, theirs, _ in SIZE_NAMES}
    config |= {"vocab_size": sizes.vocab_size, "max_position_embeddings": sizes.context}
    arrays = hugging_face_arrays(policy_decoder(params))
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        numpy_format.save_file(arrays, temporary / "model.safetensors", {"format": "pt"})
        temporary.chmod(0o755)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return directory


def hugging_face_arrays(decoder: PyTree) -> dict[str, NDArray[Any]]:
    """The parameters of a `transformer.Decoder` under the names that Hugging Face's Llama has.

    Matrices are [outputs, inputs] there, the transpose of ours.
    """
    named = named_leaves(decoder["params"])
    num_layers = sum(name.endswith("query/kernel") for name in named)
    return {
        theirs: _as_matrix(ours, np.asarray(named[ours])) for ours, theirs, _ in _names(num_layers)
    }


def load_safetensors(
    directory: str | os.PathLike, context: int | None = None
) -> tuple[DecoderSizes, PyTree]:
    """The sizes and the parameters of ``language_model(sizes, "none")`` from a Llama in a directory
    with ``config.json`` and ``model.safetensors``.

    ``context`` replaces the number of tokens that the model was trained for, because caches have
    that size. Raises `ConfigError` if a file is missing or damaged, or if the model is of another
    kind.
    """
    numpy_format = import_extra("safetensors.numpy")
    directory = Path(directory)
    try:
        config = json.loads((directory / "config.json").read_text())
        arrays = numpy_format.load_file(directory / "model.safetensors")
    except OSError as error:
        raise ConfigError(f"cannot read the weights in {directory}: {error.strerror}") from None
    except Exception:  # of JSON and of safetensors
        raise ConfigError(f"the weights in {directory} are damaged: they cannot be read") from None
    for name, value in REQUIRED.items():
        if config.get(name, value) != value:
            raise ConfigError(f"{name} is {config[name]!r} in {directory}: it must be {value!r}")
    if config.get("rope_scaling"):
        raise ConfigError(f"the model in {directory} scales its positions, which is not supported")
    config = {"rope_theta": DecoderSizes.rope_base} | config
    described = {ours: config.get(theirs) for ours, theirs, _ in SIZE_NAMES}
    described["context"] = config.get("max_position_embeddings")
    renamed = {ours: theirs for ours, theirs, _ in _names(described["num_layers"] or 0)}
    return _decoder(directory, described, arrays, renamed, context)


def load_gguf(path: str | os.PathLike, context: int | None = None) -> tuple[DecoderSizes, PyTree]:
    """The same as `load_safetensors` from a GGUF file of llama.cpp, whose weights become float32.

    llama.cpp rotates pairs of neighbouring rows of the query and key matrices, and its files have
    these rows in that order; here the pairs are half a head apart.
    """
    gguf = import_extra("gguf")
    try:
        reader = gguf.GGUFReader(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # the package raises several kinds
        raise ConfigError(f"{path} is no GGUF file, or is damaged") from None
    architecture = _metadata(reader, "general.architecture")
    if architecture != "llama":
        raise ConfigError(f"{path} has the architecture {architecture!r}: it must be 'llama'")
    described = {ours: _metadata(reader, f"llama.{theirs}") for ours, _, theirs in SIZE_NAMES}
    described["context"] = _metadata(reader, "llama.context_length")
    arrays = {x.name: gguf.dequantize(x.data, x.tensor_type) for x in reader.tensors}
    for suffix, heads in (("attn_q.weight", "num_heads"), ("attn_k.weight", "num_kv_heads")):
        for name in arrays:
            if name.endswith(suffix) and described[heads]:
                arrays[name] = _as_halves(arrays[name], described[heads])
    renamed = {ours: theirs for ours, _, theirs in _names(described["num_layers"] or 0)}
    return _decoder(path, described, arrays, renamed, context)


def _decoder(
    path: Any,
    described: Mapping[str, Any],
    arrays: Arrays,
    names: Mapping[str, str],
    context: int | None,
) -> tuple[DecoderSizes, PyTree]:
    """The decoder with these sizes and arrays, whose ``names`` map ours to those of the file."""
    missing = [name for name, size in described.items() if size is None]
    missing += [name for name in names.values() if name not in arrays]
    if missing:
        raise ConfigError(f"{path} has no {missing[0]}")
    for head in ("lm_head.weight", "output.weight"):
        if head in arrays:
            raise ConfigError(f"{path} has the matrix {head}: only tied embeddings are supported")
    sizes = DecoderSizes(
        vocab_size=len(arrays[names["embedding/embedding"]]),
        **(dict(described) | ({} if context is None else {"context": context})),
    )
    model = language_model(sizes, "none")
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(1, jnp.int32)))
    named = {}
    for ours, x in named_leaves(like["policy"]["params"]).items():
        matrix = arrays[names[ours]]
        if matrix.size != x.size or (matrix.ndim == 2 and matrix.shape[1] != _inputs(ours, x)):
            raise ConfigError(
                f"{names[ours]} in {path} has the shape {matrix.shape}, which does not fit {sizes}"
            )
        matrix = matrix if ours == "embedding/embedding" else matrix.T
        named[ours] = jnp.asarray(matrix.reshape(x.shape), x.dtype)
    decoder = {"params": from_named(named, like["policy"]["params"])}
    return sizes, {"policy": decoder, "value": {}}


def _names(num_layers: int) -> list[tuple[str, str, str]]:
    """Our name of every parameter, that of Hugging Face, and that of llama.cpp."""
    return [*OUTER_NAMES] + [
        (f"blocks_{i}/{ours}", f"model.layers.{i}.{hugging_face}", f"blk.{i}.{llama_cpp}")
        for i in range(num_layers)
        for ours, hugging_face, llama_cpp in LAYER_NAMES
    ]


def _inputs(name: str, x: Any) -> int:
    """The number of inputs of a matrix: all axes but the last of ``attention_out``, else one."""
    if name == "embedding/embedding":
        return x.shape[1]
    return x.size // x.shape[-1] if "attention_out" in name else x.shape[0]


def _as_matrix(name: str, x: NDArray[Any]) -> NDArray[Any]:
    """The parameter as [outputs, inputs]; embeddings and scales are the same as ours."""
    if x.ndim == 1 or name == "embedding/embedding":
        return x
    return np.ascontiguousarray(x.reshape(_inputs(name, x), -1).T)


def _as_halves(rows: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Rows 0, 2, 4, … of each head and then its rows 1, 3, 5, …"""
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _metadata(reader: Any, name: str) -> Any:
    """A value in the metadata of a GGUF file; None if it is missing."""
    field = reader.get_field(name)
    return None if field is None else field.contents()
