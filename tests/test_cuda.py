"""What is particular to GPUs: sessions that change devices, calls of the CUDA runtime that fail, models and threads that share a
device. On the CPU over tests/shim (make test-cuda), and on a GPU (make test-gpu)."""

import ctypes
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from answers import SMOOTH
from test_sampler import draw_on
from test_together import draw, sampling, sessions_of

import pykvsmooth as kvs
from pykvsmooth._native import library_path
from pykvsmooth.generation import _mean
from pykvsmooth.machine import cuda_text

if "; available: " not in cuda_text():
    pytest.skip(f"no GPU: {cuda_text()}", allow_module_level=True)

SHIM = cuda_text().startswith("archs shim")


def counted(word: str) -> int:
    """By the shim: shim_runtime.h."""
    count = ctypes.CDLL(str(library_path)).kvs_shim_counted
    count.restype, count.argtypes = ctypes.c_longlong, [ctypes.c_char_p]
    return count(word.encode())


@pytest.fixture(scope="module")
def model(tiny_pair) -> Iterator[kvs.Model]:
    with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, device="cuda") as model:
        model._end_ids = frozenset()  # random weights may choose </s> anywhere
        yield model


def greedy(session: kvs.Session, n: int) -> list[int]:
    ids = []
    for _ in range(n):
        ids.append(int(session.logits().argmax()))
        session.feed(ids[-1:], generated=True)
    return ids


def picture(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (24, 32, 3), np.uint8)


def caption(pair, image: np.ndarray, device: str = "cuda") -> list[int]:
    with kvs.Model(pair.text, mmproj=pair.mmproj, device=device) as model, model.session(n_ctx=256, policy=SMOOTH) as session:
        session.feed([1, 5])
        session.feed_image(image)
        session.feed([6, 7])
        ids = greedy(session, 6)
        with session.fork() as fork:
            assert greedy(fork, 2) == greedy(session, 2)
        assert np.isfinite(session.entropies()).all()
        return ids


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_session_changes_devices(devices: tuple[str, str], shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "stories260K"
    ids = json.loads((folder / "greedy200.json").read_text())["ids"]
    models = [kvs.Model(folder / "stories260K-f32.gguf", device=device) for device in devices]
    assert [model.device.partition(":")[0] for model in models] == list(devices)
    with models[0] as first, models[1] as second:
        with first.session(n_ctx=256, kv_type="f32") as session:
            session.feed([1])
            assert greedy(session, 83) == ids[:83]
            session.save(tmp_path / "half")
        with kvs.Session.load(second, tmp_path / "half", policy=None) as session:
            assert greedy(session, len(ids) - 83) == ids[83:]


def test_smoothed_on_both_devices(tiny_pair, rng: np.random.Generator) -> None:
    """The same values within float32's reach, and the same strengths, since they are ranks."""
    image, ids = picture(rng), rng.integers(3, 100, 24).tolist()
    seen = []
    for device in ("cpu", "cuda"):
        model = kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, device=device)
        with model, model.session(n_ctx=256, kv_type="f32", policy=SMOOTH) as session:
            session.feed([1])
            session.feed_image(image)
            session.feed([4, 5, 6])
            for token in ids:
                session.feed([token], generated=True)
            seen.append((session.logits(), session.kv(0), session.entropies(), session.strengths()))
    (a, kv_a, entropy_a, strength_a), (b, kv_b, entropy_b, strength_b) = seen
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-3 * np.abs(a).max())
    np.testing.assert_allclose(np.array(kv_b), np.array(kv_a), rtol=0, atol=1e-3 * np.abs(np.array(kv_a)).max())
    np.testing.assert_allclose(entropy_b, entropy_a, rtol=0, atol=1e-4)
    assert (
        np.mean(np.isclose(strength_a, strength_b, rtol=0, atol=1e-6, equal_nan=True)) > 0.98
    )  # two entropies may be equal to the last bit


