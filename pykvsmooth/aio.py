"""Streams for asyncio. A module of its own, because asyncio is slow to import and most programs do without."""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

from .stats import Result, Stats, Token
from .stream import Stream


class _Thread:
    """A daemon thread that does one thing after another until it is told to end."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=_work, args=(self._jobs,), name="pykvsmooth-async", daemon=True).start()
        self.end = weakref.finalize(self, self._jobs.put, None)
        self.end.atexit = False

    def do(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job


class AsyncStream:
    """A Stream for asyncio: an async iterator of Tokens. Cancelling the task that waits for a token ends the answer."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._thread: _Thread | None = None

    async def _run(self, call: Callable[[], Any]) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if self._thread is None:
            self._thread = _Thread()

        def job() -> None:
            try:
                outcome, error = call(), None
            except BaseException as caught:
                outcome, error = None, caught
            try:
                loop.call_soon_threadsafe(_settle, future, outcome, error)
            except RuntimeError:
                pass  # the loop was closed meanwhile: nobody waits

        self._thread.do(job)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self._stream.cancel()
            if not future.cancelled():
                await _wait(future)  # the session is free when this returns
            self._stream.close()
            raise

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Token:
        token = await self._run(lambda: next(self._stream, None))
        if token is None:
            raise StopAsyncIteration
        return token

    async def result(self) -> Result:
        """Reads the stream to its end."""
        return await self._run(self._stream.result)

    async def aclose(self) -> None:
        """Ends the answer."""
        self._stream.close()

    def cancel(self) -> None:
        """Ends the answer at the next occasion; from any thread."""
        self._stream.cancel()

    @property
    def stats(self) -> Stats:
        return self._stream.stats

    @property
    def finish_reason(self) -> str | None:
        return self._stream.finish_reason

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _settle(future: asyncio.Future[Any], outcome: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(outcome)
    else:
        future.set_exception(error)


async def _wait(future: asyncio.Future[Any]) -> None:
    """Until a native call has ended, whatever comes of it and however often the task is cancelled."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
    future.exception()
