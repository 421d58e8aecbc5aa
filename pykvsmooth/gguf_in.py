"""A GGUF file, or all parts of a split one, for a program that reads every key and every tensor: what is in it, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ._native import ffi, lib, string
from .errors import ModelFormatError, UnsupportedModelError
from .gguf import open_file

MAX_VALUES = 1 << 24  # of all keys: a vocabulary has some hundred thousand, a file that claims millions wants our memory


@dataclass(frozen=True)
class Key:
    """type and element (of an array; None otherwise) are numbers of gguf.GGUFValueType; strings are bytes as they are in the file."""

    name: str
    type: int
    element: int | None
    value: Any


@dataclass(frozen=True)
class Tensor:
    """shape as NumPy has it, the length of a row last; the data are n_bytes at offset of the file at path."""

    name: str
    type: str
    shape: tuple[int, ...]
    path: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Source:
    """keys are those of the first part, without what belongs to its being one; tensors are those of all parts in their order."""

    paths: tuple[str, ...]
    keys: tuple[Key, ...]
    tensors: tuple[Tensor, ...]


def read(path: str) -> Source:
    """Header and tables; of a split file path is the first part. ModelFormatError for a broken file and for parts that do not belong
    together, UnsupportedModelError for a tensor of a type that does not load."""
    keys, tensors = _read_file(path)
    _, count, promised = _place(keys)
    paths = [path] if count <= 1 else _part_paths(path, keys, count)
    for i, part in enumerate(paths[1:], 1):
        more_keys, more = _read_file(part)
        if _place(more_keys)[:2] != (i, count):
            raise ModelFormatError(f"{part}: split.no: this is not part {i + 1} of {count}, as its name says", part, "split.no")
        tensors += more
    names = {tensor.name: tensor for tensor in tensors}
    if len(names) < len(tensors) or promised not in (None, len(tensors)):
        told = f"{promised} tensors are promised, {len(names)} different ones are in its {len(paths)} parts"
        raise ModelFormatError(f"{path}: split.tensors.count: {told}", path, "split.tensors.count")
    return Source(tuple(paths), tuple(key for key in keys if not key.name.startswith("split.")), tuple(tensors))


def _place(keys: list[Key]) -> tuple[int, int, int | None]:
    """Which part of how many this is, and how many tensors all of them hold."""
    found = {key.name: key.value for key in keys if isinstance(key.value, int)}
    return found.get("split.no", 0), found.get("split.count", 1), found.get("split.tensors.count")


def _part_paths(path: str, keys: list[Key], count: int) -> list[str]:
    ending = f"-{1:05}-of-{count:05}.gguf"
    if _place(keys)[0] != 0 or not path.endswith(ending):
        raise ModelFormatError(f"{path}: split.count: the file is one of {count} parts; give the first one, *{ending}", path, "split.count")
    stem = path[: -len(ending)]
    return [f"{stem}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]


def _read_file(path: str) -> tuple[list[Key], list[Tensor]]:
    with open_file(path) as file:
        return list(_keys(path, file)), list(_tensors(path, file))


def _keys(path: str, file: Any) -> Iterator[Key]:
    key, n_values = ffi.new("kvs_gguf_key *"), 0
    for i in range(lib.kvs_gguf_n_keys(file)):
        lib.kvs_gguf_key_at(file, i, key)
        n_values += key.count
        if n_values > MAX_VALUES:
            name = string(key.name)
            raise UnsupportedModelError(f"{path}: {name}: more than {MAX_VALUES} values of metadata can't be read", path, name)
        if key.type == lib.KVS_GGUF_ARRAY:
            values = [_value(file, i, j, key.element_type) for j in range(key.count)]
            yield Key(string(key.name), key.type, key.element_type, values)
        else:
            yield Key(string(key.name), key.type, None, _value(file, i, 0, key.type))


def _value(file: Any, i: int, j: int, kind: int) -> Any:
    if kind == lib.KVS_GGUF_STRING:
        length = ffi.new("int64_t *")
        return bytes(ffi.buffer(lib.kvs_gguf_string(file, i, j, length), length[0]))
    if kind in (lib.KVS_GGUF_F32, lib.KVS_GGUF_F64):
        return lib.kvs_gguf_float(file, i, j)
    number = lib.kvs_gguf_int(file, i, j)
    return bool(number) if kind == lib.KVS_GGUF_BOOL else number


def _tensors(path: str, file: Any) -> Iterator[Tensor]:
    t = ffi.new("kvs_gguf_tensor *")
    for i in range(lib.kvs_gguf_n_tensors(file)):
        lib.kvs_gguf_tensor_at(file, i, t)
        name, kind = string(t.name), lib.kvs_type_name(t.type)
        if kind == ffi.NULL:
            raise UnsupportedModelError(f"{path}: {name}: its type, number {t.type} in GGUF, can't be read", path, name)
        shape = tuple(t.dims[d] for d in reversed(range(t.n_dims)))
        yield Tensor(name, string(kind), shape, path, t.offset, t.bytes)
