"""Want of memory: each allocation, mapping, stream, lock and thread of the library is refused, one after the other. What was asked for is
then an OutOfMemoryError, or there as if nothing had been; nothing is left behind, and the next try gives what it would have given.

Needs a build with KVS_INJECT (make inject), which counts its blocks of memory; make asan asks LeakSanitizer, too.
"""

import ctypes
import gc
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import SEED
from test_errors import environment
from test_loader import write_split

import pykvsmooth as kvs
from pykvsmooth import gguf
from pykvsmooth._native import Flag, ffi, lib, library_path, native_call

INJECTS = hasattr(ctypes.CDLL(str(library_path)), "kvs_test_fail_after")
pytestmark = pytest.mark.skipif(not INJECTS, reason="needs a build with KVS_INJECT: make inject")

FILES = tempfile.TemporaryDirectory(prefix="kvs-inject-")  # until the end
PROMPT = "describe the red car"
IMAGE = np.random.default_rng(SEED).integers(0, 256, (56, 56, 3), np.uint8)
DSCR = {"layers": "1:", "gamma": 0.5, "rope_mode": "pre", "coord_norm": "patch"}
SMOOTH = kvs.KVSmooth(layers=":", lambda_ref=0.6)
STACKS: dict[str, Any] = {
    "plain": None,
    "kvsmooth": kvs.KVSmooth(layers=":", smooth_prompt="last_token"),
    "dscr": kvs.DSCR(**DSCR),
    "in_layer": kvs.DSCR(**DSCR, phase="in_layer"),
    "prunehal": kvs.PruneHal(keep=0.5, times=2, index_scope="kv_head"),
    "stack": [kvs.DSCR(**DSCR, phase="after_prefill"), SMOOTH, kvs.PruneHal(keep=0.5, times=2, reversible=True)],
}


@contextmanager
def refusing(n: int, lasting: bool) -> Iterator[None]:
    lib.kvs_test_fail_after(n, lasting)
    try:
        yield
    finally:
        lib.kvs_test_fail_after(0, 0)


@contextmanager
def cancelling(n: int) -> Iterator[None]:
    lib.kvs_test_cancel_after(n)
    try:
        yield
    finally:
        lib.kvs_test_cancel_after(0)


def each_refusal(
    prepare: Callable[[], AbstractContextManager[Any]],
    act: Callable[[Any], Any],
    check: Callable[[Any, Any, Any], None],
    lasting: bool = False,
    errors: tuple[type[Exception], ...] = (kvs.OutOfMemoryError,),
    some: int = 0,
) -> int:
    """check(thing, what act(thing) gave or raised, what it gives undisturbed) for each refusal, all of them on things made afresh. Gives
    how many there were. some: not each, but so many, drawn at random."""
    expected = None

    def attempt(n: int) -> int:
        nonlocal expected
        with prepare() as thing:
            with refusing(n, lasting):
                try:
                    outcome = act(thing)
                except errors as error:
                    outcome = error
                calls = lib.kvs_test_calls()
            if n == 0:
                expected = outcome
            check(thing, outcome, expected)
        return calls

    calls = attempt(0)
    for n in np.random.default_rng(SEED).permutation(calls)[:some].tolist():
        attempt(n + 1)
    return calls if some else next(n for n in count(1) if n > attempt(n)) - 1


# ---- what is left ----


def left() -> tuple[int, ...]:
    """Blocks of the library, threads, files, and mappings of models of this process."""
    maps = Path("/proc/self/maps").read_text().count(".gguf")
    return lib.kvs_test_blocks(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), maps


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    native_call(gc.collect, Flag())  # the package's own thread is there now
    before = left()
    yield
    gc.collect()
    assert left() == before


def test_a_block_that_is_left_is_seen() -> None:
    before, out = left(), ffi.new("kvs_gguf **")
    assert lib.kvs_gguf_open(os.fsencode(pair("plain")[0]), out, ffi.NULL) == 0
    assert left()[0] > before[0] + 20 and left()[3] == before[3] + 1
    lib.kvs_gguf_free(out[0])
    assert left() == before


STAY = "import ctypes, os, sys; ctypes.CDLL(os.environ['KVS_LIBRARY'])"  # else it is unloaded before the report, which then names nobody
FORGETFUL = f"""{STAY}
from pykvsmooth._native import ffi, lib
def forget(path):
    out = ffi.new("kvs_gguf **")
    assert lib.kvs_gguf_open(path.encode(), out, ffi.NULL) == 0
    out[0] = ffi.NULL
forget(sys.argv[1])
"""
ALL_TESTS = f"{STAY}; import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', 'not sanitizer', *sys.argv[1:]]))"


needs_lsan = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "__lsan_do_leak_check"), reason="needs a library with AddressSanitizer: make asan, make test-cuda-asan"
)


