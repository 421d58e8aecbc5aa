"""Instructions that this process has executed, as the processor counts them, where the kernel and the machine let us ask."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

_CALLS = {"x86_64": 298, "aarch64": 241}  # perf_event_open
_HARDWARE, _INSTRUCTIONS = 0, 1
_INHERIT, _EXCLUDE_KERNEL, _EXCLUDE_HV = 1 << 1, 1 << 5, 1 << 6


class Instructions:
    """Counts those of the calling thread, and of all threads that are started after this: make it first. why: empty, or why it can't."""

    def __init__(self) -> None:
        self._fd = -1
        self.why = ""
        call = _CALLS.get(platform.machine())
        if sys.platform != "linux" or call is None:
            self.why = f"there is no counter on {platform.system()} {platform.machine()}"
            return
        flags = _INHERIT | _EXCLUDE_KERNEL | _EXCLUDE_HV
        attributes = struct.pack("=IIQQQQQIIQ", _HARDWARE, 64, _INSTRUCTIONS, 0, 0, 0, flags, 0, 0, 0)
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.syscall(call, ctypes.c_char_p(attributes), 0, -1, -1, ctypes.c_ulong(1 << 3))  # this thread, any CPU, close on exec
        if self._fd < 0:
            self.why = f"the kernel gives no counter: {os.strerror(ctypes.get_errno())}"

    def read(self) -> int | None:
        """Instructions so far, those of helpers that wait in a loop among them; None where they can't be counted."""
        if self._fd < 0:
            return None
        return int(struct.unpack("=Q", os.read(self._fd, 8))[0])

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
