"""Calls of the CUDA runtime that fail: a typed error, nothing left behind, and the next model on the same device is well, or on the CPU
where CUDA says that the process can't use it any more.

Over tests/shim, which makes a call fail and counts what is held."""

import logging
import re
from typing import Any

import numpy as np
import pytest
from conftest import SEED
from devices import revive, revived  # noqa: F401
from test_cuda import SHIM, counted, picture
from test_inject import STACKS, left, nothing_is_left  # noqa: F401
from test_inject_cuda import IMAGE, machine, open_model, pair

import pykvsmooth as kvs

pytestmark = pytest.mark.skipif(not SHIM, reason="calls fail on purpose in the shim alone")

CALLS = """cudaMalloc cudaMallocHost cudaMemcpyAsync cudaMemsetAsync cudaMemcpy2DAsync cudaStreamSynchronize cudaEventRecord
    cudaEventSynchronize cudaStreamBeginCapture cudaStreamEndCapture cudaGraphInstantiate cudaGraphLaunch cudaSetDevice
    cudaStreamCreateWithFlags cudaEventCreateWithFlags cudaDeviceGetAttribute cudaGetDeviceCount cudaMemGetInfo""".split()
SOME = 30


def work(kind: str) -> tuple[list[object], int]:
    """A life with all policies and a random answer, and how often the function that fails was called while it was loaded."""
    with machine(kind) as options, open_model(options) as model:
        calls = counted("asked")
        with model.session(n_ctx=64, policy=STACKS["stack"], seed=7) as session:
            answer = session.generate("a dog", image=IMAGE, max_tokens=4, temperature=1.0, top_k=5).result()
            seen: list[object] = [[token.id for token in answer.tokens], session.visual_masses().tobytes()]
            with session.fork() as fork:
                seen += [fork.prunings, fork.logits().tobytes()]
            session.restore()
            seen.append([part.tobytes() for part in session.kv(0)])
    return seen, calls


def held() -> list[int]:
    return [*left(), *(counted(word) for word in ("blocks", "pinned", "objects"))]


