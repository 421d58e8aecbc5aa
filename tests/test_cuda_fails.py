"""Calls of the CUDA runtime that fail: a typed error, nothing left behind, and the next model on the same device is well.

Over tests/shim, which makes a call fail and counts what is held."""

import numpy as np
import pytest
from conftest import SEED
from test_cuda import SHIM, counted
from test_inject import STACKS, left, nothing_is_left  # noqa: F401
from test_inject_cuda import IMAGE, machine, open_model

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
    assert failed or call == "cudaMemGetInfo"  # then nobody knows what is free
    monkeypatch.delenv("KVS_SHIM_FAIL")
    assert work(kind)[0] == expected
