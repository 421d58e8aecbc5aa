"""What a caller may ask of one answer, checked before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from ._native import ffi
from .checks import integer, real, utf8

if TYPE_CHECKING:
    from .images import ImageLike
    from .prompt import ImageMode

MAX_LOGPROBS = 20


def seed_of(seed: Any) -> int:
    """Any integer as 64 bits; None draws a fresh one."""
    if seed is None:
        return int.from_bytes(os.urandom(8), "little")
    return integer("seed", seed) & (2**64 - 1)


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    if stop is None or isinstance(stop, str):
        stop = () if stop is None else (stop,)
    if not isinstance(stop, Iterable) or isinstance(stop, (bytes, Mapping)):
        raise TypeError(f"stop must be None, a text or a list of texts, not {type(stop).__name__}")
    strings = tuple(stop)
    for i, text in enumerate(strings):
        if not utf8(f"stop[{i}]", text):
            raise ValueError("stop: an empty text would stop everything")
    return strings


class AnswerOptions(TypedDict, total=False):
    """Options as keyword arguments, for type checkers."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: str | Iterable[str] | None
    seed: int | None
    logprobs: int


class RequestOptions(AnswerOptions, total=False):
    """All arguments of Session.generate."""

    prompt: str
    image: ImageLike | Sequence[ImageLike] | None
    images: Sequence[ImageLike] | None
    mode: ImageMode
    system: str | None
    template: str | None


def refuse_unknown(function: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def read_options(function: str, given: AnswerOptions) -> Options:
    """The **options of a public function."""
    refuse_unknown(function, given, AnswerOptions.__annotations__)
    return Options(**given)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How one answer is drawn and when it ends. max_tokens=None: until the context is full."""

    max_tokens: int | None = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | Iterable[str] | None = ()  # a tuple after the checks
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
