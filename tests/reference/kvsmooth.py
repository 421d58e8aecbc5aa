"""KVSmooth (arXiv 2602.04268, eq. 5 and 13-15) with every switch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass
class KVSmooth:
    """The arguments of pykvsmooth.KVSmooth. observed and tolerance are for tests: where entropies in the queue are closer than
    tolerance to the newest, their order is a matter of rounding, and any strength that observed (n_generated, n_layer) shows and
    that one of the orders explains is taken over."""

    lambda_ref: float = 0.9
    window: int = 15
    half_width: float = 0.2
    layers: str | Sequence[int] = "3:-1"
    mode: str = "adaptive"
    lambda_fixed: float | None = None
    lambda_den: str = "fill"
    lambda_max: float = 1.0
    rope_mode: str = "post"
    target: str = "kv"
    first_token: str = "mix_with_prompt"
    warm_start: str | tuple[str, int] = "none"
    smooth_prompt: str = "off"
    entropy_norm: str = "none"
    entropy_heads: str = "all"
    entropy_include_self: bool = True
    rank_ties: str = "strict"
    queue_scope: str = "turn"
    ema: str = "recursive"
    mix: str = "ema"
    skip_token_ids: Sequence[int] = ()
    observed: dict[tuple[int, int], float] | None = None  # (row, layer) -> strength
    tolerance: float = 0.0

    def layer_set(self, n_layer: int) -> set[int]:
        if isinstance(self.layers, str):
            return set(range(n_layer)[slice(*(int(part) if part else None for part in self.layers.split(":")))])
        return {i % n_layer for i in self.layers}

    def warm_rows(self) -> int:
        return {"none": 0, "last_prompt_row": 1}[self.warm_start] if isinstance(self.warm_start, str) else self.warm_start[1]

    def ranked(self, entropy: Array, rows_seen: int) -> Array:
        """log_len: divided by the most that it could be; without its own key a row sees one less"""
        keys = rows_seen if self.entropy_include_self else rows_seen - 1
        return entropy / np.log(max(2, keys)) if self.entropy_norm == "log_len" else entropy

    def strength(self, queue: list[float], row: int, layer: int) -> float:
        """eq. 13 and 14: the rank of the newest entropy among the queue, itself included; clipped to the window around lambda_ref."""
        if self.mode == "fixed":
            return self.lambda_fixed
        z, older = queue[-1], np.array(queue[:-1])
        smaller, equal = int((older < z).sum()), int((older == z).sum())
        own = self._clip(smaller + (0.5 * equal if self.rank_ties == "midrank" else 0.0), len(queue))
        if self.observed is None:
            return own
        low, high = int((older < z - self.tolerance).sum()), int((older < z + self.tolerance).sum())
        seen = self.observed.get((row, layer), own)
        halves = np.arange(low, high + 0.5, 0.5 if self.rank_ties == "midrank" else 1.0)
        return next((x for x in (self._clip(k, len(queue)) for k in halves) if abs(x - seen) < 1e-5), own)

    def _clip(self, rank: float, entries: int) -> float:
        lam = rank / (self.window if self.lambda_den == "capacity" else entries)
        lam = min(max(lam, self.lambda_ref - self.half_width), self.lambda_ref + self.half_width)
        return min(max(lam, 0.0), self.lambda_max)

    def mixed(self, row: Array, before: Array, lam: Array) -> Array:
        """eq. 15; damp is an ablation of ours, without the row before"""
        return (1 - lam) * row if self.mix == "damp" else (1 - lam) * row + lam * before
