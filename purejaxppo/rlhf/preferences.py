"""Demonstrations, preferences and prompts: read from JSON Lines, or derived from ratings."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from purejaxppo.rlhf.corpora import RatedTexts
from purejaxppo.rlhf.texts import Pairs, Ranked
from purejaxppo.rlhf.tokenizer import Tokenizer, require_unicode
from purejaxppo.types import ConfigError
from purejaxppo.validation import integer, nearest, wrong

Records = str | os.PathLike | Iterable[Mapping[str, Any]]  # a JSON Lines file, or its objects
RecordT = TypeVar("RecordT")


class Demonstration(NamedTuple):
    """A completion to imitate; with an empty prompt it is a text of its own."""

    prompt: str
    completion: str


class Preference(NamedTuple):
    """Two completions of a prompt, which may be empty; somebody preferred ``chosen``."""

    prompt: str
    chosen: str
    rejected: str
    margin: float = 0.0  # how much better it is, at least 0 (Touvron et al. 2023, section 3.2.2)


class RatingDraws(NamedTuple):
    """n draws of two different texts, and of one person's rating of each."""

    first: NDArray[np.int64]  # [n] index of a text
    second: NDArray[np.int64]  # [n] index of another text
    first_person: NDArray[np.int64]  # [n] index of a rating of the first text
    second_person: NDArray[np.int64]  # [n]


# ------------------------------------------------------------------------------------- JSON Lines


def read_demonstrations(records: Records) -> list[Demonstration]:
    """Objects with ``prompt`` and ``completion``, two strings; the completion is not empty.

    Like the readers below, it takes the path of a JSON Lines file in UTF-8 or any iterable of
    mappings, ignores other keys and blank lines, and raises `ConfigError` with file and line, or
    with the number of the record, for the first record that is not so, and if there are none.
    """

    def read(record: Mapping[str, Any]) -> Demonstration:
        return Demonstration(
            prompt=_string(record, "prompt", may_be_empty=True),
            completion=_string(record, "completion"),
        )

    return _read("demonstrations", records, read)


def read_preferences(records: Records) -> list[Preference]:
    """Objects with ``prompt``, ``chosen`` and ``rejected``, and ``margin`` if there is one.

    The margin is a finite number of at least 0. Equal completions are refused.
    """

    def read(record: Mapping[str, Any]) -> Preference:
        preference = Preference(
            prompt=_string(record, "prompt", may_be_empty=True),
            chosen=_string(record, "chosen", may_be_empty=True),
            rejected=_string(record, "rejected", may_be_empty=True),
            margin=_margin(record.get("margin", 0.0)),
        )
        if preference.chosen == preference.rejected:
            raise ConfigError("chosen and rejected are equal: remove the pair")
        return preference

    return _read("preferences", records, read)


def read_prompts(records: Records) -> list[str]:
    """Objects with ``prompt``, a string that is not empty."""
    return _read("prompts", records, lambda record: _string(record, "prompt"))


def _read(
    kind: str, records: Records, read: Callable[[Mapping[str, Any]], RecordT]
) -> list[RecordT]:
    if isinstance(records, str | os.PathLike):
        name = str(records)
        places = _objects_of_file(Path(records))
    else:
        name = kind
        places = ((f"{kind}[{i}]", record) for i, record in enumerate(records))
    result = []
    for place, record in places:
        try:
            if not isinstance(record, Mapping):
                raise wrong("the record", record, 'an object such as {"prompt": "…"}')
            result.append(read(record))
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
    if not result:
        raise ConfigError(f"{name}: there are no {kind}")
    return result


