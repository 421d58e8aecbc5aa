"""Many requests at once: each has a session of its own, and all that are live take their step together in one pass over the weights."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from . import errors
from ._native import Flag
from .handles import refuse_pickle
from .options import integer
from .session import Session, step
from .stats import Result, Token

if TYPE_CHECKING:
    from .generation import Generation
    from .model import Model

MAX_PARALLEL = 256


class Batch:
    """An iterator of (index, Token) and, at the end of each request, (index, Result). Requests enter as others finish; at most parallel
    sessions exist. Leaving the loop, close() and cancel() (from any thread) end all of them."""

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
        options: dict[str, Any],
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
        self._options = options
        self._queue = enumerate(iter(requests))
        self._idle: list[Session] = [Session(model, **self._make)]  # the first one now, so that bad arguments are known at once
        self._live: dict[int, Generation] = {}
        self._items = self._run()

    def __iter__(self) -> Iterator[tuple[int, Token | Result | Exception]]:
        try:
            yield from self._items
        finally:
            self.close()

    def __next__(self) -> tuple[int, Token | Result | Exception]:
        return next(self._items)

    def cancel(self) -> None:
        """Ends all answers at the next occasion; their results come with finish_reason "cancelled". From any thread."""
        self._flag.set()

    def close(self) -> None:
        """Ends all answers and frees their sessions."""
        self.cancel()
        self._items.close()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        refuse_pickle(self)

    # ---- inside ----

    def _run(self) -> Iterator[tuple[int, Any]]:
        try:
            while True:
                yield from self._enter()
                if not self._live:
                    return
                yield from self._step()
        finally:
            for session in [*self._idle, *(generation.session for generation in self._live.values())]:
                session.close()

    def _enter(self) -> Iterator[tuple[int, Any]]:
        """Starts requests while there is room."""
        while len(self._live) < self._parallel and not self._flag:
            index, request = next(self._queue, (None, None))
            if index is None:
                return
            session = self._idle.pop() if self._idle else Session(self._model, **self._make)
            try:
                generation = session.generate(**self._arguments(request))._generation
                generation.flag = self._flag
                self._live[index] = generation
                with session._handle as pointer:
                    generation.start(pointer)
            except errors.CancelledError:
                yield self._leave(index)
            except Exception as error:
                self._live.pop(index, None)
                self._idle.append(session)
                if not self._yield_errors:
                    raise
                yield index, error

    def _arguments(self, request: Any) -> dict[str, Any]:
        if isinstance(request, str):
            request = {"prompt": request}
        if not isinstance(request, dict):
            raise TypeError(f"a request must be a prompt or a dict of arguments of generate(), not {type(request).__name__}")
        given = {**self._options, **request}
        if "prompt" not in given:
            raise TypeError("a request needs a prompt")
        return given

    def _step(self) -> Iterator[tuple[int, Any]]:
        """One token for each that is live. The handles are held for the native work only."""
        ids: dict[int, int] = {}
        for index, generation in list(self._live.items()):
            with generation.session._handle as pointer:
                id = generation.sample(pointer)
            if id is not None:
                ids[index] = id
                continue
            last = generation.flush()
            if last is not None:
                yield index, last
            yield self._leave(index)
        try:
            tokens = self._step_together(ids)
        except errors.CancelledError:
            for index in ids:
                yield self._leave(index)
            return
        yield from tokens

    def _step_together(self, ids: dict[int, int]) -> list[tuple[int, Token]]:
        if not ids:
            return []
        with ExitStack() as held:
            pointers = [held.enter_context(self._live[index].session._handle) for index in ids]
            begin = time.perf_counter()
            step(pointers, list(ids.values()), self._flag)
            seconds = (time.perf_counter() - begin) / len(ids)
            return [(index, self._live[index].after_step(pointer, seconds)) for index, pointer in zip(ids, pointers, strict=True)]

    def _leave(self, index: int) -> tuple[int, Result]:
        generation = self._live.pop(index)
        if generation.finish_reason is None:
            generation._end("cancelled")
        self._idle.append(generation.session)
        return index, generation.result()
