"""The tensors of a checkpoint: safetensors, one file or several with an index, read one tensor at a time.

The safetensors package gives BF16 to NumPy only by way of torch, so the format's header (eight bytes of length, then JSON) is read
here; what the format demands of it is checked before a byte of a tensor is read.
"""

from __future__ import annotations

import errno
import math
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from ..checks import shown
from ..errors import ModelFileNotFoundError
from .folder import LFS, Folder, broken, is_lfs_pointer, parse_json, unsupported

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_HEADER = 100 << 20  # as in the safetensors package
MAX_DIMS = 8
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}
READABLE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. shape as NumPy has it; type in the words of safetensors; offset in bytes from the file's beginning."""

    folder: Folder
    file: str
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int

    @property
    def path(self) -> str:
        return self.folder.path_of(self.file)

    def read(self) -> NDArray[np.float32]:
        """The values as float32. ModelFormatError: the file is shorter than it was, or a value is no finite number."""
        if self.type not in READABLE:
            raise unsupported(self.path, self.name, f"has the type {self.type}; F32, F16 and BF16 can be converted")
        count = math.prod(self.shape)
        with self.folder.open(self.file) as file:
            file.seek(self.offset)
            stored = np.fromfile(file, READABLE[self.type], count)
        if len(stored) != count:
            raise broken(self.path, self.name, "the file ends within this tensor")
        values = (stored.astype("<u4") << 16).view("<f4") if self.type == "BF16" else stored.astype("<f4", copy=False)
        finite = np.isfinite(values)
        if not finite.all():
            at = int(finite.argmin())
            raise broken(self.path, self.name, f"its value {at} of {count} is {values[at]}", self.offset + at * stored.itemsize)
        return values.reshape(self.shape)


def tensors_of(folder: Folder) -> dict[str, Tensor]:
    """All tensors of a folder's checkpoint by their names.

    ModelFormatError, ModelFileError, ModelFileNotFoundError (no safetensors, a shard is missing), UnsupportedModelError (pickles only).
    """
    if folder.find("model.safetensors"):
        return _read_header(folder, "model.safetensors")
    name = "model.safetensors.index.json"
    index = folder.json(name)
    if index is None:
        raise _no_tensors(folder)
    where = index.section("weight_map")
    if where is None or not all(isinstance(file, str) for file in where.values.values()):
        raise index.broken("weight_map", "must be an object that gives a file for each tensor")
    found: dict[str, Tensor] = {}
    for file in sorted(set(where.values.values())):
        for tensor in _read_header(folder, file).values():
            if tensor.name in found:
                raise broken(tensor.path, tensor.name, f"this tensor is in {found[tensor.name].file}, too")
            found[tensor.name] = tensor
    for tensor_name, file in where.values.items():
        if tensor_name not in found or found[tensor_name].file != file:
            raise broken(folder.path_of(file), tensor_name, f"this tensor is missing: {name} says that it is in this file")
    return found


def _no_tensors(folder: Folder) -> Exception:
    pickles = (name for ending in (".bin", ".pth") for name in folder.names(ending) if name.startswith(("pytorch_model", "consolidated")))
    pickle = next(pickles, None)
    if pickle is None:
        reason = "there is no model.safetensors and no model.safetensors.index.json in it"
        return ModelFileNotFoundError(f"{folder.path}: {reason}", folder.path, errno.ENOENT)
    reason = (
        "the weights are pickles, which may run any program when they are opened and are not opened here; "
        "get the checkpoint as safetensors, or load and save it once with transformers: save_pretrained(NEW_FOLDER)"
    )
    return unsupported(folder.path, pickle, reason)


def _read_header(folder: Folder, name: str) -> dict[str, Tensor]:
    path = folder.path_of(name)
    with folder.open(name) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        if is_lfs_pointer(start):
            raise broken(path, "", LFS)
        length = struct.unpack_from("<Q", start)[0] if len(start) >= 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise broken(path, "", f"is no safetensors file, or only the beginning of one: a header of {length} bytes in {size}", 0)
        file.seek(8)
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    begin = 8 + length
    ends = [(*_data_offsets(path, tensor, entry), tensor) for tensor, entry in header.items()]
    at = 0
    for first, last, tensor in sorted(ends):
        if first != at:
            raise broken(path, tensor, f"begins at {first} of the data, the tensor before it ends at {at}")
        at = last
    if begin + at != size:
        raise broken(path, "", f"holds {size - begin} bytes of data, its header promises {at}: was it written or fetched to its end?")
    return {
        tensor: Tensor(folder, name, tensor, entry["dtype"], tuple(entry["shape"]), begin + entry["data_offsets"][0])
        for tensor, entry in header.items()
    }


def _data_offsets(path: str, tensor: str, entry: Any) -> tuple[int, int]:
    """Begin and end of a tensor within the data, which its type and shape confirm."""
    if not isinstance(entry, dict):
        raise broken(path, tensor, "its entry in the header must be an object")
    kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(kind, str) or kind not in BITS:
        raise broken(path, tensor, f"dtype: {shown(kind)} is no type that safetensors knows")
    if not _is_sizes(shape) or len(shape) > MAX_DIMS:
        raise broken(path, tensor, f"shape: must be a list of up to {MAX_DIMS} sizes, not {shown(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise broken(path, tensor, f"data_offsets: must be the first byte and the one after the last, not {shown(offsets)}")
    bits = math.prod(shape) * BITS[kind]
    if (offsets[1] - offsets[0]) * 8 != bits:
        raise broken(path, tensor, f"has {offsets[1] - offsets[0]} bytes, but its type and shape ask for {shown(bits // 8)}")
    return offsets[0], offsets[1]


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 63 for x in value)
