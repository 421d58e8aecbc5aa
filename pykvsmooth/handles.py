"""Owners of native objects: they free them once, after the last user, and say no to use after close, after a fork, or by two at once."""

from __future__ import annotations

import os
import threading
import weakref
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
        self._free = weakref.finalize(self, _free_session, pointer, model, self._pid)
        self._free.atexit = False  # a thread may still be inside at exit; the process takes its memory with it

    @property
    def closed(self) -> bool:
        return not self._free.alive

    def __enter__(self) -> Any:
        _check_process(self._pid, "session")
        if not self._lock.acquire(blocking=False):
            raise BusyError("the session is in use by another thread; make one session per thread, they share the model's weights")
        if self.closed or self._model.closed:
            self._lock.release()
            raise ClosedError("the session is closed" if self.closed else "the session's model is closed")
        return self._pointer

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def close(self) -> None:
        if self.closed or os.getpid() != self._pid:
            return
        if not self._lock.acquire(timeout=CLOSE_SECONDS):
            raise BusyError("the session is in use by another thread and did not stop")
        try:
            self._free()
        finally:
            self._lock.release()
