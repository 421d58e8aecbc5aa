"""Opening and loading files through the C interface, for the loader tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf_write as gw
import pytest
from gguf_write import File

from pykvsmooth._native import ffi, lib


class Failure(Exception):
    def __init__(self, code: int, err: Any) -> None:
        self.code = code
        self.path, self.what, self.message = (ffi.string(x).decode() for x in (err.path, err.what, err.message))
        self.offset = err.offset
        super().__init__(self.message)


def new_error() -> Any:
    return ffi.new("kvs_error *", {"struct_size": ffi.sizeof("kvs_error")})


def open_gguf(path: Path | str) -> Any:
    out, err = ffi.new("kvs_gguf **"), new_error()
    code = lib.kvs_gguf_open(os.fsencode(path), out, err)
    if code:
        assert out[0] == ffi.NULL
        raise Failure(code, err)
    return ffi.gc(out[0], lib.kvs_gguf_free)


def load(path: Path | str, mmproj: Path | str | None = None) -> Any:
    text, image = ffi.new("char[]", os.fsencode(path)), ffi.new("char[]", os.fsencode(mmproj)) if mmproj else ffi.NULL
    params = ffi.new("kvs_model_params *", {"struct_size": ffi.sizeof("kvs_model_params"), "threads": 1})
    params.text_path, params.mmproj_path = text, image
    out, err = ffi.new("kvs_model **"), new_error()
    code = lib.kvs_model_load(params, out, err)
    if code:
        assert out[0] == ffi.NULL
        raise Failure(code, err)
    return ffi.gc(out[0], lib.kvs_model_free)


def info(model: Any) -> Any:
    out = ffi.new("kvs_model_info *", {"struct_size": ffi.sizeof("kvs_model_info")})
    lib.kvs_model_get_info(model, out)
    return out


def refused(call: Any, *args: Any, code: int, match: str, what: str | None = None, offset: int | None = None) -> Failure:
    """The call fails with this code, and the message holds the file, what is wrong and match."""
    with pytest.raises(Failure) as caught:
        call(*args)
    failure = caught.value
    assert failure.code == code, failure.message
    assert match in failure.message, failure.message
    assert failure.path and failure.path[-20:] in failure.message
    if what is not None:
        assert failure.what == what and what in failure.message, failure.message
    if offset is not None:
        assert failure.offset == offset, (failure.offset, failure.message)
    assert all(32 <= ord(c) < 127 for c in failure.message)
    return failure


def refused_text(tmp_path: Path, f: File, **expected: Any) -> Failure:
    return refused(load, f.write(tmp_path / "text.gguf"), **expected)


def refused_pair(tmp_path: Path, f: File, text: File | None = None, **expected: Any) -> Failure:
    return refused(load, (text or gw.text()).write(tmp_path / "text.gguf"), f.write(tmp_path / "mmproj.gguf"), **expected)


def loaded(tmp_path: Path, f: File, mmproj: File | None = None) -> Any:
    return info(load(f.write(tmp_path / "text.gguf"), mmproj.write(tmp_path / "mmproj.gguf") if mmproj else None))


def replace(f: File, key: str, kind: int, value: Any) -> File:
    f.keys[key] = (kind, value)
    return f
