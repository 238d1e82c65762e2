"""Decoders in the formats of others: safetensors as Hugging Face's Llama has them, and GGUF.

Both need the extra ``rlhf``. Embeddings must be tied and positions not scaled; a file with arrays
that a `transformer.Decoder` does not have is refused.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from purejaxppo.policies.arrays import new_directory
from purejaxppo.rlhf.extra import import_extra
from purejaxppo.rlhf.language_model import policy_decoder
from purejaxppo.rlhf.llama_layout import (
    HUGGING_FACE,
    LLAMA_CPP,
    SIZE_NAMES,
    decoder_shapes,
    hugging_face_arrays,
    read_decoder,
    read_sizes,
)
from purejaxppo.rlhf.transformer import DecoderSizes
from purejaxppo.types import ConfigError, PyTree

# Entries of Hugging Face's config.json: the value they must have, and that of a missing one.
REQUIRED = {
    "model_type": ("llama", None),
    "hidden_act": ("silu", "silu"),
    "tie_word_embeddings": (True, False),
    "attention_bias": (False, False),
    "mlp_bias": (False, False),
}


def save_safetensors(directory: str | os.PathLike, sizes: DecoderSizes, params: PyTree) -> Path:
    """Write the decoder that predicts tokens, for ``LlamaForCausalLM.from_pretrained(directory)``.

    The directory is new and holds ``config.json`` and ``model.safetensors``; it is written
    atomically. Raises `ConfigError` if it exists, and for parameters of other sizes.
    """
    numpy_format = import_extra("safetensors.numpy")
    if "policy" not in params:
        raise ConfigError("the parameters are not those of a language_model")
    decoder = policy_decoder(params)
    if jax.tree.map(jnp.shape, decoder) != jax.tree.map(jnp.shape, decoder_shapes(sizes)):
        raise ConfigError(f"the parameters do not have the sizes {sizes}")
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    config |= {name: value for name, (value, _) in REQUIRED.items()}
    config |= {theirs: getattr(sizes, ours) for ours, theirs, _ in SIZE_NAMES}
    config["vocab_size"] = sizes.vocab_size
    with new_directory(directory, "weights") as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        arrays = hugging_face_arrays(decoder)
        numpy_format.save_file(arrays, temporary / "model.safetensors", {"format": "pt"})
    return Path(directory)


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
    path = directory / "model.safetensors"
    for file in (directory / "config.json", path):
        if not file.is_file():
            raise ConfigError(
                f"there is no {file}: weights in several files and in other formats cannot be read"
            )
    try:
        config = dict(json.loads((directory / "config.json").read_text()))
        arrays = numpy_format.load_file(path)
    except Exception:  # of the files, of JSON and of safetensors
        raise ConfigError(f"the weights in {directory} cannot be read, or are damaged") from None
    for name, (value, default) in REQUIRED.items():
        if config.get(name, default) != value:
            found = config.get(name, default)
            raise ConfigError(f"{name} is {found!r} in {directory}: it must be {value!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ConfigError(f"the model in {directory} scales its positions, which is not supported")
    described = {"rope_theta": DecoderSizes.rope_base} | config | rope
    if described.get("num_key_value_heads") is None:
        described["num_key_value_heads"] = described.get("num_attention_heads")
    vocab_size = config.get("vocab_size")
    sizes = read_sizes(directory, described, HUGGING_FACE, vocab_size, context)
    if config.get("head_dim") not in (None, sizes.head_width):
        raise ConfigError(f"head_dim is {config['head_dim']} in {path}: it must be width / heads")
    head = arrays.pop("lm_head.weight", None)
    if head is not None and not np.array_equal(head, arrays.get("model.embed_tokens.weight")):
        raise ConfigError(f"{path} has an lm_head: only tied embeddings are supported")
    return read_decoder(path, sizes, HUGGING_FACE, arrays)


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
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if name.startswith(("general.", "llama."))  # not the tokenizer
    }
    for name, value in (("general.architecture", "llama"), ("llama.rope.scaling.type", "none")):
        if metadata.get(name, value) != value:
            raise ConfigError(f"{name} is {metadata[name]!r} in {path}: it must be {value!r}")
    metadata.setdefault("llama.rope.freq_base", DecoderSizes.rope_base)
    heads = metadata.get("llama.attention.head_count")
    metadata.setdefault("llama.attention.head_count_kv", heads)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    embedding = tensors.get("token_embd.weight")
    vocab_size = None if embedding is None else int(embedding.shape[1])
    sizes = read_sizes(path, metadata, LLAMA_CPP, vocab_size, context)

    def array(name: str) -> NDArray[Any]:
        tensor = tensors[name]
        try:
            x = gguf.dequantize(tensor.data, tensor.tensor_type)
        except Exception:
            kind = tensor.tensor_type.name
            raise ConfigError(
                f"{name} in {path} has the type {kind}, which cannot be read"
            ) from None
        for suffix, num_heads in (("q.weight", sizes.num_heads), ("k.weight", sizes.num_kv_heads)):
            if name.endswith(f"attn_{suffix}") and len(x) == num_heads * sizes.head_width:
                x = _as_halves(x, num_heads)
        return x

    return read_decoder(path, sizes, LLAMA_CPP, tensors, array)


def _as_halves(rows: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Rows 0, 2, 4, … of each head and then its rows 1, 3, 5, …"""
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
