"""How captions look: as they are, shaded by entropy, with strengths under the words, or two of them compared."""

from __future__ import annotations

import bisect
import difflib
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .terminal import GREEN, RED, Screen, Ui, cells, split_cells

if TYPE_CHECKING:
    from ..stats import Result, Stats, Token

# black on a background from none over yellow to red, in the 256-colour palette; readable on dark and on light terminals
SHADES = ["", *(f"\x1b[38;5;16;48;5;{n}m" for n in (230, 229, 222, 215, 209, 203, 197))]
BARS, DIGITS = "▁▂▃▄▅▆▇█", "01234567"
LONGEST_WORD = 24  # columns; scripts without spaces are shaded in pieces of about this length


class Plain:
    """Tokens as they come. The terminal does the wrapping."""

    def __init__(self, ui: Ui) -> None:
        self.ui = ui
        self._any = False
        self._end = "\n"

    def token(self, token: Token) -> None:
        if token.text:
            self.ui.clear()
            self.ui.out.write(self.ui.out.safe(token.text))
            self._any, self._end = True, token.text[-1]

    def end(self) -> None:
        """The last line ends, also after an interrupt; an empty caption is an empty line."""
        if not self._any or self._end != "\n":
            self.ui.clear()
            self.ui.out.write("\n")

    def legend(self) -> None:
        pass


