"""Weights to blocks: single arrays, and whole GGUF files tensor by tensor. Which tensor gets which type is the business of mixes.py."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import gguf_in, gguf_out
from ._native import check, ffi, lib, new_error, string
from .checks import c_path, choice, integer
from .errors import ModelFileError, ModelFormatError
from .mixes import MIXES, PLAIN, fitting_type, mix_name, tensor_type, wanted_type

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .gguf_in import Source, Tensor

__all__ = ["MIXES", "TYPES", "Quantized", "encode", "quantize_file", "tensor_type"]

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
CHUNK = 1 << 22  # values that one thread works on at a time: a fraction of a second, 16 MiB as float32
QUANTIZATION_VERSION = 2


def _number(type: str) -> int:
    number: int = getattr(lib, f"KVS_TYPE_{type}")
    return number


def _threads(threads: int | None) -> int:
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return integer("threads", threads, 1, 1024)


# ---- arrays ----


def encode(values: NDArray[np.floating[Any]], type: str, threads: int | None = None) -> NDArray[np.uint8]:
    """Rows of weights as rows of blocks.

    values: (rows, cols), any float type, worked on as float32; type: one of TYPES. Gives (rows, bytes of a row) uint8. The scales of each
    block are searched for the least squared error; the same bits come from any number of threads and any machine. threads: default the
    processors that this process may use; the GIL is free meanwhile.
    ValueError: cols is no multiple of the type's block (32 or 256), or a value that is not finite or too large for the type; it
    names the place.
    """
    kind = _number(choice("type", type, TYPES))
    array = np.asarray(values)
    if array.dtype.kind != "f" or array.ndim != 2:
        raise TypeError(f"values must be a float array of shape (rows, cols), not {array.dtype} of shape {array.shape}")
    rows, cols = array.shape
    width = lib.kvs_row_bytes(kind, cols)
    if width < 0:
        raise ValueError(f"values: rows of {cols} are not whole blocks of {type}")
    out, n_threads = np.empty((rows, width), np.uint8), _threads(threads)
    step = max(1, min(CHUNK // max(cols, 1), -(-rows // n_threads)))
    if step >= rows:
        _encode(array, kind, out, 0)
        return out
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(lambda i: _encode(array[i : i + step], kind, out[i : i + step], i), range(0, rows, step)))
    return out


def _encode(values: NDArray[np.floating[Any]], kind: int, out: NDArray[np.uint8], first_row: int) -> None:
    """One call of the native encoder, into contiguous rows. first_row: of the whole, for the message."""
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(values, np.float32)
    err, (rows, cols) = new_error(), values.shape
    source, target = ffi.cast("float *", values.ctypes.data), ffi.cast("void *", out.ctypes.data)
    if lib.kvs_encode(kind, source, rows, cols, target, err) and err.offset >= 0:
        row, col = divmod(err.offset, cols)
        raise ValueError(f"row {first_row + row}, column {col}: {string(err.message)}")
    check(err.code, err)


# ---- files ----


@dataclass(frozen=True)
class Quantized:
    """What became of a file: sizes in bytes, and the tensors whose rows are no whole blocks of the type that their mix wants."""

    bytes_in: int
    bytes_out: int
    misfits: tuple[str, ...]
    requantized: bool  # some tensors had lost digits before


Progress = Callable[[str, int, int], None]


def quantize_file(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    mix: str,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Writes the text model or mmproj src (GGUF of any types that load; the first part of a split file stands for all) to dst, one file,
    with the tensors in the types of mix (a key of MIXES; "q4_k" is "q4_k_m"). All other metadata are kept.

    A tensor that has the wanted type already is copied as it is. progress(name, done, total) is called before each tensor. Memory: a few
    chunks of 16 MiB per thread, however large the file is. Whatever ends the call early leaves no dst behind, or the old one.
    ModelFormatError and UnsupportedModelError for src, ModelFileError where the system refuses to read or write, ValueError for an
    unknown mix or dst being src, ImportError without the package gguf.
    """
    mix, n_threads = mix_name(mix), _threads(threads)
    source = gguf_in.read(os.fsdecode(c_path("src", src)))
    dst = os.fsdecode(c_path("dst", dst))
    if os.path.exists(dst) and any(os.path.samefile(dst, path) for path in source.paths):
        raise ValueError(f"dst: {dst} is the file that is read; write to another name")
    specs, misfits = _plan(source, mix)
    with gguf_out.create(dst, _architecture(source)) as out, ThreadPoolExecutor(n_threads) as pool:
        _copy_keys(source, mix, out.keys)
        out.begin(specs)
        for data in _in_order(pool, n_threads + 1, _chunks(source, specs, progress)):
            out.write(data)
    requantized = any(tensor.type not in (*PLAIN, spec.type) for tensor, spec in zip(source.tensors, specs, strict=True))
    return Quantized(sum(map(os.path.getsize, source.paths)), os.path.getsize(dst), misfits, requantized)


