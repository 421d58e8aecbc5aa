"""Text from models and files, made safe to show."""

from __future__ import annotations

import unicodedata

_TURNS_TEXT_AROUND = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # bidirectional overrides
_NEVER_SHOWN = ("Cc", "Cs", "Zl", "Zp")  # control characters, half characters, separators of lines and paragraphs


def escaped(text: str) -> str:
    """Control characters as \\x1b and the like, but for line ends and tabs: a model's words must not drive the terminal."""
    if text.isprintable():
        return text
    return "".join(c if _harmless(c) else c.encode("unicode_escape").decode() for c in text)


def _harmless(char: str) -> bool:
    return char in "\n\t" or (unicodedata.category(char) not in _NEVER_SHOWN and char not in _TURNS_TEXT_AROUND)


def escaped_json(text: str) -> str:
    """What JSON leaves as it is though a terminal would obey it, as \\u0085: the same text to a reader."""
    if text.isprintable():
        return text
    return "".join(c if _harmless(c) else f"\\u{ord(c):04x}" for c in text)


def one_line(text: str) -> str:
    return escaped(" ".join(text.split("\n")).replace("\t", " "))
