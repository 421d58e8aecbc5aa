"""What a caller may ask of one answer, checked before any work."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ._native import ffi

MAX_LOGPROBS = 20


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """value as an int within [low, high]; TypeError for bools and for what is no integer."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    value = value.__index__()
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {'at least ' + str(low) if high is None else f'in {low}..{high}'}, not {value}")
    return value


def real(name: str, value: Any, low: float, high: float = math.inf, open_low: bool = False) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    value = float(value)
    if not math.isfinite(value) or value < low or value > high or (open_low and value == low):
        limits = f"{'over' if open_low else 'at least'} {low:g}" + (f" and at most {high:g}" if high != math.inf else "")
        raise ValueError(f"{name} must be {limits}, not {value}")
    return value


def seed_of(seed: Any) -> int:
    """Any integer as 64 bits; None draws a fresh one."""
    if seed is None:
        return int.from_bytes(os.urandom(8), "little")
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed must be an integer or None, not {type(seed).__name__}")
    return seed.__index__() & (2**64 - 1)


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in strings:
        if not isinstance(text, str):
            raise TypeError(f"stop must be text or a list of texts, not a list of {type(text).__name__}")
        if not text:
            raise ValueError("stop: an empty text would stop everything")
    return strings


@dataclass(frozen=True, kw_only=True)
class Options:
    """How one answer is drawn and when it ends. max_tokens=None: until the context is full."""

    max_tokens: int | None = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    seed: int | None = None
    logprobs: int = 0

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if self.max_tokens is not None:
            put("max_tokens", integer("max_tokens", self.max_tokens, 0))
        put("temperature", real("temperature", self.temperature, 0.0))
        put("top_k", integer("top_k", self.top_k, 0, 2**31 - 1))
        put("top_p", real("top_p", self.top_p, 0.0, 1.0, open_low=True))
        put("min_p", real("min_p", self.min_p, 0.0, 1.0))
        put("repetition_penalty", real("repetition_penalty", self.repetition_penalty, 0.0, open_low=True))
        put("stop", stop_strings(self.stop))
        put("logprobs", integer("logprobs", self.logprobs, 0, MAX_LOGPROBS))
        if self.seed is not None:
            put("seed", seed_of(self.seed))

    def to_native(self) -> Any:
        sampling = ffi.new("kvs_sampling *")
        sampling.struct_size = ffi.sizeof("kvs_sampling")
        sampling.temperature, sampling.top_k = self.temperature, self.top_k
        sampling.top_p, sampling.min_p = self.top_p, self.min_p
        sampling.repetition_penalty, sampling.n_top = self.repetition_penalty, self.logprobs
        return sampling
