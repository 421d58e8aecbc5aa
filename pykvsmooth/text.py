"""From token bytes to the text of an answer, piece by piece: UTF-8 that is not complete yet and text that may become a stop
string are held back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable


class AnswerText:
    """Feed token bytes, get text. After stopped is True nothing more comes.

    The first space of an answer is SentencePiece's, not the writer's: it is dropped, as in transformers' decode.
    """

    def __init__(self, drop_space: bool, stop: Iterable[str] | None = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = drop_space
        self._stop = tuple(stop or ())
        self._held = ""
        self.stopped = False

    def push(self, data: bytes, last: bool = False) -> str:
        """The text that is certain now; last: nothing follows, so that everything is certain."""
        if self.stopped:
            return ""
        text = self._decoder.decode(data, last)
        if self._drop_space and text:
            self._drop_space = False
            text = text.removeprefix(" ")
        text = self._held + text
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _undecided(self, text: str) -> int:
        """Length of the longest end of text that begins a stop string."""
        longest = max(map(len, self._stop), default=0)
        for n in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stop):
                return n
        return 0
