"""English words of a caption, split as NLTK's word_tokenize (3.10) splits them: the Treebank conventions.

One pass of one expression over the text. Only what decides where a word ends is reproduced: a full stop at the end of a word is always a
token of its own, where NLTK's sentence splitter leaves it to abbreviations ("st."), so there our count of tokens is one higher.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_ALONE = r"«»“”‘’„;@#$%&?!*\"\[\](){}<>‒-―"  # characters that are tokens by themselves, wherever they stand
_FINAL = r"\.(?=[\])}>\"'»”’.]{0,8}(?:\s|$))"  # a full stop that ends a word
_END = rf"(?=\s|$|[{_ALONE}`]|[,:](?!\d)|{_FINAL}|\.\.|--|'')"
_CLITIC = rf"'(?:s|m|d|ll|re|ve){_END}"
_NOT = rf"n't{_END}"
_HALVES = r"\b(?:can(?=not\b)|gim(?=me\b)|gon(?=na\b)|got(?=ta\b)|lem(?=me\b)|wan(?=na\b))"
_OPENING = r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)"
_IN_WORD = (
    rf"[^\s{_ALONE}`.,:'n-]"
    rf"|n(?!'t{_END})"
    r"|[,:](?=\d)"
    rf"|(?!{_FINAL})\.(?!\.)"
    rf"|(?!{_CLITIC}|'{_END}|{_OPENING}|'')'"
    r"|-(?!-)"
)
_TOKEN = re.compile(rf"\.{{2,}}|--|`+|''|[{_ALONE}]|{_NOT}|{_CLITIC}|{_HALVES}|(?:{_IN_WORD})+|\S", re.IGNORECASE)


def tokens(text: str) -> Iterator[tuple[str, int, int]]:
    """(word in lower case, first character, one past the last) in order. A character that is no space is in exactly one token."""
    for match in _TOKEN.finditer(text):
        yield match[0].lower(), match.start(), match.end()
