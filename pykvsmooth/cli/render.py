"""How a caption looks while it comes: as it is, or shaded by entropy, with strengths under the words."""

from __future__ import annotations

import bisect
import math
import re
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, chop_cells
from rich.text import Text

from .escape import escaped
from .terminal import Ui

if TYPE_CHECKING:
    from ..stats import Stats, Token

# black on a background from none over yellow to red, in the 256-colour palette; readable on dark and on light terminals
SHADES = ["", *(f"color(16) on color({n})" for n in (230, 229, 222, 215, 209, 203, 197))]
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
            self.ui.put(self.ui.out.safe(token.text))
            self._any, self._end = True, token.text[-1]

    def end(self) -> None:
        """The last line ends, also after an interrupt; an empty caption is an empty line."""
        if not self._any or self._end != "\n":
            self.ui.put("\n")

    def legend(self) -> None:
        pass


class Painted(Plain):
    """Words shaded by their row entropy (heat) and bars of the strengths under each line (strengths).

    Tokens are gathered to whole words, which get the mean of their tokens. A shade is the word's rank among the words so far: what
    counts as high differs from model to model and picture to picture. Rich wraps whole paragraphs only; here words stream, and the
    bars of a line need to know where it ended. So this breaks the lines.
    """

    def __init__(self, ui: Ui, heat: bool, strengths: tuple[float, float] | None) -> None:
        super().__init__(ui)
        self._heat, self._range = heat and ui.out.colour, strengths
        self._word = ""
        self._begin = self._at = 0  # characters before the word, and so far
        self._entropies: list[float] = []  # of the tokens of the word
        self._strengths: list[float] = []
        self._seen: list[float] = []  # of the words so far: entropies, sorted
        self._all_strengths: list[float] = []
        self._column, self._bars = 0, ""

    def token(self, token: Token) -> None:
        self._any = True
        for piece in re.findall(r"\n|[ \t]+|[^ \t\n]+", escaped(token.text)) or [""]:
            if piece.isspace() or cell_len(self._word) + cell_len(piece) > LONGEST_WORD:
                self._flush()
            self._begin = self._begin if self._word else self._at
            self._word += piece
            self._at += len(piece)
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
        if self._heat and self._seen:
            scale = f" {self._seen[0]:.2f} to {self._seen[-1]:.2f} nats, shaded by rank"
            self.ui.note(Text.assemble("row entropy ", *(("  ", shade) for shade in SHADES), scale), style="")
        if self._range and self._all_strengths:
            marks = DIGITS if self.ui.err.options.ascii_only else BARS
            mean = sum(self._all_strengths) / len(self._all_strengths)
            self.ui.note(f"strength {marks[0]} {self._range[0]:.2f} to {marks[-1]} {self._range[1]:.2f}, mean {mean:.3f}", style="")

    def _flush(self) -> None:
        text, self._word = self._word.replace("\t", " "), ""
        entropy, strength = _mean(self._entropies), _mean(self._strengths)
        self._entropies, self._strengths = [], []
        word = text.lstrip(" ")
        space = text[: len(text) - len(word)]
        width = max(self.ui.out.width, 10) - 1
        if self._column and self._column + len(space) + cell_len(word) > width:
            self._newline()
        style = self._style(self._begin + len(space), word, entropy) if word else ""
        if word and strength is not None:
            self._all_strengths.append(strength)
        self._put(space if self._column else "", "", strength=None)
        for i, piece in enumerate(chop_cells(word, width) or [word]):  # it gives nothing for accents alone
            if i:
                self._newline()
            self._put(piece, style, strength)

    def _put(self, text: str, style: str, strength: float | None) -> None:
        self.ui.put(text, style)
        self._column += cell_len(text)
        self._bars += self._bar(strength) * cell_len(text)

    def _newline(self) -> None:
        bars, self._column, self._bars = self._bars.rstrip(), 0, ""
        self.ui.put("\n")
        if bars and self._range:
            self.ui.put(bars, "cyan")
            self.ui.put("\n")

    def _style(self, begin: int, word: str, entropy: float | None) -> str:
        """How a word looks that begins at this character of the text."""
        return self._shade(entropy)

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
        marks = DIGITS if self.ui.out.options.ascii_only else BARS
        share = (strength - low) / (high - low) if high > low else 1.0
        return marks[round(min(max(share, 0.0), 1.0) * (len(marks) - 1))]


def _mean(values: list[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None


def strength_range(policy: Any) -> tuple[float, float]:
    """The ends of the scale for bars: the window of strengths that the policy can give."""
    from ..policies.stack import Stack

    policy = Stack(policy).kvsmooth
    if policy is None or policy.lambda_fixed is not None:
        return 0.0, 1.0
    return max(0.0, policy.lambda_ref - policy.half_width), min(policy.lambda_max, policy.lambda_ref + policy.half_width)


def stats_line(stats: Stats, finish_reason: str) -> str:
    parts = []
    if stats.encode_s or stats.reused_images:
        parts.append("picture reused" if stats.reused_images else f"encode {stats.encode_s:.2f} s")
    reused = f", {stats.reused_tokens} reused" if stats.reused_tokens else ""
    parts.append(f"prefill {stats.prefill_s:.2f} s ({stats.prefill_tokens} rows{reused})")
    parts.append(f"{stats.decode_tokens} tokens at {stats.tokens_per_s:.1f} tok/s")
    parts.append(stats.device)
    why = {"length": "cut at --max-tokens", "context": "cut: the context is full (--n-ctx)", "cancelled": "stopped"}.get(finish_reason)
    return "; ".join([*parts, why] if why else parts)
