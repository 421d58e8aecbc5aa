"""libkvs through cffi (ABI mode): finds the library, checks that it fits, turns status codes into exceptions.

The declarations are the text between the [cffi] marks of kvs.h. A wheel carries them parsed (_kvs_cffi.py, written by the build);
a source checkout parses native/kvs.h. Every struct size and the ABI version are compared at import, so that a library of
another version is an ImportError and never a crash.
"""

from __future__ import annotations

import importlib
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from . import errors
from ._cdef import declarations

__all__ = ["Flag", "check", "ffi", "lib", "library_path", "native_call", "new_error", "string"]

_HERE = Path(__file__).resolve().parent
T = TypeVar("T")


def _make_ffi() -> Any:
    try:
        return importlib.import_module("._kvs_cffi", __package__).ffi  # so written, because type checkers find it in wheels only
    except ImportError:
        pass
    import cffi

    headers = [folder / "kvs.h" for folder in (_HERE, _HERE.parent / "native")]
    header = next((path for path in headers if path.is_file()), None)
    if header is None:
        raise ImportError(f"pykvsmooth: kvs.h is at none of {', '.join(map(str, headers))}; install the package again")
    ffi = cffi.FFI()
    ffi.cdef(declarations(header))
    return ffi


def _find_library() -> Path:
    asked = os.environ.get("KVS_LIBRARY")
    if asked:
        if not Path(asked).is_file():
            raise ImportError(f"pykvsmooth: KVS_LIBRARY={asked} is not a file; point it at libkvs.so or unset it")
        return Path(asked).absolute()
    from importlib.resources import files

    names = ("libkvs.so", "libkvs.dylib")
    for name in names:
        beside = files(__package__).joinpath(name)
        if beside.is_file():
            return Path(str(beside))
    build = _HERE.parent / "build"
    found = [path for name in names for pattern in (name, f"*/{name}") for path in build.glob(pattern)]
    if not found:
        raise ImportError(
            f"pykvsmooth: libkvs.so is neither beside {_HERE} nor below {build}. Build it (cmake -B build/release && "
            "cmake --build build/release), or set KVS_LIBRARY to its path"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def _load() -> tuple[Any, Any, Path]:
    ffi = _make_ffi()
    path = _find_library()
    try:
        lib = ffi.dlopen(str(path))
        abi = lib.kvs_abi_version()
    except (OSError, AttributeError) as error:
        raise ImportError(f"pykvsmooth: {path} does not load as libkvs: {error}") from error
    if abi != lib.KVS_ABI_VERSION:
        raise ImportError(f"pykvsmooth: {path} has ABI version {abi}, this package needs {lib.KVS_ABI_VERSION}; rebuild or reinstall")
    for name in ffi.list_types()[0]:
        if ffi.typeof(name).kind != "struct":
            continue
        try:
            ours = ffi.sizeof(name)
        except (ValueError, getattr(ffi, "error", ValueError)):  # opaque: only the library knows it
            continue
        theirs = lib.kvs_struct_size(name.encode())
        if theirs != ours:
            raise ImportError(f"pykvsmooth: struct {name} has {theirs} bytes in {path} and {ours} in kvs.h; rebuild or reinstall")
    return ffi, lib, path


ffi, lib, library_path = _load()


def string(chars: Any) -> str:
    """A zero-terminated C string or char array as text; file names may hold bytes that are not UTF-8."""
    return str(ffi.string(chars), "utf-8", "surrogateescape")


def new_error() -> Any:
    err = ffi.new("kvs_error *")
    err.struct_size = ffi.sizeof("kvs_error")
    return err


def check(code: int, err: Any) -> None:
    """Raises the exception for a status; returns for KVS_OK."""
    if code:
        raise make_exception(code, err)


def make_exception(code: int, err: Any) -> Exception:
    message = string(err.message) or f"libkvs failed with status {code}"
    path, what = string(err.path), string(err.what)
    offset = err.offset if err.offset >= 0 else None
    needed, available = int(err.needed), int(err.available)
    if code == lib.KVS_E_FORMAT:
        return errors.ModelFormatError(message, path, what, offset)
    if code == lib.KVS_E_IO:
        kind = errors.ModelFileNotFoundError if offset == 2 else errors.ModelFileError
        return kind(message, path, offset)
    if code in (lib.KVS_E_UNSUPPORTED, lib.KVS_E_MISMATCH):
        return (errors.UnsupportedModelError if code == lib.KVS_E_UNSUPPORTED else errors.ModelMismatchError)(message, path, what)
    if code == lib.KVS_E_CONTEXT:
        return errors.ContextOverflowError(message, needed, available)
    if code == lib.KVS_E_MEMORY:
        return errors.OutOfMemoryError(message, needed, available)
    if code == lib.KVS_E_SESSION_FILE:
        return errors.SessionFileError(message, path, what, offset)
    if code == lib.KVS_E_LIMIT:
        return (errors.MemoryLimitError if what == "cache_bytes" else errors.LimitError)(message, what, needed, available)
    if code == lib.KVS_E_NUMERIC:
        return errors.NumericError(message, what)
    simple = {
        lib.KVS_E_DEVICE: errors.DeviceError,
        lib.KVS_E_BUSY: errors.BusyError,
        lib.KVS_E_CANCELLED: errors.CancelledError,
        lib.KVS_E_POLICY: errors.PolicyError,
        lib.KVS_E_ARGUMENT: ValueError,
    }
    return simple.get(code, errors.KVSmoothError)(message)


class Flag:
    """A cancel flag that native code polls. set() is safe from any thread and from a signal handler."""

    __slots__ = ("pointer",)

    def __init__(self) -> None:
        self.pointer = ffi.new("int32_t *", 0)

    def set(self, value: int = 1) -> None:
        lib.kvs_flag_set(self.pointer, value)

    def __bool__(self) -> bool:
        return bool(self.pointer[0])


# ---- interruptible calls ----
# cffi gives the GIL up during a call, but Python runs signal handlers in the main thread only, and that sits in C. So the main
# thread lets a worker make the call and waits on a lock, which a signal interrupts; then it sets the flag and waits for the end.


class _Job:
    __slots__ = ("call", "claim", "done", "error", "finished", "result")

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.claim = threading.Lock()  # taken by the worker that runs it, or by the main thread that gives it up
        self.done = threading.Lock()
        self.done.acquire()
        self.finished = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        if self.claim.acquire(blocking=False):
            try:
                self.result = self.call()
            except BaseException as error:
                self.error = error
        self.finished = True
        self.done.release()

    def wait(self, poll: Callable[[], None] | None = None) -> None:
        while not self.finished:
            self.done.acquire(timeout=0.02)  # a timeout, because not every platform lets a signal end the wait
            if poll is not None:
                poll()

    def give_up(self, flag: Flag) -> None:
        """Ends the job for good, however often the user presses Ctrl-C meanwhile."""
        while True:
            try:
                flag.set()
                if self.finished or self.claim.acquire(blocking=False):
                    return
                self.wait()
                return
            except BaseException:
                continue


class _Worker:
    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        threading.Thread(target=self._loop, name="pykvsmooth", daemon=True).start()

    def _loop(self) -> None:
        while True:
            self.jobs.get().run()


_worker: _Worker | None = None


def _forget_worker() -> None:
    global _worker
    _worker = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_worker)


def _start(job: _Job, own_thread: bool) -> None:
    """Where no thread can be started the call is made here: it can't be interrupted then, but it works."""
    global _worker
    try:
        if own_thread:
            threading.Thread(target=job.run, name="pykvsmooth", daemon=True).start()
            return
        if _worker is None:
            _worker = _Worker()
    except RuntimeError:
        job.run()
    else:
        _worker.jobs.put(job)


def native_call(call: Callable[[], T], flag: Flag, poll: Callable[[], None] | None = None) -> T:
    """Runs a long native call that polls flag. In the main thread Ctrl-C (any exception of a signal handler) sets the flag,
    waits until the call has ended, and goes on as usual; in other threads it is a plain call.

    poll, if given, is called in the calling thread every 20 ms and at the end; an exception of it ends the call, too.
    """
    if poll is None and threading.current_thread() is not threading.main_thread():
        return call()
    job = _Job(call)
    try:
        _start(job, own_thread=poll is not None)
        job.wait(poll)
    except BaseException:
        job.give_up(flag)
        raise
    if job.error is not None:
        raise job.error
    return cast("T", job.result)
