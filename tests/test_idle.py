"""What a model costs while it does nothing: no processor time, and one copy of its weights in memory. In processes of their own, because
both are counted by process."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
from conftest import Pair

IDLE = """
import sys, time
import pykvsmooth as kvs
with kvs.Model(sys.argv[1], mmproj=False, device="cpu", threads=int(sys.argv[2])) as model, model.session(n_ctx=256) as session:
    model._end_ids = frozenset()
    def idle():
        begin = time.process_time()
        time.sleep(0.5)
        return time.process_time() - begin
    session.generate("a dog", max_tokens=20).result()
    idle_after = min(idle() for _ in range(2))
    stream = session.generate("the cat", max_tokens=20)
    next(stream)
    print(idle_after, idle())
"""
MEMORY = """
import sys
import pykvsmooth as kvs
def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name + ":"))
def use(path):
    with kvs.Model(path, mmproj=False, device="cpu", threads=2) as model, model.session(n_ctx=64) as session:
        session.feed([1, 300, 301, 302, 303, 304])
        session.feed([305], generated=True)
        return kilobytes("VmHWM"), kilobytes("VmRSS")
_, before = use(sys.argv[1])
print(*(kilobytes - before for kilobytes in use(sys.argv[2])))
"""


def child(code: str, *arguments: object) -> list[float]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    return [float(word) for word in done.stdout.split()]


@pytest.mark.parametrize("threads", [2, 5])
def test_an_idle_model_takes_no_processor_time(threads: int, tiny_pair: Pair) -> None:
    """Behind an answer, and in the middle of one that nobody reads: threads that went on spinning would take all of it."""
    after, amid = child(IDLE, tiny_pair.text, threads)
    assert after < 0.02 and amid < 0.02


def write_large(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Some 40 MB of Q4_K, soon written: tensors of a shape hold the same blocks. Gives the bytes of matrices."""
    stored = tiny.stored

    @functools.cache
    def once(shape: tuple[int, ...], kind: object, std: float, mean: float) -> object:
        return stored(np.random.default_rng(1), shape, kind, std, mean)

    monkeypatch.setattr(tiny, "stored", lambda _rng, shape, kind, std, mean=0.0: once(shape, kind, std, mean))
    shape = {"n_layer": 6, "n_embd": 1024, "n_head": 8, "n_head_kv": 8, "n_ff": 2816}
    tiny.write_text(path, np.random.default_rng(1), type="q4_k", types={"token_embd": "f32"}, **shape)
    return sum(t.n_bytes for t in gguf.GGUFReader(path).tensors if t.tensor_type == gguf.GGMLQuantizationType.Q4_K)


@pytest.mark.slow  # a sanitizer's own memory would be counted, too: these runs leave out what is slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/status is Linux's")
def test_weights_are_in_memory_once(tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are brought into an order of their own in the first pass, matrix by matrix, and the file's pages are given back at once: neither
    at the end nor at any time before are there two copies. What a process needs beside them, a small model has brought in before."""
    weights = write_large(tmp_path / "large.gguf", monkeypatch)
    peak, now = (kilobytes * 1024 / weights for kilobytes in child(MEMORY, tiny_pair.text, tmp_path / "large.gguf"))
    print(f"{weights >> 20} MB of weights: peak {peak:.2f}, now {now:.2f}")
    assert 0.7 < now <= peak < 1.5
