"""A server's life: other pictures, options, policies and caches for each caption; some are cancelled, some fail, some are chats. Memory is
flat, that of a GPU, too, and no file, thread or mapping is left; eight threads do it over one model. make soak: 1,000 captions;
KVS_SOAK_SECONDS: of the threads, for a build with ThreadSanitizer. The tests run a few.
"""

import asyncio
import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from device_memory import SHIM, used_bytes
from devices import DEVICE

import pykvsmooth as kvs

CAPTIONS = int(os.environ.get("KVS_SOAK", 40))
SECONDS = float(os.environ.get("KVS_SOAK_SECONDS", 2))
PICTURES = 100
KEPT = 256 << 20  # bytes of a GPU: kernels that are loaded when they are first met
WORDS = "the a of in on man dog cat red blue big small table street car tree".split()
GRID = {"layers": "1:", "coord_norm": "patch"}
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def left() -> tuple[int, int, int]:
    gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count(".gguf")


def device_bytes() -> int:
    """In use there: working space of passes grows with the longest one, sessions give theirs back."""
    gc.collect()
    return used_bytes() if DEVICE == "cuda" else 0


class Life:
    """What users do, drawn at random."""

    def __init__(self, model: kvs.Model, rng: np.random.Generator, folder: Path) -> None:
        self.model, self.rng, self.folder = model, rng, folder
        self.pictures = [rng.integers(0, 256, (*rng.integers(20, 200, 2), 3), np.uint8) for _ in range(PICTURES)]
        self.done: Counter[str] = Counter()
        self.empty = 0  # bytes of the device, without the model

    def one(self, *choices: Any) -> Any:
        return choices[self.rng.integers(len(choices))]

    def policies(self) -> list[Any]:
        all_of_them = [
            kvs.DSCR(**GRID, phase=self.one("before_question", "after_prefill", "in_layer"), gamma=self.one(0.5, 1.0)),
            kvs.KVSmooth(layers=self.one([1], "1:4"), rope_mode=self.one("post", "relative"), target=self.one("kv", "k", "o")),
            kvs.PruneHal(keep=0.5, times=2, reversible=self.one(True, False), index_scope=self.one("layer", "kv_head")),
        ]
        return [policy for policy in all_of_them if self.rng.random() < 0.5]

    def request(self) -> dict[str, Any]:
        sampling: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": int(self.rng.integers(1 << 30))}
        request = {"prompt": " ".join(self.rng.choice(WORDS, self.rng.integers(1, 30))), "max_tokens": int(self.rng.integers(1, 12))}
        request |= sampling if self.rng.random() < 0.5 else {"repetition_penalty": self.one(1.0, 1.1)}
        request |= {"mode": self.one("pad", "crop", "stretch"), "logprobs": self.one(0, 5)}
        pictures = [self.pictures[i] for i in self.rng.integers(0, PICTURES, self.one(0, 1, 1, 1, 2))]
        return request | ({"images": pictures} if pictures else {})

    def session(self) -> kvs.Session:
        return self.model.session(n_ctx=self.one(256, 400), kv_type=self.one("f16", "f32", "q8_0"), policy=self.policies())

    def caption(self) -> None:
        with self.session() as session:
            session.generate(**self.request()).result()

    def cancelled(self) -> None:
        with self.session() as session:
            stream = session.generate(**self.request() | {"max_tokens": None})
            timer = threading.Timer(float(self.rng.uniform(0, 0.02)), stream.cancel)
            timer.start()
            stream.result()
            timer.join()

    def left_alone(self) -> None:
        session = self.session()
        next(session.generate(**self.request()), None)

    def chat(self) -> None:
        with self.session() as session:
            session.chat("a dog", image=self.one(*self.pictures), max_tokens=3).result()
            session.chat("and a cat", max_tokens=3).result()

    def batch(self) -> None:
        requests = [self.request() for _ in range(4)]
        for _ in self.model.generate_batch(requests, n_ctx=400, policy=self.policies(), parallel=2):
            if self.rng.random() < 0.03:
                break

    def awaited(self) -> None:
        async def answer() -> None:
            with self.session() as session:
                async for _ in session.agenerate(**self.request()):
                    if self.rng.random() < 0.1:
                        break

        asyncio.run(answer())

    def moved(self) -> None:
        with self.session() as session:
            session.generate(**self.request()).result()
            with session.fork() as twin:
                twin.feed([5, 6], generated=True)
            session.save(self.folder / "session")
            kvs.Session.load(self.model, self.folder / "session", policy=session.policy).close()
            with suppress(kvs.PolicyError):  # rows of a picture are gone for good
                session.rewind(1)
                session.logits()

    def wrong(self) -> None:
        with self.session() as session, pytest.raises((ValueError, TypeError, kvs.KVSmoothError)):
            self.one(
                lambda: session.generate("a", image=b"no picture"),
                lambda: session.generate("a " * 2000),
                lambda: session.feed([-1]),
                lambda: session.generate("a", temperature=-1.0),
                lambda: kvs.Session.load(self.model, self.folder / "nothing"),
                lambda: kvs.Model(self.folder / "nothing.gguf"),
                lambda: session.rewind(10),
            )()

    def any(self) -> None:
        kinds: list[Callable[[], None]] = [self.caption] * 6 + [
            self.cancelled,
            self.left_alone,
            self.chat,
            self.batch,
            self.awaited,
            self.moved,
            self.wrong,
        ]
        kind = self.one(*kinds)
        kind()
        self.done[kind.__name__] += 1


