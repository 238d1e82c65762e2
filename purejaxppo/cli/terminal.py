"""Output in terminals that cannot show every character: what they cannot show is replaced, never an error."""

import codecs
import sys

HANDLER = "purejaxppo.plain"  # the name under which codecs know it

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
    """Let stdout and stderr show what their encoding lacks by `PLAIN`, and by a question mark where it has none."""
    codecs.register_error(HANDLER, _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(
            stream, "reconfigure"
        ):  # what tests or notebooks put in their place may be something else
            stream.reconfigure(errors=HANDLER)


def shown(text: str, encoding: str) -> str:
    """The text as a terminal of this encoding shows it; for tables, whose columns depend on its width."""
    codecs.register_error(HANDLER, _plain)
    return text.encode(encoding, HANDLER).decode(encoding)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(
        PLAIN.get(character, "?") for character in error.object[error.start : error.end]
    ), error.end
