"""Tasks of texts: film reviews with people's ratings, and records of the user."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from purejaxppo.rlhf import corpora, judges
from purejaxppo.rlhf.extra import import_extra
from purejaxppo.rlhf.preferences import (
    Preference,
    Records,
    comparisons,
    encode_pairs,
    encode_rated,
    read_demonstrations,
    read_preferences,
    read_prompts,
)
from purejaxppo.rlhf.settings import PipelineSettings
from purejaxppo.rlhf.tasks import Judges, Prompts, Task, require_judges
from purejaxppo.rlhf.texts import Ranked, Texts
from purejaxppo.rlhf.tokenizer import END, Tokenizer, quoted, train_tokenizer
from purejaxppo.types import ConfigError

NUM_HELD_OUT_COMPARISONS = 8000


def reviews_task(settings: PipelineSettings, num_held_out_prompts: int = 512) -> Task:
    """Sentences of film reviews, and preferences derived from people's ratings (`corpora`).

    The prompts are the first words of sentences that are held out, without duplicates. The reward
    model learns from the ratings of all people, DPO from comparisons of two ratings. Snippets that
    are longer than the context are cut. The gold judge and the second judge score whole sentences.
    """
    import_extra("sklearn")  # of the judges, before anything is trained
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

    # With the snippets, whose words are less common, the reward model is more accurate.
    corpus = [*sentences.train, *splits.preferences.texts]
    tokenizer = train_tokenizer(corpus, settings.vocab_size)
    ranked = encode_rated(tokenizer, splits.preferences, settings.context, truncate=True)
    cut = float(np.mean(ranked.texts.tokens[np.arange(len(ranked.rating)), -1] != 0))
    prompts = list(dict.fromkeys(sentences.prompts))
    return _text_task(
        settings,
        name="reviews",
        tokenizer=tokenizer,
        ranked=ranked,
        demonstrations=[("", sentence) for sentence in sentences.train],
        held_out=[("", sentence) for sentence in sentences.held_out],
        preferences=comparisons(splits.preferences, settings.key, settings.num_comparisons),
        held_out_preferences=comparisons(splits.test, settings.key, NUM_HELD_OUT_COMPARISONS),
        prompts=prompts[num_held_out_prompts:],
        held_out_prompts=prompts[:num_held_out_prompts],
        judges=make_judges,
        truncate=True,
    )._replace(
        notes=(
            "The preferences are derived: nobody compared two snippets. A comparison draws two "
            "snippets and one person's rating of each; the higher rating wins.",
            f"{100 * cut:.0f} % of the snippets fill the context of {settings.context} tokens or "
            "are cut there. The accuracies of the judges are those on whole snippets.",
        )
    )


def records_task(
    settings: PipelineSettings,
    demonstrations: Records,
    preferences: Records,
    prompts: Records | None = None,
    judges: Judges | None = None,
) -> Task:
    """Records of the user: JSON Lines files or iterables of objects (`preferences`).

    Without ``prompts`` those of the demonstrations are used. A tenth of the prompts, at least one
    of each kind of record, is held out with all records that have them; records without a prompt
    are held out by their texts. ``judges`` score whole texts in the report. Raises `ConfigError`
    with file and line for an invalid record, for a text longer than the context, for a judge that
    is no `Judge` or has the name of another measurement, and for settings of another task.
    """
    if settings.task != "records":
        raise ConfigError(
            f"task = {settings.task!r}: the settings of records are PipelineSettings.of('records')"
        )
    require_judges(judges or {})
    shown = read_demonstrations(demonstrations)
    judged = read_preferences(preferences)
    if prompts is not None:
        starts = read_prompts(prompts)
    else:
        starts = [record.prompt for record in shown if record.prompt]
    starts = list(dict.fromkeys(starts))
    if not starts:
        raise ConfigError("there are no prompts: the demonstrations have none, so give prompts")
    kinds = {
        "demonstrations": [record.prompt or record.completion for record in shown],
        "preferences": [record.prompt or record.chosen for record in judged],
        "prompts": starts,
    }
    is_held_out = _held_out(kinds)
    held_out, train = _split(shown, kinds["demonstrations"], is_held_out)
    held_out_pairs, pairs = _split(judged, kinds["preferences"], is_held_out)
    held_out_prompts, train_prompts = _split(starts, starts, is_held_out)
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


def _encoded_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str], context: int, max_new_tokens: int
) -> Prompts:
    """The prompts, no wider than the longest. Raises `ConfigError` if no completion fits."""
    texts = tokenizer.encode_texts(prompts, None, context)
    longest = int(np.max(texts.length))
    if longest + max_new_tokens > context:
        prompt = prompts[int(np.argmax(texts.length))]
        raise ConfigError(
            f"the prompt {quoted(prompt)} has {longest} tokens with its start, and "
            f"max_new_tokens = {max_new_tokens} more exceed the context of {context}: shorten it, "
            "or choose a longer context"
        )
    return Prompts(np.asarray(texts.tokens)[:, :longest], np.asarray(texts.length))


def _held_out(kinds: Mapping[str, Sequence[str]]) -> set[str]:
    """A tenth of all keys, and at least one of every kind: those with the smallest hashes.

    Raises `ConfigError` for a kind with a single key, which cannot be held out and learnt from.
    """
    ordered = {name: sorted(set(keys), key=_hash) for name, keys in kinds.items()}
    every = sorted({key for keys in ordered.values() for key in keys}, key=_hash)
    held_out = set(every[: len(every) // 10])
    for name, keys in ordered.items():
        if len(keys) < 2:
            raise ConfigError(
                f"the {name} have one prompt only: they need two, because one is held out"
            )
        held_out.add(keys[0])
    for name, keys in ordered.items():
        if held_out.issuperset(keys):
            raise ConfigError(
                f"all {len(keys)} prompts of the {name} are held out: give more different prompts"
            )
    return held_out


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _split(
    records: Sequence[Any], keys: Sequence[str], held_out: set[str]
) -> tuple[list[Any], list[Any]]:
    """The records that are held out, and the others."""
    pairs = list(zip(records, keys, strict=True))
    return [x for x, key in pairs if key in held_out], [
        x for x, key in pairs if key not in held_out
    ]