def test_precision_of_the_tower(rng: np.random.Generator, tmp_path: Path) -> None:
    """Tensor cores multiply halves, whatever the CPU would round to; also where another part of the model is the CPU's."""
    image = picture(rng)
    for v_type, auto in (("f16", "f16"), ("q8_0", "f16"), ("f32", "f32")):
        text, mmproj, _ = tiny.write_pair(tmp_path / v_type, seed=3, n_layer=2, load=False, v_type=v_type)
        rows = {}
        for precision, layers, said in (("auto", "auto", auto), ("auto", 1, auto), ("exact", "auto", "f32")):
            with kvs.Model(text, mmproj=mmproj, device="cuda", gpu_layers=layers, precision=precision) as model:
                assert model.vision_precision == said
                rows[precision] = model.encode_image(image)
        assert np.linalg.norm(rows["auto"] - rows["exact"]) <= 0.02 * np.linalg.norm(rows["exact"])
        assert (rows["auto"] == rows["exact"]).all() == (auto == "f32")


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "logprobs": 20},
]


@pytest.mark.parametrize("policy", [None, SMOOTH], ids=["plain", "kvsmooth"])
@pytest.mark.parametrize("options", SAMPLING, ids=["greedy", "random", "cuts"])
def test_answers_are_drawn_as_on_the_cpu(options: dict[str, Any], policy, model: kvs.Model, rng: np.random.Generator) -> None:
    """From the same logits the same ids; what each token tells is what the session tells afterwards."""
    seed = int(rng.integers(2**62))
    params = {"temperature": 0.0, **options}
    n_top = params.pop("logprobs", 0)
    with model.session(n_ctx=256, policy=policy) as session:
        stream = session.generate("a cat", image=picture(rng), max_tokens=12, seed=seed, **options)
        tokens = [next(stream)]
        while stream.finish_reason is None and len(tokens) < 12:
            with session._handle as pointer:
                seen = session._timeline(pointer)[0].tolist()
            drawn = draw_on("base", session.logits(), len(tokens) + 1, seed, seen, n_top=n_top, **params)
            token = next(stream)
            assert drawn.ids[-1] == token.id and [id for id, _ in drawn.top] == [id for id, _ in token.top_logprobs]
            np.testing.assert_allclose(drawn.logprob, token.logprob, atol=1e-6, rtol=1e-6)
            tokens.append(token)
        with session.fork() as fork:  # which has to look for it in the cache
            layers = fork._layers
            entropies, strengths = fork.entropies()[:, layers], fork.strengths()[:, layers]
        assert [_mean(row) for row in entropies.tolist()] == [token.entropy for token in tokens]
        if policy:
            np.testing.assert_array_equal([_mean(row) for row in strengths.tolist()], [token.strength for token in tokens])


def test_a_sampled_answer_goes_on_elsewhere(tiny_pair, rng: np.random.Generator, tmp_path: Path) -> None:
    """Logits and random numbers go along: with a fork, and with a file to the other device."""
    options: dict[str, Any] = {"template": None, "temperature": 1.0, "top_p": 0.9}
    models = [kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, device=device) for device in ("cuda", "cpu")]
    for model in models:
        model._end_ids = frozenset()
    with models[0] as cuda, models[1] as cpu, cuda.session(n_ctx=128, kv_type="f32", seed=int(rng.integers(2**62))) as session:
        session.generate("a", max_tokens=5, **options).result()
        session.save(tmp_path / "s")
        with session.fork() as fork, kvs.Session.load(cuda, tmp_path / "s") as same, kvs.Session.load(cpu, tmp_path / "s") as other:
            for one in (fork, same, other):
                np.testing.assert_array_equal(one.logits(), session.logits())
            answers = [one.generate("a", max_tokens=8, **options).result() for one in (session, fork, same, other)]
            ids = [[token.id for token in answer.tokens] for answer in answers]
    assert ids[0] == ids[1] == ids[2]
    assert ids[3][0] == ids[0][0]  # those behind it come of logits that may differ in their last bits