@pytest.fixture
def life(tiny_pair: Pair, rng: np.random.Generator, tmp_path: Path) -> Iterator[Life]:
    kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, device=DEVICE).close()  # what a driver keeps of a process is there now
    empty = device_bytes()
    with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, device=DEVICE, threads=2) as model:
        model._end_ids = frozenset()
        life = Life(model, rng, tmp_path)
        life.empty = empty
        yield life


def test_nothing_grows(life: Life) -> None:
    life.caption()
    before, sizes, on_device, began = left(), [], [], time.monotonic()
    for i in range(CAPTIONS):
        life.any()
        if i >= CAPTIONS // 4 and (i + 1) % max(1, CAPTIONS // 20) == 0:
            sizes.append(resident())
            on_device.append(device_bytes())
    del i
    after, took = left(), time.monotonic() - began
    first, last = np.mean(sizes[:4]), np.mean(sizes[-4:])
    print(f"\n{CAPTIONS} in {took:.0f} s: {dict(life.done)}")
    print(f"resident {first / 1048576:.2f} -> {last / 1048576:.2f} MiB ({100 * (last / first - 1):+.2f} %), {before} -> {after}")
    assert after == before
    assert CAPTIONS < 200 or last < 1.01 * first, sizes
    first, last = np.mean(on_device[:4]), np.mean(on_device[-4:])
    print(f"of the device {first / 1048576:.2f} -> {last / 1048576:.2f} MiB")
    assert CAPTIONS < 200 or last <= 1.01 * first + (1 << 20), on_device  # one longer pass than all before takes a block more
    life.model.close()
    gc.collect()
    assert device_bytes() - life.empty <= (0 if SHIM else KEPT)


def test_eight_threads(life: Life, tmp_path: Path) -> None:
    end, errors = time.monotonic() + SECONDS, []

    def live(number: int) -> Life:
        folder = tmp_path / str(number)
        folder.mkdir()
        own = Life(life.model, np.random.default_rng([number, int(life.rng.integers(1 << 30))]), folder)
        while time.monotonic() < end and not errors:
            try:
                own.any()
            except BaseException as error:
                errors.append(error)
                raise
        return own

    with ThreadPoolExecutor(8) as pool:
        done = sum((own.done for own in pool.map(live, range(8))), Counter())
    print(f"\n{done.total()} in {SECONDS:.0f} s by eight threads: {dict(done)}")
    assert done.total() >= 8
