"""Streams: an answer while it is being written."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .errors import ClosedError
from .handles import refuse_pickle
from .stats import Result, Stats, Token

if TYPE_CHECKING:
    from .generation import Generation


class Stream:
    """An iterator of Tokens. Nothing runs between two tokens, so leaving the loop stops the work.

        stream = session.generate("Describe the image.", image="street.jpg")
        for token in stream:
            print(token.text, end="")
        print(stream.finish_reason, stream.stats.tokens_per_s)

    A loop that is left early closes the stream, and so does everything that drops an iterator of it (itertools.islice, zip): to read a
    few tokens and go on later take them with next(stream). cancel() may be called from any thread; it also ends a prefill and the
    encoding of a picture.
    """

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[Token]:
        try:
            while (token := self._next()) is not None:
                yield token
        finally:
            self.close()

    def __next__(self) -> Token:
        token = self._next()
        if token is None:
            raise StopIteration
        return token

    def _next(self) -> Token | None:
        """None at the end."""
        generation = self._generation
        if generation.finish_reason is not None:
            return None
        session = generation.session
        try:
            with session._handle.use(generation.flag) as pointer:
                session._refuse_active(generation)
                session._active = weakref.ref(generation)
                return self._advance(pointer)
        except ClosedError as error:
            if not generation.was_cancelled(error):
                raise
            generation._end("cancelled")
            return None

    def _advance(self, pointer: Any) -> Token | None:
        try:
            return self._generation.next_token(pointer)
        except Exception as error:
            self._error = error
            raise

    def cancel(self) -> None:
        """Ends the answer at the next occasion, within milliseconds. From any thread; reading the stream then ends it as "cancelled"."""
        self._generation.flag.set()

    def close(self) -> None:
        """Ends the answer, and waits for a call of another thread that is in it; the session is free for the next. Does nothing if it
        has ended."""
        generation = self._generation
        if generation.finish_reason is None:
            self.cancel()
        generation.session._handle.wait(generation.flag)
        generation._end("cancelled")

    def result(self) -> Result:
        """Reads the stream to its end. An exception that ended it is raised again."""
        while self._next() is not None:
            pass
        if self._error is not None:
            raise self._error
        return self._generation.result()

    @property
    def stats(self) -> Stats:
        """The figures so far."""
        return self._generation.stats()

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length", "context" or "cancelled"; None while it runs."""
        return self._generation.finish_reason

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        refuse_pickle(self)

    def __repr__(self) -> str:
        return f"<pykvsmooth.Stream {len(self._generation.tokens)} tokens, {self.finish_reason or 'running'}>"