def _objects_of_file(path: Path) -> Iterator[tuple[str, Any]]:
    """``FILE:LINE`` and the value of each line that is not blank."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}:{number}", _json(f"{path}:{number}", line)


def _json(place: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: byte {error.start + 1} of the line is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{place}: the line is not JSON: {error.msg} at column {error.colno}"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        raise ConfigError(f"{place}: the line is too deep or its numbers are too long") from None


def _string(record: Mapping[str, Any], key: str, may_be_empty: bool = False) -> str:
    if key not in record:
        raise ConfigError(f"the key {key!r} is missing{nearest(key, record)}")
    value = record[key]
    if not isinstance(value, str):
        raise wrong(key, value, "a string")
    if not value and not may_be_empty:
        raise wrong(key, value, "a string of at least one character")
    require_unicode(key, value)
    return value


def _margin(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.float_info.max:
        raise wrong("margin", value, "a finite number of at least 0")
    return float(value)


# ---------------------------------------------------------------------------------------- ratings


def draw_ratings(rated: RatedTexts, rng: np.random.Generator, n: int) -> RatingDraws:
    """Draw n times two different texts and one rating of each, all uniform and independent."""
    if len(rated.texts) < 2:
        raise ConfigError(f"there are {len(rated.texts)} texts: a comparison needs two")
    sizes = np.array([len(ratings) for ratings in rated.ratings])
    first = rng.integers(len(sizes), size=n)
    second = (first + rng.integers(1, len(sizes), size=n)) % len(sizes)
    return RatingDraws(
        first=first,
        second=second,
        first_person=rng.integers(sizes[first]),
        second_person=rng.integers(sizes[second]),
    )


def comparisons(rated: RatedTexts, seed: int, n: int) -> list[Preference]:
    """n preferences between two texts, each derived from one person's rating of either text.

    A comparison draws two texts and one person's rating of each. The text with the higher rating
    is chosen; draws with equal ratings are dropped. Nobody compared the two texts, and the ratings
    may be of two people: these preferences are derived. Prompts are empty.
    """
    integer("n", n, 1)
    rng = np.random.default_rng(integer("seed", seed, 0))
    if len({rating for ratings in rated.ratings for rating in ratings.tolist()}) < 2:
        raise ConfigError("all ratings are equal: no text is preferred to another")
    result: list[Preference] = []
    while len(result) < n:
        draws = draw_ratings(rated, rng, n)
        for i, j, a, b in zip(*(indices.tolist() for indices in draws), strict=True):
            difference = rated.ratings[i][a] - rated.ratings[j][b]
            if difference:
                chosen, rejected = (i, j) if difference > 0 else (j, i)
                result.append(Preference("", rated.texts[chosen], rated.texts[rejected]))
    return result[:n]


def encode_rated(
    tokenizer: Tokenizer, rated: RatedTexts, context: int, truncate: bool = False
) -> Ranked:
    """The texts as tokens with the ratings of all people, NumPy arrays of n rows.

    Any two of them can be compared; comparisons like those of `comparisons` then have the
    probabilities of `preference_of_ratings`.
    """
    rating = np.full((len(rated.texts), max(map(len, rated.ratings))), np.nan, np.float32)
    for row, ratings in zip(rating, rated.ratings, strict=True):
        row[: len(ratings)] = ratings
    prompts = [""] * len(rated.texts)
    return Ranked(
        texts=tokenizer.encode_texts(prompts, rated.texts, context, truncate),
        rating=rating,  # type: ignore[arg-type]
        prompt=np.zeros(len(rated.texts), np.int32),  # type: ignore[arg-type]
    )


def encode_pairs(
    tokenizer: Tokenizer, preferences: Sequence[Preference], context: int, truncate: bool = False
) -> Pairs:
    """The preferences as tokens, NumPy arrays of n rows; see `Tokenizer.encode_texts`."""
    prompts = [preference.prompt for preference in preferences]
    chosen = [preference.chosen for preference in preferences]
    rejected = [preference.rejected for preference in preferences]
    return Pairs(
        chosen=tokenizer.encode_texts(prompts, chosen, context, truncate),
        rejected=tokenizer.encode_texts(prompts, rejected, context, truncate),
        margin=np.array([preference.margin for preference in preferences], np.float32),  # type: ignore[arg-type]
    )
