"""What figures depend on: the machine, and what else runs on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._native import ffi, lib, string


def facts() -> dict[str, Any]:
    """cpu (name, features, kernels and why they), cuda (as `info` has it), cores, cores_allowed, memory_bytes, available_bytes,
    cache_bytes (the last level), kernel, huge_pages (the kernel's mode), load (processes that ran in the last minute, mean), KVS_CPU."""
    return {
        "cpu": cpu_text(),
        "cuda": cuda_text(),
        "cores": os.cpu_count() or 1,
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "available_bytes": available_bytes(),
        "cache_bytes": cache_bytes(),
        "kernel": platform.platform(),
        "huge_pages": _huge_pages(),
        "load": os.getloadavg()[0],
        "KVS_CPU": os.environ.get("KVS_CPU"),
    }


def cpu_text() -> str:
    """NAME; features: ...; kernels: avx2 (why)"""
    return _text(lib.kvs_cpu_info)


def cuda_text() -> str:
    """archs 75 80 ...; available: ..., or unavailable: reason"""
    return _text(lib.kvs_cuda_info)


def _text(fill: Callable[[Any, int], int]) -> str:
    size = fill(ffi.NULL, 0) + 1
    text = ffi.new("char[]", max(size, 1))
    fill(text, size)
    return string(text)


def available_bytes() -> int:
    """Memory that can be had without swapping; all of it where that is not known."""
    return _status_bytes("/proc/meminfo", "MemAvailable") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(pid: int | str = "self") -> int:
    """The largest resident memory of a process so far; 0 where that is not known. ru_maxrss would not do: it begins with that of
    the process that started this one."""
    return _status_bytes(f"/proc/{pid}/status", "VmHWM")


def cache_bytes() -> int:
    """Of the last level, as one processor sees it; 0 where that is not known."""
    sizes = [_size(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=0)


def _size(path: Path) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    try:
        text = path.read_text().strip()
        return int(text[:-1]) * units[text[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return 0


def _status_bytes(path: str, name: str) -> int:
    try:
        with open(path, encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith(name + ":"))
    except (OSError, ValueError, IndexError, StopIteration):
        return 0


def _huge_pages() -> str:
    """always, madvise or never"""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return text[text.index("[") + 1 : text.index("]")]
    except (OSError, ValueError):
        return "unknown"
