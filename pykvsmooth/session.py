"""Session: one timeline over a model, with its own cache. One thread at a time."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import errors
from ._native import Flag, check, ffi, lib, native_call, new_error, string
from .checks import c_path, choice, float_rows, integer, integers, utf8
from .handles import SessionHandle, refuse_pickle
from .options import AnswerOptions, Options, read_options, seed_of
from .policies.stack import Policy, Stack
from .prompt import MODES, Part, Picture, Prompt, build_prompt, digest_of, read_picture
from .stats import Pruning
from .stream import Stream
from .template import Message, choose

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from typing_extensions import Unpack

    from .aio import AsyncStream
    from .generation import Generation
    from .images import ImageLike
    from .model import Model
    from .prompt import ImageMode

KVType = Literal["f16", "f32", "q8_0"]
KV_TYPES: dict[KVType, int] = {"f16": lib.KVS_TYPE_F16, "f32": lib.KVS_TYPE_F32, "q8_0": lib.KVS_TYPE_Q8_0}
NO_LIMIT = 1 << 30


def _native_params(model: Model, n_ctx: int, kv_type: KVType, stack: Stack, seed: int, exact_rows: int) -> tuple[Any, Any]:
    """(kvs_session_params *, what must be kept alive beside it)"""
    params = ffi.new("kvs_session_params *")
    params.struct_size = ffi.sizeof("kvs_session_params")
    params.n_ctx, params.kv_type, params.seed, params.exact_rows = n_ctx, KV_TYPES[kv_type], seed, exact_rows
    return params, stack.to_native(model, params)


@dataclass
class _Chat:
    """Turns of chat(). rows: the length of the timeline behind the last one, to notice when somebody else moved it."""

    turns: list[Message] = field(default_factory=list)
    rows: int = 0


@dataclass(frozen=True)
class Request:
    """What generate() and chat() were asked. images: as they were given, not read yet."""

    message: str
    images: list[Any]
    mode: str
    system: str | None
    template: str | None
    chat: bool


@dataclass(frozen=True)
class Plan:
    """What a stream will feed. fresh: a new timeline, whose common prefix with the old one is reused; otherwise it is appended."""

    prompt: Prompt
    fresh: bool
    message: str | None = None  # of chat
    system: str | None = None


class Session:
    """One timeline: rows of text and pictures, the cache of their keys and values, and a policy that edits it.

    Made by Model.session(), fork() and Session.load(). A session belongs to one thread at a time (BusyError for a second one); many
    sessions may run at once over one model. Every array that it gives is a copy.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int = 2048,
        kv_type: KVType = "f16",
        policy: Policy | Sequence[Policy] | None = None,
        seed: int | None = None,
        exact_rows: int = 0,
    ) -> None:
        _check_model(model)
        n_ctx = integer("n_ctx", n_ctx, 1, 1 << 20)
        choice("kv_type", kv_type, list(KV_TYPES))
        exact_rows = integer("exact_rows", exact_rows, 0, 4096)
        stack = Stack(policy)
        params, keep = _native_params(model, n_ctx, kv_type, stack, seed_of(seed), exact_rows)
        self._adopt(model, stack, lambda pointer, out, err: lib.kvs_session_new(pointer, params, out, err), Flag())
        del keep

    def _adopt(
        self,
        model: Model,
        stack: Stack,
        make: Callable[[Any, Any, Any], int],
        flag: Flag,
        check: Callable[[int, Any], None] = check,
    ) -> None:
        """Fills this object with the native session that make gives, if flag does not end it before."""
        err = new_error()
        self._handle = SessionHandle(model._handle)
        try:
            check(native_call(lambda: make(model._handle.pointer, self._handle.cell, err), flag), err)
        except BaseException:
            self._handle.close()
            raise
        pointer = self._handle.cell[0]
        self.model = model
        self._stack = stack
        self.n_ctx: int = lib.kvs_session_n_ctx(pointer)
        self.kv_type = next(name for name, number in KV_TYPES.items() if number == lib.kvs_session_kv_type(pointer))
        self._layers = stack.telemetry_layers(model.n_layer)
        self._per_head = stack.prunehal is not None and stack.prunehal.index_scope == "kv_head"
        self._chat = _Chat()
        self._prompt_end = NO_LIMIT  # rows before the first row at which a prompt ended
        self._active: weakref.ref[Generation] | None = None
        model._sessions.add(self)

    @property
    def policy(self) -> Policy | tuple[Policy, ...] | None:
        """None, the one policy, or several in the order in which they act."""
        return self._stack.as_given

    # ---- answers ----

    def generate(
        self,
        prompt: str,
        image: ImageLike | Sequence[ImageLike] | None = None,
        images: Sequence[ImageLike] | None = None,
        mode: ImageMode = "pad",
        system: str | None = None,
        template: str | None = "auto",
        max_tokens: int | None = 512,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Iterable[str] | None = (),
        seed: int | None = None,
        logprobs: int = 0,
    ) -> Stream:
        """An answer to prompt, as a Stream of tokens.

        Starts a new timeline; of the old one the longest common prefix is reused, but no row that a policy has changed.
        image, images: path, bytes, file object, PIL.Image or HWC uint8 array. "<image>" marks in the prompt say where each goes; without
        marks they go in front. mode: "pad", "crop", "stretch". template: "auto" (the model's own, else Vicuna's), "vicuna", None (the
        prompt as it is), or jinja2 text. system: a sentence in front. temperature 0 is greedy. stop: texts that end the answer and are
        not part of it. seed: of this answer; None goes on with the session's. logprobs: so many top_logprobs per token, up to 20.

        Arguments, pictures and room are checked here, work begins with the first token. Raises ImageError, UnsupportedModelError (a
        picture for a text-only model), ContextOverflowError (needed, n_ctx), LimitError, BusyError, ClosedError, TypeError, ValueError.
        """
        options = Options(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            seed=seed,
            logprobs=logprobs,
        )
        return self._stream(self._request(prompt, image, images, mode, system, template, chat=False), options)

    def chat(
        self,
        message: str,
        image: ImageLike | Sequence[ImageLike] | None = None,
        images: Sequence[ImageLike] | None = None,
        mode: ImageMode = "pad",
        system: str | None = None,
        template: str | None = "auto",
        **options: Unpack[AnswerOptions],
    ) -> Stream:
        """The next turn of a conversation, as a Stream. What was said before stays in the cache: only the new turn is computed.

        Arguments as in generate(); system belongs to the first message. reset() begins another conversation. An answer that was cut
        short counts as it is. ValueError where the timeline was changed by something else since the last turn.
        """
        checked = read_options("chat", options)
        return self._stream(self._request(message, image, images, mode, system, template, chat=True), checked)

    def reset(self) -> None:
        """Empties the timeline and forgets the conversation."""
        flag = Flag()
        with self._handle.use(flag) as pointer:
            self._refuse_active()
            self._rewind(pointer, lib.kvs_session_n_past(pointer), flag)
            self._chat = _Chat()

    def agenerate(
        self,
        prompt: str,
        image: ImageLike | Sequence[ImageLike] | None = None,
        images: Sequence[ImageLike] | None = None,
        mode: ImageMode = "pad",
        system: str | None = None,
        template: str | None = "auto",
        **options: Unpack[AnswerOptions],
    ) -> AsyncStream:
        """generate() for asyncio: `async for token in session.agenerate(...)`. Work runs in a thread; cancelling the task ends it.

        Only what costs nothing is checked here. Pictures are read and the prompt is cut into tokens with the first token, and what is
        wrong with them is raised there.
        """
        checked = read_options("agenerate", options)
        return self._async_stream(self._request(prompt, image, images, mode, system, template, chat=False), checked)

    def achat(
        self,
        message: str,
        image: ImageLike | Sequence[ImageLike] | None = None,
        images: Sequence[ImageLike] | None = None,
        mode: ImageMode = "pad",
        system: str | None = None,
        template: str | None = "auto",
        **options: Unpack[AnswerOptions],
    ) -> AsyncStream:
        """chat() for asyncio; see agenerate()."""
        checked = read_options("achat", options)
        return self._async_stream(self._request(message, image, images, mode, system, template, chat=True), checked)

    def _stream(self, request: Request, options: Options) -> Stream:
        from .generation import Generation

        generation = Generation(self, request, options)
        with self._handle.use(generation.flag) as pointer:
            self._refuse_active()
            generation.prepare(pointer)
        return Stream(generation)

    def _async_stream(self, request: Request, options: Options) -> AsyncStream:
        from .aio import AsyncStream
        from .generation import Generation

        with self._handle:
            self._refuse_active()
        return AsyncStream(Stream(Generation(self, request, options)))

    def _request(
        self, message: str, image: Any, images: Sequence[ImageLike] | None, mode: str, system: str | None, template: str | None, chat: bool
    ) -> Request:
        """Checks what can be checked at no cost."""
        texts = {"message" if chat else "prompt": message} | ({} if system is None else {"system": system})
        for name, text in texts.items():
            utf8(name, text)
            self.model.limits.check_text(name, text)
        choice("mode", mode, MODES)
        if image is not None and images is not None:
            raise ValueError("give image or images, not both")
        if images is not None and (isinstance(images, (str, bytes)) or not isinstance(images, Sequence)):
            hint = "; list(a) makes one of an array (n, height, width, 3)" if isinstance(images, np.ndarray) else ""
            raise TypeError(f"images must be a list of pictures, not {type(images).__name__}{hint}")
        chosen = images if images is not None else image if isinstance(image, (list, tuple)) else [] if image is None else [image]
        marks = message.count("<image>")
        if marks and marks != len(chosen):
            raise ValueError(f"the prompt has {marks} <image> marks for {len(chosen)} pictures; give one picture per mark")
        if chosen:
            self.model._vision_info()  # an error for a text-only model
        return Request(message, list(chosen), mode, system, template, chat)

    def _plan(self, request: Request, pictures: list[Picture], n_past: int) -> Plan:
        """pictures: those of the request, read."""
        if request.chat and self._chat.turns:
            return self._plan_next(request, pictures, n_past)
        text = self._template(request.template).first(request.message, len(pictures), request.system)
        prompt = build_prompt(self.model, text, pictures, begin=True)
        if not prompt.n_rows:
            raise ValueError("the prompt is empty and the model has no BOS token: there is nothing to begin with")
        return Plan(prompt, True, request.message if request.chat else None, request.system)

    def _plan_next(self, request: Request, pictures: list[Picture], n_past: int) -> Plan:
        if request.system is not None:
            raise ValueError("system belongs to the first message of a conversation; call reset() to begin another one")
        if n_past != self._chat.rows:
            raise ValueError("the timeline has changed since the last turn of the conversation; call reset() to begin another one")
        text = self._template(request.template).next(self._chat.turns, request.message, len(pictures))
        return Plan(build_prompt(self.model, text, pictures, begin=False), False, request.message)

    def _template(self, template: str | None) -> Any:
        info = self.model._info
        return choose(template, self.model.chat_template, self.model._special_text(info.bos), self.model._special_text(info.eos))

    def _check_room(self, plan: Plan, n_past: int) -> None:
        """For the prompt and one token of the answer."""
        self._check_rows(0 if plan.fresh else n_past, plan.prompt.n_rows + 1)

    def _check_rows(self, there: int, new: int) -> None:
        if there + new > self.n_ctx:
            raise errors.ContextOverflowError(
                f"context overflow: {there + new} rows needed ({there} there, {new} new), n_ctx is {self.n_ctx}; "
                "make the session with a larger n_ctx, or shorten the prompt",
                there + new,
                self.n_ctx,
            )

    # ---- the lower floor ----

    def feed(self, ids: Iterable[int], generated: bool = False) -> None:
        """Adds rows, synchronously; no BOS is added. generated=True: each id counts as just generated, one by one, and policies act on it.

        Prompt rows are all or nothing: on an error or Ctrl-C none has been added. Generated ones are a step each: after Ctrl-C those
        before it stay, n_past says how many. Raises ContextOverflowError (nothing was fed), ValueError, and ClosedError if another
        thread closes the session meanwhile.
        """
        run = np.array(integers("ids", ids, 0, self.model.n_vocab - 1), np.int32)
        flag = Flag()
        with self._handle.use(flag) as pointer:
            self._refuse_active()
            if not generated:
                self._feed(pointer, [Part(0, len(run), ids=run)] if run.size else [], [None], flag)
                return
            self._check_rows(lib.kvs_session_n_past(pointer), len(run))
            for id in run.tolist():
                self._note_prompt_end(pointer)
                self._step(pointer, id, flag)

    def feed_image(self, image: ImageLike, mode: ImageMode = "pad") -> None:
        """Adds the rows of a picture: n_image of them, all or nothing.

        Arguments and errors as in Model.encode_image(); ContextOverflowError, BusyError, ClosedError.
        """
        flag = Flag()
        with self._handle.use(flag) as pointer:
            self._refuse_active()
            picture = self._read_picture(image, mode, lib.kvs_session_n_pictures(pointer))
            rows, _ = self.model._encode(picture, flag)
            self._feed(pointer, [Part(0, len(rows), picture=picture)], [rows], flag)

    def feed_embeddings(self, embeddings: ArrayLike) -> None:
        """Adds rows given as embeddings, all or nothing: (n, n_embd) float32, finite. Under DSCR they must be a picture's, and its depth
        map is one of the model's whole square.

        Raises TypeError for what holds no real numbers, ValueError for another shape or numbers that are not finite, and
        ContextOverflowError, BusyError, ClosedError.
        """
        rows = float_rows("embeddings", embeddings, self.model.n_embd)
        if not len(rows):
            return
        flag = Flag()
        with self._handle.use(flag) as pointer:
            self._refuse_active()
            depth = self._stack.depth_of(self.model, lib.kvs_session_n_pictures(pointer), "stretch")
            picture = Picture(rows, digest_of(rows, "rows"), depth(None) if depth else None)
            self._feed(pointer, [Part(0, len(rows), picture=picture)], [rows], flag)

    def logits(self) -> NDArray[np.float32]:
        """(n_vocab,) float32 of the last row fed. Ends the prefill: what a policy does at the end of a prompt is done, once.

        ValueError before anything was fed; NumericError if they are not finite; BusyError, ClosedError.
        """
        out, flag, err = np.empty(self.model.n_vocab, np.float32), Flag(), new_error()
        target = ffi.from_buffer("float[]", out)
        with self._handle.use(flag) as pointer:
            self._end_prefill(pointer, flag)
            check(native_call(lambda: lib.kvs_session_logits(pointer, target, flag.pointer, err), flag), err)
        return out

    def kv(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(K, V) of a layer, each (n_kv_head, n_rows, head_dim) float32: the physical rows, the newest already smoothed. K after rotary
        embedding, in the GGUF's interleaved order. Ends the prefill, as logits() does.

        layer: negative as in Python; ValueError where there is none. BusyError, ClosedError.
        """
        layer, flag = self._layer(layer), Flag()
        with self._handle.use(flag) as pointer:
            self._end_prefill(pointer, flag)
            shape = (self.model.n_kv_head, lib.kvs_session_n_rows(pointer, layer), self.model.head_dim)
            k, v, err = np.empty(shape, np.float32), np.empty(shape, np.float32), new_error()
            buffers = ffi.from_buffer("float[]", k), ffi.from_buffer("float[]", v)
            check(lib.kvs_session_kv(pointer, layer, shape[1], *buffers, err), err)
        return k, v

    def positions(self, layer: int) -> NDArray[np.int32]:
        """(n_rows,) int32: the rotary position of each physical row of a layer, which is its index in the timeline; (n_kv_head, n_rows)
        with PruneHal(index_scope="kv_head"), where heads keep different rows. Errors as of kv()."""
        layer = self._layer(layer)
        with self._handle as pointer:
            sets, n, err = lib.kvs_session_n_sets(pointer), lib.kvs_session_n_rows(pointer, layer), new_error()
            out = np.empty((sets, n), np.int32)
            check(lib.kvs_session_positions(pointer, layer, n, ffi.from_buffer("int32_t[]", out), err), err)
        return out if self._per_head else out[0]

    def entropies(self) -> NDArray[np.float32]:
        """(n_generated, n_layer) float32: row entropies in nats, mean over heads (arXiv 2602.04268 eq. 5), also without a policy.
        Ends the prefill, as logits() does. BusyError, ClosedError."""
        return self._telemetry()[0]

    def strengths(self) -> NDArray[np.float32]:
        """(n_generated, n_layer) float32: strengths (eq. 14); NaN where a layer was not smoothed. Ends the prefill, as logits() does.
        BusyError, ClosedError."""
        return self._telemetry()[1]

    def visual_masses(self) -> NDArray[np.float32]:
        """(n_generated, n_layer) float32: share of attention on rows of pictures, mean over heads (arXiv 2510.19183), 0 without pictures.
        Ends the prefill, as logits() does. BusyError, ClosedError."""
        return self._telemetry()[2]

    @property
    def prunings(self) -> list[Pruning]:
        """What PruneHal has dropped and nobody has brought back, oldest first; steps count the generated rows of the session."""
        with self._handle as pointer:
            return self._prunings(pointer, None)

    def restore(self) -> None:
        """Brings all rows back that PruneHal has dropped. Rows that were generated meanwhile stay as they are, and the answer under way
        is not pruned any more; an answer to a prompt with a new picture is. Ctrl-C ends it, and nothing has changed.

        Without PruneHal nothing happens. PolicyError if it was made without reversible=True; BusyError, ClosedError.
        """
        flag, err = Flag(), new_error()
        with self._handle.use(flag) as pointer:
            self._refuse_active()
            check(native_call(lambda: lib.kvs_session_restore(pointer, flag.pointer, err), flag), err)

    @property
    def n_past(self) -> int:
        """Rows of the timeline."""
        with self._handle as pointer:
            return int(lib.kvs_session_n_past(pointer))

    @property
    def n_generated(self) -> int:
        """Rows that were generated."""
        with self._handle as pointer:
            return int(lib.kvs_session_n_generated(pointer))

    @property
    def nbytes(self) -> int:
        """Memory of the cache, in bytes: room for n_ctx rows, less the rows that PruneHal dropped for good."""
        with self._handle as pointer:
            return int(lib.kvs_session_bytes(pointer))

    def fork(self) -> Session:
        """An independent copy, the sampler's state and the conversation too. OutOfMemoryError, BusyError, ClosedError; Ctrl-C ends it."""
        flag = Flag()
        with self._handle.use(flag) as pointer:
            twin = object.__new__(Session)
            twin._adopt(self.model, self._stack, lambda _, out, err: lib.kvs_session_fork(pointer, out, flag.pointer, err), flag)
            twin._chat = _Chat(list(self._chat.turns), self._chat.rows)
            twin._prompt_end = self._prompt_end
        return twin

    def rewind(self, n_tokens: int) -> None:
        """Drops the newest n_tokens rows, exactly. Ctrl-C ends it, and nothing has changed.

        PolicyError where the exact rows for it are gone, or where PruneHal has dropped rows of a picture since that were not kept (then
        nothing has changed); ValueError for more rows than there are; BusyError, ClosedError.
        """
        flag = Flag()
        with self._handle.use(flag) as pointer:
            self._refuse_active()
            self._rewind(pointer, integer("n_tokens", n_tokens, 0, lib.kvs_session_n_past(pointer)), flag)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the timeline, the cache and the sampler's state to a file, completely or not at all, also if Ctrl-C ends it.

        Raises SessionFileError, which is a SessionIOError (also an OSError, with errno) where the system has failed; OutOfMemoryError,
        BusyError, ClosedError, TypeError, ValueError.
        """
        name, flag, err = c_path("path", path), Flag(), new_error()
        with self._handle.use(flag) as pointer:
            _check_file(native_call(lambda: lib.kvs_session_save(pointer, name, flag.pointer, err), flag), err)

    @classmethod
    def load(
        cls, model: Model, path: str | os.PathLike[str], policy: Policy | Sequence[Policy] | None = None, exact_rows: int = 0
    ) -> Session:
        """A session that save() wrote, over the same model. policy must be what it was saved with; n_ctx and kv_type come from the file.
        The words of a chat() are not in it.

        Raises SessionFileError (path, what), of which SessionIOError and SessionFileNotFoundError are OSErrors, too; PolicyError,
        OutOfMemoryError, ClosedError, TypeError, ValueError.
        """
        _check_model(model)
        stack, name, flag = Stack(policy), c_path("path", path), Flag()
        params, keep = _native_params(model, 1, "f16", stack, 0, integer("exact_rows", exact_rows, 0, 4096))

        def make(pointer: Any, out: Any, err: Any) -> int:
            return int(lib.kvs_session_load(pointer, name, params, out, flag.pointer, err))

        session = object.__new__(cls)
        session._adopt(model, stack, make, flag, _check_file)
        session._prompt_end = 0
        del keep
        return session

    def close(self) -> None:
        """Ends what the session does, in this thread or another, and gives the memory back. May be called again. A stream that has begun
        ends as "cancelled", one that has not, and any other call of another thread, as a ClosedError."""
        active = self._active_generation()
        if active is not None:
            active.flag.set()
            active._end("cancelled")
        self._handle.close()

    @property
    def closed(self) -> bool:
        return self._handle.closed

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        refuse_pickle(self)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"n_ctx={self.n_ctx}, kv_type={self.kv_type!r}, policy={self.policy!r}"
        return f"<pykvsmooth.Session {state}>"

    # ---- inside: the handle is held ----

    def _read_picture(self, image: ImageLike, mode: str, index: int) -> Picture:
        """Picture index of the timeline, with its depth if a policy asks for that."""
        choice("mode", mode, MODES)
        self.model._vision_info()
        return read_picture(self.model, image, mode, self._stack.depth_of(self.model, index, mode))

    def _feed(self, pointer: Any, parts: list[Part], rows: list[Any], flag: Flag) -> None:
        """All parts in one go; rows[i]: the embeddings of part i, None for ids."""
        chunks = ffi.new("kvs_chunk[]", len(parts) or 1)
        keep = []
        for chunk, part, embeddings in zip(chunks, parts, rows, strict=False):
            chunk.n = part.end - part.begin
            if part.picture is None:
                keep.append(ffi.from_buffer("int32_t[]", np.ascontiguousarray(part.ids)))
                chunk.ids = keep[-1]
            else:
                keep.append(ffi.from_buffer("float[]", embeddings))
                chunk.embd, chunk.hash = keep[-1], part.picture.key
                if part.picture.depth is not None:
                    keep.append(ffi.from_buffer("float[]", _of_rows(part.picture.depth, chunk.n)))
                    chunk.depth = keep[-1]
        err = new_error()
        check(native_call(lambda: lib.kvs_session_feed(pointer, chunks, len(parts), flag.pointer, err), flag), err)

    def _step(self, pointer: Any, id: int, flag: Flag) -> None:
        step([pointer], [id], flag)

    def _note_prompt_end(self, pointer: Any) -> None:
        """Rows from here on must not be reused as a prefix where the policy marks the end of a prompt."""
        self._prompt_end = min(self._prompt_end, max(0, lib.kvs_session_n_past(pointer) - 1))

    def _end_prefill(self, pointer: Any, flag: Flag) -> None:
        if self._active_generation() is None:
            self._note_prompt_end(pointer)
        err = new_error()
        check(native_call(lambda: lib.kvs_session_end_prefill(pointer, flag.pointer, err), flag), err)

    def _rewind(self, pointer: Any, n: int, flag: Flag) -> None:
        err = new_error()
        check(native_call(lambda: lib.kvs_session_rewind(pointer, n, flag.pointer, err), flag), err)
        if lib.kvs_session_n_past(pointer) <= self._prompt_end:
            self._prompt_end = NO_LIMIT

    def _timeline(self, pointer: Any) -> tuple[NDArray[np.int32], NDArray[np.uint64], NDArray[np.int32]]:
        """Of each row: id (-1 for a picture's), key of the picture, 1 where it was generated."""
        n, err = lib.kvs_session_n_past(pointer), new_error()
        ids, keys, generated = np.empty(n, np.int32), np.empty(n, np.uint64), np.empty(n, np.int32)
        buffers = [ffi.from_buffer(kind, array) for kind, array in (("int32_t[]", ids), ("uint64_t[]", keys), ("int32_t[]", generated))]
        check(lib.kvs_session_timeline(pointer, n, *buffers, err), err)
        return ids, keys, generated

    def _reusable(self, pointer: Any, prompt: Prompt) -> int:
        """How many rows of the timeline a new one that begins with prompt may keep."""
        ids, keys, generated = self._timeline(pointer)
        n = len(ids)
        changed = np.flatnonzero(generated)
        images = np.flatnonzero(ids < 0)
        first, picture = (int(found[0]) if len(found) else n for found in (changed, images))
        whole = lib.kvs_session_n_whole(pointer)
        return prompt.common(ids, keys, self._stack.reusable(n, first, picture, self._prompt_end, prompt.n_rows, whole))

    def _prunings(self, pointer: Any, since: int | None) -> list[Pruning]:
        """Those behind row since and later ones, their steps counted from that row; None: all, counted over all generated rows."""
        n, err = lib.kvs_session_n_prunings(pointer), new_error()
        if not n:
            return []
        events = ffi.new("kvs_pruning[]", n)
        check(lib.kvs_session_prunings(pointer, n, events, err), err)
        steps = self._timeline(pointer)[2].cumsum() if since is None else None
        return [
            Pruning(
                int(steps[e.row]) if steps is not None else e.row - since + 1,
                "forced" if e.forced else "vote",
                e.rows_before,
                e.rows_after,
            )
            for e in events
            if since is None or e.row >= since
        ]

    def _telemetry(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        flag = Flag()
        with self._handle.use(flag) as pointer:
            self._end_prefill(pointer, flag)
            shape = (lib.kvs_session_n_generated(pointer), self.model.n_layer)
            entropies, strengths, masses = (np.empty(shape, np.float32) for _ in range(3))
            err, out = new_error(), [ffi.from_buffer("float[]", array) for array in (entropies, strengths, masses)]
            check(lib.kvs_session_telemetry(pointer, shape[0], *out, err), err)
        return entropies, strengths, masses

    def _layer(self, layer: int) -> int:
        n = self.model.n_layer
        return integer("layer", layer, -n, n - 1) % n

    def _active_generation(self) -> Generation | None:
        """The answer that is being written, if its stream is still there and has neither ended nor been cancelled."""
        active = self._active() if self._active is not None else None
        return active if active is not None and active.finish_reason is None and not active.flag else None

    def _refuse_active(self, mine: Generation | None = None) -> None:
        active = self._active_generation()
        if active is not None and active is not mine:
            raise errors.BusyError("a stream of this session has not ended: read it to its end, or close() it first")


def step(pointers: list[Any], ids: list[int], flag: Flag) -> None:
    """One generated token for each of several sessions of one model, in one pass."""
    sessions, tokens, err = ffi.new("kvs_session *[]", pointers), ffi.new("int32_t[]", ids), new_error()
    check(native_call(lambda: lib.kvs_sessions_step(sessions, tokens, len(ids), flag.pointer, err), flag), err)


def _of_rows(depth: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """Native code reads n values. PolicyError for another number: embeddings that are no picture."""
    if len(depth) != n:
        raise errors.PolicyError(f"DSCR: {n} rows of embeddings are no picture of {len(depth)} patches; feed them without this policy")
    return depth


def _check_model(model: object) -> None:
    from .model import Model

    if not isinstance(model, Model):
        raise TypeError(f"model must be a Model, not {type(model).__name__}")


_WHAT_TO_DO = {
    errno.ENOENT: "check the path",
    errno.EACCES: "check the permissions, or choose another folder",
    errno.ENOSPC: "make room there, or choose another folder",
}


def _check_file(code: int, err: Any) -> None:
    """Like check, for session files: trouble of the operating system is a SessionIOError."""
    if code != lib.KVS_E_IO:
        check(code, err)
        return
    number = int(err.offset)
    kind = errors.SessionFileNotFoundError if number == errno.ENOENT else errors.SessionIOError
    raise kind(f"{string(err.message)}; {_WHAT_TO_DO.get(number, 'choose another path')}", string(err.path), number)
