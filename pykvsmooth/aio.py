"""Streams for asyncio. A module of its own, because asyncio is slow to import and most programs do without."""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar, cast

from .errors import DeviceError
from .stats import Result, Stats, Token
from .stream import Stream

T = TypeVar("T")
_Call = Callable[[], Any]
_Settle = Callable[[Any, BaseException | None], None]


class _Thread:
    """A daemon thread that makes one call after another until it is told to end."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[_Call, _Settle] | None] = queue.SimpleQueue()
        try:
            threading.Thread(target=_work, args=(self._jobs,), name="pykvsmooth-async", daemon=True).start()
        except RuntimeError as error:
            raise DeviceError(f"an asynchronous answer needs a thread of its own, and none could be started: {error}") from error
        self.end = weakref.finalize(self, self._jobs.put, None)
        self.end.atexit = False

    def do(self, call: _Call, settle: _Settle) -> None:
        self._jobs.put((call, settle))


def _work(jobs: queue.SimpleQueue[tuple[_Call, _Settle] | None]) -> None:
    while (job := jobs.get()) is not None:
        call, settle = job
        outcome, error = None, None
        try:
            outcome = call()
        except BaseException as caught:
            error = caught
        del job, call  # before anybody hears of the end: they hold the stream, which else lived on for a moment
        settle(outcome, error)
        del settle, outcome, error


class AsyncStream:
    """A Stream for asyncio: `async for token in stream`, `await stream.result()`. Cancelling the task that waits for a token ends the
    answer, and so does leaving the loop; `await anext(stream)` takes one token at a time."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._thread: _Thread | None = None

    async def _run(self, call: Callable[[], T]) -> T:
        """call() in the thread, after the calls before it. When this returns or raises the session is free."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(outcome: Any, error: BaseException | None) -> None:
            try:
                loop.call_soon_threadsafe(_settle, future, outcome, error)
            except RuntimeError:
                pass  # the loop was closed meanwhile: nobody waits

        self._thread = self._thread or _Thread()
        self._thread.do(call, settle)
        try:
            return cast(T, await asyncio.shield(future))
        except asyncio.CancelledError:
            self._stream.cancel()
            await _wait(future)
            self._stream.close()
            raise

    def __aiter__(self) -> AsyncIterator[Token]:
        return _Tokens(self)

    async def __anext__(self) -> Token:
        token = await self._run(self._stream._next)
        if token is None:
            raise StopAsyncIteration
        return token

    async def result(self) -> Result:
        """Reads the stream to its end."""
        return await self._run(self._stream.result)

    async def aclose(self) -> None:
        """Ends the answer. When this returns the session is free for the next."""
        self._stream.cancel()
        if self._thread is None:
            self._stream.close()
        else:
            await self._run(self._stream.close)

    def cancel(self) -> None:
        """Ends the answer at the next occasion; from any thread."""
        self._stream.cancel()

    @property
    def stats(self) -> Stats:
        return self._stream.stats

    @property
    def finish_reason(self) -> str | None:
        return self._stream.finish_reason

    def __repr__(self) -> str:
        return f"<pykvsmooth.AsyncStream of {self._stream!r}>"

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _Tokens:
    """What a loop holds. An async generator would do, but asyncio closes those only later, in a task of its own."""

    def __init__(self, stream: AsyncStream) -> None:
        self._stream = stream

    def __aiter__(self) -> _Tokens:
        return self

    async def __anext__(self) -> Token:
        return await self._stream.__anext__()

    def __del__(self) -> None:
        self._stream._stream.close()


def _settle(future: asyncio.Future[Any], outcome: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(outcome)
    else:
        future.set_exception(error)


async def _wait(future: asyncio.Future[Any]) -> None:
    """Until a call in the thread has ended, whatever comes of it and however often the task is cancelled."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()
