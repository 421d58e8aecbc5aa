"""One answer as a state machine: prepare (pictures, words), start (encode, prefill), then sample, step, token until it ends. Streams
drive one of these, batches several at once."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from . import errors
from ._native import Flag, check, ffi, lib, native_call, new_error
from .options import Options
from .prompt import Part, Picture
from .stats import Result, Stats, Token, peak_bytes
from .text import AnswerText

if TYPE_CHECKING:
    from .session import Plan, Request, Session


logger = logging.getLogger("pykvsmooth")


class Generation:
    """Making one is cheap: prepare() does what takes a while."""

    def __init__(self, session: Session, request: Request, options: Options) -> None:
        model = session.model
        self.session = session
        self.request = request
        self.options = options
        self.flag = Flag()
        self.plan: Plan | None = None
        self.tokens: list[Token] = []
        self.finish_reason: str | None = None
        self.started = False
        self._pictures: list[Picture] | None = None
        self._before = 0  # pictures of the timeline in front of them
        self._encoded = 0  # of them
        self._turns = 0  # of the conversation that the plan goes on with
        self._answer = AnswerText(bool(model._info.add_space_prefix), options.stop)
        self._stats = Stats(load_s=model.load_s, device=model.device)
        self._sampling = options.to_native()
        self._sample = ffi.new("kvs_sample *")
        self._telemetry = np.empty((3, model.n_layer), np.float32)
        self._answer_row = 0  # of the timeline
        self._err = new_error()
        self._message: dict[str, str] | None = None  # the answer as the conversation keeps it

    # ---- the steps; the session's handle is held by the caller ----

    def prepare(self, pointer: Any) -> Plan:
        """What to feed, and that there is room for it. Once more at the start, for the conversation may have moved on."""
        session, request = self.session, self.request
        before = lib.kvs_session_n_pictures(pointer) if request.chat and session._chat.turns else 0
        if self._pictures is None or self._before != before:
            self._before = before
            self._pictures = [session._read_picture(image, request.mode, before + i) for i, image in enumerate(request.images)]
        n_past = lib.kvs_session_n_past(pointer)
        if self.plan is None or self._turns != len(session._chat.turns):
            self._turns = len(session._chat.turns)
            self.plan = session._plan(request, self._pictures, n_past)
        session._check_room(self.plan, n_past)
        return self.plan

    def start(self, pointer: Any) -> None:
        """Pictures, prefix, prompt rows."""
        self.started = True
        plan = self.prepare(pointer)
        begin = self.session._reusable(pointer, plan.prompt) if plan.fresh else 0
        parts = plan.prompt.rest(begin)
        rows = [self._encode(part.picture) if part.picture else None for part in parts]
        self._stats.reused_images = plan.prompt.pictures - self._encoded
        time_0 = time.perf_counter()
        try:
            self._prefill(pointer, plan, begin, parts, rows)
        finally:
            self._stats.prefill_s = time.perf_counter() - time_0
        self._stats.prefill_tokens = plan.prompt.n_rows - begin
        self._stats.reused_tokens = begin
        self._answer_row = lib.kvs_session_n_past(pointer)
        self._open_turn(pointer, plan)
        if self.session._stack.prunehal and not lib.kvs_session_n_pictures(pointer):
            logger.info("PruneHal: no picture in the timeline, so nothing will be pruned")

    def _encode(self, picture: Picture) -> Any:
        """The picture's embeddings."""
        known, begin = False, time.perf_counter()
        try:
            rows, known = self.session.model._encode(picture, self.flag)
        finally:
            if not known:
                self._stats.encode_s += time.perf_counter() - begin
        self._encoded += not known
        return rows

    def _prefill(self, pointer: Any, plan: Plan, begin: int, parts: list[Part], rows: list[Any]) -> None:
        session = self.session
        if plan.fresh:
            session._rewind(pointer, lib.kvs_session_n_past(pointer) - begin, self.flag)
            session._chat.turns = []
        check(lib.kvs_session_new_turn(pointer, self._err), self._err)
        session._feed(pointer, parts, rows, self.flag)
        session._note_prompt_end(pointer)
        check(native_call(lambda: lib.kvs_session_end_prefill(pointer, self.flag.pointer, self._err), self.flag), self._err)
        if self.options.seed is not None:
            check(lib.kvs_session_reseed(pointer, self.options.seed, self._err), self._err)

    def _open_turn(self, pointer: Any, plan: Plan) -> None:
        if plan.message is None:
            return
        system = [{"role": "system", "content": plan.system}] if plan.system else []
        self._message = {"role": "assistant", "content": ""}
        self.session._chat.turns += [*system, {"role": "user", "content": plan.message}, self._message]
        self.session._chat.rows = lib.kvs_session_n_past(pointer)

    def goes_on(self) -> bool:
        """Is an id to be sampled? If not, the answer has ended; then flush() may hold a last piece of text."""
        reason = self._reason_to_end()
        if reason is not None:
            self._end(reason)
        return reason is None

    def after_sample(self, pointer: Any, seconds: float) -> int | None:
        """The id that was sampled, or None at the end, as above."""
        self._stats.decode_s += seconds
        if self._sample.id in self.session.model._end_ids:
            self._end("stop")
        elif lib.kvs_session_n_past(pointer) >= self.session.n_ctx:
            self._end("context")
        else:
            return int(self._sample.id)
        return None

    def _reason_to_end(self) -> str | None:
        """Known before anything is sampled."""
        if self.flag:
            return "cancelled"
        if self._answer.stopped:
            return "stop"
        return "length" if self._has_all_tokens() else None

    def _has_all_tokens(self) -> bool:
        return self.options.max_tokens is not None and self._stats.decode_tokens >= self.options.max_tokens

    def after_step(self, pointer: Any, seconds: float) -> Token:
        """The token of a sampled id that has been fed."""
        stats = self._stats
        stats.decode_s += seconds
        stats.decode_tokens += 1
        if self._message is not None:
            self.session._chat.rows = lib.kvs_session_n_past(pointer)
        text = self._answer.push(self.session.model.token_bytes(self._sample.id), self._has_all_tokens())
        out = ffi.cast("float *", ffi.from_buffer(self._telemetry))
        width = self._telemetry.shape[1]
        check(lib.kvs_session_telemetry(pointer, 1, out, out + width, out + 2 * width, self._err), self._err)
        entropies, strengths, masses = self._telemetry.tolist()  # a few numbers: lists are quicker than arrays
        entropy, strength = (_mean([row[layer] for layer in self.session._layers]) for row in (entropies, strengths))
        mass = _mean(masses) if lib.kvs_session_n_pictures(pointer) else None
        if self.session._stack.prunehal:
            stats.pruned = self.session._prunings(pointer, self._answer_row)
        return self._put(text, entropy, strength if self.session._stack.kvsmooth else None, mass)

    def flush(self) -> Token | None:
        """At an end that the model or the context made: text that was held back, as a token that was sampled but not fed."""
        text = self._answer.push(b"", True) if self.finish_reason in ("stop", "context") else ""
        return self._put(text, math.nan, math.nan if self.session._stack.kvsmooth else None) if text else None

    def _put(self, text: str, entropy: float, strength: float | None, mass: float | None = None) -> Token:
        sample = self._sample
        top = tuple((sample.top_ids[i], sample.top_logprobs[i]) for i in range(sample.n_top)) if self.options.logprobs else ()
        token = Token(text, sample.id, sample.logprob, entropy, strength, top, mass)
        self.tokens.append(token)
        if self._message is not None:
            self._message["content"] += text
        return token

    def _end(self, reason: str) -> None:
        self.finish_reason = self.finish_reason or reason

    # ---- for one stream ----

    def next_token(self, pointer: Any) -> Token | None:
        """One whole step. None at the end. Being cancelled is an end, every other exception goes through."""
        try:
            if not self.started and not self.flag:
                self.start(pointer)
            id = sample([self], [pointer], self.flag)[0] if self.goes_on() else None
            if id is None:
                return self.flush()
            begin = time.perf_counter()
            self.session._step(pointer, id, self.flag)
            return self.after_step(pointer, time.perf_counter() - begin)
        except BaseException as error:
            self._end("cancelled")
            self._settle(pointer)
            if self.was_cancelled(error):
                return None
            raise

    def _settle(self, pointer: Any) -> None:
        """A signal's exception may come between the rows and the note of them: the conversation shall go on behind what is there."""
        chat = self.session._chat
        n_past = lib.kvs_session_n_past(pointer)
        if self._message is not None:
            chat.rows = n_past
        elif self.started and self.plan is not None and chat.turns and n_past > chat.rows:
            self._open_turn(pointer, self.plan)  # the question is there, its answer has not begun

    def was_cancelled(self, error: BaseException) -> bool:
        """Does error come of the flag, which cancel() sets, or of the close() that set it?"""
        return bool(self.flag) and isinstance(error, (errors.CancelledError, errors.ClosedError))

    def stats(self) -> Stats:
        """The figures so far; a copy."""
        figures = {name: self._stats[name] for name in self._stats}
        if figures["decode_s"] > 0:
            figures["tokens_per_s"] = figures["decode_tokens"] / figures["decode_s"]
        figures["peak_bytes"] = peak_bytes()
        figures["finish_reason"] = self.finish_reason
        figures["pruned"] = list(figures["pruned"])
        return Stats(**figures)

    def result(self) -> Result:
        return Result("".join(token.text for token in self.tokens), list(self.tokens), self.finish_reason or "cancelled", self.stats())


def sample(generations: list[Generation], pointers: list[Any], flag: Flag) -> list[int | None]:
    """The next ids of several answers that go on, over one model, drawn at once: all or none. None for one that ends with it."""
    sessions, err = ffi.new("kvs_session *[]", pointers), generations[0]._err
    sampling = ffi.new("kvs_sampling *[]", [generation._sampling for generation in generations])
    out = ffi.new("kvs_sample *[]", [generation._sample for generation in generations])
    begin = time.perf_counter()
    check(lib.kvs_sessions_sample(sessions, sampling, len(pointers), out, flag.pointer, err), err)
    seconds = time.perf_counter() - begin
    return [generation.after_sample(pointer, seconds) for generation, pointer in zip(generations, pointers, strict=True)]


def _mean(values: list[float]) -> float:
    """Mean of the numbers among values; NaN if there is none."""
    numbers = [value for value in values if value == value]
    return sum(numbers) / len(numbers) if numbers else math.nan
