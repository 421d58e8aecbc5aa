"""Why a setting helps or does not: what it does to the words that the plain model has chosen, one by one.

The plain model's captions are fed to a smoothed session as if it had generated them. Where a mention begins, the token's log-probability
is compared with the plain model's, and the token with the one that the smoothed session would have chosen.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

import pykvsmooth as kvs
from models.scenes import PROMPT
from pykvsmooth.evaluate import auc
from pykvsmooth.evaluate.score import Scored

from .runs import MAX_TOKENS, Run

Array = np.ndarray
RESAMPLES = 1000
COUNT = 100  # captions that are looked into


@dataclass(frozen=True)
class Shifts:
    """Of the mentions of true and of invented objects, caption by caption: nats that smoothing adds to the first token's log-probability,
    and whether it would have chosen another token."""

    true: list[list[tuple[float, bool]]]
    invented: list[list[tuple[float, bool]]]

    def mean(self, invented: bool, what: int) -> tuple[float, float, float]:
        """Mean of the shift (what 0) or share of other choices (what 1), and its 95 % interval by the bootstrap over captions."""
        groups = self.invented if invented else self.true
        rng = np.random.default_rng(0)
        drawn = (rng.integers(0, len(groups), len(groups)) for _ in range(RESAMPLES))
        means = [_mean([groups[i] for i in rows], what) for rows in drawn]
        low, high = np.nanpercentile(means, (2.5, 97.5))
        return _mean(groups, what), float(low), float(high)

    @property
    def auc(self) -> float:
        """How well the shift alone tells invented mentions from true ones: .5 is chance."""
        falls = [[-shift for group in groups for shift, _ in group] for groups in (self.true, self.invented)]
        return auc(*falls)


def _mean(groups: list[list[tuple[float, bool]]], what: int) -> float:
    values = [one[what] for group in groups for one in group]
    return float(np.mean(values)) if values else float("nan")


def shifts(model: kvs.Model, policy: kvs.KVSmooth, plain: Run, count: int = COUNT) -> Shifts:
    """Of the first count captions of the plain model."""
    found = Shifts([], [])
    with model.session(n_ctx=512) as as_is, model.session(n_ctx=512, policy=policy) as smoothed:
        for view, scored in list(zip(plain.scenes, plain.report.captions, strict=True))[:count]:
            tokens = as_is.generate(PROMPT, image=view.picture, max_tokens=MAX_TOKENS).result().tokens
            smoothed.generate(PROMPT, image=view.picture, max_tokens=0).result()
            true, invented = _compare(smoothed, tokens, scored)
            found.true.append(true)
            found.invented.append(invented)
    return found


def _compare(session: kvs.Session, tokens: list[kvs.Token], scored: Scored) -> tuple[list[tuple[float, bool]], list[tuple[float, bool]]]:
    begins = [0, *accumulate(len(token.text) for token in tokens)]
    groups: tuple[list[tuple[float, bool]], list[tuple[float, bool]]] = ([], [])
    fed = 0
    for mention, invented in zip(scored.mentions, scored.invented, strict=True):
        at = bisect_right(begins, mention.begin) - 1
        session.feed([token.id for token in tokens[fed:at]], generated=True)
        fed = at
        logits = session.logits().astype(np.float64)
        logprob = logits[tokens[at].id] - np.logaddexp.reduce(logits)
        groups[invented].append((float(logprob - tokens[at].logprob), int(logits.argmax()) != tokens[at].id))
    return groups
