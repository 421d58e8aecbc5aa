"""Model files that shrink, change or are replaced while they are in use: a typed error, a session as it was, and a process that lives.

Each case runs in a process of its own: a page of a file that is gone is SIGBUS, and without the handler the process would end.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import Pair
from test_errors import environment

import pykvsmooth as kvs

PRELUDE = """
import os, random, sys, threading, time
import numpy as np
import pykvsmooth as kvs
text, mmproj = sys.argv[1:3]
picture = np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)

def refused(call, *words):
    try:
        call()
    except kvs.ModelFormatError as error:
        assert type(error) is kvs.ModelFormatError and all(word in str(error) for word in words), error
        assert error.path and os.path.basename(error.path) in str(error)
        return
    raise AssertionError("no error")
"""


@pytest.fixture
def pair(tiny_pair: Pair, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of one's own."""
    return tuple(Path(shutil.copy(path, tmp_path)) for path in (tiny_pair.text, tiny_pair.mmproj))


def child(code: str, pair: tuple[Path, Path], *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", PRELUDE + textwrap.dedent(code), *map(str, pair)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**environment(), **env}, check=False)


def survives(code: str, pair: tuple[Path, Path]) -> None:
    result = child(code, pair)
    assert (result.returncode, result.stderr) == (0, ""), result


def test_a_file_that_shrinks_during_an_answer(pair: tuple[Path, Path]) -> None:
    survives(
        """
model = kvs.Model(text, mmproj=mmproj, threads=2)
model._end_ids = frozenset()
size = os.path.getsize(text)
session = model.session()
stream = session.generate("a dog", max_tokens=100)
for _ in range(5):
    next(stream)
rows = session.n_past
os.truncate(text, 4096)
refused(lambda: list(stream), f"the file shrank from {size} to 4096 bytes while in use")
assert session.n_past == rows, (session.n_past, rows)
before = session.kv(0)
refused(lambda: session.feed([5, 6, 7]), "shrank")
assert session.n_past == rows and all(np.array_equal(a, b) for a, b in zip(before, session.kv(0)))
refused(lambda: list(model.session().generate("a")), "shrank")  # every session of the model, and for good
os.truncate(text, size)
refused(lambda: list(model.session().generate("a")), "shrank")
assert model.encode_image(picture).shape  # the other file is whole
model.close()
""",
        pair,
    )


def test_a_file_that_shrinks_in_the_middle_of_a_pass(pair: tuple[Path, Path]) -> None:
    survives(
        """
for delay in (0.02, 0.05, 0.1):
    data = open(text, "rb").read()
    with kvs.Model(text, mmproj=False, threads=2) as model, model.session(n_ctx=20_000) as session:
        session.feed([5, 6, 7])
        before = session.kv(1)
        threading.Timer(delay, os.truncate, (text, 300_000)).start()
        refused(lambda: session.feed([5] * 15_000), "to 300000 bytes while in use")
        assert session.n_past == 3 and all(np.array_equal(a, b) for a, b in zip(before, session.kv(1)))
    with open(text + ".new", "wb") as file:
        file.write(data)
    os.replace(text + ".new", text)
""",
        pair,
    )


def test_a_file_that_shrinks_under_an_encode(pair: tuple[Path, Path]) -> None:
    survives(
        """
model = kvs.Model(text, mmproj=mmproj, threads=2)
threading.Timer(0.02, os.truncate, (mmproj, 100_000)).start()

def encode():
    for i in range(5000):
        model.encode_image(np.full((8, 8, 3), i % 256, np.uint8) ^ np.uint8(i // 256))
refused(encode, "mmproj.gguf", "to 100000 bytes while in use")
refused(lambda: list(model.session().generate("a", image=picture ^ np.uint8(255))), "shrank")
assert len(model.session().generate("a dog", max_tokens=3).result().tokens) <= 3
""",
        pair,
    )


def test_a_file_that_shrinks_at_any_moment_of_a_load(pair: tuple[Path, Path]) -> None:
    survives(
        """
data = {path: open(path, "rb").read() for path in (text, mmproj)}
random.seed(7)

def write():
    for path, content in data.items():
        with open(path, "wb") as file:
            file.write(content)

for _ in range(2):  # the second time says how long it takes
    begin = time.perf_counter()
    kvs.Model(text, mmproj=mmproj, threads=1).close()
    took = time.perf_counter() - begin
failed = loaded = rounds = 0
while rounds < 30 or (failed < 5 and rounds < 1000):
    rounds += 1
    write()
    victim = random.choice([text, mmproj])
    timer = threading.Timer(random.uniform(0, took), os.truncate, (victim, random.choice([0, 1, 5000, 100_000, len(data[victim]) - 1])))
    timer.start()
    try:
        model = kvs.Model(text, mmproj=mmproj, threads=1)
    except kvs.ModelFormatError:
        failed += 1
    else:
        loaded += 1
        timer.join()
        refused(lambda: list(model.session().generate("a dog", image=picture)), "while in use")
        model.close()
    timer.join()
assert failed >= 5, (failed, loaded)
""",
        pair,
    )


def test_threads_that_share_a_file_that_shrinks(pair: tuple[Path, Path]) -> None:
    survives(
        """
model = kvs.Model(text, mmproj=False, threads=2)
model._end_ids = frozenset()
ends = []

def work(i):
    session = model.session(n_ctx=4096, policy=kvs.KVSmooth(layers=[1]) if i % 2 else None)
    try:
        list(session.generate("a dog " * (100 * i + 1), max_tokens=3000))
    except kvs.ModelFormatError as error:
        ends.append(str(error))
threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
for thread in threads:
    thread.start()
time.sleep(0.1)
os.truncate(text, 200_000)
for thread in threads:
    thread.join()
assert len(ends) == 6 and all("to 200000 bytes while in use" in end for end in ends), ends
""",
        pair,
    )


def test_a_file_that_changes(pair: tuple[Path, Path]) -> None:
    survives(
        """
for grow in (False, True):
    with kvs.Model(text, mmproj=mmproj) as model, model.session() as session:
        list(session.generate("a dog", max_tokens=2))
        rows = session.n_past
        time.sleep(0.02)  # the clock of file times ticks no faster
        with open(text, "r+b") as file:
            file.seek(0 if grow else -100, 2)
            file.write(b"x")
        refused(lambda: session.feed([5]), "the file has changed since it was loaded", "renaming")
        assert session.n_past == rows
with kvs.Model(text, mmproj=mmproj) as model:  # as it is now, it is as good as any
    list(model.session().generate("a dog", max_tokens=2))
""",
        pair,
    )


def test_a_file_that_is_replaced_or_removed(pair: tuple[Path, Path]) -> None:
    """The file that was opened goes on under no name."""
    with kvs.Model(pair[0], mmproj=pair[1], device="cpu") as model, model.session() as session:
        first = session.generate("a dog", max_tokens=6, temperature=0).result().text
        other = pair[0].with_suffix(".new")
        other.write_bytes(b"another model")
        other.replace(pair[0])
        assert session.generate("a dog", max_tokens=6, temperature=0).result().text == first
        pair[0].unlink()
        pair[1].unlink()
        assert session.generate("a dog", max_tokens=6, temperature=0).result().text == first
        assert model.encode_image(np.zeros((9, 9, 3), np.uint8)).shape == (model.n_image, model.n_embd)


INSPECT = """
from pykvsmooth import gguf

def inspect():
    with gguf.open_file(text) as file:
        os.truncate(text, 64)
        gguf.keys_of(file, max_array=1 << 20)
refused(inspect, "shrank from", "to 64 bytes")
"""


def test_a_file_that_shrinks_while_it_is_inspected(pair: tuple[Path, Path]) -> None:
    survives(INSPECT, pair)


def test_without_the_handler_it_is_the_end(pair: tuple[Path, Path]) -> None:
    result = child(INSPECT, pair, KVS_SIGBUS="0")
    assert result.returncode == -signal.SIGBUS or "Sanitizer: BUS" in result.stderr


FOREIGN = """
import mmap
{setup}
model = kvs.Model(text, mmproj=False)
{later}
with open(text + ".other", "wb+") as file:
    file.truncate(8192)
    view = mmap.mmap(file.fileno(), 8192)
    file.truncate(0)
    print("reading", flush=True)
    view[0]
"""


@pytest.mark.parametrize(
    ("setup", "later"),
    [
        ("", ""),
        ("import faulthandler; faulthandler.enable()", ""),
        ("import faulthandler; faulthandler.enable()", "faulthandler.disable()"),
    ],
    ids=["alone", "faulthandler", "faulthandler off"],
)
def test_a_fault_that_is_not_ours_goes_on(pair: tuple[Path, Path], setup: str, later: str) -> None:
    result = child(FOREIGN.format(setup=setup, later=later), pair)
    assert result.stdout == "reading\n" and result.returncode != 0
    if "Sanitizer" not in result.stderr:
        assert result.returncode == -signal.SIGBUS
        assert ("Fatal Python error: Bus error" in result.stderr) == (bool(setup) and not later)


def test_a_signal_that_was_sent_goes_on(pair: tuple[Path, Path]) -> None:
    kill = "kvs.Model(text, mmproj=False); os.kill(os.getpid(), signal.SIGBUS); print('alive')"
    assert child("import signal\n" + kill, pair).stdout == ""
    assert child("import signal; signal.signal(signal.SIGBUS, signal.SIG_IGN)\n" + kill, pair).stdout == "alive\n"
    heard = child("import signal; signal.signal(signal.SIGBUS, lambda *_: print('heard'))\n" + kill, pair)
    assert sorted(heard.stdout.split()) == ["alive", "heard"]


@pytest.mark.skipif("san" in os.environ.get("LD_PRELOAD", ""), reason="what was there before is the sanitizer's, not the standard action")
def test_the_handler_comes_back(pair: tuple[Path, Path]) -> None:
    """faulthandler.disable() puts back the standard action, which was there before it; the next model sees to that."""
    survives(
        "import faulthandler; faulthandler.enable()\nkvs.Model(text, mmproj=False).close()\nfaulthandler.disable()\n" + INSPECT,
        pair,
    )


@pytest.mark.skipif("tsan" in os.environ.get("LD_PRELOAD", ""), reason="TSan has no threads in a forked child")
def test_a_child_that_loads_its_own(pair: tuple[Path, Path]) -> None:
    survives(
        """
parent = kvs.Model(text, mmproj=False)
pid = os.fork()
if pid == 0:
    try:
        own = kvs.Model(mmproj=False, path=text)
        session = own.session()
        os.truncate(text, 5000)
        refused(lambda: list(session.generate("a")), "to 5000 bytes while in use")
        os._exit(0)
    finally:
        os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
refused(lambda: list(parent.session().generate("a")), "while in use")
""",
        pair,
    )


def test_many_models_one_after_another(pair: tuple[Path, Path]) -> None:
    """Neither descriptors nor mappings are left."""

    def state() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().count(str(pair[0].parent))
        return len(os.listdir("/proc/self/fd")), maps

    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc here")
    before = state()
    for _ in range(20):
        models = [kvs.Model(pair[0], mmproj=pair[1], device="cpu") for _ in range(3)]
        for model in models:
            model.close()
    assert state() == before
