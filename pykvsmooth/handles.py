"""Owners of native objects: they free them once, after the last user, and say no to use after close, after a fork, or by two at once."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from types import FrameType
from typing import Any, NoReturn

from ._native import lib
from .errors import BusyError, ClosedError, KVSmoothError

CLOSE_SECONDS = 10.0  # how long close() waits for a cancelled call of another thread


def refuse_pickle(thing: object) -> NoReturn:
    raise TypeError(f"a {type(thing).__name__} can't be pickled or copied: it owns native memory; make one in each process from the files")


def _check_process(pid: int, what: str) -> None:
    if os.getpid() != pid:
        raise KVSmoothError(
            f"this {what} was made before a fork: its threads do not exist in this process. Load the model in the child "
            '(multiprocessing start method "spawn" or "forkserver")'
        )


class ModelHandle:
    """A kvs_model and how many use it: the Model itself, its sessions, and calls that run. Freed when the last one is gone."""

    def __init__(self, pointer: Any) -> None:
        self.pointer = pointer
        self.closed = False
        self._users = 1
        self._pid = os.getpid()
        self._lock = threading.RLock()  # reentrant: the collector may run a finalizer inside

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
        if last and os.getpid() == self._pid:
            lib.kvs_model_free(self.pointer)

    def close(self) -> None:
        with self._lock:
            if self.closed:
                return
            self.closed = True
        self.release()

    def __enter__(self) -> Any:
        return self.retain()

    def __exit__(self, *_: object) -> None:
        self.release()


def _free_session(pointer: Any, model: ModelHandle, pid: int) -> None:
    if os.getpid() == pid:
        lib.kvs_session_free(pointer)
        model.release()


class SessionHandle:
    """A kvs_session. As a context manager it gives the pointer to one thread at a time: BusyError for the second.

    model must have been retained for it; the reference is given back when the session is freed.
    """

    def __init__(self, pointer: Any, model: ModelHandle) -> None:
        self._pointer = pointer
        self._model = model
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._owner: tuple[int, FrameType] | None = None  # the thread and the function that use the session now
        self._free = weakref.finalize(self, _free_session, pointer, model, self._pid)
        self._free.atexit = False  # a thread may still be inside at exit; the process takes its memory with it

    @property
    def closed(self) -> bool:
        return not self._free.alive

    def __enter__(self) -> Any:
        _check_process(self._pid, "session")
        self._take(sys._getframe(1))
        if self.closed or self._model.closed:
            self._owner = None
            raise ClosedError("the session is closed" if self.closed else "the session's model is closed")
        return self._pointer

    def __exit__(self, *_: object) -> None:
        self._owner = None

    def _take(self, frame: FrameType) -> None:
        with self._lock:
            if self._owner is not None and not self._left_behind(*self._owner):
                raise BusyError("the session is in use by another thread; make one session per thread, they share the model's weights")
            self._owner = (threading.get_ident(), frame)

    @staticmethod
    def _left_behind(thread: int, owner: FrameType) -> bool:
        """A signal's exception may strike between the steps of __enter__ and __exit__. Then the function that had taken the session has
        ended without giving it back: it is this thread's, and no longer on its stack."""
        if thread != threading.get_ident():
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not owner:
            frame = frame.f_back
        return frame is None

    def close(self) -> None:
        """Waits for a call of another thread, which the caller has cancelled."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while not self.closed and os.getpid() == self._pid:
            try:
                self._take(sys._getframe())
            except BusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.002)
                continue
            try:
                self._free()
            finally:
                self._owner = None
