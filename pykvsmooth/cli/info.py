"""pykvsmooth info: one line per fact that an answer to "why is it slow, why does it not run" needs."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from .escape import one_line
from .terminal import Ui, bytes_text

EXTRAS = {"rich": "cli", "jinja2": "chat", "gguf": "convert", "matplotlib": "plot", "onnxruntime": "depth"}  # and what brings them


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info", help="this machine and this build", description="Version, CPU and kernels, device, memory, packages."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, ui: Ui) -> int:
    for name, fact in _facts():
        ui.put(f"{name}: {one_line(fact)}\n")
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    import cffi
    import numpy
    import PIL

    from .. import __version__
    from .._native import lib, library_path
    from ..machine import cpu_text, cuda_text

    yield "pykvsmooth", f"{__version__} (ABI {lib.kvs_abi_version()})"
    yield "library", f"{library_path} ({bytes_text(os.path.getsize(library_path))})"
    yield "cpu", cpu_text()
    yield "threads", _threads()
    yield "cuda", cuda_text()
    yield "memory", _memory()
    for variable in ("PYKVSMOOTH_MODEL", "PYKVSMOOTH_MMPROJ", "PYKVSMOOTH_DEPTH_MODEL"):
        yield variable, _file(os.environ.get(variable))
    yield "python", f"{platform.python_version()} ({platform.python_implementation()}, {platform.platform()})"
    yield "packages", f"numpy {numpy.__version__}, pillow {PIL.__version__}, cffi {cffi.__version__}"
    yield "optional packages", ", ".join(_optional(name, extra) for name, extra in EXTRAS.items())


def _optional(name: str, extra: str) -> str:
    """Not imported: some of them take seconds."""
    if find_spec(name) is None:
        return f"{name} not installed (pip install 'pykvsmooth[{extra}]')"
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:  # of another distribution, such as onnxruntime-gpu
        return f"{name} of unknown version"


def _threads() -> str:
    """What affinity and the cgroup's quota leave of the processors."""
    total = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    quota = _quota()
    limits = [f"affinity {allowed}"] if allowed < total else []
    if quota is not None:
        limits.append(f"cgroup quota {quota:.3g}")
    n = max(1, min(allowed, int(quota) if quota is not None else allowed))
    return f"{n} of {total} processors{' (' + ', '.join(limits) + ')' if limits else ''}"


def _quota() -> float | None:
    """Processors that cgroup v2 or v1 grants, None for all."""
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        with (
            open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", encoding="ascii") as a,
            open("/sys/fs/cgroup/cpu/cpu.cfs_period_us", encoding="ascii") as b,
        ):
            limit, period_us = int(a.read()), int(b.read())
        return limit / period_us if limit > 0 else None
    except (OSError, ValueError):
        return None


def _memory() -> str:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file if line.startswith(("MemTotal", "MemAvailable"))}
        return f"{bytes_text(sizes['MemTotal'])}, {bytes_text(sizes['MemAvailable'])} available"
    except (OSError, KeyError, ValueError, IndexError):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return bytes_text(pages)


def _file(path: str | None) -> str:
    if not path:
        return "not set"
    return f"{path} ({bytes_text(os.path.getsize(path))})" if os.path.isfile(path) else f"{path} (there is no such file)"
