"""`Task`: what the pipeline learns from. Film reviews, one's own records, or arithmetic."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from purejaxppo.rlhf import arithmetic, corpora, judges
from purejaxppo.rlhf.preferences import (
    Preference,
    Records,
    comparisons,
    encode_pairs,
    ratings_of_people,
    read_demonstrations,
    read_preferences,
    read_prompts,
)
from purejaxppo.rlhf.settings import PipelineSettings
from purejaxppo.rlhf.texts import Pairs, Ranked, Score, Texts
from purejaxppo.rlhf.tokenizer import END, Tokenizer, train_tokenizer
from purejaxppo.types import ConfigError

NUM_HELD_OUT_COMPARISONS = 8000
Judges = Mapping[str, judges.Judge]


class Prompts(NamedTuple):
    """Prompts as tokens, NumPy arrays."""

    tokens: NDArray[np.int32]  # [n, L]
    length: NDArray[np.int32]  # [n]


class Task(NamedTuple):
    """The data of a pipeline as tokens, and how its texts are scored and read."""

    name: str
    vocab_size: int
    eos: int  # the end-of-text token
    context: int  # tokens of the longest text
    max_new_tokens: int
    demonstrations: Texts
    held_out: Texts
    prompts: Prompts  # for reinforcement learning
    held_out_prompts: Prompts  # for evaluation
    decode: Callable[[Any], str]  # tokens -> text
    pairs: Pairs | None  # None: there is a ``score``, and no reward model is needed
    ranked: Ranked | None  # what the reward model learns from, if not from the pairs
    held_out_pairs: Pairs | None
    held_out_preferences: Sequence[Preference]  # the same ones as characters
    score: Score | None
    judges: Callable[[], Judges]  # of texts; not known to the reward model
    tokenizer: Tokenizer | None


def arithmetic_task(seed: int = 0, num_held_out: int = 1000, repeats: int = 3) -> Task:
    """Two-digit addition (`arithmetic`): 1,000 of the 10,000 prompts are held out."""
    prompts = np.random.default_rng(seed).permutation(arithmetic.make_prompts())
    held_out = prompts[:num_held_out]
    train = prompts[num_held_out:]
    repeated = jnp.asarray(np.tile(train, (repeats, 1)))
    answers = arithmetic.demonstrations(jax.random.key(seed), repeated)
    return Task(
        name="arithmetic",
        vocab_size=arithmetic.VOCAB_SIZE,
        eos=arithmetic.END,
        context=arithmetic.PROMPT_LENGTH + arithmetic.MAX_NEW_TOKENS,
        max_new_tokens=arithmetic.MAX_NEW_TOKENS,
        demonstrations=arithmetic.as_texts(repeated, answers),
        held_out=_right_answers(held_out),
        prompts=_arithmetic_prompts(train),
        held_out_prompts=_arithmetic_prompts(held_out),
        decode=arithmetic.decode,
        pairs=None,
        ranked=None,
        held_out_pairs=None,
        held_out_preferences=(),
        score=arithmetic.score,
        judges=dict,
        tokenizer=None,
    )


def reviews_task(settings: PipelineSettings, num_held_out_prompts: int = 512) -> Task:
    """Sentences of film reviews, and preferences derived from people's ratings (`corpora`).

    The prompts are the first words of sentences that are held out. Texts of comparisons that are
    longer than the context are cut. The gold judge and the second judge score whole sentences.
    """
    reviews = corpora.load_reviews()
    sentences = corpora.split_sentences(corpora.simple_sentences(reviews.texts))
    splits = corpora.split_ratings(corpora.load_ratings())

    @functools.cache
    def make_judges() -> Judges:
        gold = splits.gold
        return {
            "gold": judges.fit_gold_judge(gold.texts, gold.mean_ratings),
            "second": judges.fit_second_judge(reviews.texts, reviews.labels),
        }

    tokenizer = train_tokenizer(sentences.train, settings.vocab_size)
    return _text_task(
        settings,
        name="reviews",
        tokenizer=tokenizer,
        ranked=_ranked(settings, tokenizer, splits.preferences),
        demonstrations=[("", sentence) for sentence in sentences.train],
        held_out=[("", sentence) for sentence in sentences.held_out],
        preferences=comparisons(splits.preferences, settings.key, settings.num_comparisons),
        held_out_preferences=comparisons(splits.test, settings.key, NUM_HELD_OUT_COMPARISONS),
        prompts=sentences.prompts[num_held_out_prompts:],
        held_out_prompts=sentences.prompts[:num_held_out_prompts],
        judges=make_judges,
        truncate=True,
    )


def records_task(
    settings: PipelineSettings,
    demonstrations: Records,
    preferences: Records,
    prompts: Records | None = None,
    judges: Judges | None = None,
) -> Task:
    """One's own records: JSON Lines files or iterables of objects (`preferences`).

    Without ``prompts`` those of the demonstrations are used. A tenth of each kind of record, at
    least one, is held out. ``judges`` score whole texts in the report. Raises `ConfigError` with
    file and line for an invalid record, and for a text longer than the context.
    """
    shown = read_demonstrations(demonstrations)
    judged = read_preferences(preferences)
    if prompts is not None:
        starts = read_prompts(prompts)
    else:
        starts = [record.prompt for record in shown if record.prompt]
    starts = list(dict.fromkeys(starts))
    if not starts:
        raise ConfigError("there are no prompts: the demonstrations have none, so give prompts")
    rng = np.random.default_rng(settings.key)
    held_out, train = _split("demonstrations", shown, rng)
    held_out_pairs, pairs = _split("preferences", judged, rng)
    held_out_prompts, train_prompts = _split("prompts", starts, rng)
    corpus = [text for record in train for text in record]
    return _text_task(
        settings,
        name="records",
        tokenizer=train_tokenizer(corpus, settings.vocab_size),
        ranked=None,
        demonstrations=train,
        held_out=held_out,
        preferences=pairs,
        held_out_preferences=held_out_pairs,
        prompts=train_prompts,
        held_out_prompts=held_out_prompts,
        judges=lambda: judges or {},
        truncate=False,
    )


# ------------------------------------------------------------------------------------------ parts


def _text_task(
    settings: PipelineSettings,
    *,
    name: str,
    tokenizer: Tokenizer,
    ranked: Ranked | None,
    demonstrations: Sequence[tuple[str, str]],
    held_out: Sequence[tuple[str, str]],
    preferences: Sequence[Preference],
    held_out_preferences: Sequence[Preference],
    prompts: Sequence[str],
    held_out_prompts: Sequence[str],
    judges: Callable[[], Judges],
    truncate: bool,
) -> Task:
    """A task whose records are encoded by a tokenizer."""
    context = settings.context
    max_new_tokens = settings.max_new_tokens

    def encoded(records: Sequence[tuple[str, str]]) -> Texts:
        starts, completions = zip(*records, strict=True)
        return tokenizer.encode_texts(starts, completions, context)

    return Task(
        name=name,
        vocab_size=tokenizer.vocab_size,
        eos=END,
        context=context,
        max_new_tokens=max_new_tokens,
        demonstrations=encoded(demonstrations),
        held_out=encoded(held_out),
        prompts=_encoded_prompts(tokenizer, prompts, context, max_new_tokens),
        held_out_prompts=_encoded_prompts(tokenizer, held_out_prompts, context, max_new_tokens),
        decode=tokenizer.decode,
        pairs=encode_pairs(tokenizer, preferences, context, truncate),
        ranked=ranked,
        held_out_pairs=encode_pairs(tokenizer, held_out_preferences, context, truncate),
        held_out_preferences=held_out_preferences,
        score=None,
        judges=judges,
        tokenizer=tokenizer,
    )


def _ranked(settings: PipelineSettings, tokenizer: Tokenizer, rated: corpora.RatedTexts) -> Ranked:
    """One person's rating of every text, in each of several rounds; all can be compared."""
    prompts = [""] * len(rated.texts)
    texts = tokenizer.encode_texts(prompts, rated.texts, settings.context, truncate=True)
    index, rating = ratings_of_people(rated, settings.key, settings.reward_rounds)
    return Ranked(
        texts=jax.tree.map(lambda x: x[np.array(index)], texts),
        rating=np.array(rating, np.float32),  # type: ignore[arg-type]
        prompt=np.zeros(len(index), np.int32),  # type: ignore[arg-type]
    )


