"""One answer as a state machine: start (encode, prefill), then sample, step, token until it ends. Streams drive one of these,
batches several at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import errors
from ._native import Flag, check, ffi, lib, new_error
from .options import Options
from .prompt import Part
from .stats import Result, Stats, Token, peak_bytes
from .text import AnswerText

if TYPE_CHECKING:
    from .session import Plan, Session


class Generation:
    """make_plan(n_past) is called at once, and again if the conversation has moved on until the first token."""

    def __init__(self, session: Session, make_plan: Callable[[int], Plan], options: Options, n_past: int) -> None:
        model = session.model
        self.session = session
        self.options = options
        self.flag = Flag()
        self.tokens: list[Token] = []
        self.finish_reason: str | None = None
        self.started = False
        self._make_plan = make_plan
        self._turns = len(session._chat.turns)
        self.plan = make_plan(n_past)
        session._check_room(self.plan, n_past)
        self._answer = AnswerText(bool(model._info.add_space_prefix), options.stop)
        self._stats = Stats(load_s=model.load_s, device=model.device)
        self._sampling = options.to_native()
        self._sample = ffi.new("kvs_sample *")
        self._telemetry = np.empty((2, model.n_layer), np.float32)
        self._err = new_error()
        self._message: dict[str, str] | None = None  # the answer as the conversation keeps it

    # ---- the steps; the session's handle is held by the caller ----

    def start(self, pointer: Any) -> None:
        """Pictures, prefix, prompt rows."""
        session = self.session
        self.started = True
        n_past = lib.kvs_session_n_past(pointer)
        if self._turns != len(session._chat.turns):
            self.plan = self._make_plan(n_past)
        session._check_room(self.plan, n_past)
        begin = session._reusable(pointer, self.plan.prompt) if self.plan.fresh else 0
        parts = self.plan.prompt.rest(begin)
        rows = self._encode(parts)
        time_0 = time.perf_counter()
        if self.plan.fresh:
            session._rewind(pointer, n_past - begin)
            session._chat.turns = []
        check(lib.kvs_session_new_turn(pointer, self._err), self._err)
        session._feed(pointer, parts, rows, self.flag)
        session._note_prompt_end(pointer)
        check(lib.kvs_session_end_prefill(pointer, self._err), self._err)
        if self.options.seed is not None:
            check(lib.kvs_session_reseed(pointer, self.options.seed, self._err), self._err)
        self._stats.prefill_s = time.perf_counter() - time_0
        self._stats.prefill_tokens = self.plan.prompt.n_rows - begin
        self._stats.reused_tokens = begin
        self._open_turn(pointer)

    def _encode(self, parts: list[Part]) -> list[Any]:
        """Embeddings of the pictures that have to be fed, None for text."""
        rows: list[Any] = []
        encoded, begin = 0, time.perf_counter()
        for part in parts:
            embeddings, known = self.session.model._encode(part.picture, self.flag) if part.picture else (None, True)
            rows.append(embeddings)
            encoded += not known
        self._stats.encode_s = time.perf_counter() - begin if encoded else 0.0
        self._stats.reused_images = self.plan.prompt.pictures - encoded
        return rows

    def _open_turn(self, pointer: Any) -> None:
        if self.plan.message is None:
            return
        system = [{"role": "system", "content": self.plan.system}] if self.plan.system else []
        self._message = {"role": "assistant", "content": ""}
        self.session._chat.turns += [*system, {"role": "user", "content": self.plan.message}, self._message]
        self.session._chat.rows = lib.kvs_session_n_past(pointer)

    def sample(self, pointer: Any) -> int | None:
        """The next id, or None at the end; then flush() may hold a last piece of text."""
        if self.flag:
            return self._end("cancelled")
        if self._answer.stopped:
            return self._end("stop")
        if self.options.max_tokens is not None and self._stats.decode_tokens >= self.options.max_tokens:
            return self._end("length")
        begin = time.perf_counter()
        check(lib.kvs_session_sample(pointer, self._sampling, self._sample, self._err), self._err)
        self._stats.decode_s += time.perf_counter() - begin
        if self._sample.id in self.session.model._end_ids:
            return self._end("stop")
        if lib.kvs_session_n_past(pointer) >= self.session.n_ctx:
            return self._end("context")
        return self._sample.id

    def after_step(self, pointer: Any, seconds: float) -> Token:
        """The token of a sampled id that has been fed."""
        stats = self._stats
        stats.decode_s += seconds
        stats.decode_tokens += 1
        if self._message is not None:
            self.session._chat.rows = lib.kvs_session_n_past(pointer)
        last = self.options.max_tokens is not None and stats.decode_tokens >= self.options.max_tokens
        text = self._answer.push(self.session.model.token_bytes(self._sample.id), last)
        out = ffi.cast("float *", ffi.from_buffer(self._telemetry))
        check(lib.kvs_session_telemetry(pointer, 1, out, out + self._telemetry.shape[1], self._err), self._err)
        entropy, strength = (_mean(row[self.session._layers]) for row in self._telemetry)
        return self._put(text, entropy, strength if self.session.policy is not None else None)

    def flush(self) -> Token | None:
        """At an end that the model or the context made: text that was held back, as a token that was sampled but not fed."""
        text = self._answer.push(b"", True) if self.finish_reason in ("stop", "context") else ""
        return self._put(text, math.nan, math.nan if self.session.policy is not None else None) if text else None

    def _put(self, text: str, entropy: float, strength: float | None) -> Token:
        sample = self._sample
        top = tuple((sample.top_ids[i], sample.top_logprobs[i]) for i in range(sample.n_top)) if self.options.logprobs else ()
        token = Token(text, sample.id, sample.logprob, entropy, strength, top)
        self.tokens.append(token)
        if self._message is not None:
            self._message["content"] += text
        return token

    def _end(self, reason: str) -> None:
        self.finish_reason = self.finish_reason or reason

    # ---- for one stream ----

    def next_token(self, pointer: Any) -> Token | None:
        """One whole step. None at the end. A cancelled native call is an end, every other exception goes through."""
        try:
            if not self.started and not self.flag:
                self.start(pointer)
            id = self.sample(pointer)
            if id is None:
                return self.flush()
            begin = time.perf_counter()
            self.session._step(pointer, id, self.flag)
            return self.after_step(pointer, time.perf_counter() - begin)
        except errors.CancelledError:
            self._end("cancelled")
            return None
        except BaseException:
            self._end("cancelled")
            raise

    def stats(self) -> Stats:
        """The figures so far; a copy."""
        figures = {name: self._stats[name] for name in self._stats}
        if figures["decode_s"] > 0:
            figures["tokens_per_s"] = figures["decode_tokens"] / figures["decode_s"]
        figures["peak_bytes"] = peak_bytes()
        figures["finish_reason"] = self.finish_reason
        return Stats(**figures)

    def result(self) -> Result:
        return Result("".join(token.text for token in self.tokens), list(self.tokens), self.finish_reason or "cancelled", self.stats())


def _mean(values: np.ndarray) -> float:
    """Mean of the numbers among values; NaN if there is none."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else math.nan