@pytest.mark.skipif(not SHIM, reason="counted by the shim")
@pytest.mark.parametrize("policy", [None, SMOOTH], ids=["plain", "kvsmooth"])
@pytest.mark.parametrize("options", SAMPLING, ids=["greedy", "random", "cuts"])
def test_waits_and_copies_of_a_token(options: dict[str, Any], policy, model: kvs.Model) -> None:
    """One for the step, telemetry included, and one for the id. To the device goes what is staged for a step, and which ids were seen."""
    words = ["waits", "to_host", "graphs", "captures", "to_device"]
    with model.session(n_ctx=256, policy=policy) as session:
        stream = session.generate("a cat", template=None, max_tokens=40, **options)
        for _ in range(20):
            next(stream)
        before = [counted(word) for word in words]
        for _ in range(10):
            next(stream)
        found = [counted(word) - n for word, n in zip(words, before, strict=True)]
    assert found == [20, 20, 10, 0, 20 if "repetition_penalty" in options else 10]


@pytest.mark.skipif(not SHIM, reason="counted by the shim")
@pytest.mark.parametrize("parallel", [2, 16])
@pytest.mark.parametrize("options", SAMPLING, ids=["greedy", "random", "cuts"])
def test_waits_and_copies_of_a_batch(options: dict[str, Any], parallel: int, model: kvs.Model) -> None:
    """However many step together: one wait for their step, one for their ids."""
    words = ["waits", "to_host", "graphs", "captures", "to_device"]
    batch = model.generate_batch(["a cat"] * parallel, n_ctx=64, parallel=parallel, template=None, max_tokens=20, **options)
    with batch:
        for _ in range(5 * parallel):
            next(batch)
        before = [counted(word) for word in words]
        for _ in range(5 * parallel):
            next(batch)
        found = [counted(word) - n for word, n in zip(words, before, strict=True)]
    assert found == [10, 10, 5, 0, 10 if "repetition_penalty" in options else 5]


@pytest.mark.skipif(not SHIM, reason="counted by the shim")
@pytest.mark.parametrize(("n", "launches"), [(1, 1), (16, 1), (32, 1), (33, 2), (64, 2)])
def test_launches_of_a_draw(n: int, launches: int, model: kvs.Model, rng: np.random.Generator) -> None:
    with sessions_of(model, n, rng) as sessions:
        before = [counted(word) for word in ("waits", "kernels")]
        draw(sessions, [sampling({})] * n)
        assert [counted(word) - n for word, n in zip(("waits", "kernels"), before, strict=True)] == [1, launches]


@pytest.mark.skipif(not SHIM, reason="calls fail on purpose in the shim alone")
@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaMemcpy2DAsync", "cudaStreamSynchronize", "cudaSetDevice"])
def test_a_copy_that_finds_no_memory(call: str, tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told of a copy that is lost: whatever the error, the device is given up, and no file has what was not read."""

    def saved(session: kvs.Session) -> bytes:
        session.save(path)
        return path.read_bytes()

    def forked(session: kvs.Session) -> bytes:
        with session.fork() as fork:
            return saved(fork)

    path, failed = tmp_path / "s", 0
    for act in (saved, forked, lambda session: session.visual_masses().tobytes()):
        for n in (1, 2, 3, 20):
            with kvs.Model(tiny_pair.text, mmproj=False, device="cuda") as model, model.session(n_ctx=32) as session:
                session.feed([1, 2, 3])
                greedy(session, 3)
                expected = act(session)
                path.unlink(missing_ok=True)
                monkeypatch.setenv("KVS_SHIM_FAIL", f"{call}:{n}:2")
                try:
                    assert act(session) == expected
                except (kvs.DeviceError, kvs.OutOfMemoryError) as error:
                    failed += 1
                    given_up = "cuda:0 failed: " in str(error) and "cudaErrorMemoryAllocation" in str(error)
                    assert (given_up or act == forked) and not path.exists()  # a fork may find none for itself
                finally:
                    monkeypatch.delenv("KVS_SHIM_FAIL")
    assert failed


def test_threads_and_models_share_a_device(tiny_pair, rng: np.random.Generator) -> None:
    image = picture(rng)
    expected = caption(tiny_pair, image)
    found: list[list[int]] = []
    with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, device="cuda") as model:

        def run() -> None:
            with model.session(n_ctx=256, policy=SMOOTH) as session:
                session.feed([1, 5])
                session.feed_image(image)
                session.feed([6, 7])
                found.append(greedy(session, 6))

        threads = [threading.Thread(target=run) for _ in range(3)]
        threads += [threading.Thread(target=lambda: found.append(caption(tiny_pair, image))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [expected] * 5