def _plan(source: Source, mix: str) -> tuple[list[gguf_out.Spec], tuple[str, ...]]:
    names = {tensor.name for tensor in source.tensors}
    n_layer = sum(name.startswith("blk.") and name.endswith(".attn_norm.weight") for name in names)
    tied = "output.weight" not in names
    specs, misfits = [], []
    for tensor in source.tensors:
        wanted = wanted_type(tensor.name, tensor.shape, mix, n_layer, tied)
        kind = fitting_type(wanted, tensor.shape[-1])
        if kind != wanted:
            misfits.append(tensor.name)
        specs.append(gguf_out.Spec(tensor.name, tensor.shape, kind))
    return specs, tuple(misfits)


def _architecture(source: Source) -> str:
    value = next((key.value for key in source.keys if key.name == "general.architecture"), None)
    if not isinstance(value, bytes) or not value.isascii():
        path = source.paths[0]
        raise ModelFormatError(f"{path}: general.architecture: the key is missing or no text", path, "general.architecture")
    return value.decode()


def _copy_keys(source: Source, mix: str, writer: Any) -> None:
    """All keys of the source but those that the file makes anew. An empty array is left out: the gguf package can't write one."""
    from gguf import GGUFValueType

    own = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
    for key in source.keys:
        if key.name not in own and not (key.type == GGUFValueType.ARRAY and not key.value):
            element = None if key.element is None else GGUFValueType(key.element)
            writer.add_key_value(key.name, key.value, GGUFValueType(key.type), element)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_file_type(MIXES[mix].file_type)


@dataclass(frozen=True)
class _Piece:
    """Whole rows of a tensor on their way: n_rows of cols values from byte offset of a file."""

    tensor: Tensor
    type: str
    first_row: int
    n_rows: int

    def run(self) -> NDArray[np.uint8]:
        t, cols = self.tensor, self.tensor.shape[-1]
        width = lib.kvs_row_bytes(_number(t.type), cols)
        data = _read(t, t.offset + self.first_row * width, self.n_rows * width)
        if t.type == self.type:
            return data
        values = np.empty((self.n_rows, cols), np.float32)
        lib.kvs_decode(_number(t.type), ffi.from_buffer(data), values.size, ffi.cast("float *", values.ctypes.data))
        out = np.empty((self.n_rows, lib.kvs_row_bytes(_number(self.type), cols)), np.uint8)
        try:
            _encode(values, _number(self.type), out, self.first_row)
        except ValueError as error:
            raise ModelFormatError(f"{t.path}: {t.name}: {error}", t.path, t.name) from error
        return out


def _read(tensor: Tensor, offset: int, n: int) -> NDArray[np.uint8]:
    """n bytes of the file. Read, not mapped: a file that shrinks meanwhile is an error and no crash."""
    data = np.empty(n, np.uint8)
    try:
        with open(tensor.path, "rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < n and (got := file.readinto(data.data[done:])):
                done += got
    except OSError as error:
        raise ModelFileError(f"{tensor.path}: can't be read: {error.strerror}", tensor.path, error.errno) from error
    if done < n:
        raise ModelFormatError(f"{tensor.path}: {tensor.name}: the file has become shorter", tensor.path, tensor.name, offset + done)
    return data


def _chunks(source: Source, specs: Sequence[gguf_out.Spec], progress: Progress | None) -> Iterator[_Piece]:
    for i, (tensor, spec) in enumerate(zip(source.tensors, specs, strict=True)):
        if progress is not None:
            progress(tensor.name, i, len(specs))
        cols = tensor.shape[-1]
        rows, step = int(np.prod(tensor.shape[:-1], dtype=np.int64)), max(1, CHUNK // cols)
        for first in range(0, rows, step):
            yield _Piece(tensor, spec.type, first, min(step, rows - first))


def _in_order(pool: ThreadPoolExecutor, ahead: int, pieces: Iterator[_Piece]) -> Iterator[NDArray[np.uint8]]:
    """The results in the order of the pieces, with at most so many under way or waiting."""
    waiting: deque[Future[NDArray[np.uint8]]] = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(piece.run))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
