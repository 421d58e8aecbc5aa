"""What the command line knows about the terminal: colours, width, the status line, and how text is made safe to show."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from typing import TextIO

RESET, DIM, BOLD, RED, GREEN = "\x1b[0m", "\x1b[2m", "\x1b[1m", "\x1b[31m", "\x1b[32m"
_TURNS_TEXT_AROUND = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # bidirectional overrides


class Screen:
    """One of the two output streams. Looked at once; a window that changes its size is asked for its width each time."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115  None when the shell closed it
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")
        dumb = os.environ.get("TERM", "dumb") == "dumb"
        self.tty = self.stream.isatty()
        self.cursor = self.tty and not dumb
        self.colour = self.cursor and not os.environ.get("NO_COLOR")
        self.utf8 = (self.stream.encoding or "").lower().replace("-", "") == "utf8"

    @property
    def width(self) -> int:
        try:
            columns = os.get_terminal_size(self.stream.fileno()).columns if self.tty else 0
        except (OSError, ValueError):
            columns = 0
        return max(columns, 10) if columns else 80

    def write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

    def safe(self, text: str) -> str:
        """On a terminal control characters are shown, not obeyed; a pipe gets what there is."""
        return escaped(text) if self.tty else text

    def paint(self, text: str, *codes: str) -> str:
        return f"{''.join(codes)}{text}{RESET}" if self.colour and text else text


class Ui:
    """Both streams, the line that shows progress, and messages."""

    def __init__(self, quiet: bool = False) -> None:
        self.out, self.err = Screen(sys.stdout), Screen(sys.stderr)
        self.quiet = quiet
        self._shown = False
        self._last = 0.0

    def status(self, text: str, at_most_every: float = 0.0) -> None:
        """Shows one line that the next output replaces. Nothing on a pipe, nothing with --quiet."""
        now = time.monotonic()
        if self.quiet or not self.err.cursor or now - self._last < at_most_every:
            return
        self._last, self._shown = now, True
        self.err.write("\r\x1b[K" + self.err.paint(cut(escaped(text), self.err.width - 1), DIM))

    def clear(self) -> None:
        if self._shown:
            self._shown, self._last = False, 0.0
            self.err.write("\r\x1b[K")

    def note(self, text: str, dim: bool = True) -> None:
        """A line for people, on standard error; not with --quiet."""
        self.clear()
        if not self.quiet:
            self.err.write((self.err.paint(text, DIM) if dim else text) + "\n")

    def error(self, text: object) -> None:
        self.clear()
        self.err.write(self.err.paint("error:", RED) + " " + one_line(str(text)) + "\n")

    def restore(self) -> None:
        """After an interrupt: no colour and no half line stays behind."""
        for screen in (self.out, self.err):
            if screen.colour:
                screen.write(RESET)
        self.clear()


def escaped(text: str) -> str:
    """Control characters as \\x1b and the like, but for line ends and tabs: a model's words must not drive the terminal."""
    if text.isprintable():
        return text
    return "".join(c if _harmless(c) else c.encode("unicode_escape").decode() for c in text)


def _harmless(char: str) -> bool:
    return char in "\n\t" or (unicodedata.category(char) not in ("Cc", "Cs") and char not in _TURNS_TEXT_AROUND)


def one_line(text: str) -> str:
    return escaped(" ".join(text.split("\n")).replace("\t", " "))


def cells(text: str) -> int:
    """Columns that text takes on a terminal."""
    return sum(map(_char_cells, text)) if not text.isascii() else len(text)


def _char_cells(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def split_cells(text: str, width: int) -> list[str]:
    """text in pieces of at most width columns (at least a character each)."""
    pieces, used = [""], 0
    for char in text:
        n = _char_cells(char)
        if used + n > width and pieces[-1]:
            pieces.append("")
            used = 0
        pieces[-1] += char
        used += n
    return pieces


def cut(text: str, width: int) -> str:
    return text if cells(text) <= width else split_cells(text, max(width - 1, 1))[0] + "~"


def bytes_text(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def time_text(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
