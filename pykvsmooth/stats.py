"""What a stream gives: tokens, the result, and the figures; what a model takes of its device."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of a device that are reckoned with before anything is allocated there. weights: on the CPU the files', which are mapped. cache:
    of a session of n_ctx rows in F16. work: buffers of a pass. reserve: for the device itself, driver and graphs. free: what there was of
    it; 0 where that is not known, as on the CPU."""

    weights: int
    cache: int
    work: int
    reserve: int
    free: int
    n_ctx: int

    @property
    def needed(self) -> int:
        """The sum of the first four."""
        return self.weights + self.cache + self.work + self.reserve


@dataclass(frozen=True, slots=True)
class Pruning:
    """Rows of pictures that PruneHal took out of the cache. step: number of the generated token behind which it happened, from 1 on.
    reason: "forced" (force_step) or "vote". rows_before, rows_after: rows of pictures in each layer that is pruned."""

    step: int
    reason: Literal["forced", "vote"]
    rows_before: int
    rows_after: int


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.

    text: what can be shown now; may be empty (incomplete UTF-8 and possible stop strings wait for the tokens after) and may hold
    text of tokens before. logprob: natural log of the raw probability, before temperature and cuts. entropy: row entropy in nats, mean
    over heads and over the smoothed layers (all layers without a policy; arXiv 2602.04268 eq. 5). strength: mean over the smoothed
    layers (eq. 14), NaN where the token was not smoothed, None without a policy. top_logprobs: (id, logprob) pairs, best first, as many
    as logprobs= asked for. visual_mass: share of this token's attention on rows of pictures, mean over heads and all layers; None in a
    session without pictures.
    """

    text: str
    id: int
    logprob: float
    entropy: float
    strength: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    visual_mass: float | None = None


@dataclass(slots=True)
class Stats:
    """Figures of one answer; also a read-only mapping (stats["decode_s"], dict(stats)).

    Times in seconds. prefill_tokens: rows computed for the prompt, reused_tokens: rows that were in the cache already,
    reused_images: pictures that were not encoded again. decode_s: of the steps that this answer was in, whoever shared them: those of a
    batch add up to more than it took. tokens_per_s: decode_tokens / decode_s, of this answer alone. peak_bytes: largest resident memory
    of the process so far. pruned: what PruneHal dropped during this answer, steps counted from its first token.
    """

    load_s: float = 0.0
    encode_s: float = 0.0
    prefill_s: float = 0.0
    prefill_tokens: int = 0
    decode_s: float = 0.0
    decode_tokens: int = 0
    tokens_per_s: float = 0.0
    reused_tokens: int = 0
    reused_images: int = 0
    device: str = ""
    peak_bytes: int = 0
    finish_reason: str | None = None
    pruned: list[Pruning] = field(default_factory=list)

    def keys(self) -> list[str]:
        return [field.name for field in fields(self)]

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer. finish_reason: "stop" (the model ended it, or a stop string), "length" (max_tokens), "context" (n_ctx rows are full),
    "cancelled". text is the joined text of tokens."""

    text: str
    tokens: list[Token]
    finish_reason: str
    stats: Stats
