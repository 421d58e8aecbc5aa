"""Memory of the first GPU, as its driver counts it, or tests/shim in its place: what is free, and a ballast that leaves so much."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest

from pykvsmooth._native import library_path
from pykvsmooth.machine import cuda_text

SHIM = cuda_text().startswith("archs shim")
SHIM_BYTES = 4 << 30  # of its device, unless it is told


@cache
def _driver() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """libcuda, and the context that the library's runtime uses, too. The library itself tells nobody what is free."""
    cuda, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
    for code in (
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
    ):
        assert code == 0, f"error {code} of the CUDA driver"
    return cuda, context


def _ask(name: str, *args: object) -> int:
    cuda, context = _driver()
    assert cuda.cuCtxPushCurrent_v2(context) == 0
    code: int = getattr(cuda, name)(*args)
    assert cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())) == 0
    return code


def used_bytes() -> int:
    """On a GPU by everybody; over the shim by this process."""
    if SHIM:
        count = ctypes.CDLL(str(library_path)).kvs_shim_counted
        count.restype, count.argtypes = ctypes.c_longlong, [ctypes.c_char_p]
        return int(count(b"bytes"))
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert _ask("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total)) == 0
    return total.value - free.value


def free_bytes() -> int:
    if SHIM:
        return int(os.environ.get("KVS_SHIM_MEMORY", SHIM_BYTES)) - used_bytes()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert _ask("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total)) == 0
    return free.value


@contextmanager
def ballast(leave: int) -> Iterator[None]:
    """So many bytes of the GPU are free, to within 2 MiB."""
    if SHIM:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KVS_SHIM_MEMORY", str(used_bytes() + leave))
            yield
        return
    block = ctypes.c_uint64()
    code = _ask("cuMemAlloc_v2", ctypes.byref(block), ctypes.c_size_t(max(free_bytes() - leave, 1)))
    if code:
        pytest.skip(f"no ballast: error {code} of the CUDA driver")
    try:
        yield
    finally:
        assert _ask("cuMemFree_v2", block) == 0
