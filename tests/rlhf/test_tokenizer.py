"""Texts become tokens and come back without loss; no text contains a special token."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentences import sentence_of

from purejaxppo.rlhf import extra
from purejaxppo.rlhf.tokenizer import (
    END,
    PADDING,
    SMALLEST_VOCABULARY,
    START,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

CORPUS = ["the film is good", "the film is bad", "the plot of the film", "don't see the film"] * 3
TOKENIZER = train_tokenizer(CORPUS, SMALLEST_VOCABULARY + 12)
BYTES = train_tokenizer([], SMALLEST_VOCABULARY)
# The 256 bytes in the order of GPT-2: printable characters of Latin-1 first, moved to their place.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
A = 3 + PRINTABLE.index(ord("a"))  # the token of the byte "a"


@given(st.text())
def test_every_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode([text])[0]) == text
    tokens = BYTES.encode([text])[0]
    assert BYTES.decode(tokens) == text and len(tokens) == len(text.encode())


@given(st.text(alphabet="the film\n\t'’é\x00\u2028🎬", max_size=30))
def test_texts_of_learnt_words_come_back(text):
    tokens = TOKENIZER.encode([text])[0]
    assert TOKENIZER.decode(tokens) == text and min(tokens, default=3) >= 3


def test_padding_start_and_end_are_three_tokens_that_no_text_contains():
    assert {PADDING, START, END} == {0, 1, 2}
    for text in ("<s></s><pad>", "<|endoftext|>", "[PAD][UNK]", "\x00\x01\x02", "0 1 2"):
        assert min(TOKENIZER.encode([text])[0]) >= 3
    assert BYTES.encode(["a"]) == [[A]] and BYTES.vocab_size == 259


def test_frequent_words_are_one_token():
    """`` film`` (with its blank) is joined in full: it is in every text."""
    tokens = TOKENIZER.encode([" film", "film", "the film"])
    assert len(tokens[0]) == 1 and len(tokens[1]) > 1 and tokens[2][-1:] == tokens[0]
    assert TOKENIZER.vocab_size == SMALLEST_VOCABULARY + 12


def test_training_joins_the_most_frequent_pair_first():
    tokenizer = train_tokenizer(["abab abab xy"], SMALLEST_VOCABULARY + 2)
    b = A + 1
    ab = SMALLEST_VOCABULARY  # "ab" appears 4 times; then "abab" and " " before "abab" do
    assert tokenizer.encode(["ab", "ba"]) == [[ab], [b, A]]
    assert len(tokenizer.encode(["abab"])[0]) == 1
    with_all = train_tokenizer(["ab"], 1000)
    assert with_all.vocab_size == SMALLEST_VOCABULARY + 1  # nothing is left to join


def test_training_is_the_same_in_every_process(tmp_path):
    code = f"""
import sys
from purejaxppo.rlhf.tokenizer import save_tokenizer, train_tokenizer
save_tokenizer(sys.argv[1], train_tokenizer({CORPUS!r}, {SMALLEST_VOCABULARY + 12}))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other.json")], check=True)
    save_tokenizer(tmp_path / "this.json", TOKENIZER)
    assert (tmp_path / "this.json").read_bytes() == (tmp_path / "other.json").read_bytes()


def test_texts_are_start_prompt_completion_and_end():
    texts = BYTES.encode_texts(["a", ""], ["ba", "a"], 6)
    b = A + 1
    assert texts.tokens.tolist() == [
        [START, A, b, A, END, PADDING],
        [START, A, END] + [PADDING] * 3,
    ]
    assert texts.length.tolist() == [5, 3] and texts.prompt_length.tolist() == [2, 1]
    assert {array.dtype for array in texts} == {np.dtype(np.int32)}
    mask = np.asarray(texts.completion_mask)
    assert mask.T.tolist() == [[False, True, True, True, False], [True, True, False, False, False]]


def test_prompts_alone_have_no_end():
    texts = BYTES.encode_texts(["a", "ab"], None, 4)
    assert texts.tokens.tolist() == [[START, A, PADDING, PADDING], [START, A, A + 1, PADDING]]
    assert texts.length.tolist() == texts.prompt_length.tolist() == [2, 3]
    assert BYTES.encode_texts([], None, 4).tokens.shape == (0, 4)


