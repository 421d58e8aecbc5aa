"""Captions against the objects that are in their pictures: CHAIR's figures for a whole corpus, with intervals and comparisons.

    report = score(captions, truth)
    report.figures()             {"chair_s": 0.418, "chair_i": ..., "recall": ..., "precision": ..., "f1": ..., "length": ...}
    report.intervals()           {"chair_s": (0.374, 0.462), ...}
    compare(report, baseline)    differences, with intervals, and McNemar's test

All figures are ratios of sums over captions (Rohrbach et al. 2018; F1, recall and precision as in the scorers of OPERA, PAI and SPARC):
chair_s: captions with an invented mention / captions; chair_i: invented mentions / mentions; recall: true objects that are named /
objects that are there; precision: true objects that are named / objects that are named, both without repeats; f1 of these two sums;
length: tokens per caption. A ratio without a denominator is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from .chair import Mention, find
from .errors import EvaluationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ImageId: TypeAlias = "int | str"
Truth: TypeAlias = "Mapping[str, frozenset[str]]"  # str(image_id) -> node words
FIGURES = ("chair_s", "chair_i", "recall", "precision", "f1", "length")
RESAMPLES, SEED, CONFIDENCE = 5000, 0, 0.95
_CHUNK = 1 << 22  # random numbers at a time


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """A token of a caption: the text that it brought, the entropy of its attention row, and its strength (None where there was none)."""

    text: str
    entropy: float | None
    strength: float | None


@dataclass(frozen=True, slots=True)
class Caption:
    """What a model says of a picture. tokens: how it came about, where that was kept; their texts make up the text."""

    image_id: ImageId
    text: str
    tokens: tuple[TokenFacts, ...] = ()


@dataclass(frozen=True)
class Scored:
    """A caption's mentions, in its order, and which of them (same index) are not in the picture. length: tokens, see chair.find."""

    image_id: ImageId
    mentions: tuple[Mention, ...]
    truth: frozenset[str]
    length: int

    @property
    def nodes(self) -> list[str]:
        return [mention.node for mention in self.mentions]

    @property
    def invented(self) -> list[bool]:
        return [mention.node not in self.truth for mention in self.mentions]

    @property
    def hallucinated(self) -> list[str]:
        """The node words of the invented mentions, repeats kept."""
        return [node for node in self.nodes if node not in self.truth]

    @property
    def counts(self) -> tuple[int, ...]:
        """What the figures are ratios of sums of: caption, has an invention; inventions, mentions; true objects named, objects named,
        objects there; tokens."""
        nodes, invented = set(self.nodes), len(self.hallucinated)
        return 1, int(invented > 0), invented, len(self.mentions), len(nodes & self.truth), len(nodes), len(self.truth), self.length


@dataclass(frozen=True)
class Report:
    """Scored captions of a corpus."""

    captions: tuple[Scored, ...]

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """(n captions, 8)"""
        return np.array([scored.counts for scored in self.captions], np.int64).reshape(len(self.captions), 8)

    def figures(self) -> dict[str, float]:
        return dict(zip(FIGURES, _figures(self.counts.sum(0)).tolist(), strict=True))

    def intervals(self, resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, tuple[float, float]]:
        """Of 95 %: percentiles of the bootstrap over captions. The same seed gives the same digits, in whatever order the captions are."""
        return _intervals(_figures(_resampled(self.counts[by_image(self)], resamples, seed)))


@dataclass(frozen=True)
class Comparison:
    """A run less another on the same pictures.

    difference: figure by figure; interval: its 95 %, both runs resampled together. mended: captions with an invention in the other run
    and none in this; new: the other way round; p: McNemar's exact test, two-sided, that both are as likely.
    """

    difference: dict[str, float]
    interval: dict[str, tuple[float, float]]
    mended: int
    new: int
    p: float


def score(captions: Iterable[Caption], truth: Truth, parity: bool = False) -> Report:
    """Finds the mentions (see chair.py for parity). EvaluationError if there is no caption, one has no truth, or two are of one picture."""
    scored: dict[str, Scored] = {}
    for caption in captions:
        key = str(caption.image_id)
        if key not in truth:
            raise EvaluationError(f"image {key} has a caption, but no truth")
        if key in scored:
            raise EvaluationError(f"image {key} has two captions")
        mentions, length = find(caption.text, parity)
        scored[key] = Scored(caption.image_id, tuple(mentions), truth[key], length)
    if not scored:
        raise EvaluationError("there are no captions to score")
    return Report(tuple(scored.values()))


