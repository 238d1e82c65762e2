"""Byte-level byte-pair encoding: texts as tokens and back, without loss.

Padding, start and end of a text are the tokens 0, 1 and 2. The vocabulary of the encoding follows
from 3 on and does not know them, so no text can contain them, whatever it looks like.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int

from purejaxppo.rlhf.extra import import_extra
from purejaxppo.rlhf.texts import Texts
from purejaxppo.runs.disk import atomic_write
from purejaxppo.types import ConfigError
from purejaxppo.validation import integer

PADDING = 0
START = 1
END = 2
NUM_SPECIAL = 3
QUOTED = 60  # characters
SMALLEST_VOCABULARY = NUM_SPECIAL + 256  # one token for each byte
Tokens = Sequence[int] | Int[np.ndarray, "L"] | Int[Array, "L"]
FORMAT = "purejaxppo tokenizer"
FORMAT_VERSION = 1


class Tokenizer(NamedTuple):
    """Byte-pair encoding of UTF-8, and three special tokens."""

    bpe: Any  # `tokenizers.Tokenizer`; its token i is our token i + 3

    @property
    def vocab_size(self) -> int:
        """The number of tokens, with the three special ones."""
        return self.bpe.get_vocab_size() + NUM_SPECIAL

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, without start and end."""
        for text in texts:
            require_unicode("a text", text)
        unique = list(dict.fromkeys(texts))  # texts of comparisons appear several times
        tokens = {}
        for text, encoding in zip(unique, self.bpe.encode_batch(unique), strict=True):
            tokens[text] = [token + NUM_SPECIAL for token in encoding.ids]
        return [tokens[text] for text in texts]

    def decode(self, tokens: Tokens) -> str:
        """The text of these tokens up to the first end; padding and starts are left out.

        Bytes that are not UTF-8, such as half of a character, become U+FFFD. Raises `ConfigError`
        for a number that is not a token.
        """
        content = []
        for token in np.asarray(tokens, int).tolist():
            if not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"token {token} is unknown: the tokens are 0 … {self.vocab_size - 1}"
                )
            if token == END:
                break
            if token >= NUM_SPECIAL:
                content.append(token - NUM_SPECIAL)
        return self.bpe.decode(content)

    def encode_texts(
        self,
        prompts: Sequence[str],
        completions: Sequence[str] | None,
        context: int,
        truncate: bool = False,
    ) -> Texts:
        """Start, prompt, completion and end of n texts as NumPy arrays [n, ``context``].

        Prompt and completion are encoded apart, as in generation, where the prompt is known alone.
        Without ``completions`` the texts are start and prompt, and no prompt may be empty. With
        completions, an empty prompt makes the completion a text of its own. With ``truncate``, a
        longer text keeps its first ``context`` tokens, and so loses its end. A prompt is never cut.

        Raises `ConfigError` for an empty prompt and for a prompt or text longer than the context.
        """
        integer("context", context, 1)
        if completions is not None and len(completions) != len(prompts):
            raise ConfigError(
                f"there are {len(prompts)} prompts and {len(completions)} completions: "
                "give each prompt one completion"
            )
        starts = [[START, *tokens] for tokens in self.encode(prompts)]
        ends: list[list[int]] = [[] for _ in prompts]
        if completions is not None:
            ends = [[*tokens, END] for tokens in self.encode(completions)]
        texts = np.full((len(prompts), context), PADDING, np.int32)
        length = np.zeros(len(prompts), np.int32)
        prompt_length = np.zeros(len(prompts), np.int32)
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if completions is None and len(start) == 1:
                raise ConfigError(f"prompt {i} is empty: give it at least one character")
            _require_fits("prompt", prompts[i], start, context)
            if not truncate and completions is not None:
                _require_fits("text", prompts[i] + completions[i], start + end, context)
            tokens = (start + end)[:context]
            texts[i, : len(tokens)] = tokens
            length[i] = len(tokens)
            prompt_length[i] = len(start)
        return Texts(tokens=texts, length=length, prompt_length=prompt_length)  # type: ignore[arg-type]


def require_unicode(name: str, text: str) -> None:
    """Raise `ConfigError` for a half of a surrogate pair, which JSON can express and UTF-8 not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} has the lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which is no character: remove it"
        ) from None


def quoted(text: str) -> str:
    """The beginning of a text on one line, in quotation marks, for messages."""
    return repr(text if len(text) <= QUOTED else text[: QUOTED - 1] + "…")


def _require_fits(kind: str, text: str, tokens: list[int], context: int) -> None:
    if len(tokens) > context:
        raise ConfigError(
            f"the {kind} {quoted(text)} has {len(tokens)} tokens with its start, and the context "
            f"has {context}: shorten it, or choose a longer context"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016, section 3.2) of bytes (Radford et al. 2019, 2.2).

    The first 3 tokens are special, the next 256 the bytes. Each further token joins the two tokens
    that follow one another most often within the words of ``texts``, until there are ``vocab_size``
    tokens or no two are left to join. The same texts give the same tokenizer.
    """
    integer("vocab_size", vocab_size, SMALLEST_VOCABULARY)
    tokenizers = import_extra("tokenizers")
    bytes_of_words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = bytes_of_words
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_SPECIAL,
        initial_alphabet=bytes_of_words.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return Tokenizer(bpe)


def save_tokenizer(path: str | os.PathLike, tokenizer: Tokenizer) -> None:
    """Write the tokenizer to one JSON file, atomically."""
    path = Path(path)
    bpe = json.loads(tokenizer.bpe.to_str())
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "bpe": bpe}
    text = json.dumps(content, ensure_ascii=False) + "\n"
    try:
        atomic_write(path, lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Read the file of `save_tokenizer`. Raises `ConfigError` if it is missing or damaged."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{path} is not a tokenizer or is damaged: it is not JSON") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f"{path} is not a tokenizer of purejaxppo")
    if content.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{path} has the format version {content.get('format_version')!r}: "
            f"this version of purejaxppo reads {FORMAT_VERSION}"
        )
    try:
        bpe = import_extra("tokenizers").Tokenizer.from_str(json.dumps(content["bpe"]))
    except ConfigError:
        raise
    except Exception:  # the package raises plain exceptions
        raise ConfigError(f"the tokenizer {path} is damaged: its encoding cannot be read") from None
    return Tokenizer(bpe)
