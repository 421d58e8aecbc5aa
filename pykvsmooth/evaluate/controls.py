"""What smoothing has to be held against, and where inventions stand: captions cut short, objects dropped blindly, row entropies, positions.

A method that merely says less also invents less. truncated() cuts captions after n sentences (the baseline's curve in figure 4 of arXiv
2602.04268); drop_last() takes away the objects that are named last, in captions chosen at random, down to a given recall.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from .errors import EvaluationError
from .score import Caption, Report, Scored, TokenFacts, auc, by_image, percentiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")


def sentence_ends(text: str) -> list[int]:
    """For each sentence one past its last character. Words after the last full stop are a sentence, too."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if text[ends[-1] if ends else 0 :].strip():
        ends.append(len(text))
    return ends


def truncated(captions: Iterable[Caption], sentences: int) -> list[Caption]:
    """The captions, each without what follows its first so many sentences."""
    cut = []
    for caption in captions:
        ends = sentence_ends(caption.text)
        end = ends[sentences - 1] if 0 < sentences <= len(ends) else 0 if sentences <= 0 else len(caption.text)
        cut.append(Caption(caption.image_id, caption.text[:end], _tokens_until(caption, end)))
    return cut


def _tokens_until(caption: Caption, end: int) -> tuple[TokenFacts, ...]:
    kept = []
    at = 0
    for token in caption.tokens:
        if at >= end:
            break
        kept.append(replace(token, text=token.text[: end - at]))
        at += len(token.text)
    return tuple(kept)


def drop_last(report: Report, recall: float, seed: int = 0) -> Report:
    """The control for a method that ends at this recall: captions in random order lose the object that they name last for the first
    time (all its mentions), one each round, until the recall of the corpus is no higher than that. Lengths stay as they were."""
    captions = list(report.captions)
    there = int(report.counts[:, 6].sum())
    correct = int(report.counts[:, 4].sum())
    rng = np.random.default_rng(seed)
    while any(scored.mentions for scored in captions):
        for i in rng.permutation(by_image(report)).tolist():
            if correct <= recall * there:
                return Report(tuple(captions))
            shorter = _without_last(captions[i])
            correct += shorter.counts[4] - captions[i].counts[4]
            captions[i] = shorter
    return Report(tuple(captions))


def _without_last(scored: Scored) -> Scored:
    if not scored.mentions:
        return scored
    last = list(dict.fromkeys(scored.nodes))[-1]
    return replace(scored, mentions=tuple(mention for mention in scored.mentions if mention.node != last))


@dataclass(frozen=True)
class Separation:
    """How well row entropy tells invented mentions from true ones: the area under the ROC curve (0.5: not at all; NaN: one of them never
    occurs), its 95 % interval by bootstrap over captions, and how many mentions of each there were."""

    auc: float
    interval: tuple[float, float]
    true: int
    invented: int


def entropy_separation(captions: Sequence[Caption], report: Report, resamples: int = 1000, seed: int = 0) -> Separation:
    """At the token that begins the mention. The captions must have tokens (EvaluationError); report is score() of the same captions."""
    by_id = {str(caption.image_id): caption for caption in captions}
    ordered = [report.captions[i] for i in by_image(report)]
    groups = [_entropies(by_id[str(scored.image_id)], scored) for scored in ordered]
    value = _pooled_auc(groups)
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(0, len(groups), len(groups)).tolist() for _ in range(resamples))
    values = np.array([_pooled_auc([groups[i] for i in rows]) for rows in drawn])
    values = values[np.isfinite(values)]
    low, high = percentiles(values).tolist() if values.size else (math.nan, math.nan)
    return Separation(value, (low, high), sum(len(true) for true, _ in groups), sum(len(invented) for _, invented in groups))


def _pooled_auc(groups: Iterable[tuple[list[float], list[float]]]) -> float:
    true: list[float] = []
    invented: list[float] = []
    for a, b in groups:
        true += a
        invented += b
    return auc(true, invented)


def _entropies(caption: Caption, scored: Scored) -> tuple[list[float], list[float]]:
    """Of true and of invented mentions."""
    if "".join(token.text for token in caption.tokens) != caption.text:
        raise EvaluationError(f"image {caption.image_id}: its caption was kept without tokens")
    begins = [0, *accumulate(len(token.text) for token in caption.tokens)]
    found: tuple[list[float], list[float]] = ([], [])
    for mention, invented in zip(scored.mentions, scored.invented, strict=True):
        entropy = caption.tokens[bisect_right(begins, mention.begin) - 1].entropy
        if entropy is not None:
            found[invented].append(entropy)
    return found


def positions(captions: Iterable[Caption], report: Report, bins: int = 10) -> NDArray[np.int64]:
    """(bins, 2): true and invented mentions in each part of the caption's characters, first to last."""
    sizes = {str(caption.image_id): len(caption.text) for caption in captions}
    counts = np.zeros((bins, 2), np.int64)
    for scored in report.captions:
        size = sizes[str(scored.image_id)]
        for mention, invented in zip(scored.mentions, scored.invented, strict=True):
            counts[mention.begin * bins // size, int(invented)] += 1
    return counts