def _encoded_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str], context: int, max_new_tokens: int
) -> Prompts:
    """The prompts, no wider than the longest. Raises `ConfigError` if no completion fits."""
    texts = tokenizer.encode_texts(prompts, None, context)
    longest = int(np.max(texts.length))
    if longest + max_new_tokens > context:
        i = int(np.argmax(texts.length))
        raise ConfigError(
            f"prompt {i} has {longest} tokens with its start, and max_new_tokens = "
            f"{max_new_tokens} more exceed the context of {context}: shorten it, or choose a "
            "longer context"
        )
    return Prompts(np.asarray(texts.tokens)[:, :longest], np.asarray(texts.length))


def _right_answers(prompts: NDArray[np.int32]) -> Texts:
    tokens = jnp.asarray(prompts)
    return arithmetic.as_texts(tokens, arithmetic.answers(tokens))


def _arithmetic_prompts(prompts: NDArray[np.int32]) -> Prompts:
    return Prompts(prompts, np.full(len(prompts), arithmetic.PROMPT_LENGTH, np.int32))


def _split(kind: str, records: Sequence[Any], rng: np.random.Generator) -> tuple[list, list]:
    """A tenth of the records, at least one, and the rest."""
    if len(records) < 2:
        raise ConfigError(f"there is one record of {kind}: it needs two, one of them held out")
    order = rng.permutation(len(records))
    count = max(1, len(records) // 10)
    return [records[i] for i in order[:count]], [records[i] for i in order[count:]]
