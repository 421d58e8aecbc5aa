"""PruneHal (arXiv 2510.19183) with every option."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass
class PruneHal:
    """The arguments of pykvsmooth.PruneHal. tolerance is for tests: what is closer than that is a matter of rounding, and decided as
    the session that is compared decided it (observed of Answer)."""

    keep: float = 0.4
    times: int = 3
    force_step: int = 2
    reference: str = "running_mean_reset"
    vote_fraction: float = 0.5
    vote_strict: bool = True
    index_scope: str = "layer"
    reduction: str = "mean"
    per_image_quota: bool = False
    layers: str | Sequence[int] = ":"
    top_k: int | Sequence[int] | None = None
    reversible: bool = False
    tolerance: float = 0.0

    def layer_list(self, n_layer: int) -> list[int]:
        if isinstance(self.layers, str):
            return sorted(range(n_layer)[slice(*(int(part) if part else None for part in self.layers.split(":")))])
        return sorted({i % n_layer for i in self.layers})

    def counts(self) -> list[int]:
        return [] if self.top_k is None else [self.top_k] if isinstance(self.top_k, int) else list(self.top_k)

    # ---- which rows stay ----

    def choose(self, scores: Array, picture: Array, count: int | None, share: float) -> Array:
        """Live rows of pictures: their scores and the picture that each belongs to -> which of them stay. count: of top_k."""
        best_first = np.argsort(-scores, kind="stable")
        total = min(len(scores), count or max(1, int(share * len(scores))))
        stays = np.zeros(len(scores), bool)
        for one in np.unique(picture):
            rows = best_first[picture[best_first] == one]
            quota = max(1, int(share * len(rows))) if self.per_image_quota else 1
            stays[rows[:quota]] = True
        if not self.per_image_quota:
            rest = best_first[~stays[best_first]]
            stays[rest[: max(0, total - stays.sum())]] = True
        return stays

    def scores(self, p: Array) -> Array:
        """p (layers, G, H / G, keys) of the newest row -> what keys are chosen by: (layers, G, keys), alike where rows are shared."""
        over = (lambda a, axis: a.max(axis)) if self.reduction == "max" else (lambda a, axis: a.mean(axis))
        if self.index_scope == "kv_head":
            return over(p, 2)
        scores = over(p, (1, 2))
        if self.index_scope == "global":
            scores = np.broadcast_to(scores.mean(0), scores.shape)
        return np.broadcast_to(scores[:, None], (*p.shape[:2], p.shape[3]))


@dataclass
class Answer:
    """What is known of one sequence: it begins at the end of the prompt that holds the newest picture."""

    policy: PruneHal
    attention: list[Array]  # A_l, (pruned layers,), of the steps that the mean is over
    fixed: Array  # the reference where it is no mean
    m: int = 1
    n: int = 0

    def step(self, a: Array, n_live: int, observed: bool | None) -> tuple[str | None, float, int | None]:
        """a: A_l of step m. Gives the reason to prune now, or None; the share that stays, and the count under top_k."""
        p, counts = self.policy, self.policy.counts()
        self.m += 1
        count = counts[self.n] if self.n < len(counts) else None
        share = min(1.0, count / n_live) if count else p.keep
        may = self.n < p.times and (not counts or count is not None)
        reason = None
        if may and self.m == p.force_step:
            reason = "forced"
        elif may and self._majority(a, share, observed):
            reason = "vote"
        self._update(a, reason is not None)
        return reason, share, count

    def _majority(self, a: Array, share: float, observed: bool | None) -> bool:
        reference = self.fixed
        if self.policy.reference.startswith("running_mean"):
            if not self.attention:
                return False
            reference = np.mean(self.attention, axis=0)
        decided = {self._enough(int((a < np.sqrt(share) * reference * (1 + nudge)).sum()), len(a)) for nudge in self._nudges()}
        return decided.pop() if len(decided) == 1 else bool(observed)

    def _nudges(self) -> tuple[float, ...]:
        return -self.policy.tolerance, self.policy.tolerance

    def _enough(self, votes: int, n: int) -> bool:
        return votes > self.policy.vote_fraction * n if self.policy.vote_strict else votes >= self.policy.vote_fraction * n

    def _update(self, a: Array, pruned: bool) -> None:
        self.attention.append(a)
        if not pruned:
            return
        self.n += 1
        if self.policy.reference == "running_mean_reset":
            self.attention = []
        if self.policy.reference == "last_prune":
            self.fixed = a
