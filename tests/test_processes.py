"""Processes around the library: pools that spawn, subinterpreters, limits of threads, models that come and go, objects half built, and what
is still open when the interpreter ends."""

import gc
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import SEED, Pair
from test_errors import environment, run

import pykvsmooth as kvs

IMAGE = np.random.default_rng(SEED).integers(0, 256, (56, 56, 3), np.uint8)


def left() -> tuple[int, int, int]:
    """Threads, files, mappings of models."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return threading.active_count(), len(os.listdir("/proc/self/fd")), maps.count(".gguf")


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# ---- other processes ----

POOL = """
import multiprocessing, sys
import pykvsmooth as kvs

def caption(path):
    with kvs.Model(path, mmproj=False, threads=1) as model, model.session() as session:
        return [token.id for token in session.generate("a dog", max_tokens=3).result().tokens]

def use(model):
    return model.n_layer

if __name__ == "__main__":
    method, path = sys.argv[1:]
    with kvs.Model(path, mmproj=False) as model, multiprocessing.get_context(method).Pool(2) as pool:
        print(len({tuple(ids) for ids in pool.map(caption, [path] * 4)}))
        try:
            pool.map(use, [model])
        except TypeError as error:
            print(error)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_pools(tiny_pair: Pair, tmp_path: Path, method: str) -> None:
    """Each process loads a model of its own, also one that was forked; a Model can't be sent to it."""
    (tmp_path / "pool.py").write_text(POOL)
    command = [sys.executable, str(tmp_path / "pool.py"), method, tiny_pair.text]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch("1\n.*a Model can't be pickled.*make one in each process.*\n", result.stdout)


SUBINTERPRETER = """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
import pykvsmooth as kvs
kvs.Model(sys.argv[1], mmproj=False).close()
id = interpreters.create()
code = '''
try:
    import pykvsmooth as kvs
    kvs.Model({!r}, mmproj=False).close()
    print("works")
except ImportError as error:
    print("ImportError", error)
'''.format(sys.argv[1])
failed = (getattr(interpreters, "run_string", None) or interpreters.exec)(id, code)
assert not failed, failed
"""


def test_subinterpreters(tiny_pair: Pair) -> None:
    """They work, or an import says that it can't be: cffi and NumPy are what decides. The process goes on in both cases."""
    command = [sys.executable, "-c", SUBINTERPRETER, tiny_pair.text]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    if "ModuleNotFoundError: No module named '_xxsubinterpreters'" in result.stderr:
        pytest.skip("this Python has no subinterpreters")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(("works", "ImportError"))


# ---- threads that can't be started ----

FEW_THREADS = """
import asyncio, sys, threading
import numpy as np
import pykvsmooth as kvs
def refuse(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
with kvs.Model(sys.argv[1], mmproj=sys.argv[2], threads=1) as model, model.session() as session:
    image = np.zeros((56, 56, 3), np.uint8)
    print(session.generate("a dog", image=image, max_tokens=3).result().finish_reason)
    async def main():
        return [token async for token in session.agenerate("a dog", max_tokens=3)]
    try:
        asyncio.run(main())
    except kvs.KVSmoothError as error:
        print(type(error).__name__, error)
"""


def test_python_can_not_start_a_thread(tiny_pair: Pair) -> None:
    """Calls are made where they are asked for; a stream for asyncio, which needs one, is an error of ours."""
    command = [sys.executable, "-c", FEW_THREADS, tiny_pair.text, tiny_pair.mmproj]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch("(length|stop)\nDeviceError .*thread.*\n", result.stdout), result.stdout


# ---- many of them ----

MODELS = int(os.environ.get("KVS_MODELS", 60))


def test_models_come_and_go(tiny_pair: Pair) -> None:
    """KVS_MODELS=1000 makes a soak of it."""
    sizes, before = [], left()
    for i in range(MODELS):
        with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, threads=2) as model:
            session = model.session(n_ctx=64, policy=kvs.KVSmooth(layers=[1]))
            assert session.generate("a dog", image=IMAGE, max_tokens=2).result().finish_reason in ("length", "stop")
            if i % 3:
                session.close()
        if i in (MODELS // 3, MODELS - 1):
            sizes.append(resident())
    del model, session
    assert left()[1:] == before[1:] and left()[0] <= before[0] + 1  # the package's own thread
    keeps = "san" in os.environ.get("LD_PRELOAD", "")  # a sanitizer keeps what was freed for a while
    assert keeps or sizes[1] < 1.02 * sizes[0], sizes
    print(f"{MODELS} models: resident memory {sizes[0] >> 10} -> {sizes[1] >> 10} KiB")


# ---- the end of the interpreter ----

STILL_OPEN = {
    "feed": "threading.Thread(target=session.feed, args=([5] * 20000,), daemon=True).start()",
    "batch": "batch = model.generate_batch(['a', 'b'], n_ctx=900, max_tokens=None); next(batch)",
    "batch in a thread": """
batch = model.generate_batch(["a", "b"], n_ctx=30000, max_tokens=None)
threading.Thread(target=list, args=(batch,), daemon=True).start()
""",
    "encode": "threading.Thread(target=model.encode_image, args=(image,), daemon=True).start()",
    "half an async answer": """
stream = session.agenerate("a dog", max_tokens=None)
async def some():
    async for token in stream:
        if len(stream._stream._generation.tokens) > 2:
            global kept
            kept = stream
            return
asyncio.run(some())
""",
    "a task under way": """
async def endless():
    async for token in session.agenerate("a dog " * 4000, template=None):
        pass
async def main():
    asyncio.ensure_future(endless())
    await asyncio.sleep(0.05)
asyncio.run(main())
""",
    "a thread that is waited for": "threading.Thread(target=lambda: session.generate('a dog', max_tokens=300).result()).start()",
    "a cycle": "cycle = [session, session.generate('a dog')]; next(cycle[1]); cycle.append(cycle)",
}


@pytest.mark.parametrize("what", STILL_OPEN)
def test_quiet_end_with(what: str, tiny_pair: Pair) -> None:
    """Nothing is printed, nothing hangs."""
    code = f"""
import asyncio, threading, time
import numpy as np
import pykvsmooth as kvs
model = kvs.Model({tiny_pair.text!r}, mmproj={tiny_pair.mmproj!r}, threads=2)
model._end_ids = frozenset()
session, image = model.session(n_ctx=30000), np.zeros((56, 56, 3), np.uint8)
{STILL_OPEN[what].strip()}
time.sleep(0.02)
"""
    assert run(code) == ("", "")
