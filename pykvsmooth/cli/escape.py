"""Text from models and files, made safe to show."""

from __future__ import annotations

import unicodedata

_TURNS_TEXT_AROUND = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # bidirectional overrides


def escaped(text: str) -> str:
    """Control characters as \\x1b and the like, but for line ends and tabs: a model's words must not drive the terminal."""
    if text.isprintable():
        return text
    return "".join(c if _harmless(c) else c.encode("unicode_escape").decode() for c in text)


def _harmless(char: str) -> bool:
    return char in "\n\t" or (unicodedata.category(char) not in ("Cc", "Cs") and char not in _TURNS_TEXT_AROUND)


def one_line(text: str) -> str:
    return escaped(" ".join(text.split("\n")).replace("\t", " "))