def by_image(report: Report) -> list[int]:
    """The captions' places in the order of their image ids, numbers by value. What is drawn by chance is drawn from it: a file that
    `eval run` wrote has its captions as they ended."""
    ids = [str(scored.image_id) for scored in report.captions]
    return sorted(range(len(ids)), key=lambda i: (len(ids[i]), ids[i]))


def compare(report: Report, other: Report, resamples: int = RESAMPLES, seed: int = SEED) -> Comparison:
    """EvaluationError unless both have the same pictures."""
    mine, theirs = ({str(scored.image_id) for scored in one.captions} for one in (report, other))
    if alone := sorted(mine ^ theirs):
        raise EvaluationError(f"the runs to compare differ in {len(alone)} pictures; image {alone[0]} is in one of them only")
    a, b = (one.counts[by_image(one)] for one in (report, other))
    both = _resampled(np.concatenate((a, b), 1), resamples, seed)
    names = list(FIGURES)
    differences = _figures(a.sum(0)) - _figures(b.sum(0))
    mended, new = int(((a[:, 1] == 0) & (b[:, 1] == 1)).sum()), int(((a[:, 1] == 1) & (b[:, 1] == 0)).sum())
    interval = _intervals(_figures(both[:, :8]) - _figures(both[:, 8:]))
    return Comparison(dict(zip(names, differences.tolist(), strict=True)), interval, mended, new, mcnemar(mended, new))


def mcnemar(mended: int, new: int) -> float:
    """The two-sided p of the exact test: of mended + new captions that changed sides, how likely is a split at least as uneven?"""
    n, few = mended + new, min(mended, new)
    ways = term = 1
    for k in range(few):
        term = term * (n - k) // (k + 1)
        ways += term
    return min(1.0, 2 * ways / (1 << n))


def percentiles(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(2, ...) the ends of the 95 % interval along the first axis."""
    return np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)


def _figures(sums: NDArray[np.int64]) -> NDArray[np.float64]:
    """(..., 8) sums of Scored.counts -> (..., 6) figures in the order of FIGURES."""
    n, with_invention, invented, mentions, correct, named, there, tokens = np.moveaxis(sums.astype(np.float64), -1, 0)
    return np.stack(
        [
            _ratio(with_invention, n),
            _ratio(invented, mentions),
            _ratio(correct, there),
            _ratio(correct, named),
            _ratio(2 * correct, there + named),  # 2 PR / (P + R)
            _ratio(tokens, n),
        ],
        axis=-1,
    )


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _resampled(counts: NDArray[np.int64], resamples: int, seed: int) -> NDArray[np.int64]:
    """(resamples, columns): sums over as many captions, drawn with replacement. Whole numbers, so the order of adding does not matter."""
    rng = np.random.default_rng(seed)
    n = len(counts)
    step = max(1, _CHUNK // n)
    table = counts.astype(np.float64)
    sums = []
    for begin in range(0, resamples, step):
        rows = min(step, resamples - begin)
        drawn = rng.integers(0, n, (rows, n), dtype=np.int32) + np.arange(rows)[:, None] * n
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        sums.append((times @ table).astype(np.int64))
    return np.concatenate(sums)


def _intervals(figures: NDArray[np.float64]) -> dict[str, tuple[float, float]]:
    low, high = percentiles(figures)
    return {name: (float(a), float(b)) for name, a, b in zip(FIGURES, low, high, strict=True)}


def auc(true: Sequence[float], invented: Sequence[float]) -> float:
    """How often an invented value is above a true one (ties count one half): the area under the ROC curve. NaN if either is empty."""
    if not true or not invented:
        return math.nan
    values = np.concatenate((np.asarray(true, np.float64), np.asarray(invented, np.float64)))
    _, inverse, times = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(times) - (times - 1) / 2)[inverse]
    below = ranks[len(true) :].sum() - len(invented) * (len(invented) + 1) / 2
    return float(below / (len(true) * len(invented)))
