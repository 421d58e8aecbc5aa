"""Roofs: how fast a device reads, multiplies and adds at best. Measured again and again, because it changes by the minute."""

from __future__ import annotations

import os
from typing import Any

from .._native import check, ffi, lib, new_error
from ..checks import utf8
from ..errors import ClosedError, DeviceError
from ..machine import available_bytes, cache_bytes

KINDS = {
    "read": lib.KVS_ROOF_READ,
    "read_huge": lib.KVS_ROOF_READ_HUGE,
    "f32": lib.KVS_ROOF_F32,
    "int8": lib.KVS_ROOF_INT8,
    "bf16": lib.KVS_ROOF_BF16,
    "amx_int8": lib.KVS_ROOF_AMX_INT8,
    "amx_bf16": lib.KVS_ROOF_AMX_BF16,
    "copy": lib.KVS_ROOF_COPY,
    "f16_mma": lib.KVS_ROOF_F16_MMA,
}
MEMORY = ("read", "read_huge", "copy")
CPU_MEMORY, GPU_MEMORY = MEMORY[:2], MEMORY[::2]
SECONDS, GPU_BYTES = 0.05, 256 << 20


class Roofs:
    """The roofs of device: "cpu", so many threads (0: all that are allowed) of the kernels that KVS_CPU chooses; or "cuda", "cuda:N".
    kinds: those that it has; memory: those of them that are bytes per second.

    nbytes: of the buffer that is read; None: of a CPU four times the last cache, at least 512 MiB; of a GPU 256 MiB, or eight times its
    L2 cache if that is more; at most an eighth of the memory that is free.
    Use as a context manager, or call close(). ValueError for arguments out of range, OutOfMemoryError, DeviceError.
    """

    def __init__(self, threads: int = 0, nbytes: int | None = None, device: str = "cpu") -> None:
        if nbytes is None and device == "cpu":
            nbytes = min(max(4 * cache_bytes(), 512 << 20), max(available_bytes() // 8, 16 << 20))
        err, out = new_error(), ffi.new("kvs_roofs **")
        check(lib.kvs_roofs_open(utf8("device", device), threads, GPU_BYTES if nbytes is None else nbytes, out, err), err)
        self._pointer: Any = out[0]
        self._pid = os.getpid()
        self.memory = CPU_MEMORY if device == "cpu" else GPU_MEMORY
        try:
            self.kinds = (*self.memory, *(kind for kind in KINDS if kind not in MEMORY and self._has(kind)))
        except BaseException:
            self.close()
            raise

    def _has(self, kind: str) -> bool:
        try:
            self.measure(kind, 1e-4)
        except DeviceError:
            return False
        return True

    def measure(self, kind: str, seconds: float = SECONDS) -> float:
        """Bytes per second, or operations (a multiply-add is two), of all threads together. seconds: up to 10.
        KeyError for an unknown kind, DeviceError for a unit that this machine lacks; ClosedError, OutOfMemoryError, ValueError."""
        if self._pointer is None:
            raise ClosedError("the roofs are closed")
        err, out = new_error(), ffi.new("double *")
        check(lib.kvs_roofs_measure(self._pointer, KINDS[kind], seconds, out, err), err)
        return float(out[0])

    def close(self) -> None:
        """May be called again."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None and os.getpid() == self._pid:
            lib.kvs_roofs_free(pointer)

    def __enter__(self) -> Roofs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
