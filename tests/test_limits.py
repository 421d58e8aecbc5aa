"""Limits: one more than what is allowed is an error with a name, the value and the way out; exactly that much is none."""

from __future__ import annotations

import dataclasses
import io
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from devices import DEVICE
from PIL import Image

import pykvsmooth as kvs
from pykvsmooth.images import load_image


def load(pair: Pair, **limits: Any) -> kvs.Model:
    return kvs.Model(pair.text, mmproj=pair.mmproj, device=DEVICE, limits=kvs.Limits(**limits))


def check(error: kvs.LimitError, name: str, value: int, allowed: int) -> None:
    assert (error.limit, error.value, error.allowed) == (name, value, allowed)
    assert str(error).endswith(f"to allow more: Model(..., limits=Limits({name}=...))")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)


def test_model_bytes(tiny_pair: Pair) -> None:
    size = Path(tiny_pair.text).stat().st_size
    both = size + Path(tiny_pair.mmproj).stat().st_size
    load(tiny_pair, model_bytes=both).close()
    for allowed, found in ((both - 1, both), (size - 1, size), (1, size)):
        with pytest.raises(kvs.LimitError, match=r"model_bytes: .* MiB are needed, .* MiB are allowed") as caught:
            load(tiny_pair, model_bytes=allowed)
        check(caught.value, "model_bytes", found, allowed)
        assert isinstance(caught.value, ValueError)


def test_cache_bytes_of_all_sessions(tiny_pair: Pair) -> None:
    with load(tiny_pair) as model, model.session(n_ctx=100) as session:
        one = cache_bytes(session)
    with load(tiny_pair, cache_bytes=3 * one) as model:
        first, second = model.session(n_ctx=100), model.session(n_ctx=100)
        third = second.fork()
        for make in (lambda: model.session(n_ctx=100), first.fork, lambda: model.session(n_ctx=1)):
            with pytest.raises(kvs.MemoryLimitError, match=r"cache_bytes: .* are needed, 0\.0 MiB are allowed") as caught:
                make()
            assert isinstance(caught.value, (kvs.OutOfMemoryError, MemoryError))
            assert caught.value.needed == caught.value.value and caught.value.free == caught.value.allowed == 0
        assert first.generate("a dog", max_tokens=2).result().tokens
        third.close()
        with pytest.raises(kvs.MemoryLimitError) as error:
            model.session(n_ctx=101)
        assert error.value.allowed == one < error.value.value
        for _ in range(20):  # what is closed is given back
            model.session(n_ctx=100).close()
        policy = kvs.KVSmooth(layers=[1])
        with pytest.raises(kvs.MemoryLimitError):  # exact rows count, too
            model.session(n_ctx=100, policy=policy)


def cache_bytes(session: kvs.Session) -> int:
    from pykvsmooth._native import lib

    with session._handle as pointer:
        return int(lib.kvs_session_bytes(pointer))


def test_cache_bytes_of_a_saved_session(tiny_pair: Pair, tmp_path: Path) -> None:
    """A file decides n_ctx, and must not decide more than that."""
    with load(tiny_pair) as model, model.session(n_ctx=4000) as session:
        session.feed([5, 6])
        session.save(tmp_path / "s.kvs")
    with load(tiny_pair, cache_bytes=1 << 16) as model:
        with pytest.raises(kvs.MemoryLimitError):
            kvs.Session.load(model, tmp_path / "s.kvs")
        model.session(n_ctx=4).close()


def test_cache_bytes_by_many_threads(tiny_pair: Pair) -> None:
    with load(tiny_pair) as model, model.session(n_ctx=64) as session:
        one = cache_bytes(session)
    with load(tiny_pair, cache_bytes=4 * one) as model:
        made: list[kvs.Session] = []

        def work() -> None:
            for _ in range(30):
                try:
                    made.append(model.session(n_ctx=64))
                except kvs.MemoryLimitError:
                    continue

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 4
        for session in made:
            session.close()
        assert [model.session(n_ctx=64) for _ in range(4)]


def test_the_memory_of_the_machine_is_the_standard(tiny_pair: Pair) -> None:
    """A cache that can't fit is refused, not given and taken back by the system in the middle of an answer."""
    sessions = []
    with load(tiny_pair) as model, pytest.raises(kvs.OutOfMemoryError):
        for _ in range(100_000):
            sessions.append(model.session(n_ctx=1 << 20, kv_type="f32"))
    for session in sessions:
        session.close()


