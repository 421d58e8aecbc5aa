"""Many threads over one model, two threads on one session, cancelling from outside, Ctrl-C."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from devices import DEVICE
from test_errors import environment
from twins import picture

import pykvsmooth as kvs

LONG = "a dog " * 6000
WORDS = ["the", "a", "of", "in", "on", "man", "dog", "cat", "red", "blue", "big", "small", "table", "street", "car", "tree"]


@pytest.fixture(scope="module")
def model(tiny_pair: Pair) -> Iterator[kvs.Model]:
    with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, device=DEVICE, threads=2) as model:
        model._end_ids = frozenset()  # random weights may choose </s> anywhere
        yield model


def test_eight_threads_as_alone(model: kvs.Model, rng: np.random.Generator) -> None:
    jobs: list[dict[str, Any]] = [
        {
            "prompt": " ".join(rng.choice(WORDS, 10)),
            "image": picture(rng) if i % 2 else None,
            "max_tokens": 24,
            "temperature": 0.8 * (i % 3),
            "seed": i,
            "repetition_penalty": 1.1,
        }
        for i in range(8)
    ]
    policies = [None, kvs.KVSmooth(layers=[1, 2]), kvs.KVSmooth(layers=[0, 3], rope_mode="relative")]

    def run(i: int) -> tuple[str, list[float]]:
        with model.session(n_ctx=200, policy=policies[i % 3]) as session:
            texts = [session.generate(**jobs[i]).result() for _ in range(3)]
            assert len({t.text for t in texts}) == 1
            return texts[0].text, [t.entropy for t in texts[0].tokens]

    alone = [run(i) for i in range(8)]
    model._images.clear()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, range(8)))
    for one, other in zip(alone, together, strict=True):
        assert one[0] == other[0] and np.array_equal(one[1], other[1], equal_nan=True)


def test_a_step_gets_its_turn_beside_a_long_prompt(model: kvs.Model) -> None:
    """The model is handed on block by block, in the order of asking."""
    with model.session(n_ctx=12_000) as long, model.session(n_ctx=12_000) as short:
        short.feed([1, 2, 3])
        thread = threading.Thread(target=long.feed, args=([5] * 10_240,))  # 20 blocks
        longest, start = 0.0, time.perf_counter()
        thread.start()
        while thread.is_alive():
            begin = time.perf_counter()
            short.feed([5], generated=True)
            longest = max(longest, time.perf_counter() - begin)
        thread.join()
        assert longest < (time.perf_counter() - start) / 3


def test_two_threads_on_one_session(model: kvs.Model) -> None:
    """Each call works or is a BusyError; the session is sound afterwards."""
    with model.session(n_ctx=30000) as session:
        outcomes: list[str] = []

        def use(call: Callable[[], Any]) -> None:
            try:
                call()
                outcomes.append("done")
            except kvs.BusyError:
                outcomes.append("busy")

        ids = model.tokenize(LONG)[:6000]
        long = threading.Thread(target=use, args=(lambda: session.feed(ids),))
        long.start()
        while session._handle._user is None and long.is_alive():
            time.sleep(0.001)
        time.sleep(0.01)
        for call in (lambda: session.feed([5]), lambda: session.logits(), lambda: session.generate("a"), lambda: session.kv(0)):
            use(call)
        long.join()
        assert outcomes == ["busy"] * 4 + ["done"]
        assert session.n_past == 6000 and session.generate("a dog", max_tokens=2).result().tokens


def test_the_gil_is_free(model: kvs.Model) -> None:
    with model.session(n_ctx=30000) as session:
        ids = model.tokenize(LONG)[:6000]
        thread = threading.Thread(target=session.feed, args=(ids,))
        thread.start()
        ticks, began = 0, time.monotonic()
        while thread.is_alive():
            time.sleep(0.001)
            ticks += 1
        took = time.monotonic() - began
        assert took > 0.05 and ticks > took / 0.02, f"{ticks} ticks in {took:.2f} s"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_cancel_from_another_thread(model: kvs.Model, phase: str) -> None:
    with model.session(n_ctx=30000, policy=kvs.KVSmooth(layers=[1])) as session:
        expected = session.generate("a dog", max_tokens=4).result().text
        prompt = LONG if phase == "prefill" else "a dog and a cat"
        stream = session.generate(prompt, template=None, max_tokens=None, repetition_penalty=1.01)
        cancelled = []

        def cancel() -> None:
            cancelled.append(time.monotonic())
            stream.cancel()

        threading.Timer(0.05, cancel).start()
        result = stream.result()
        assert result.finish_reason == "cancelled" and time.monotonic() - cancelled[0] < 0.5
        assert bool(result.tokens) == (phase == "decode")
        assert session.generate("a dog", max_tokens=4).result().text == expected


@pytest.mark.parametrize("whose", ["session", "model"])
def test_close_while_another_thread_decodes(tiny_pair: Pair, whose: str) -> None:
    for _ in range(10):
        with kvs.Model(tiny_pair.text, mmproj=False, threads=2) as model:
            model._end_ids = frozenset()
            session = model.session(n_ctx=30000)
            results: list[kvs.Result] = []
            decoding = threading.Event()

            def decode(session: kvs.Session, results: list[kvs.Result], decoding: threading.Event) -> None:
                stream = session.generate("a dog", max_tokens=None)
                next(stream)
                decoding.set()
                results.append(stream.result())

            thread = threading.Thread(target=decode, args=(session, results, decoding))
            thread.start()
            assert decoding.wait(60)
            (session if whose == "session" else model).close()
            thread.join(5)
            assert not thread.is_alive() and session.closed
            assert results[0].finish_reason == "cancelled" and results[0].tokens


def test_closing_a_stream_waits_for_the_call(model: kvs.Model) -> None:
    with model.session(n_ctx=30000) as session:
        for _ in range(20):
            stream = session.generate("a dog " * 2000, template=None, max_tokens=None)
            thread = threading.Thread(target=stream.result, daemon=True)
            thread.start()
            while session._handle._user is None and thread.is_alive():
                time.sleep(0.001)
            stream.close()
            session.feed([5])
            thread.join()
            assert stream.finish_reason == "cancelled"
            session.reset()


def waits_for_flag(_: object, flag: Any) -> Any:
    while not flag:
        time.sleep(0.001)
    raise kvs.CancelledError


@pytest.mark.parametrize("whose", ["session", "model"])
@pytest.mark.parametrize("what", ["feed", "generated", "image"])
def test_close_ends_a_feed_of_another_thread(tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch, what: str, whose: str) -> None:
    with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, threads=2) as model:
        session, other = model.session(n_ctx=60000), model.session()
        monkeypatch.setattr(model, "_encode", waits_for_flag)
        errors: list[Exception] = []

        def work() -> None:
            try:
                if what == "image":
                    session.feed_image(np.zeros((56, 56, 3), np.uint8))
                else:
                    session.feed([5, 6, 7] * 19000, generated=what == "generated")
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while session._handle._user is None and thread.is_alive():
            time.sleep(0.001)
        time.sleep(0.02)
        began = time.monotonic()
        (session if whose == "session" else model).close()
        assert time.monotonic() - began < 1 and session.closed and (other.closed, model.closed) == (whose == "model",) * 2
        thread.join()
        assert [type(error) for error in errors] == [kvs.ClosedError]


def test_model_close_goes_through_all_of_it(tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from pykvsmooth import handles

    monkeypatch.setattr(handles, "CLOSE_SECONDS", 0.05)
    model = kvs.Model(tiny_pair.text, mmproj=False)
    stuck, others = model.session(), [model.session() for _ in range(4)]
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with stuck._handle:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    with pytest.raises(kvs.BusyError):
        model.close()
    assert model.closed and all(session.closed for session in others) and not stuck.closed
    leave.set()
    thread.join()
    with pytest.raises(kvs.ClosedError):
        stuck.feed([5])
    model.close()
    assert stuck.closed


CTRL_C = """
import os, signal, sys, threading, time
import pykvsmooth as kvs
phase = sys.argv[1]
model = kvs.Model(sys.argv[2], mmproj=sys.argv[3])
model._end_ids = frozenset()
session = model.session(n_ctx=60000)
ids = [5, 6, 7] * 19000
def interrupt():
    time.sleep(0.1)
    stamp.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
