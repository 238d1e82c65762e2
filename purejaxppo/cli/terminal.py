"""Output in terminals that cannot show every character: these are replaced, without an error."""

import codecs
import sys

HANDLER = "purejaxppo.plain"  # its name in the registry of codecs

PLAIN = {
    "±": "+/-",
    "×": "x",
    "÷": "/",
    "·": "*",
    "−": "-",
    "–": "-",
    "—": "-",
    "…": "...",
    "→": "->",
    "←": "<-",
    "≤": "<=",
    "≥": ">=",
    "∞": "inf",
    "⌈": "ceil(",
    "⌊": "floor(",
    "⌉": ")",
    "⌋": ")",
    "γ": "gamma",
    "ε": "epsilon",
    "θ": "theta",
    "λ": "lambda",
    "π": "pi",
    "β": "beta",
    "δ": "delta",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "•": "*",
    "√": "sqrt",
}


def allow_any_character() -> None:
    """Make stdout and stderr replace characters that their encoding lacks.

    The substitute comes from `PLAIN`; it is a question mark for other characters.
    """
    codecs.register_error(HANDLER, _substitute)
    for stream in (sys.stdout, sys.stderr):
        # Tests and notebooks may replace the streams by objects without this method.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=HANDLER)


def shown(text: str, encoding: str) -> str:
    """The text as a terminal with this encoding shows it, with the width that tables must use."""
    codecs.register_error(HANDLER, _substitute)
    return text.encode(encoding, HANDLER).decode(encoding)


def _substitute(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    return "".join(PLAIN.get(character, "?") for character in unknown), error.end