def test_a_completion_is_encoded_as_after_a_prompt_alone():
    """``fi`` and ``lm`` are not joined to ``film``, because generation cannot join them either."""
    texts = TOKENIZER.encode_texts(["the fi"], ["lm"], 12)
    tokens = texts.tokens[0]
    n = texts.prompt_length[0]
    assert tokens[1:n].tolist() == TOKENIZER.encode(["the fi"])[0]
    assert tokens[n : texts.length[0] - 1].tolist() == TOKENIZER.encode(["lm"])[0]


def test_a_truncated_text_loses_its_end():
    texts = BYTES.encode_texts(["a", "a"], ["bbb", "b"], 4, truncate=True)
    b = A + 1
    assert texts.tokens.tolist() == [[START, A, b, b], [START, A, b, END]]
    assert texts.length.tolist() == [4, 4]


def test_decoding_leaves_out_specials_and_stops_at_the_end():
    b = A + 1
    assert BYTES.decode([START, A, PADDING, b, END, A, 10**6]) == "ab"
    assert BYTES.decode(np.array([START, A, A], np.int32)) == "aa"
    assert BYTES.decode([]) == ""
    half = BYTES.encode(["é"])[0][:1]
    assert BYTES.decode(half) == "\ufffd"


def test_a_file_holds_the_whole_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(path, TOKENIZER)
    loaded = load_tokenizer(path)
    texts = [*CORPUS, "é🎬 <s>", "unseen words"]
    assert loaded.encode(texts) == TOKENIZER.encode(texts)
    assert loaded.vocab_size == TOKENIZER.vocab_size
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: BYTES.decode([259]), "token 259 is unknown: the tokens are 0 … 258"),
        (lambda: BYTES.decode([-1]), "token -1 is unknown"),
        (lambda: BYTES.encode_texts(["a", ""], None, 4), "prompt 1 is empty"),
        (
            lambda: BYTES.encode_texts(["a", "abcd"], None, 4),
            "the prompt 'abcd' has 5 tokens with its start, and the context has 4",
        ),
        (
            lambda: BYTES.encode_texts(["abcd"], ["a"], 4, truncate=True),
            "the prompt 'abcd' has 5 tokens with its start, and the context has 4",
        ),
        (
            lambda: BYTES.encode_texts(["ab"], ["a"], 4),
            "the text 'aba' has 5 tokens with its start, and the context has 4",
        ),
        (lambda: BYTES.encode_texts(["a"], [], 4), "there are 1 prompts and 0 completions"),
        (lambda: BYTES.encode_texts(["a"], None, 0), "context = 0: it must be an integer"),
        (
            lambda: BYTES.encode(["a", "b\ud800"]),
            "a text has the lone surrogate U+D800",
        ),
        (
            lambda: train_tokenizer(["a"], 258),
            "vocab_size = 258: it must be an integer of at least",
        ),
        (lambda: load_tokenizer("nowhere/t.json"), "cannot read the tokenizer nowhere/t.json"),
        (lambda: save_tokenizer("nowhere/t.json", BYTES), "cannot write nowhere/t.json"),
        (lambda: extra.import_extra("no_such_package"), "pip install 'purejaxppo[rlhf]'"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(make, sentence):
    assert sentence in sentence_of(make)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: text[: len(text) // 2], "is damaged: it is not JSON"),
        (lambda text: "[1]", "is not a tokenizer of purejaxppo"),
        (lambda text: json.dumps(json.loads(text) | {"format_version": 9}), "format version 9"),
        (lambda text: json.dumps(json.loads(text) | {"bpe": {"a": 1}}), "encoding cannot be read"),
        (
            lambda text: json.dumps({"format": "purejaxppo tokenizer", "format_version": 1}),
            "damaged",
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, sentence):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(path, BYTES)
    path.write_text(change(path.read_text()))
    assert sentence in sentence_of(lambda: load_tokenizer(path))
