"""A figure: what was measured again and again, the shares of roofs, and the same of a peer. And the statistics of such lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES, SEED, CONFIDENCE = 2000, 0, 0.95


@dataclass(frozen=True)
class Spread:
    """median, least and greatest, the quartiles, and how many values there were."""

    median: float
    min: float
    q1: float
    q3: float
    max: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """ValueError for none."""
    if not values:
        raise ValueError("no values")
    low, q1, median, q3, high = np.quantile(np.asarray(values, np.float64), (0, 0.25, 0.5, 0.75, 1)).tolist()
    return Spread(median, low, q1, q3, high, len(values))


def ratio_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """The median of a[i] / b[i], and the ends of its 95 % interval by the bootstrap over pairs. The same digits each time.
    ValueError unless both have the same length, which is not 0."""
    if len(a) != len(b) or not len(a):
        raise ValueError("pairs are needed")
    ratios = np.asarray(a, np.float64) / np.asarray(b, np.float64)
    rng = np.random.default_rng(SEED)
    medians = np.median(ratios[rng.integers(0, len(ratios), (RESAMPLES, len(ratios)))], axis=1)
    low, high = np.quantile(medians, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)).tolist()
    return float(np.median(ratios)), low, high


@dataclass
class Peer:
    """The same figure of a peer with one of its settings. error: why there are no (more) values; dropped: it was clearly not its best."""

    values: list[float] = field(default_factory=list)
    error: str = ""
    dropped: bool = False


@dataclass
class Figure:
    """what and at: of what, {"depth": 640} say. values: one for each repetition, in unit. roofs and shares: by the kind of roof, what was
    measured before and after each value, and how much of it the value is. peers: by setting. more: what is particular to this figure."""

    what: str
    unit: str
    threads: int
    at: dict[str, Any] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)
    roofs: dict[str, list[float]] = field(default_factory=dict)
    shares: dict[str, list[float]] = field(default_factory=dict)
    peers: dict[str, Peer] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def lower_is_better(self) -> bool:
        return self.unit in ("s", "ratio")

    def best_peer(self) -> str | None:
        """The setting with the best median, of those that were measured to the end."""
        full = {name: peer.values for name, peer in self.peers.items() if peer.values and not peer.dropped}
        best = min if self.lower_is_better else max
        return best(full, key=lambda name: spread(full[name]).median) if full else None

    def ahead(self) -> list[float]:
        """How many times faster than the peer's best setting, pair by pair: above 1 is faster. Empty without a peer, or where the two did
        not do the same work."""
        name = self.best_peer()
        if name is None or self.more.get("unequal"):
            return []
        pairs = zip(self.values, self.peers[name].values, strict=False)
        return [theirs / ours if self.lower_is_better else ours / theirs for ours, theirs in pairs]


@dataclass
class Entry:
    """A figure and how to get a value of it. used: bytes or operations per second that a value stands for, held against each of roofs.
    rivals: the same of a peer, by setting."""

    figure: Figure
    measure: Callable[[], float]
    roofs: Sequence[str] = ()
    used: Callable[[float], float] = float
    rivals: Mapping[str, Callable[[], float]] = field(default_factory=dict)