def leaks(*code: str) -> list[str]:
    """What the library had asked for and nobody could reach when python -c code ended; what Python leaves is not ours to judge."""
    options = {"ASAN_OPTIONS": "detect_leaks=1:halt_on_error=1", "LSAN_OPTIONS": "exitcode=0"}
    result = subprocess.run([sys.executable, "-c", *code], capture_output=True, text=True, env=environment() | options)
    assert result.returncode == 0 and "LeakSanitizer" in result.stderr, result.stdout + result.stderr[-2000:]
    blocks = re.split(r"\n(?=(?:Direct|Indirect) leak of)", result.stderr)
    return [block for block in blocks if re.search(r"#[0-4] .*libkvs|#[0-4] .* kvs_", block)]


@needs_lsan
@pytest.mark.parametrize("what", ["planted", "these tests"])
def test_leak_sanitizer(what: str) -> None:
    ours = leaks(FORGETFUL, pair("plain")[0]) if what == "planted" else leaks(ALL_TESTS, __file__)
    assert bool(ours) == (what == "planted"), "\n".join(ours[:3])


# ---- a model ----


@cache
def pair(kind: str) -> tuple[str, str | None]:
    folder = Path(FILES.name) / kind
    folder.mkdir()
    if kind == "split":
        return str(write_split(folder)[0]), None
    small = {"n_layer": 2, "v_layer": 2, "n_vocab": None}
    wide = {"type": "q4_k", "v_type": "f16", "n_embd": 256, "n_ff": 256, "n_head": 8, "tied": True} if kind == "quantized" else {}
    rest = {"biases": True, "rope_scaling": ("llama3", [1.0] * 8), "type": "f16"} if kind == "biases" else {}
    return tiny.write_pair(folder, seed=SEED, load=False, **small, **wide, **rest)[:2]


def open_model(text: str, mmproj: str | None, threads: int | None = None) -> kvs.Model:
    model = kvs.Model(text, mmproj=mmproj or False, threads=threads)
    model._end_ids = frozenset()
    return model


def caption(session: kvs.Session, n: int = 6) -> list[int]:
    picture = IMAGE if session.model.has_vision else None
    return [token.id for token in session.generate(PROMPT, image=picture, max_tokens=n).result().tokens]


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("kind", ["plain", "split", "quantized", "biases"])
def test_load(kind: str, lasting: bool) -> None:
    """A thread that is refused is one thread less; without the files of a quota there is none."""
    files = pair(kind)

    def check(_: object, outcome: Any, expected: kvs.Model) -> None:
        if isinstance(outcome, Exception):
            assert type(outcome) is kvs.OutOfMemoryError and "out of memory" in str(outcome)
            return
        assert outcome.threads + outcome._info.threads_missing >= expected.threads
        with outcome, outcome.session(n_ctx=100) as session:
            assert len(caption(session, 2)) == 2

    assert each_refusal(nullcontext, lambda _: open_model(*files), check, lasting) > 100


def test_a_number_of_threads_that_can_not_be_had() -> None:
    def check(_: object, outcome: Any, __: object) -> None:
        if isinstance(outcome, kvs.Model):
            assert outcome.threads == 3
            outcome.close()
        elif isinstance(outcome, kvs.DeviceError):
            assert re.search("cannot start thread [23] of 3.*ask for fewer threads", str(outcome))
            seen.append(outcome)

    seen: list[Exception] = []
    each_refusal(nullcontext, lambda _: open_model(*pair("plain"), 3), check, errors=(kvs.OutOfMemoryError, kvs.DeviceError))
    assert len(seen) == 2


def test_inspection_of_a_file() -> None:
    text, _ = pair("plain")

    def check(_: object, outcome: Any, expected: Any) -> None:
        assert type(outcome) is kvs.OutOfMemoryError or outcome == expected

    each_refusal(nullcontext, lambda _: gguf.read_metadata(text), check)


# ---- a caption ----


@contextmanager
def fresh(policy: Any = None) -> Iterator[kvs.Session]:
    """A session of a model that has run nothing, so that no buffer is there yet."""
    with open_model(*pair("plain")) as model, model.session(n_ctx=128, policy=policy, seed=7) as session:
        yield session


@cache
def file_of(stack: str, n: int) -> Path:
    """A session behind a caption of n tokens; 0: a prompt that has not ended yet."""
    path = Path(FILES.name) / f"{stack}-{n}"
    with fresh(STACKS[stack]) as session:
        if n:
            caption(session, n)
        else:
            session.feed([1, 5])
            session.feed_image(IMAGE)
            session.feed([6, 7])
        session.save(path)
    return path


@contextmanager
def captioned(stack: str, n: int, back: int = 0) -> Iterator[kvs.Session]:
    """The same, in a model that has run nothing; less its last rows."""
    with open_model(*pair("plain")) as model, kvs.Session.load(model, file_of(stack, n), policy=STACKS[stack]) as session:
        session.rewind(back)
        yield session


