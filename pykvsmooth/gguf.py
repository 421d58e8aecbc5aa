"""Model files before they are loaded: which file is meant, its metadata, and the mmproj that belongs to it."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import box
from ._native import check, ffi, lib, new_error, string
from .checks import c_path
from .errors import KVSmoothError, ModelFileNotFoundError, ModelMismatchError, OutOfMemoryError

_log = logging.getLogger("pykvsmooth")

MAX_ARRAY = 1024  # longer arrays (the vocabulary) are left out of metadata


@contextmanager
def open_file(path: str) -> Iterator[Any]:
    """A kvs_gguf for reading. ModelFormatError for what is none, and if the file changes meanwhile."""
    err, out = new_error(), ffi.new("kvs_gguf **")
    check(lib.kvs_gguf_open(c_path("path", path), out, err), err)
    try:
        yield out[0]
        check(lib.kvs_gguf_check(out[0], err), err)
    finally:
        lib.kvs_gguf_free(out[0])


def _value(file: Any, i: int, j: int, kind: int) -> Any:
    if kind == lib.KVS_GGUF_STRING:
        length = ffi.new("int64_t *")
        return ffi.buffer(lib.kvs_gguf_string(file, i, j, length), length[0])[:].decode("utf-8", "replace")
    if kind in (lib.KVS_GGUF_F32, lib.KVS_GGUF_F64):
        return lib.kvs_gguf_float(file, i, j)
    number = lib.kvs_gguf_int(file, i, j)
    return bool(number) if kind == lib.KVS_GGUF_BOOL else number


def keys_of(file: Any, max_array: int = MAX_ARRAY) -> dict[str, Any]:
    """Metadata as Python values; arrays of more than max_array elements and arrays of arrays are left out."""
    found: dict[str, Any] = {}
    key = ffi.new("kvs_gguf_key *")
    for i in range(lib.kvs_gguf_n_keys(file)):
        lib.kvs_gguf_key_at(file, i, key)
        if key.type != lib.KVS_GGUF_ARRAY:
            found[string(key.name)] = _value(file, i, 0, key.type)
        elif key.count <= max_array and key.element_type != lib.KVS_GGUF_ARRAY:
            found[string(key.name)] = [_value(file, i, j, key.element_type) for j in range(key.count)]
    return found


def read_metadata(path: str) -> dict[str, Any]:
    with open_file(path) as file:
        return keys_of(file)


def _of_environment(variable: str) -> str | None:
    """The file that it names. One that is not there is said to come from it: nobody has named it in the call."""
    name = os.environ.get(variable)
    if name and not os.path.exists(name):
        raise ModelFileNotFoundError(f"{name}: no such file; the environment variable {variable} names it", name, errno.ENOENT)
    return name or None


def model_path(path: Any) -> str:
    """The file that is meant. None: the environment variable PYKVSMOOTH_MODEL, else the checkpoint in the box, and a word about it."""
    path = _of_environment("PYKVSMOOTH_MODEL") if path is None else path
    if path is None:
        path = box.text_model()
        if path is None:
            raise ModelFileNotFoundError(
                "no model was named: call Model(path) with a GGUF file, or set the environment variable PYKVSMOOTH_MODEL to one "
                "(and PYKVSMOOTH_MMPROJ to its mmproj); this installation has no checkpoint in the box"
            )
        _log.warning("no model was named: this is the small one in the box, which knows scenes of pictograms and nothing else")
    return os.fsdecode(c_path("path", path))


@dataclass(frozen=True)
class Found:
    path: str | None
    reason: str  # why there is none


def find_mmproj(model: str, metadata: dict[str, Any], mmproj: Any) -> Found:
    """The mmproj that is meant. Several that fit are a ModelMismatchError: nothing is guessed."""
    if mmproj is False:
        return Found(None, "mmproj=False")
    if mmproj is True:
        raise TypeError("mmproj must be a path, None or False")
    if mmproj is None:
        mmproj = _of_environment("PYKVSMOOTH_MMPROJ")
    if mmproj is not None:
        return Found(os.fsdecode(c_path("mmproj", mmproj)), "")
    folder = Path(model).parent
    try:
        names = sorted(p for p in folder.iterdir() if p.name.lower().startswith("mmproj") and p.name.lower().endswith(".gguf"))
    except OSError:
        names = []
    misfits = {str(path): _misfit(path, metadata) for path in names if path != Path(model)}
    fits = [path for path, reason in misfits.items() if not reason]
    if len(fits) > 1:
        raise ModelMismatchError(
            f"{model}: more than one mmproj file beside it fits: {', '.join(Path(p).name for p in fits)}; choose with mmproj=..., "
            "or mmproj=False for text only",
            model,
        )
    if fits:
        return Found(fits[0], "")
    return Found(None, "; ".join(f"{Path(p).name}: {why}" for p, why in misfits.items()) or f"no mmproj*.gguf in {folder}")


def _misfit(path: Path, metadata: dict[str, Any]) -> str:
    """Why this file can't be the model's mmproj; empty if its projector gives rows of the right width."""
    width = metadata.get(f"{metadata.get('general.architecture')}.embedding_length")
    tensor = ffi.new("kvs_gguf_tensor *")
    try:
        with open_file(str(path)) as file:
            for i in range(lib.kvs_gguf_n_tensors(file)):
                lib.kvs_gguf_tensor_at(file, i, tensor)
                if string(tensor.name) == "mm.2.weight":
                    return "" if tensor.dims[1] == width else f"made for models of width {tensor.dims[1]}, this one has {width}"
    except OutOfMemoryError:
        raise
    except KVSmoothError as error:
        return str(error)
    return "no LLaVA projector in it (tensor mm.2.weight)"
