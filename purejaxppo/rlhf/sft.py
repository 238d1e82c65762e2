"""Supervised fine-tuning: a language model learns to continue texts as people did.

L = −(1 / N) Σ log π(token t + 1 | tokens 0 … t) over the N tokens in a mask, in nats per token: the
tokens of the completions, or all but the first of each text.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from purejaxppo.losses import masked_mean
from purejaxppo.rlhf.supervised import (
    InitParams,
    Loss,
    SupervisedResult,
    in_batches,
    make_supervised_train,
    supervised_job,
)
from purejaxppo.rlhf.supervised_settings import SupervisedSettings
from purejaxppo.rlhf.texts import Texts, starts_of_texts, with_padding_of_zeros
from purejaxppo.runs.programs import Job
from purejaxppo.types import ConfigError, Model, PRNGKey, PyTree


class PackedTexts(NamedTuple):
    """Rows of one or more texts. The padding of a row has token 0 and starts at every token."""

    tokens: Int[Array, "n L"]
    reset: Bool[Array, "n L"]  # the first token of a text: nothing before it is seen after it
    in_text: Bool[Array, "n L"]  # a token to predict: of a text, and not its first
    in_completion: Bool[Array, "n L"]  # the same, of a completion


SFTData = Texts | PackedTexts


def make_sft(
    settings: SupervisedSettings, model: Model, mask_prompts: bool = True
) -> Callable[[PRNGKey, PyTree, SFTData], SupervisedResult]:
    """``train(key, params, data) -> SupervisedResult``: pure, for jit, and for vmap over keys.

    ``data`` are texts, or rows made by `pack`. With ``mask_prompts`` only completions are learnt.
    ``params=None`` starts from new parameters. The metrics are those of `make_supervised_trainer`
    and ``perplexity`` (exp L), ``accuracy`` (the share of tokens that are the most probable one)
    and ``tokens`` (N). Check the data with `require_texts` first.
    """
    train_on = make_supervised_train(settings, _loss(model, mask_prompts), _init_params(model))

    def train(key: PRNGKey, params: PyTree, data: SFTData) -> SupervisedResult:
        return train_on(key, params, {"data": data})

    return train


def sft_job(
    settings: SupervisedSettings, model: Model, num_examples: int, mask_prompts: bool = True
) -> Job:
    """`make_sft` for ``run_job(job, params=..., frozen={"data": data})``."""
    counts = {"loss": "tokens", "accuracy": "tokens"}
    loss = _loss(model, mask_prompts)
    return supervised_job(settings, num_examples, loss, _init_params(model), counts)


def evaluate(
    model: Model, params: PyTree, data: SFTData, batch_size: int = 64, mask_prompts: bool = True
) -> dict[str, Float[Array, ""]]:
    """``loss``, ``perplexity`` and ``accuracy`` on held-out data, over all its tokens at once."""

    def of_rows(rows: PackedTexts) -> tuple[Array, Array, Array]:
        log_prob, is_likeliest, mask = _predictions(model, params, rows, mask_prompts)
        total = jnp.where(mask, -log_prob, 0).sum(axis=0)
        return total, (mask & is_likeliest).sum(axis=0), mask.sum(axis=0)

    total, correct, count = (x.sum() for x in in_batches(of_rows, _rows(data), batch_size))
    loss = total / jnp.maximum(count, 1)
    accuracy = correct / jnp.maximum(count, 1)
    return {"loss": loss, "perplexity": jnp.exp(loss), "accuracy": accuracy}


def pack(texts: Texts, row_length: int) -> PackedTexts:
    """Put several texts into each row, so that less of a minibatch is padding.

    Each text goes to the row with the least free space that suffices (best fit), in the order of
    the texts. Runs on the host. Raises `ConfigError` for a text longer than ``row_length``.
    """
    length = np.asarray(texts.length)
    if len(length) and length.max() > row_length:
        i = int(length.argmax())
        raise ConfigError(f"text {i} has {length[i]} tokens: row_length is {row_length}")
    one: Any = jax.tree.map(np.asarray, one_per_row(texts))
    with_space: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by free space
    rows: list[list[int]] = []
    for text, size in enumerate(length):
        free = next((f for f in range(size, row_length + 1) if with_space[f]), row_length)
        if not with_space[free]:
            with_space[free].append(len(rows))
            rows.append([])
        row = with_space[free].pop()
        rows[row].append(text)
        with_space[free - size].append(row)

    def packed(x: Any, padding: int | bool) -> Any:
        out = np.full((len(rows), row_length), padding, x.dtype)
        for row, members in enumerate(rows):
            joined = np.concatenate([x[text, : length[text]] for text in members])
            out[row, : len(joined)] = joined
        return out

    return PackedTexts(
        tokens=packed(one.tokens, 0),
        reset=packed(one.reset, True),
        in_text=packed(one.in_text, False),
        in_completion=packed(one.in_completion, False),
    )


def one_per_row(texts: Texts) -> PackedTexts:
    """Each text in a row of its own."""
    first = jnp.zeros((1, len(texts.length)), bool)
    return PackedTexts(
        tokens=with_padding_of_zeros(texts).tokens,
        reset=starts_of_texts(texts),
        in_text=jnp.concatenate([first, texts.text_mask]).T,
        in_completion=jnp.concatenate([first, texts.completion_mask]).T,
    )


# ------------------------------------------------------------------------------------------ parts


def _rows(data: SFTData) -> PackedTexts:
    return data if isinstance(data, PackedTexts) else one_per_row(data)


def _init_params(model: Model) -> InitParams:
    return lambda key: model.init(key, jnp.zeros(1, jnp.int32))


def _loss(model: Model, mask_prompts: bool) -> Loss:
    def loss(
        params: PyTree, examples: SFTData, frozen: Any, key: PRNGKey
    ) -> tuple[Array, dict[str, Array]]:
        rows = _rows(examples)
        log_prob, is_likeliest, mask = _predictions(model, params, rows, mask_prompts)
        value = masked_mean(-log_prob, mask)
        metrics = {
            "perplexity": jnp.exp(value),
            "accuracy": masked_mean(is_likeliest.astype(value.dtype), mask),
            "tokens": mask.sum(),
        }
        return value, metrics

    return loss


def _predictions(
    model: Model, params: PyTree, rows: PackedTexts, mask_prompts: bool
) -> tuple[Float[Array, "T n"], Bool[Array, "T n"], Bool[Array, "T n"]]:
    """log π(token t + 1), whether it is the most probable token, and the mask; T = L − 1."""
    obs = rows.tokens[:, :-1].T
    carry = model.initial_carry(obs.shape[1])
    distribution, _ = model.unroll(params, carry, obs, rows.reset[:, :-1].T)
    following = rows.tokens[:, 1:].T
    mask = (rows.in_completion if mask_prompts else rows.in_text)[:, 1:].T
    return distribution.log_prob(following), distribution.mode() == following, mask