@pytest.mark.parametrize("stack", STACKS)
def test_caption(stack: str) -> None:
    def check(session: kvs.Session, outcome: Any, expected: list[int]) -> None:
        if isinstance(outcome, Exception):
            assert session._handle._user is None
            assert caption(session) == expected
            with session.model.session(n_ctx=128, policy=session.policy) as other:
                assert caption(other) == expected
        else:
            assert outcome == expected

    each_refusal(lambda: fresh(STACKS[stack]), caption, check, lasting=stack == "stack")


# ---- single calls: all or nothing ----


def bits(session: kvs.Session) -> list[Any]:
    """All that can be seen of a session."""
    rows = [part.tobytes() for layer in range(session.model.n_layer) for part in (*session.kv(layer), session.positions(layer))]
    history = [part.tobytes() for part in (session.entropies(), session.strengths(), session.visual_masses())]
    last = [session.logits().tobytes()] if session.n_past else []
    return [session.n_past, session.n_generated, session.prunings, rows, history, last]


def forked(session: kvs.Session) -> list[Any]:
    with session.fork() as twin:
        return bits(twin)


def opened(session: kvs.Session) -> list[Any]:
    with session.model.session(n_ctx=77, policy=session.policy) as other:
        return bits(other)


def saved(session: kvs.Session) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        try:
            session.save(path)
        finally:
            left = os.listdir(folder)
        return left == ["s"]


def rewound(session: kvs.Session) -> int:
    session.rewind(2)
    return session.n_past


def sampled(session: kvs.Session) -> bytes:
    """The row that is the last now runs again, and the one before it, too."""
    session.rewind(1)
    return session.logits().tobytes()


ACTS: dict[str, Callable[[kvs.Session], Any]] = {
    "feed": lambda s: s.feed([5, 6, 7]),
    "feed_image": lambda s: s.feed_image(IMAGE[:, ::-1]),
    "step": lambda s: s.feed([5], generated=True),
    "end_prefill": lambda s: s.kv(0)[0].tobytes(),
    "restore": lambda s: s.restore(),
    "rewind": rewound,
    "reset": lambda s: s.reset(),
    "fork": forked,
    "save": saved,
    "session": opened,
    "encode_image": lambda s: s.model.encode_image(IMAGE[::-1]).tobytes(),
    "tokenize": lambda s: s.model.tokenize("a red car " * 40),
    "positions": lambda s: s.positions(1).tobytes(),
    "sample": lambda s: [t.id for t in s.generate("a dog", max_tokens=2, temperature=1.0, top_k=5, seed=3).result().tokens],
}
NOTHING_TO_ASK_FOR = ("restore", "rewind", "reset", "positions")
PARTLY = ("sample",)  # several calls: what the first of them did stays


@pytest.mark.parametrize("stack", ["stack", "kvsmooth", "in_layer"])
@pytest.mark.parametrize("act", ACTS)
def test_all_or_nothing(act: str, stack: str) -> None:
    if stack == "in_layer" and not act.startswith("feed"):
        pytest.skip("like the others")

    def prepare() -> AbstractContextManager[kvs.Session]:
        return captioned(stack, 0 if act == "end_prefill" else 6)

    with prepare() as session:
        before = [session.n_past, session.n_generated] if act == "end_prefill" else bits(session)

    def check(session: kvs.Session, outcome: Any, expected: Any) -> None:
        after.append(None if act in PARTLY else bits(session)) if not after else None
        if isinstance(outcome, Exception):
            if act == "end_prefill":
                assert [session.n_past, session.n_generated] == before
            elif act not in PARTLY:
                assert bits(session) == before
            assert ACTS[act](session) == expected
        else:
            assert outcome == expected
        assert act in PARTLY or bits(session) == after[0]

    after: list[Any] = []
    if act in NOTHING_TO_ASK_FOR:
        with prepare() as session, refusing(1, True):
            ACTS[act](session)
    else:
        each_refusal(prepare, ACTS[act], check)


@pytest.mark.parametrize("stack", ["plain", "kvsmooth", "stack"])
@pytest.mark.parametrize("back", [1, 5])
def test_rows_that_run_again(stack: str, back: int) -> None:
    """logits() behind a rewind: the last row runs again, where it is mixed the one before it, too, and with the rows that it saw. What a
    failure in the middle of it leaves is what was there."""

    def check(session: kvs.Session, outcome: Any, expected: bytes) -> None:
        if isinstance(outcome, Exception):
            rows = [part.tobytes() for layer in range(session.model.n_layer) for part in (*session.kv(layer), session.positions(layer))]
            assert rows == before
            assert session.logits().tobytes() == expected
        else:
            assert outcome == expected
        after.append(bits(session))
        assert after[-1] == after[0]

    with captioned(stack, 6, back) as session:
        before = [part.tobytes() for layer in range(session.model.n_layer) for part in (*session.kv(layer), session.positions(layer))]
    after: list[Any] = []
    assert each_refusal(lambda: captioned(stack, 6, back), lambda s: s.logits().tobytes(), check) > 10


