"""Model: the weights, shared by any number of sessions and threads."""

from __future__ import annotations

import logging
import os
import re
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import errors, gguf
from ._native import Flag, check, ffi, lib, native_call, new_error, string
from .checks import c_path, integer, integers, shown, utf8
from .handles import ModelHandle, refuse_pickle
from .limits import Limits
from .prompt import Picture, read_picture
from .stats import MemoryPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from .batch import Batch
    from .images import ImageLike
    from .options import RequestOptions
    from .policies.stack import Policy
    from .prompt import ImageMode
    from .session import KVType, Session

_log = logging.getLogger("pykvsmooth")
Precision = Literal["auto", "exact"]
_PRECISIONS = {"auto": lib.KVS_PRECISION_AUTO, "exact": lib.KVS_PRECISION_EXACT}
_ROUNDINGS: tuple[Literal["f32", "bf16", "f16"], ...] = ("f32", "bf16", "f16")
IMAGE_CACHE_BYTES = 64 << 20
IMAGE_CACHE_PICTURES = 8  # few, because long-lived small arrays would cut the heap to pieces
END_OF_TURN = ("</s>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>")


class _ImageCache:
    """Embeddings of the last pictures, by digest of their pixels: never by file name. Safe for threads."""

    def __init__(self, budget: int, pictures: int) -> None:
        self._budget = budget
        self._pictures = pictures
        self._rows: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, digest: bytes) -> NDArray[np.float32] | None:
        with self._lock:
            rows = self._rows.get(digest)
            if rows is not None:
                self._rows.move_to_end(digest)
            return rows

    def put(self, digest: bytes, rows: NDArray[np.float32]) -> None:
        rows.flags.writeable = False
        with self._lock:
            if digest in self._rows or rows.nbytes > self._budget:
                return
            self._rows[digest] = rows
            self._bytes += rows.nbytes
            while self._bytes > self._budget or len(self._rows) > self._pictures:
                self._bytes -= self._rows.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        with self._lock:
            self._rows.clear()
            self._bytes = 0