def test_image_pixels(tiny_pair: Pair, tmp_path: Path) -> None:
    picture = Image.fromarray(np.zeros((10, 30, 3), np.uint8))
    picture.save(tmp_path / "p.png")
    data = (tmp_path / "p.png").read_bytes()
    sources: list[Any] = [picture, np.asarray(picture), data, io.BytesIO(data), tmp_path / "p.png"]
    limits = kvs.Limits(image_pixels=299)
    for source in sources:
        with pytest.raises(kvs.ImageLimitError, match="30 x 10 is more than 299 pixels; make it smaller first") as caught:
            load_image(source, limits=limits)
        check(caught.value, "image_pixels", 300, 299)
        assert isinstance(caught.value, kvs.ImageError)
    assert load_image(data, limits=kvs.Limits(image_pixels=300)).size == (30, 10)
    with load(tiny_pair, image_pixels=299) as model, model.session() as session:
        for use in (
            lambda: model.encode_image(picture),
            lambda: session.feed_image(picture),
            lambda: session.generate("a", image=picture),
            lambda: session.chat("a", image=data),
        ):
            with pytest.raises(kvs.ImageLimitError):
                use()


def test_image_bytes(tiny_pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "p.bmp"
    Image.fromarray(np.zeros((10, 30, 3), np.uint8)).save(path)
    data, n = path.read_bytes(), path.stat().st_size
    for source in (path, str(path), data, bytearray(data), io.BytesIO(data)):
        with pytest.raises(kvs.ImageLimitError, match=f"{n:,} bytes are more than the {n - 1:,} that a picture may have") as caught:
            load_image(source, limits=kvs.Limits(image_bytes=n - 1))
        check(caught.value, "image_bytes", n, n - 1)
    assert load_image(path, limits=kvs.Limits(image_bytes=n)).size == (30, 10)

    class Endless(io.RawIOBase):
        def read(self, n: int = -1) -> bytes:
            assert 0 < n <= 1001
            return bytes(n)

    with pytest.raises(kvs.ImageLimitError, match="1,001 bytes are more than the 1,000"):
        load_image(Endless(), limits=kvs.Limits(image_bytes=1000))
    with load(tiny_pair, image_bytes=n - 1) as model, pytest.raises(kvs.ImageLimitError):
        model.encode_image(path)


def test_prompt_chars(tiny_pair: Pair) -> None:
    with load(tiny_pair, prompt_chars=50) as model, model.session() as session:
        long = "a" * 51
        assert model.tokenize(long[:50])
        uses: list[tuple[str, Any]] = [
            ("text", lambda: model.tokenize(long)),
            ("prompt", lambda: session.generate(long, template=None)),
            ("message", lambda: session.chat(long)),
            ("system", lambda: session.generate("a", system=long)),
            ("prompt", lambda: session.agenerate(long)),
            ("prompt", lambda: list(model.generate_batch([long], n_ctx=64))),
        ]
        for name, use in uses:
            with pytest.raises(kvs.LimitError, match=f"{name}: 51 characters are more than the 50 that are allowed") as caught:
                use()
            check(caught.value, "prompt_chars", 51, 50)
        assert session.n_past == 0 and session.generate("a dog", template=None, max_tokens=1).result().tokens
    with load(tiny_pair, prompt_chars=1) as model:  # names of tokens that the library itself looks for are longer
        assert model.tokenize("a")


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(kvs.Limits)])
def test_limits_are_positive_integers(name: str) -> None:
    for wrong in (0, -1, 1 << 63):
        with pytest.raises(ValueError, match=f"{name} must be in 1.."):
            kvs.Limits(**{name: wrong})
    for odd in ("1", 1.5, True, *(() if name == "cache_bytes" else (None,))):
        with pytest.raises(TypeError, match=f"{name} must be an integer"):
            kvs.Limits(**{name: odd})
    assert getattr(kvs.Limits(**{name: 7}), name) == 7


def test_limits_of_a_model(tiny_pair: Pair) -> None:
    with pytest.raises(TypeError, match="limits must be Limits"):
        kvs.Model(tiny_pair.text, mmproj=False, limits={"image_pixels": 3})  # type: ignore[arg-type]
    with kvs.Model(tiny_pair.text, mmproj=False) as model:
        assert model.limits == kvs.Limits()
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.limits.image_pixels = 3  # type: ignore[misc]
