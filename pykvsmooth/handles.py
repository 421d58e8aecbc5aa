"""Owners of native objects: they free them once, after the last user, and say no to use after close, after a fork, or by two at once."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from ._native import Flag, ffi, lib
from .errors import BusyError, CancelledError, ClosedError, KVSmoothError, OutOfMemoryError

CLOSE_SECONDS = 10.0  # how long close() waits for a cancelled call of another thread


def refuse_pickle(thing: object) -> NoReturn:
    raise TypeError(f"a {type(thing).__name__} can't be pickled or copied: it owns native memory; make one in each process from the files")


def _check_process(pid: int, what: str) -> None:
    if os.getpid() != pid:
        raise KVSmoothError(
            f"this {what} was made before a fork: its threads do not exist in this process. Load the model in the child "
            '(multiprocessing start method "spawn" or "forkserver")'
        )


def _free_model(cell: Any, pid: int) -> None:
    pointer, cell[0] = cell[0], ffi.NULL
    if pointer != ffi.NULL and os.getpid() == pid:
        lib.kvs_model_free(pointer)


class ModelHandle:
    """A kvs_model and how many use it: the Model itself, its sessions, and calls that run. Freed when the last one is gone, and at the
    latest when the collector finds that nobody can use it: an exception of a signal may strike anywhere.

    It exists before its model does: cell is where kvs_model_load puts that.
    """

    def __init__(self) -> None:
        self.cell = ffi.new("kvs_model **")
        self.closed = False
        self._users = 1
        self._pid = os.getpid()
        self._lock = threading.RLock()  # reentrant: the collector may run a finalizer inside
        self._free = weakref.finalize(self, _free_model, self.cell, self._pid)
        self._free.atexit = False  # a thread may still be inside at exit; the process takes its memory with it

    @property
    def pointer(self) -> Any:
        return self.cell[0]

    def retain(self) -> Any:
        _check_process(self._pid, "model")
        with self._lock:
            if self.closed:
                raise ClosedError("the model is closed")
            self._users += 1
            return self.pointer

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self._free()

    def close(self) -> None:
        with self._lock:
            if self.closed:
                return
            self.closed = True
        self.release()

    def __enter__(self) -> Any:
        return self.retain()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.release()
        _check_memory(error)


def _free_session(cell: Any, model: ModelHandle, pid: int) -> None:
    pointer, cell[0] = cell[0], ffi.NULL
    if os.getpid() == pid:
        if pointer != ffi.NULL:
            lib.kvs_session_free(pointer)
        model.release()


@dataclass(frozen=True)
class _User:
    """Who is inside a session: the thread, the function, and the flag that ends what it does, if that may take long."""

    thread: int
    frame: FrameType
    flag: Flag | None

    def is_mine(self) -> bool:
        return self.thread == threading.get_ident()

    def is_gone(self) -> bool:
        """A signal's exception may strike between the steps of __enter__ and __exit__. Then the function that had taken the session has
        ended without giving it back: it is this thread's, and no longer on its stack."""
        if not self.is_mine():
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is None


def _check_memory(error: BaseException | None) -> None:
    """Also what NumPy or Python itself could not have is an OutOfMemoryError."""
    if isinstance(error, MemoryError) and not isinstance(error, OutOfMemoryError):
        raise OutOfMemoryError(f"out of memory: {error or 'Python could not have what it asked for'}") from error


class _LongUse:
    """What SessionHandle.use() gives."""

    def __init__(self, handle: SessionHandle, user: _User) -> None:
        self._handle = handle
        self._user = user

    def __enter__(self) -> Any:
        return self._handle._enter(self._user)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._handle._leave()
        if self._handle._closing and isinstance(error, CancelledError):
            raise ClosedError("the session was closed during the call") from error
        _check_memory(error)


class SessionHandle:
    """A kvs_session, for one thread at a time: BusyError for the second. `with handle as pointer` is for short calls, `with
    handle.use(flag) as pointer` for those that flag ends; close() in another thread sets it, and the call is then a ClosedError.

    It exists before its session does: cell is where the native function puts that. ClosedError for a closed model.
    """

    def __init__(self, model: ModelHandle) -> None:
        self.cell = ffi.new("kvs_session **")
        self._model = model
        self._pid = os.getpid()
        self._lock = threading.RLock()  # reentrant: a signal handler may close the session inside
        self._user: _User | None = None
        self._closing = False
        model.retain()
        self._free = weakref.finalize(self, _free_session, self.cell, model, self._pid)
        self._free.atexit = False  # as of the model

    @property
    def closed(self) -> bool:
        return not self._free.alive

    def use(self, flag: Flag) -> _LongUse:
        return _LongUse(self, _User(threading.get_ident(), sys._getframe(1), flag))

    def __enter__(self) -> Any:
        return self._enter(_User(threading.get_ident(), sys._getframe(1), None))

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._leave()
        _check_memory(error)

    def _enter(self, user: _User) -> Any:
        _check_process(self._pid, "session")
        self._take(user)
        if self._closing or self._model.closed:
            self._leave()
            raise ClosedError("the session is closed" if self._closing else "the session's model is closed")
        return self.cell[0]

    def _leave(self) -> None:
        self._user = None
        if self._closing:
            self._free()

    def _take(self, user: _User) -> None:
        with self._lock:
            if self._user is not None and not self._user.is_gone():
                raise BusyError("the session is in use by another thread; make one session per thread, they share the model's weights")
            self._user = user

    def wait(self, flag: Flag) -> None:
        """Until no other thread is inside with flag, which the caller has set."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while (user := self._user) is not None and user.flag is flag and not user.is_mine() and not sys.is_finalizing():
            _pause(deadline)

    def close(self) -> None:
        """Ends the call of another thread and waits for it. In a signal handler it can't wait for the call below it: that one frees the
        session at its end."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while not self.closed and os.getpid() == self._pid:
            self._closing = True
            user = self._user
            if user is not None and user.flag is not None:
                user.flag.set()
            try:
                self._take(_User(threading.get_ident(), sys._getframe(), None))
            except BusyError:
                if user is not None and user.is_mine():
                    return
                _pause(deadline)
            else:
                self._leave()


def _pause(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise BusyError(f"a call of another thread was cancelled, but has not ended for {CLOSE_SECONDS:g} s")
    time.sleep(0.002)
