"""Records are checked one by one; comparisons follow from single ratings of two texts."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from sentences import sentence_of

from purejaxppo.rlhf.corpora import RatedTexts
from purejaxppo.rlhf.preference_losses import preference_of_ratings
from purejaxppo.rlhf.preferences import (
    Demonstration,
    Preference,
    comparisons,
    draw_ratings,
    encode_pairs,
    encode_rated,
    read_demonstrations,
    read_preferences,
    read_prompts,
)
from purejaxppo.rlhf.tokenizer import END, START, train_tokenizer

PAIR = {"prompt": "How?", "chosen": "Well.", "rejected": "é\u2028\n"}
RATED = RatedTexts(["a", "b", "c"], [np.array([0, 1]), np.array([1, 1, 2]), np.array([1])])


@pytest.fixture
def file(tmp_path):
    """A JSON Lines file of these lines."""

    def write(*lines, end="\n"):
        path = tmp_path / "data.jsonl"
        encoded = [line if isinstance(line, bytes) else line.encode() for line in lines]
        path.write_bytes(b"".join(line + end.encode() for line in encoded))
        return path

    return write


def test_files_and_iterables_give_the_same_records(file):
    rows = [PAIR | {"margin": 2, "source": "kept out"}, PAIR | {"prompt": ""}]
    expected = [Preference("How?", "Well.", "é\u2028\n", 2.0), Preference("", "Well.", "é\u2028\n")]
    path = file(json.dumps(rows[0], ensure_ascii=False), "  ", json.dumps(rows[1]), end="\r\n")
    assert read_preferences(path) == read_preferences(str(path)) == expected
    assert read_preferences(rows) == read_preferences(iter(rows)) == expected
    assert isinstance(expected[0].margin, float)
    path = file('\ufeff{"prompt": "a", "completion": "b"}', end="")
    assert read_demonstrations(path) == [Demonstration("a", "b")]
    assert read_prompts(path) == ["a"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "{",
            "the line is not JSON: Expecting property name enclosed in double quotes at column 2",
        ),
        (b'{"prompt": "\xff"}', "byte 13 of the line is not UTF-8"),
        ("[1]", 'the record = [1]: it must be an object such as {"prompt": "…"}'),
        ("{}", "the key 'prompt' is missing"),
        ('{"prompt": 1}', "prompt = 1: it must be a string"),
        ('{"prompt": ["a"]}', "prompt = ['a']: it must be a string"),
        (
            '{"prompt": "a", "choosen": "b", "rejected": "c"}',
            "the key 'chosen' is missing; did you mean 'choosen'?",
        ),
        (
            '{"prompt": "a", "chosen": "b", "rejected": null}',
            "rejected = None: it must be a string",
        ),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "b"}',
            "chosen and rejected are equal: remove the pair",
        ),
        ('{"prompt": "a\\ud800"}', "prompt has the lone surrogate U+D800 at character 1"),
        ("[" * 100_000, "the line is too deep or its numbers are too long"),
    ],
)
def test_a_wrong_line_is_named_by_file_and_line(file, line, sentence):
    path = file(json.dumps(PAIR), "", line, json.dumps(PAIR))
    assert sentence_of(lambda: read_preferences(path)).startswith(f"{path}:3: {sentence}")


@pytest.mark.parametrize(
    "margin", ["NaN", "Infinity", "-1", '"1"', "true", "null", "1" + "0" * 400]
)
def test_a_margin_is_a_finite_number(file, margin):
    path = file(json.dumps(PAIR)[:-1] + f', "margin": {margin}}}')
    message = sentence_of(lambda: read_preferences(path))
    assert message.startswith(f"{path}:1: margin = ")
    assert message.endswith("it must be a finite number of at least 0")


@pytest.mark.parametrize(
    ("read", "record", "sentence"),
    [
        (
            read_demonstrations,
            {"prompt": "a"},
            "demonstrations[1]: the key 'completion' is missing",
        ),
        (read_demonstrations, {"prompt": "a", "completion": ""}, "completion = ''"),
        (read_prompts, {"prompt": ""}, "prompts[1]: prompt = '': it must be a string of at least"),
        (read_prompts, "a", "prompts[1]: the record = 'a': it must be an object"),
    ],
)
def test_a_wrong_record_is_named_by_its_number(read, record, sentence):
    records = [{"prompt": "a", "completion": "b"}, record]
    assert sentence in sentence_of(lambda: read(iter(records)))


@pytest.mark.parametrize("read", [read_demonstrations, read_preferences, read_prompts])
def test_no_records_and_no_file_are_refused(read, file, tmp_path):
    kind = read.__name__.removeprefix("read_")
    path = file("", " ")
    assert sentence_of(lambda: read(path)) == f"{path}: there are no {kind}"
    assert sentence_of(lambda: read([])) == f"{kind}: there are no {kind}"
    assert f"cannot read {tmp_path}: " in sentence_of(lambda: read(tmp_path))
    assert "No such file" in sentence_of(lambda: read(tmp_path / "none.jsonl"))


def test_ratings_are_drawn_uniformly():
    """Six ordered pairs of different texts are equally probable, and all ratings of a text are."""
    draws = draw_ratings(RATED, np.random.default_rng(0), 60_000)
    pairs = np.bincount(3 * draws.first + draws.second, minlength=9).reshape(3, 3)
    assert not np.diag(pairs).any()
    np.testing.assert_allclose(pairs[~np.eye(3, dtype=bool)], 10_000, atol=450)  # 5 deviations
    for text, person in ((draws.first, draws.first_person), (draws.second, draws.second_person)):
        counts = np.bincount(person[text == 1], minlength=3)
        np.testing.assert_allclose(counts, 20_000 / 3, atol=350)


def test_the_text_with_the_higher_rating_is_chosen():
    """Of 'a' (0 or 1) and 'b' (1, 1 or 2), 'b' wins in 4 of 6 pairs of ratings, 2 are ties.

    'b' beats 'c' (1) in 1 of 3; 'c' beats 'a' in 1 of 2; no other text ever wins. The three pairs
    of texts are equally probable, so the shares of the wins are 4/6 : 1/3 : 1/2.
    """
    n = 30_000
    preferences = comparisons(RATED, 0, n)
    assert len(preferences) == n and {preference.prompt for preference in preferences} == {""}
    wins = [(preference.chosen, preference.rejected) for preference in preferences]
    counts = [wins.count(pair) for pair in (("b", "a"), ("b", "c"), ("c", "a"))]
    assert sum(counts) == n
    np.testing.assert_allclose(np.array(counts) / n, np.array([4, 2, 3]) / 9, atol=0.015)


def test_comparisons_follow_from_the_seed():
    assert comparisons(RATED, 3, 50) == comparisons(RATED, 3, 50) != comparisons(RATED, 4, 50)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: comparisons(RATED, 0, 0), "n = 0: it must be an integer of at least 1"),
        (lambda: comparisons(RATED, -1, 5), "seed = -1: it must be an integer of at least 0"),
        (
            lambda: comparisons(RatedTexts(["a"], [np.array([0, 1])]), 0, 5),
            "there are 1 texts: a comparison needs two",
        ),
        (
            lambda: comparisons(RatedTexts(["a", "b"], [np.array([1]), np.array([1])]), 0, 5),
            "all ratings are equal: no text is preferred to another",
        ),
    ],
)
def test_comparisons_that_cannot_be_are_refused(make, sentence):
    assert sentence in sentence_of(make)


def test_preferences_become_two_texts_with_one_prompt():
    tokenizer = train_tokenizer([], 259)
    a, b, c = tokenizer.encode(["abc"])[0]
    preferences = [Preference("a", "b", "", 0.5), Preference("", "c", "bcb")]
    pairs = encode_pairs(tokenizer, preferences, 5)
    assert pairs.chosen.tokens.tolist() == [[START, a, b, END, 0], [START, c, END, 0, 0]]
    assert pairs.rejected.tokens.tolist() == [[START, a, END, 0, 0], [START, b, c, b, END]]
    assert pairs.chosen.prompt_length.tolist() == pairs.rejected.prompt_length.tolist() == [2, 1]
    assert pairs.margin.tolist() == [0.5, 0]
    cut = encode_pairs(tokenizer, preferences, 4, truncate=True)
    assert cut.rejected.tokens[1].tolist() == [START, b, c, b]
    message = sentence_of(lambda: encode_pairs(tokenizer, preferences, 4))
    assert message.startswith("the text 'bcb' has 5 tokens")


def test_rated_texts_have_the_preferences_of_comparisons():
    """The probability of every ordered pair: over all pairs of ratings, and in 20,000 draws."""
    tokenizer = train_tokenizer(["abc"], 259)
    rated = encode_rated(tokenizer, RATED, 4)
    a = tokenizer.encode("a")[0][0]
    assert rated.texts.tokens[0].tolist() == [START, a, END, 0]
    assert rated.texts.length.tolist() == [3, 3, 3]
    probability = np.asarray(preference_of_ratings(*map(jnp.asarray, rated[1:])))
    drawn = [(x.chosen, x.rejected) for x in comparisons(RATED, 0, 20_000)]
    share = np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            pairs = [(x, y) for x in RATED.ratings[i] for y in RATED.ratings[j]]
            above = np.mean([x > y for x, y in pairs]) if i != j else 0
            assert probability[i, j] == pytest.approx(above, abs=1e-6)
            share[i, j] = drawn.count((RATED.texts[i], RATED.texts[j])) / len(drawn)
    expected = probability / probability.sum()
    np.testing.assert_allclose(share, expected, atol=5 * np.sqrt(0.25 / 20_000))
