"""Weights of others: the names and layouts of Hugging Face's Llama and of llama.cpp."""

import dataclasses
import json

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sentences import sentence_of

from purejaxppo.rlhf.language_model import language_model
from purejaxppo.rlhf.transformer import DecoderSizes
from purejaxppo.rlhf.weights import load_gguf, load_safetensors, save_safetensors

SIZES = DecoderSizes(
    vocab_size=11,
    context=8,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=24,
    rope_base=100.0,
    norm_eps=1e-3,
)


def random_params(sizes=SIZES):
    """Parameters of which none is 0 or 1."""
    params = language_model(sizes, "none").init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def our_log_probs(sizes, params, tokens):
    model = language_model(sizes, "none")
    reset = jnp.zeros(tokens.T.shape, bool).at[0].set(True)
    distribution, _ = model.unroll(params, model.initial_carry(len(tokens)), tokens.T, reset)
    return np.swapaxes(jax.nn.log_softmax(distribution.logits), 0, 1)


def llama_logits(config, arrays, tokens):
    """Hugging Face's Llama in NumPy, text by text and head by head, from its names alone."""
    weights = {name.removeprefix("model."): x.astype(np.float64) for name, x in arrays.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads

    def norm(x, name):
        mean_square = (x**2).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + config["rms_norm_eps"]) * weights[f"{name}.weight"]

    def rotated(x):  # [L, size]
        inverse = config["rope_theta"] ** (-np.arange(0, size, 2) / size)
        angle = np.tile(np.arange(len(x))[:, None] * inverse, 2)
        half = np.concatenate([-x[:, size // 2 :], x[:, : size // 2]], axis=1)
        return x * np.cos(angle) + half * np.sin(angle)

    def text_logits(text):
        hidden = weights["embed_tokens.weight"][text]
        causal = np.tril(np.ones((len(text), len(text)), bool))
        for i in range(config["num_hidden_layers"]):
            layer = f"layers.{i}"
            x = norm(hidden, f"{layer}.input_layernorm")
            query, key, value = (
                x @ weights[f"{layer}.self_attn.{part}_proj.weight"].T for part in "qkv"
            )
            outputs = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                q = rotated(query[:, head * size : (head + 1) * size])
                k = rotated(key[:, shared * size : (shared + 1) * size])
                score = np.where(causal, q @ k.T / np.sqrt(size), -np.inf)
                share = np.exp(score - score.max(axis=1, keepdims=True))
                share /= share.sum(axis=1, keepdims=True)
                outputs.append(share @ value[:, shared * size : (shared + 1) * size])
            out = weights[f"{layer}.self_attn.o_proj.weight"]
            hidden = hidden + np.concatenate(outputs, axis=1) @ out.T
            x = norm(hidden, f"{layer}.post_attention_layernorm")
            gate = x @ weights[f"{layer}.mlp.gate_proj.weight"].T
            up = x @ weights[f"{layer}.mlp.up_proj.weight"].T
            down = weights[f"{layer}.mlp.down_proj.weight"]
            hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ down.T
        return norm(hidden, "norm") @ weights["embed_tokens.weight"].T

    return np.stack([text_logits(text) for text in np.asarray(tokens)])


def test_saved_weights_are_a_llama_and_come_back(tmp_path):
    params = random_params()
    directory = save_safetensors(tmp_path / "llama", SIZES, params)
    tokens = jax.random.randint(jax.random.key(2), (3, 8), 0, SIZES.vocab_size)
    config = json.loads((directory / "config.json").read_text())
    logits = llama_logits(config, load_file(directory / "model.safetensors"), tokens)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(our_log_probs(SIZES, params, tokens), expected, atol=1e-4)
    sizes, loaded = load_safetensors(directory)
    assert sizes == SIZES
    chex.assert_trees_all_equal(loaded, params)
    shorter, _ = load_safetensors(directory, context=4)
    assert shorter.context == 4


def write_gguf(path, sizes, arrays, architecture="llama", context=8, quantized=(), scaling=None):
    """A file as llama.cpp converts Hugging Face's Llama; ``quantized`` arrays have 8 bits."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(context)
    writer.add_embedding_length(sizes.width)
    writer.add_block_count(sizes.num_layers)
    writer.add_feed_forward_length(sizes.mlp_width)
    writer.add_head_count(sizes.num_heads)
    writer.add_head_count_kv(sizes.num_kv_heads)
    writer.add_rope_freq_base(sizes.rope_base)
    writer.add_layer_norm_rms_eps(sizes.norm_eps)
    map_name = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, sizes.num_layers).get_name
    for name, x in arrays.items():
        for part, heads in (("q_proj", sizes.num_heads), ("k_proj", sizes.num_kv_heads)):
            if part in name:
                halves = x.reshape(heads, 2, x.shape[0] // heads // 2, x.shape[1])
                x = halves.swapaxes(1, 2).reshape(x.shape)
        theirs = map_name(name, try_suffixes=(".weight",)) or name
        kind = gguf.GGMLQuantizationType.Q8_0
        if name in quantized:
            writer.add_tensor(theirs, gguf.quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, x)
    if scaling:
        writer.add_rope_scaling_type(scaling)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_has_its_query_and_key_rows_in_another_order(tmp_path):
    params = random_params()
    directory = save_safetensors(tmp_path / "llama", SIZES, params)
    arrays = load_file(directory / "model.safetensors")
    write_gguf(tmp_path / "llama.gguf", SIZES, arrays)
    sizes, loaded = load_gguf(tmp_path / "llama.gguf")
    assert (sizes.width, sizes.num_kv_heads, sizes.context) == (16, 2, 8)
    assert sizes.norm_eps == pytest.approx(1e-3) and sizes.rope_base == 100
    chex.assert_trees_all_equal(loaded, params)


def test_a_gguf_file_can_be_quantized(tmp_path):
    sizes = dataclasses.replace(SIZES, width=32, mlp_width=64)
    params = random_params(sizes)
    directory = save_safetensors(tmp_path / "llama", sizes, params)
    arrays = load_file(directory / "model.safetensors")
    matrices = [name for name, x in arrays.items() if x.ndim == 2]
    write_gguf(tmp_path / "llama.gguf", sizes, arrays, quantized=matrices)
    _, loaded = load_gguf(tmp_path / "llama.gguf", context=8)
    largest = max(np.abs(x).max() for x in arrays.values())
    difference = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), loaded, params)
    assert 0 < max(jax.tree.leaves(difference)) < largest / 127


@pytest.mark.parametrize(
    ("changes", "arrays", "sentence"),
    [
        ({"scaling": gguf.RopeScalingType.LINEAR}, {}, "llama.rope.scaling.type is 'linear' in"),
        ({}, {"rope_freqs.weight": np.ones(2, np.float32)}, "has the array rope_freqs.weight"),
        (
            {},
            {"model.norm.weight": np.ones(16, np.int32)},
            "has the type I32, which cannot",
        ),
        ({}, {"model.norm.weight": np.ones(5, np.float32)}, "has the shape (5,)"),
    ],
)
def test_another_gguf_file_is_refused(tmp_path, changes, arrays, sentence):
    directory = save_safetensors(tmp_path / "llama", SIZES, random_params())
    stored = load_file(directory / "model.safetensors") | arrays
    write_gguf(tmp_path / "other.gguf", SIZES, stored, **changes)
    message = sentence_of(lambda: load_gguf(tmp_path / "other.gguf"))
    assert sentence in message and "other.gguf" in message


def changed(tmp_path, config=None, arrays=None):
    """A stored model of which the config and some arrays are replaced; None removes one."""
    directory = save_safetensors(tmp_path / "llama", SIZES, random_params())
    settings = json.loads((directory / "config.json").read_text()) | (config or {})
    (directory / "config.json").write_text(json.dumps(settings))
    stored = load_file(directory / "model.safetensors") | (arrays or {})
    kept = {name: x for name, x in stored.items() if x is not None}
    save_file(kept, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu' in"),
        ({"config": {"rope_scaling": {"type": "linear"}}}, "scales its positions"),
        ({"config": {"rope_parameters": {"rope_type": "llama3"}}}, "scales its positions"),
        ({"config": {"num_hidden_layers": 0}}, "num_layers = 0: it must be an integer of at least"),
        ({"config": {"head_dim": 8}}, "head_dim is 8 in"),
        (
            {"arrays": {"model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float32)}},
            "has the array model.layers.0.self_attn.q_proj.bias, which this decoder does not have",
        ),
        ({"config": {"intermediate_size": 20}}, "down_proj.weight in"),
        ({"config": {"num_hidden_layers": None}}, "has no num_hidden_layers"),
        ({"arrays": {"model.norm.weight": None}}, "has no array model.norm.weight"),
        (
            {"arrays": {"lm_head.weight": np.zeros((11, 16), np.float32)}},
            "has an lm_head: only tied embeddings are supported",
        ),
    ],
)
def test_another_model_is_refused(tmp_path, change, sentence):
    directory = changed(tmp_path, **change)
    message = sentence_of(lambda: load_safetensors(directory))
    assert sentence in message and "llama" in message


def test_the_rotation_is_read_as_old_and_new_files_have_it(tmp_path):
    directory = changed(tmp_path)
    settings = json.loads((directory / "config.json").read_text())
    del settings["rope_theta"]
    settings["num_key_value_heads"] = None
    variants = [
        (settings | {"rope_theta": 5.0}, 5.0),
        (settings | {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, 5.0),
        (settings | {"rope_scaling": {"rope_type": "default"}}, 10_000.0),
    ]
    arrays = load_file(directory / "model.safetensors")
    for i in range(2):  # without num_key_value_heads there are as many as heads
        for part in "kv":
            name = f"model.layers.{i}.self_attn.{part}_proj.weight"
            arrays[name] = np.concatenate([arrays[name], arrays[name]])
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    save_file(arrays, directory / "model.safetensors")
    for config, rope_base in variants:
        (directory / "config.json").write_text(json.dumps(config))
        sizes, _ = load_safetensors(directory)
        assert (sizes.rope_base, sizes.num_kv_heads) == (rope_base, 4)


def test_parameters_of_other_sizes_are_not_saved(tmp_path):
    other = dataclasses.replace(SIZES, mlp_width=20)
    message = sentence_of(lambda: save_safetensors(tmp_path / "a", other, random_params()))
    assert message.startswith("the parameters do not have the sizes DecoderSizes(")
    message = sentence_of(lambda: save_safetensors(tmp_path / "a", SIZES, {"decoder": {}}))
    assert message == "the parameters are not those of a language_model"
    assert not (tmp_path / "a").exists()


def test_files_that_cannot_be_read_are_named(tmp_path):
    message = sentence_of(lambda: load_safetensors(tmp_path / "nowhere"))
    assert message.startswith(f"there is no {tmp_path / 'nowhere' / 'config.json'}: weights in")
    directory = changed(tmp_path)
    assert "exists already" in sentence_of(
        lambda: save_safetensors(directory, SIZES, random_params())
    )
    (directory / "model.safetensors").write_bytes(b"0" * 100)
    assert "or are damaged" in sentence_of(lambda: load_safetensors(directory))
    (directory / "config.json").write_text("[1]")
    assert "or are damaged" in sentence_of(lambda: load_safetensors(directory))
    (directory / "model.safetensors").unlink()  # as with weights in several files
    assert "there is no" in sentence_of(lambda: load_safetensors(directory))
    assert "cannot read" in sentence_of(lambda: load_gguf(tmp_path / "nowhere.gguf"))
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + b"0" * 100)
    assert "is no GGUF file" in sentence_of(lambda: load_gguf(tmp_path / "damaged.gguf"))
    write_gguf(tmp_path / "other.gguf", SIZES, {}, architecture="gpt2")
    message = sentence_of(lambda: load_gguf(tmp_path / "other.gguf"))
    assert "general.architecture is 'gpt2' in" in message