class Painted(Plain):
    """Words shaded by their row entropy (heat) and bars of the strengths under each line (strengths).

    Tokens are gathered to whole words, which get the mean of their tokens. A shade is the word's rank among the words so far: what
    counts as high differs from model to model and picture to picture.
    """

    def __init__(self, ui: Ui, heat: bool, strengths: tuple[float, float] | None) -> None:
        super().__init__(ui)
        self._heat, self._range = heat and ui.out.colour, strengths
        self._word, self._entropies, self._strengths = "", [], []  # type: ignore[var-annotated]
        self._seen: list[float] = []
        self._all_strengths: list[float] = []
        self._column, self._bars = 0, ""

    def token(self, token: Token) -> None:
        self._any = True
        for piece in re.findall(r"\n|[ \t]+|[^ \t\n]+", self.ui.out.safe(token.text)) or [""]:
            if piece.isspace() or cells(self._word) + cells(piece) > LONGEST_WORD:
                self._flush()
            self._word += piece
            if piece == "\n":
                self._word = ""
                self._newline()
            elif not piece.isspace():
                self._entropies.append(token.entropy)
                if token.strength is not None and math.isfinite(token.strength):
                    self._strengths.append(token.strength)

    def end(self) -> None:
        self._flush()
        if self._column or not self._any:
            self._newline()

    def legend(self) -> None:
        self.ui.clear()
        if self._heat and self._seen:
            shades = "".join(f"{shade}  \x1b[0m" for shade in SHADES) if self.ui.err.colour else "low to high"
            low, high = self._seen[0], self._seen[-1]
            self.ui.note(f"row entropy {shades} {low:.2f} to {high:.2f} nats, shaded by rank", dim=False)
        if self._range and self._all_strengths:
            marks = BARS if self.ui.err.utf8 else DIGITS
            mean = sum(self._all_strengths) / len(self._all_strengths)
            self.ui.note(f"strength {marks[0]} {self._range[0]:.2f} to {marks[-1]} {self._range[1]:.2f}, mean {mean:.3f}", dim=False)

    def _flush(self) -> None:
        word, self._word = self._word, ""
        entropy, strength = _mean(self._entropies), _mean(self._strengths)
        self._entropies, self._strengths = [], []
        space = word[: len(word) - len(word.lstrip(" \t"))].replace("\t", " ")
        word = word.lstrip(" \t")
        width = self.ui.out.width - 1
        if self._column and self._column + len(space) + cells(word) > width:
            self._newline()
        if not self._column:
            space = ""
        code = self._shade(entropy) if word else ""
        if word and strength is not None:
            self._all_strengths.append(strength)
        for i, piece in enumerate(split_cells(word, width)):
            if i:
                self._newline()
            self._put(space if not i else "", piece, code, strength)

    def _put(self, space: str, piece: str, code: str, strength: float | None) -> None:
        self.ui.clear()
        self.ui.out.write(space + (f"{code}{piece}\x1b[0m" if code else piece))
        self._column += len(space) + cells(piece)
        self._bars += " " * len(space) + self._bar(strength) * cells(piece)

    def _newline(self) -> None:
        self.ui.clear()
        bars = self._bars.rstrip()
        self.ui.out.write("\n" + (self.ui.out.paint(bars, "\x1b[36m") + "\n" if bars and self._range else ""))
        self._column, self._bars = 0, ""

    def _shade(self, entropy: float | None) -> str:
        if entropy is None or not self._heat:
            return ""
        at = bisect.bisect_left(self._seen, entropy)
        self._seen.insert(at, entropy)
        return SHADES[at * len(SHADES) // len(self._seen)]

    def _bar(self, strength: float | None) -> str:
        if strength is None or self._range is None:
            return " "
        low, high = self._range
        marks = BARS if self.ui.out.utf8 else DIGITS
        share = (strength - low) / (high - low) if high > low else 1.0
        return marks[round(min(max(share, 0.0), 1.0) * (len(marks) - 1))]


def _mean(values: list[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None


def strength_range(policy: Any) -> tuple[float, float]:
    """The ends of the scale for bars: the window of strengths that the policy can give."""
    if policy is None or policy.lambda_fixed is not None:
        return 0.0, 1.0
    return max(0.0, policy.lambda_ref - policy.half_width), min(policy.lambda_max, policy.lambda_ref + policy.half_width)


def stats_line(stats: Stats, finish_reason: str) -> str:
    parts = (
        [f"encode {stats.encode_s:.2f} s" if not stats.reused_images else "picture reused"] if stats.encode_s or stats.reused_images else []
    )
    reused = f", {stats.reused_tokens} reused" if stats.reused_tokens else ""
    parts.append(f"prefill {stats.prefill_s:.2f} s ({stats.prefill_tokens} rows{reused})")
    parts.append(f"{stats.decode_tokens} tokens at {stats.tokens_per_s:.1f} tok/s")
    parts.append(stats.device)
    why = {"length": "cut at --max-tokens", "context": "cut: the context is full (--n-ctx)", "cancelled": "stopped"}.get(finish_reason)
    return "; ".join([*parts, why] if why else parts)


# ---- comparison ----

Marked = list[tuple[str, bool]]  # words, and whether the other caption lacks them


def marked_words(plain: str, smoothed: str) -> tuple[Marked, Marked]:
    a, b = (re.findall(r"\n|[^\s]+", text) for text in (plain, smoothed))
    left: Marked = []
    right: Marked = []
    for kind, i, i2, j, j2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        left += [(word, kind != "equal") for word in a[i:i2]]
        right += [(word, kind != "equal") for word in b[j:j2]]
    return left, right


def compare(ui: Ui, plain: Result, smoothed: Result) -> None:
    """Side by side where there is room, else one above the other; what differs is coloured, or bracketed as wdiff does."""
    out = ui.out
    left, right = marked_words(out.safe(plain.text), out.safe(smoothed.text))
    ui.clear()
    column = (out.width - 4) // 2
    if out.tty and column >= 32:
        sides = [_lines(out, left, column, RED, "[-", "-]"), _lines(out, right, column, GREEN, "{+", "+}")]
        rows = max(map(len, sides))
        heads = [(out.paint("plain", "\x1b[1m"), 5), (out.paint("smoothed", "\x1b[1m"), 8)]
        columns = [[head, *side, *[("", 0)] * (rows - len(side))] for head, side in zip(heads, sides, strict=True)]
        for (text, used), (other, _) in zip(*columns, strict=True):
            out.write(f"{text}{' ' * (column - used)} {'│' if out.utf8 else '|'} {other}".rstrip() + "\n")
    else:
        width = out.width - 1 if out.tty else 1 << 30
        for title, words, colour, opening, closing in (("plain", left, RED, "[-", "-]"), ("smoothed", right, GREEN, "{+", "+}")):
            lines = _lines(out, words, width, colour, opening, closing)
            out.write(out.paint(f"{title}:", "\x1b[1m") + "\n" + "".join(text + "\n" for text, _ in lines))
    n_left, n_right = sum(m for _, m in left), sum(m for _, m in right)
    same = "no difference" if not n_left + n_right else f"{n_left} of {len(left)} words against {n_right} of {len(right)} differ"
    ui.note(same)


def _lines(out: Screen, words: Marked, width: int, colour: str, opening: str, closing: str) -> list[tuple[str, int]]:
    """Wrapped lines, each with the columns that it takes."""
    lines: list[tuple[str, int]] = [("", 0)]
    for shown, code in _dressed(out, words, colour, opening, closing):
        for piece in split_cells(shown, width) if shown != "\n" else ["\n"]:
            text, used = lines[-1]
            if piece == "\n" or (used and used + 1 + cells(piece) > width):
                lines.append(("", 0))
                text, used = "", 0
            if piece != "\n":
                gap = " " if used else ""
                lines[-1] = (text + gap + (out.paint(piece, code) if code else piece), used + len(gap) + cells(piece))
    return lines


def _dressed(out: Screen, words: Marked, colour: str, opening: str, closing: str) -> Iterable[tuple[str, str]]:
    """Words with the brackets of their runs (without colour) or with their colour."""
    for i, (word, marked) in enumerate(words):
        if out.colour or word == "\n":
            yield word, colour if marked else ""
            continue
        first = marked and (i == 0 or not words[i - 1][1] or words[i - 1][0] == "\n")
        last = marked and (i + 1 == len(words) or not words[i + 1][1] or words[i + 1][0] == "\n")
        yield (opening if first else "") + word + (closing if last else ""), ""