def test_what_is_held_is_seen() -> None:
    before = held()
    with machine("cuda") as options, open_model(options):
        blocks, pinned, objects = (n - m for n, m in zip(held()[-3:], before[-3:], strict=True))
        assert blocks >= 3 and pinned >= 1 and objects >= 3
    assert held() == before


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["cuda", "shared"])
def test_every_call_may_fail(kind: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th: each of them while a model is loaded, and later SOME at random, or all if they are not more; with the error that
    the function is likely to give, or with want of memory."""
    rng = np.random.default_rng([SEED, *call.encode()])
    monkeypatch.setenv("KVS_SHIM_FAIL", f"{call}:0")
    (expected, at_load), calls = work(kind), counted("asked")
    before, failed = held(), 0
    for n in [*range(1, at_load + 1), *(at_load + 1 + rng.permutation(calls - at_load)[:SOME])]:
        error = rng.choice(["", ":2"])
        monkeypatch.setenv("KVS_SHIM_FAIL", f"{call}:{n}{error}")
        try:
            assert work(kind)[0] == expected, f"{n}{error} of {calls}"
        except (kvs.DeviceError, kvs.OutOfMemoryError) as caught:
            failed += 1
            assert isinstance(caught, kvs.OutOfMemoryError) or "cuda" in str(caught) or "GPU" in str(caught), caught
        assert held() == before, f"{n}{error} of {calls}"
        revive()
    assert failed or call == "cudaMemGetInfo"  # then nobody knows what is free
    monkeypatch.delenv("KVS_SHIM_FAIL")
    assert work(kind)[0] == expected


# ---- errors that stay ----

ILLEGAL = r"an illegal memory access was encountered \(cudaErrorIllegalAddress\)"
FOR_GOOD = r'; restart the process, or load the model with device="cpu"$'


def fed(device: str, **options: Any) -> bytes:
    """The logits behind prompts long and short, and some tokens."""
    text, mmproj = pair()
    with kvs.Model(text, mmproj=mmproj, device=device, threads=1, **options) as model, model.session(n_ctx=64) as session:
        session.feed(list(range(3, 30)))
        session.feed([4, 5])
        for id in (7, 8, 9):
            session.feed([id], generated=True)
        return session.logits().tobytes()


@pytest.mark.usefixtures("revived")
def test_a_device_that_has_failed(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """No GPU can be had again in this process, nothing of the model is to be trusted; models on the CPU go on."""
    expected = fed("cpu")
    with machine("cuda") as options, open_model(options) as model, model.session(n_ctx=64) as session:
        session.feed([1, 2, 3])
        monkeypatch.setenv("KVS_SHIM_FAIL", "cudaStreamSynchronize:1")
        failed = rf"^cuda:0 failed: cudaStreamSynchronize: {ILLEGAL}; this model's last kernel was \S+.*, KVS_CUDA_SYNC=1 names"
        with pytest.raises(kvs.DeviceError, match=f"{failed}.*{FOR_GOOD}"):
            session.feed([4], generated=True)
        monkeypatch.delenv("KVS_SHIM_FAIL")
        for what in (lambda: session.feed([4], generated=True), lambda: session.kv(0), lambda: model.encode_image(picture(rng))):
            with pytest.raises(kvs.DeviceError, match=f"{failed}.*{FOR_GOOD}"):
                what()
    for device in ("cuda", "cuda:0"):
        why = rf'device "{device}" can\'t be had: CUDA can\'t be used until this process is restarted: .*{ILLEGAL}; use "cpu" or "auto"'
        with pytest.raises(kvs.DeviceError, match=why):
            fed(device)
    assert fed("cpu") == expected
    text, _ = pair()
    with caplog.at_level(logging.INFO, "pykvsmooth"), kvs.Model(text, mmproj=False, device="auto") as other:
        assert other.device == "cpu" and other.n_gpu_layers == 0
        assert re.match(r"no GPU: CUDA can't be used until this process is restarted: .*cudaErrorIllegalAddress\); ", other.device_reason)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.usefixtures("revived")
def test_an_error_that_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fed("cuda")
    monkeypatch.setenv("KVS_SHIM_FAIL", "cudaStreamSynchronize:3:999")
    with pytest.raises(kvs.DeviceError, match=r"^cuda:0 failed: .*cudaErrorUnknown\); load the model again$"):
        fed("cuda")
    monkeypatch.delenv("KVS_SHIM_FAIL")
    assert fed("cuda") == expected


@pytest.mark.usefixtures("revived")
@pytest.mark.parametrize("kernel", ["row_kernel", "decode_kernel", "keys_kernel"])
@pytest.mark.parametrize("error", ["", ":716", ":719"])
def test_the_kernel_that_failed_is_named(kernel: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen where the host waits next, far behind it; with KVS_CUDA_SYNC=1 there is nothing between."""
    for sync in ("0", "1"):
        monkeypatch.setenv("KVS_CUDA_SYNC", sync)
        monkeypatch.setenv("KVS_SHIM_FAIL", f"{kernel}:2{error}")
        with pytest.raises(kvs.DeviceError, match=FOR_GOOD) as caught:
            fed("cuda")
        named = str(caught.value).partition("failed: ")[2]
        if sync == "1":
            assert re.match(rf"\(?{kernel}\b[^:]*: ", named) and "last kernel" not in named
        else:
            assert named.startswith("cuda") and "; this model's last kernel was " in named and "KVS_CUDA_SYNC=1 names" in named
        monkeypatch.delenv("KVS_SHIM_FAIL")
        revive()


def test_waiting_for_each_kernel_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fed("cuda")
    graphs, waits = counted("graphs"), counted("waits")
    fed("cuda")
    graphs, waits = counted("graphs") - graphs, counted("waits") - waits
    monkeypatch.setenv("KVS_CUDA_SYNC", "1")
    before = counted("graphs"), counted("waits"), counted("kernels")
    assert fed("cuda") == expected and graphs
    assert counted("graphs") == before[0] and counted("waits") - before[1] > counted("kernels") - before[2] > waits
