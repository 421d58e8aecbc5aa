"""Streams under asyncio: the loop never waits for work, and whoever ends an answer finds the session free."""

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
from answers import answer, ids

import pykvsmooth as kvs

LONG = "a dog " * 6000


def test_agenerate(model: kvs.Model, policy: kvs.KVSmooth | None) -> None:
    async def one(session: kvs.Session, prompt: str) -> list[int]:
        return [token.id async for token in session.agenerate(prompt, max_tokens=10)]

    async def main() -> list[list[int]]:
        with model.session(policy=policy) as a, model.session(policy=policy) as b:
            together = await asyncio.gather(one(a, "a dog"), one(b, "a cat"))
            stream = b.agenerate("a tree", max_tokens=3)
            result = await stream.result()
            assert stream.finish_reason == result.finish_reason and stream.stats.decode_tokens == result.stats.decode_tokens
            async with b.achat("a tree", max_tokens=50) as stream:
                async for _ in stream:
                    break
            assert stream.finish_reason == "cancelled"
        return together

    together = asyncio.run(main())
    assert together == [ids(answer(model, prompt, policy, max_tokens=10)) for prompt in ("a dog", "a cat")]


def test_cancelling_the_task_ends_the_answer(model: kvs.Model) -> None:
    async def main() -> None:
        with model.session(n_ctx=30000) as session:
            stream = session.agenerate(LONG, template=None)
            task = asyncio.ensure_future(stream.__anext__())
            await asyncio.sleep(0.05)
            began = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert time.monotonic() - began < 2 and stream.finish_reason == "cancelled"
            assert session.generate("a dog", max_tokens=2).result().tokens, "the session is free at once"

    asyncio.run(main())


def test_leaving_the_loop_frees_the_session(model: kvs.Model) -> None:
    async def main() -> None:
        with model.session() as session:
            for i in range(50):
                stream = session.agenerate("hi", max_tokens=50)
                async for _ in stream:
                    break
                assert stream.finish_reason == "cancelled", i
                session.generate("x", max_tokens=1).result()
                async for _ in session.agenerate("hi", max_tokens=50):  # nobody else holds this one
                    break
                session.generate("x", max_tokens=1).result()
                stream = session.agenerate("hi", max_tokens=50)
                await stream.__anext__()
                del stream
                session.generate("x", max_tokens=1).result()

    asyncio.run(main())


def test_one_token_at_a_time(model: kvs.Model) -> None:
    async def main() -> list[kvs.Token]:
        with model.session() as session:
            stream = session.agenerate("a dog", max_tokens=6)
            return [await stream.__anext__(), await stream.__anext__(), *[token async for token in stream]]

    assert [token.id for token in asyncio.run(main())] == ids(answer(model, "a dog", max_tokens=6))


@pytest.mark.parametrize("how", ["aclose", "with"])
def test_aclose_waits_for_the_call(model: kvs.Model, how: str) -> None:
    async def main() -> None:
        with model.session(n_ctx=30000) as session:
            stream = session.agenerate(LONG, template=None)
            task = asyncio.ensure_future(stream.__anext__())
            await asyncio.sleep(0.05)
            began = time.monotonic()
            if how == "aclose":
                await stream.aclose()
            else:
                async with stream:
                    pass
            session.feed([5])
            assert time.monotonic() - began < 2 and stream.finish_reason == "cancelled"
            with pytest.raises(StopAsyncIteration):
                await task
            await stream.aclose()
            early = session.agenerate("a dog")
            await early.aclose()
            assert early.finish_reason == "cancelled" and (await early.result()).tokens == []

    asyncio.run(main())


def test_pictures_and_words_are_read_in_the_thread(model: kvs.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from pykvsmooth import images
    from pykvsmooth import session as module

    seen = []

    def noted(call: Any) -> Any:
        def wrapper(*args: Any, **options: Any) -> Any:
            seen.append(threading.current_thread())
            return call(*args, **options)

        return wrapper

    monkeypatch.setattr(images, "load_image", noted(images.load_image))
    monkeypatch.setattr(module, "build_prompt", noted(module.build_prompt))

    async def main() -> list[int]:
        with model.session() as session:
            stream = session.agenerate("a dog", image=np.zeros((56, 56, 3), np.uint8), max_tokens=3)
            assert not seen and stream.stats.prefill_tokens == 0
            return ids(await stream.result())

    got = asyncio.run(main())
    assert len(seen) == 2 and threading.main_thread() not in seen
    assert got == ids(answer(model, "a dog", image=np.zeros((56, 56, 3), np.uint8), max_tokens=3))


def test_errors_at_the_call_and_with_the_first_token(model: kvs.Model) -> None:
    async def main() -> None:
        with model.session(n_ctx=64) as session:
            at_once = [
                ({"bogus": 1}, TypeError, r"^agenerate\(\) got"),
                ({"temperature": -1.0}, ValueError, "temperature"),
                ({"image": b"", "images": []}, ValueError, "not both"),
                ({"images": [b"", b""], "prompt": "<image>"}, ValueError, "marks"),
            ]
            for arguments, error, message in at_once:
                with pytest.raises(error, match=message):
                    session.agenerate(**{"prompt": "a", **arguments})
            for arguments, error in (({"image": b"no picture"}, kvs.ImageError), ({"prompt": "a " * 200}, kvs.ContextOverflowError)):
                stream = session.agenerate(**{"prompt": "a", **arguments})
                with pytest.raises(error):
                    await stream.__anext__()
                with pytest.raises(error):
                    await stream.result()
                assert session.n_past == 0 and stream.finish_reason == "cancelled"
            running = session.generate("a dog")
            next(running)
            with pytest.raises(kvs.BusyError):
                session.agenerate("a")

    asyncio.run(main())