stamp = []
threading.Thread(target=interrupt, daemon=True).start()
try:
    if phase == "feed":
        session.feed(ids)
    elif phase == "decode":
        for token in session.generate("a dog", max_tokens=None):
            pass
    elif phase == "batch":
        for item in model.generate_batch(["a dog", "a cat"], n_ctx=30000, max_tokens=None):
            pass
    elif phase == "async":
        import asyncio
        async def main():
            async for token in session.agenerate("a dog " * 9000, template=None):
                pass
        asyncio.run(main())
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - stamp[0] < 0.5)
stream = session.generate("a dog", max_tokens=3)
print(len(stream.result().tokens), session.n_past < 100)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("phase", ["feed", "decode", "batch", "async"])
def test_ctrl_c_in_the_main_thread(tiny_pair: Pair, phase: str) -> None:
    """Within half a second, and the session goes on."""
    command = [sys.executable, "-c", CTRL_C, phase, tiny_pair.text, tiny_pair.mmproj]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout.splitlines() == ["interrupted True", "3 True"], result.stdout


def test_interrupts_at_any_moment(model: kvs.Model) -> None:
    """A storm of signals: every call ends as done or interrupted, no lock stays behind, no call hangs."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")

    class Alarm(Exception):
        pass

    def handler(*_: object) -> None:
        raise Alarm

    old = signal.signal(signal.SIGALRM, handler)
    rng = np.random.default_rng(1)
    done = interrupted = 0
    try:
        with model.session(n_ctx=3000) as session:
            stats = [session.generate("a dog and a cat", max_tokens=8).result().stats for _ in range(5)]
            whole = min(s.prefill_s + s.decode_s for s in stats)
            for _ in range(150):
                try:
                    signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-5, 1.5 * whole)))
                    try:
                        session.generate("a dog and a cat", max_tokens=8).result()
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                    done += 1
                except Alarm:
                    interrupted += 1
            assert session.generate("a dog", max_tokens=2).result().tokens
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert done + interrupted == 150 and interrupted > 10


@pytest.mark.parametrize("what", ["stream", "session", "model", "batch"])
def test_closing_in_a_signal_handler(tiny_pair: Pair, what: str) -> None:
    """What runs below the handler ends as cancelled and frees itself."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    rng = np.random.default_rng(2)
    old = signal.getsignal(signal.SIGALRM)
    try:
        for _ in range(30):
            with kvs.Model(tiny_pair.text, mmproj=False, threads=2) as model:
                model._end_ids = frozenset()
                session = model.session(n_ctx=3000)
                stream = session.generate("a dog and a cat", max_tokens=None)
                batch = model.generate_batch(["a dog", "a cat"], n_ctx=3000, max_tokens=None)
                things = {"stream": stream, "session": session, "model": model, "batch": batch}
                signal.signal(signal.SIGALRM, lambda *_, thing=things[what]: thing.close())
                signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-3, 1e-2)))
                if what == "batch":
                    assert not [item for _, item in batch if not isinstance(item, kvs.Token)]
                else:
                    assert stream.result().finish_reason == "cancelled"
                    assert session.closed == (what != "stream") and model.closed == (what == "model")
                batch.close()
                assert sum(not s.closed for s in model._sessions) == (what in ("stream", "batch"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_a_conversation_goes_on_after_an_interrupt(model: kvs.Model) -> None:
    """Wherever the signal strikes: in the rows of a question or of an answer."""

    def strike(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, strike)
    try:
        for k in range(60):
            with model.session(n_ctx=4000, policy=kvs.KVSmooth(layers=[1, 2]) if k % 2 else None) as session:
                session.chat("first", max_tokens=3).result()
                stream = session.chat("a dog " * (300 if k % 3 == 0 else 1), max_tokens=3000)
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0005 * (k % 30))
                try:
                    for _ in stream:
                        pass
                except KeyboardInterrupt:
                    pass
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                stream.close()
                assert session.chat("again", max_tokens=3).result().finish_reason == "length"
    finally:
        signal.signal(signal.SIGALRM, before)