class Model:
    """A text model and, if there is one, the vision tower that belongs to it.

    path: a GGUF file (the first part of a split one); None: the environment variable PYKVSMOOTH_MODEL, else
    the small checkpoint in the box. mmproj: the tower's file; None:
    PYKVSMOOTH_MMPROJ, else an mmproj*.gguf beside the model if exactly one fits; False: text only. device: "auto", "cpu", "cuda",
    "cuda:N"; one asked for by name that can't be had is a DeviceError. gpu_layers: of the text model's layers, the last so many are a GPU's
    and the CPU computes those before; "auto": as many as fit beside a cache of 4096 rows, and the vision tower if there is room for it and
    one layer; 0: only the output, and the tower. A number must fit, else it is an OutOfMemoryError, and without a GPU a DeviceError; where
    not one layer fits "cuda" is an OutOfMemoryError (needed, free), and "auto" the CPU (device_reason).
    threads: 1..1024; None takes the processors that affinity and cgroup quota allow. progress(fraction) is called while loading;
    returning False cancels the load. limits: what files, caches, pictures and prompts may cost; None = Limits(). precision, of the vision
    tower: "auto" rounds operands of products to bf16 where the CPU is fast at it (AMD since Zen 4, Intel with AMX) and to f16 on a GPU,
    unless the tower's weights are F32 (rows of pictures are then within about 1 % of "exact"); "exact" computes in float32 everywhere.

    The CUDA backend has not run on a GPU yet: its kernels are tested on the CPU. "auto" takes a GPU that it finds, and a warning in the log
    says so; device="cpu" is what is tested.

    The files are mapped. On the CPU they load at once: the first prompt copies the text model's quantized matrices into the order that the
    kernels read, as many bytes again, and gives the file's pages back; F32, F16 and BF16 are read from the file, and processes share their
    memory. A GPU gets all weights of its layers while the model loads. Files must stay as they are while the model is in use; put another
    file in place of one by renaming. One that shrinks or is written to ends the call that noticed, and every later one, in a
    ModelFormatError; the session is as it was before.

    Many threads may share a Model; each makes its own session. Use as a context manager, or call close().

    Raises ModelFormatError (path, what, offset), ModelFileError (also an OSError), UnsupportedModelError, ModelMismatchError, DeviceError,
    LimitError, OutOfMemoryError, CancelledError; TypeError and ValueError for wrong arguments.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        mmproj: str | os.PathLike[str] | Literal[False] | None = None,
        device: str = "auto",
        gpu_layers: int | Literal["auto"] = "auto",
        threads: int | None = None,
        progress: Callable[[float], Any] | None = None,
        *,
        limits: Limits | None = None,
        precision: Precision = "auto",
    ) -> None:
        begin = time.perf_counter()
        self.path = gguf.model_path(path)
        n_layers = _check_device(device, gpu_layers)
        self.limits = _limits(limits)
        utf8("precision", precision)
        if precision not in _PRECISIONS:
            raise ValueError(f'precision must be "auto" or "exact", not {shown(precision)}')
        self.precision: Precision = precision  # that was asked for; vision_precision is what came of it
        n_threads = 0 if threads is None else integer("threads", threads, 1, 1024)
        self.metadata: dict[str, Any] = gguf.read_metadata(self.path)
        found = gguf.find_mmproj(self.path, self.metadata, mmproj)
        self.mmproj, self._no_vision = found.path, found.reason
        self._handle = _load(self.path, self.mmproj, device, n_layers, n_threads, progress, self.limits, precision)
        self._info = ffi.new("kvs_model_info *")
        self._info.struct_size = ffi.sizeof("kvs_model_info")
        lib.kvs_model_get_info(self._handle.pointer, self._info)
        self._images = _ImageCache(IMAGE_CACHE_BYTES, IMAGE_CACHE_PICTURES)
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._end_ids = self._find_end_ids()
        self.load_s = time.perf_counter() - begin
        gone = re.match("cuda:[0-9]+ is not used|no GPU: CUDA can't be used until", self.device_reason)
        level = logging.WARNING if gone else logging.INFO
        _log.log(level, "%s: device %s (%s), loaded in %.2f s", self.path, self.device, self.device_reason, self.load_s)
        if device == "auto" and self.device != "cpu":
            _log.warning('%s: the CUDA backend has not run on a GPU yet, only its tests on CPUs; device="cpu" is the tested one', self.path)
        if os.environ.get("KVS_CHECK") == "1" and not self.n_gpu_layers and self.device == "cpu":
            _log.warning("%s: KVS_CHECK=1 compares a GPU with the CPU; on the CPU there is nothing to compare", self.path)
        if self._info.threads_missing:
            wanted = self.threads + int(self._info.threads_missing)
            _log.warning("%s: %d of %d threads could be started, the system allows no more (ulimit -u)", self.path, self.threads, wanted)

    # ---- facts ----

    @property
    def device(self) -> str:
        """Where it runs: "cpu" or "cuda:N"."""
        return string(self._info.device)

    @property
    def device_reason(self) -> str:
        """Why it runs there, and with which kernels."""
        return string(self._info.device_reason)

    @property
    def n_gpu_layers(self) -> int:
        """Layers of the text model that a GPU computes, of n_layer."""
        return int(self._info.n_gpu_layers)

    @property
    def n_ctx_train(self) -> int:
        """Rows of context that the model was trained for."""
        return int(self._info.n_ctx_train)

    @property
    def n_layer(self) -> int:
        """Layers of the text model."""
        return int(self._info.n_layer)

    @property
    def n_embd(self) -> int:
        """Width of a row, as feed_embeddings takes it and encode_image gives it."""
        return int(self._info.n_embd)

    @property
    def n_vocab(self) -> int:
        """Tokens of the vocabulary: ids are 0..n_vocab - 1."""
        return int(self._info.n_vocab)

    @property
    def n_head(self) -> int:
        """Query heads of a layer."""
        return int(self._info.n_head)

    @property
    def n_kv_head(self) -> int:
        """Heads of keys and values, less than n_head where query heads share them."""
        return int(self._info.n_head_kv)

    @property
    def head_dim(self) -> int:
        """Width of a head's keys and values."""
        return int(self._info.head_dim)

    @property
    def n_image(self) -> int:
        """Rows of one encoded picture; 0 for a text-only model."""
        return int(self._info.n_image)

    @property
    def has_vision(self) -> bool:
        """Is an mmproj loaded, so that pictures can be given?"""
        return bool(self._info.has_vision)

    @property
    def vision_precision(self) -> Literal["f32", "bf16", "f16"]:
        """What the vision tower rounds operands of products to: "bf16", on a GPU "f16"; "f32" for precision="exact", F32 weights, other
        processors."""
        return _ROUNDINGS[int(self._info.vision_rounding)]

    @property
    def threads(self) -> int:
        """Threads that compute, the caller's among them."""
        return int(self._info.threads)

    @property
    def weight_bytes(self) -> int:
        """Size of the weights as the files hold them, the tower's included; see Model for what of it a process shares."""
        return int(self._info.weight_bytes)

    @property
    def memory_plan(self) -> MemoryPlan:
        """What was reckoned with before anything was allocated on the device. Where a GPU and the CPU share the layers: the GPU's part."""
        info = self._info
        weights, cache, work = int(info.plan_weights), int(info.plan_cache), int(info.plan_work)
        return MemoryPlan(weights, cache, work, int(info.plan_reserve), int(info.plan_free), int(info.plan_rows))

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, or None."""
        return int(self._info.bos) if self._info.bos >= 0 else None

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, or None."""
        return int(self._info.eos) if self._info.eos >= 0 else None

    @property
    def chat_template(self) -> str | None:
        """The file's own template (jinja2), or None."""
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) and template else None

    @property
    def closed(self) -> bool:
        return self._handle.closed

    # ---- vocabulary ----

    def tokenize(self, text: str, add_bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of text. special: names of control tokens in it ("</s>") become those tokens, otherwise they are plain text.
        TypeError, ValueError for what is no text, or holds a lone surrogate; LimitError for more than limits.prompt_chars."""
        data = utf8("text", text)
        self.limits.check_text("text", text)
        return self._tokens_of(data, add_bos, special)

    def _tokens_of(self, data: bytes, add_bos: bool, special: bool) -> list[int]:
        capacity = len(data) + 8
        with self._handle as model:
            while True:
                ids = np.empty(capacity, np.int32)
                n = lib.kvs_tokenize(model, data, len(data), bool(add_bos), bool(special), ffi.from_buffer("int32_t[]", ids), capacity)
                if n < 0:
                    raise errors.OutOfMemoryError("out of memory while tokenizing")
                if n <= capacity:
                    found: list[int] = ids[:n].tolist()
                    return found
                capacity = n

    def token_bytes(self, id: int, special: bool = False) -> bytes:
        """The bytes that a token stands for. Control tokens have none unless special. ValueError for an id out of range."""
        id = integer("id", id, 0, self.n_vocab - 1)
        length = ffi.new("int32_t *")
        with self._handle as model:
            chars = lib.kvs_token_bytes(model, id, bool(special), length)
            if chars == ffi.NULL:
                raise ValueError(f"id: {id} is not a token of this model")
            return bytes(ffi.buffer(chars, length[0]))

    def detokenize(self, ids: Iterable[int]) -> str:
        """Text of ids: control tokens are left out, and so is the space that the tokenizer put in front, as in transformers' decode.
        TypeError, ValueError for what is no list of ids of this model."""
        data = b"".join(map(self.token_bytes, integers("ids", ids, 0, self.n_vocab - 1)))
        return (data.removeprefix(b" ") if self._info.add_space_prefix else data).decode("utf-8", "replace")

    # ---- pictures ----

    def encode_image(self, image: ImageLike, mode: ImageMode = "pad") -> NDArray[np.float32]:
        """The rows that stand for a picture: (n_image, n_embd) float32, a copy.

        image: path, bytes, file object, PIL.Image, or HWC uint8 array. mode: "pad", "crop" or "stretch". Ctrl-C ends it.
        Raises ImageError for a bad picture and UnsupportedModelError for a text-only model.
        """
        return self._encode(read_picture(self, image, mode), Flag())[0].copy()

    def _encode(self, picture: Picture, flag: Flag) -> tuple[NDArray[np.float32], bool]:
        """((n_image, n_embd) float32 that nobody may write to, was it there already)"""
        known = self._images.get(picture.digest)
        if known is not None:
            return known, True
        info = self._vision_info()
        pixels = np.ascontiguousarray(picture.pixels, np.float32)
        with self._handle as model:
            rows = np.empty((info.n_image, info.n_embd), np.float32)
            err, source, target = new_error(), ffi.from_buffer("float[]", pixels), ffi.from_buffer("float[]", rows)
            check(native_call(lambda: lib.kvs_encode_image(model, source, 1, target, flag.pointer, err), flag), err)
        self._images.put(picture.digest, rows)
        return rows, False

    def _vision_info(self) -> Any:
        if self._handle.closed:
            raise errors.ClosedError("the model is closed")
        if not self.has_vision:
            raise errors.UnsupportedModelError(
                f"{self.path}: a picture was given, but no mmproj file is loaded ({self._no_vision}); "
                "load the pair with Model(path, mmproj=...)",
                self.path,
            )
        return self._info

    # ---- sessions ----

    def session(
        self,
        n_ctx: int = 2048,
        kv_type: KVType = "f16",
        policy: Policy | Sequence[Policy] | None = None,
        seed: int | None = None,
        *,
        exact_rows: int = 0,
    ) -> Session:
        """A new timeline with its own cache of n_ctx rows, 1..1048576.

        kv_type: "f16", "f32" or "q8_0". policy: None, one, or a list. seed: of the sampler; None draws one. exact_rows: rows that
        rewind can drop exactly under smoothing, up to 4096 (0 = 32).

        Memory: on a CPU the cache lies on huge pages, and all of it becomes resident with its first rows, while what lies there,
        weights too, is at most half of what this machine, or its container, has; else it grows with its rows.

        Raises PolicyError (a policy that does not fit the model), OutOfMemoryError (needed, free; MemoryLimitError beyond
        limits.cache_bytes), ClosedError, TypeError, ValueError.
        """
        from .session import Session

        return Session(self, n_ctx=n_ctx, kv_type=kv_type, policy=policy, seed=seed, exact_rows=exact_rows)

    def generate_batch(
        self,
        requests: Iterable[str | dict[str, Any]],
        n_ctx: int = 2048,
        kv_type: KVType = "f16",
        policy: Policy | Sequence[Policy] | None = None,
        *,
        parallel: int = 4,
        on_error: Literal["raise", "yield"] = "raise",
        **options: Unpack[RequestOptions],
    ) -> Batch:
        """Answers to many requests, up to parallel of them stepping together in one pass over the weights.

        requests: an iterable of prompts or of dicts with the arguments of Session.generate; options are defaults for all of them.
        Gives (index, Token) as tokens come and (index, Result) at the end of each. on_error "yield": a request that
        fails gives (index, the exception) and the others go on.

        On the CPU an answer does not depend on parallel. On a GPU it may, from a token on that was a close call: steps of up to 8 requests
        and steps of more round activations in two ways (to int8 for quantized weights, and to f16).
        """
        from .batch import Batch

        if not isinstance(requests, Iterable):
            raise TypeError(f"requests must be a list of prompts or of dicts, not {type(requests).__name__}")
        return Batch(self, requests, n_ctx=n_ctx, kv_type=kv_type, policy=policy, parallel=parallel, on_error=on_error, options=options)

    # ---- life ----

    def close(self) -> None:
        """Ends what the model's sessions do, closes them and gives the memory back. May be called again."""
        with ExitStack() as last:  # all of it, even if one part raises
            last.callback(self._handle.close)
            last.callback(self._images.clear)
            for session in list(self._sessions):
                last.callback(session.close)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        refuse_pickle(self)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.device}, {self.n_layer} layers, {'vision' if self.has_vision else 'text only'}"
        return f"<pykvsmooth.Model {Path(self.path).name}: {state}>"

    def _find_end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: EOS, the keys eot and eom, and control tokens of well-known names."""
        ids = {self._info.eos, *(self.metadata.get(f"tokenizer.ggml.{key}_token_id", -1) for key in ("eot", "eom"))}
        for name in END_OF_TURN:
            found = self._tokens_of(name.encode(), add_bos=False, special=True)  # our own text: limits are for strangers'
            if len(found) == 1 and lib.kvs_token_type(self._handle.pointer, found[0]) == 3:
                ids.add(found[0])
        return frozenset(i for i in ids if isinstance(i, int) and i >= 0)

    def _special_text(self, id: int) -> str:
        return self.token_bytes(id, special=True).decode("utf-8", "replace") if 0 <= id < self.n_vocab else ""


def _check_device(device: Any, gpu_layers: Any) -> int:
    """gpu_layers as libkvs takes it."""
    utf8("device", device)
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", device):
        raise ValueError(f'device must be "auto", "cpu", "cuda" or "cuda:N", not {shown(device)}')
    if gpu_layers == "auto":
        return int(lib.KVS_GPU_LAYERS_AUTO)
    try:
        return integer("gpu_layers", gpu_layers, 0, 1 << 20) or int(lib.KVS_GPU_LAYERS_NONE)
    except (TypeError, ValueError) as error:
        raise type(error)(f'{error}; give "auto" (as many layers as fit) or a number of layers') from None


def _limits(limits: Any) -> Limits:
    if limits is None:
        return Limits()
    if not isinstance(limits, Limits):
        raise TypeError(f"limits must be Limits(...) or None, not {type(limits).__name__}")
    return limits


def _load(
    path: str,
    mmproj: str | None,
    device: str,
    gpu_layers: int,
    threads: int,
    progress: Callable[[float], Any] | None,
    limits: Limits,
    precision: Precision,
) -> ModelHandle:
    flag, permille, err, handle = Flag(), Flag(), new_error(), ModelHandle()
    names = [ffi.new("char[]", c_path("path", name)) if name else ffi.NULL for name in (path, mmproj, device)]
    params = ffi.new("kvs_model_params *")
    params.struct_size = ffi.sizeof("kvs_model_params")
    params.text_path, params.mmproj_path, params.device = names
    params.threads, params.cancel, params.progress = threads, flag.pointer, permille.pointer
    params.model_bytes, params.cache_bytes = limits.model_bytes, limits.cache_bytes or 0
    params.precision, params.gpu_layers = _PRECISIONS[precision], gpu_layers

    def report() -> None:
        if progress is not None and progress(permille.pointer[0] / 1000) is False:
            flag.set()

    try:
        report()
        if not flag:
            check(native_call(lambda: lib.kvs_model_load(params, handle.cell, err), flag, report if progress is not None else None), err)
            report()
        if flag:  # also if the last report, after the end, said so
            raise errors.CancelledError(f"{path}: loading was cancelled by progress()")
    except BaseException:
        handle.close()
        raise
    return handle