# ---- cancellations, at each look at the flag ----


def cancelled_at(n: int, act: Callable[[Any], Any], thing: Any) -> tuple[Any, int]:
    with cancelling(n):
        try:
            outcome = act(thing)
        except kvs.CancelledError as error:
            outcome = error
        return outcome, lib.kvs_test_looks()


def some_moments(looks: int) -> list[int]:
    """All of them if they are few, else some from the beginning, the end and in between."""
    return sorted({*range(1, looks + 1)} if looks < 30 else {1, 2, looks, looks - 1, *np.linspace(3, looks, 20).astype(int).tolist()})


@pytest.mark.parametrize("stack", ["stack", "kvsmooth"])
@pytest.mark.parametrize("act", [*ACTS, "logits"])
def test_a_cancelled_call_has_changed_nothing(act: str, stack: str) -> None:
    if act in ("session", "tokenize", "positions"):
        pytest.skip("takes no time")

    def prepare() -> AbstractContextManager[kvs.Session]:
        return captioned(stack, 0 if act == "end_prefill" else 6, back=3 if act == "logits" else 0)

    def seen(session: kvs.Session) -> list[Any]:
        """Without a call that ends a prompt or runs rows again."""
        with session.fork() as twin:
            return [session.n_past, session.n_generated, session.prunings, bits(twin)]

    call = ACTS.get(act, lambda s: s.logits().tobytes())
    with prepare() as session:
        before = seen(session)
        expected, looks = cancelled_at(0, call, session)
        after = seen(session)
    cancelled = 0
    for n in some_moments(looks):
        with prepare() as session:
            outcome, _ = cancelled_at(n, call, session)
            if isinstance(outcome, Exception):
                cancelled += 1
                assert act in PARTLY or seen(session) == before
                outcome = call(session)
            assert outcome == expected and (act in PARTLY or seen(session) == after)
    assert cancelled or not looks or act in PARTLY


@pytest.mark.parametrize("kind", ["plain", "split"])
def test_a_cancelled_load(kind: str) -> None:
    def load(_: object) -> int:
        with open_model(*pair(kind), threads=2) as model:
            return model.n_layer

    expected, looks = cancelled_at(0, load, None)
    assert looks > 20
    for n in some_moments(looks):
        outcome, _ = cancelled_at(n, load, None)
        assert isinstance(outcome, kvs.CancelledError) or (outcome == expected and n >= looks)


def test_loading_a_session(tmp_path: Path) -> None:
    stack = STACKS["stack"]
    with captioned("stack", 6) as session:
        session.save(tmp_path / "s")
        before = bits(session)

    def load(session: kvs.Session) -> list[Any]:
        with kvs.Session.load(session.model, tmp_path / "s", policy=stack) as loaded:
            return bits(loaded)

    def check(session: kvs.Session, outcome: Any, _: Any) -> None:
        assert (outcome if isinstance(outcome, list) else load(session)) == before

    each_refusal(lambda: fresh(stack), load, check)


def each_refusal_of_a_batch(
    prepare: Callable[[], AbstractContextManager[kvs.Model]], requests: list[Any], some: int = 0, **options: Any
) -> None:
    """A request that fails alone leaves the others what they are. options: as generate_batch takes them."""

    def run(model: kvs.Model) -> dict[int, Any]:
        items = model.generate_batch(requests, parallel=len(requests), **options)
        ends = {index: item for index, item in items if not isinstance(item, kvs.Token)}
        return {index: item if isinstance(item, Exception) else [t.id for t in item.tokens] for index, item in ends.items()}

    def check(model: kvs.Model, outcome: Any, expected: Any) -> None:
        if isinstance(outcome, Exception):
            outcome = dict.fromkeys(range(len(requests)), outcome)
        for index, one in outcome.items():
            assert type(one) is kvs.OutOfMemoryError or one == expected[index]
        assert run(model) == expected and all(session.closed for session in model._sessions)

    each_refusal(prepare, run, check, some=some)


@pytest.mark.parametrize("on_error", ["raise", "yield"])
def test_batch(on_error: Any) -> None:
    requests = [{"prompt": PROMPT, "image": IMAGE}, {"prompt": "a dog", "temperature": 1.0, "seed": 3, "repetition_penalty": 1.2}]
    options = {"n_ctx": 100, "policy": SMOOTH, "on_error": on_error, "max_tokens": 4}
    each_refusal_of_a_batch(lambda: open_model(*pair("plain")), requests, **options)
