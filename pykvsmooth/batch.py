"""Many requests at once: each has a session of its own, and all that are live draw their ids together, and take their step together in one
pass over the weights."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ._native import Flag
from .checks import choice, integer
from .errors import BusyError, CancelledError, ClosedError, NumericError
from .generation import Generation, sample
from .handles import CLOSE_SECONDS, refuse_pickle
from .options import AnswerOptions, Options, RequestOptions, refuse_unknown
from .prompt import MODES
from .session import Session, step
from .stats import Result, Stats, Token

if TYPE_CHECKING:
    from .model import Model

T = TypeVar("T")
Item: TypeAlias = "tuple[int, Token | Result | Exception]"
MAX_PARALLEL = 256


class Batch:
    """An iterator of (index, Token) and, at the end of each request, (index, Result). Requests enter as others finish; at most parallel
    sessions exist. Leaving the loop and close() end all of them and free the sessions."""

    def __init__(
        self,
        model: Model,
        requests: Iterable[Any],
        *,
        n_ctx: int,
        kv_type: str,
        policy: Any,
        parallel: int,
        on_error: str,
        options: RequestOptions,
    ) -> None:
        if on_error not in ("raise", "yield"):
            raise ValueError(f'on_error must be "raise" or "yield", not {on_error!r}')
        if isinstance(requests, (str, bytes, dict)):
            raise TypeError("requests must be a list of prompts or of dicts, not one of them")
        self._model = model
        self._flag = Flag()
        self._make = {"n_ctx": n_ctx, "kv_type": kv_type, "policy": policy}
        self._parallel = integer("parallel", parallel, 1, MAX_PARALLEL)
        self._yield_errors = on_error == "yield"
        self._options = _check_defaults(options)
        self._queue = enumerate(iter(requests))
        self._idle: list[Session] = [Session(model, **self._make)]  # the first one now, so that bad arguments are known at once
        self._live: dict[int, Generation] = {}
        self._ready: deque[Item] = deque()
        self._over = False
        self._lock = threading.RLock()  # reentrant: a signal handler, or the generator that gives the requests, may call close()
        self._inside = False  # is a thread in _next()?

    def __iter__(self) -> Iterator[Item]:
        try:
            while (item := self._next()) is not None:
                yield item
        finally:
            self.close()

    def __next__(self) -> Item:
        item = self._next()
        if item is None:
            raise StopIteration
        return item

    def cancel(self) -> None:
        """Ends all answers at the next occasion. Reading on gives a result with finish_reason "cancelled" for each of them, and for each
        request that has not begun; where requests never end, use close(). From any thread."""
        self._flag.set()

    def close(self) -> None:
        """Ends all answers and frees their sessions; nothing more comes. From any thread; may be called again."""
        self._over = True
        self.cancel()
        if not self._lock.acquire(timeout=CLOSE_SECONDS):
            raise BusyError(f"another thread has been in this batch for {CLOSE_SECONDS:g} s")
        try:
            if not self._inside:  # else it is this thread, below on the stack, and frees them on its way out
                self._free()
        finally:
            self._lock.release()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        refuse_pickle(self)

    def __repr__(self) -> str:
        return f"<pykvsmooth.Batch {len(self._live)} running>"

    # ---- inside: the lock is held ----

    def _next(self) -> Item | None:
        """None at the end."""
        with self._lock:
            self._inside = True
            try:
                while not self._ready and not self._over:
                    self._advance()
                if self._over:
                    return None
                index, item = self._ready.popleft()
                if isinstance(item, Exception) and not self._yield_errors:
                    raise item
                return index, item
            except BaseException:
                self._over = True
                raise
            finally:
                self._inside = False
                if self._over:
                    self._free()

    def _free(self) -> None:
        sessions = [*self._idle, *(generation.session for generation in self._live.values())]
        self._ready.clear()
        self._idle.clear()
        self._live.clear()
        for session in sessions:
            session.close()

    def _advance(self) -> None:
        """One thing that has to be done next; items may come of it."""
        if self._flag:
            self._cancel_next()
            return
        self._enter()
        if self._ready:
            return
        if self._live:
            self._step()
        elif not self._flag:
            self._over = True

    def _cancel_next(self) -> None:
        for index in list(self._live):
            self._leave(index)
        if self._ready:
            return
        drawn = next(self._queue, None)
        if drawn is None:
            self._over = True
        else:
            self._ready.append((drawn[0], self._cancelled()))

    def _cancelled(self) -> Result:
        """Of a request that never began."""
        return Result("", [], "cancelled", Stats(load_s=self._model.load_s, device=self._model.device, finish_reason="cancelled"))

    def _enter(self) -> None:
        """Starts requests while there is room."""
        while len(self._live) < self._parallel and not self._ready and not self._flag:
            drawn = next(self._queue, None)
            if drawn is None:
                return
            try:
                self._begin(*drawn)
            except Exception as error:
                self._fail(drawn[0], error)

    def _begin(self, index: int, request: Any) -> None:
        if not self._idle:
            self._idle.append(Session(self._model, **self._make))
        session = self._idle[-1]
        generation = session.generate(**self._arguments(request))._generation
        generation.flag = self._flag
        self._live[index] = generation
        self._idle.pop()
        session._active = weakref.ref(generation)
        with session._handle.use(self._flag) as pointer:
            generation.start(pointer)

    def _arguments(self, request: Any) -> dict[str, Any]:
        if isinstance(request, str):
            request = {"prompt": request}
        if not isinstance(request, dict):
            raise TypeError(f"a request must be a prompt or a dict of arguments of generate(), not {type(request).__name__}")
        given = {**self._options, **request}
        if "prompt" not in given:
            raise TypeError("a request needs a prompt")
        return given

    def _step(self) -> None:
        """One token for each that is live."""
        drawn = self._sample([index for index, generation in self._live.items() if generation.goes_on()])
        for index in [index for index in self._live if drawn.get(index) is None]:
            self._leave(index)
        ids = {index: id for index, id in drawn.items() if id is not None}
        try:
            self._step_together(ids)
        except Exception as error:
            if isinstance(error, NumericError) and len(ids) > 1:
                self._step_alone(ids)
                return
            for index in ids:
                self._fail(index, error)

    def _sample(self, indices: list[int]) -> dict[int, int | None]:
        """The next ids, drawn at once; None at an end. One's error has changed nothing for the others: each once more by itself."""
        if not indices:
            return {}
        try:
            ids = self._together(indices, lambda generations, pointers: sample(generations, pointers, self._flag))
        except Exception as error:
            if len(indices) == 1:
                self._fail(indices[0], error)
                return {}
            return {index: id for one in indices for index, id in self._sample([one]).items()}
        return dict(zip(indices, ids, strict=True))

    def _together(self, indices: Iterable[int], act: Callable[[list[Generation], list[Any]], T]) -> T:
        """Holds the handles of these sessions, for native work only."""
        generations, pointers = [self._live[index] for index in indices], []
        with ExitStack() as held:
            for generation in generations:  # no comprehension: a handle belongs to the function that took it
                pointers.append(held.enter_context(generation.session._handle.use(self._flag)))
            return act(generations, pointers)

    def _step_alone(self, ids: dict[int, int]) -> None:
        """One's numbers have ended the joint step, which has changed nothing: whose were they?"""
        for index, id in ids.items():
            try:
                self._step_together({index: id})
            except Exception as error:
                self._fail(index, error)

    def _step_together(self, ids: dict[int, int]) -> None:
        if not ids:
            return

        def act(generations: list[Generation], pointers: list[Any]) -> None:
            begin = time.perf_counter()
            step(pointers, list(ids.values()), self._flag)
            seconds = time.perf_counter() - begin
            for index, generation, pointer in zip(ids, generations, pointers, strict=True):
                self._ready.append((index, generation.after_step(pointer, seconds)))

        self._together(ids, act)

    def _leave(self, index: int) -> None:
        """The end of an answer: text that was held back, and the result."""
        generation = self._live.pop(index)
        generation._end("cancelled")  # unless it has ended otherwise
        last = generation.flush()
        if last is not None:
            self._ready.append((index, last))
        self._ready.append((index, generation.result()))
        self._idle.append(generation.session)

    def _fail(self, index: int, error: Exception) -> None:
        """The end of a request by an error. Its session goes: nobody knows what state it is in."""
        generation = self._live.pop(index, None)
        if generation is not None:
            generation._end("cancelled")
            generation.session.close()
        if not (self._flag and isinstance(error, (CancelledError, ClosedError))):
            self._ready.append((index, error))
        else:
            self._ready.append((index, generation.result() if generation is not None else self._cancelled()))


def _check_defaults(given: RequestOptions) -> dict[str, Any]:
    """The **options of Model.generate_batch, as far as they can be checked without a request."""
    refuse_unknown("generate_batch", given, RequestOptions.__annotations__)
    choice("mode", given.get("mode", "pad"), MODES)
    defaults: dict[str, Any] = {**given}
    options = [name for name in defaults if name in AnswerOptions.__annotations__]
    checked = Options(**{name: defaults[name] for name in options})
    return {**defaults, **{name: getattr(checked, name) for name in options}}
