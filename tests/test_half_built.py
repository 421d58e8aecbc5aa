"""An exception (a Ctrl-C, say) at each line of what makes and unmakes objects: no model, session or thread stays behind, and nothing is
printed by a finalizer."""

import gc
import linecache
import os
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from conftest import SEED, Pair

import pykvsmooth as kvs
from pykvsmooth import _native, handles

HOME = str(Path(kvs.__file__).parent)
FILES = ("model.py", "handles.py", "session.py", "batch.py", "generation.py", "stream.py")
FREEING = ("_free_model", "_free_session", "release")  # what has begun to free is not struck itself
IMAGE = np.zeros((56, 56, 3), np.uint8)


class Struck(BaseException):
    """What a signal handler raises."""


class Strike:
    """Raises at the n-th line that runs in the package's files, of the functions that are not skipped. A with statement is not struck: its
    line comes up once more before its lock is given back, where no signal's handler ever runs (Python looks for signals at calls and
    at jumps back), and a lock that stays taken would be the test's own doing."""

    def __init__(self, n: int) -> None:
        self.n, self.lines, self.where = n, 0, ""

    def __call__(self, frame: FrameType, event: str, _: Any) -> "Strike | None":
        name = frame.f_code.co_filename
        if not (name.startswith(HOME) and name.endswith(FILES)) or frame.f_code.co_name in FREEING:
            return None
        if event == "line" and not linecache.getline(name, frame.f_lineno).lstrip().startswith("with "):
            self.lines += 1
            if self.lines == self.n:
                self.where = f"{name}:{frame.f_lineno}"
                raise Struck
        return self

    def __enter__(self) -> "Strike":
        sys.settrace(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Asserts that all native objects that were made are gone, each freed once."""
    alive: dict[str, int] = {"model": 0, "session": 0}
    lib = _native.lib

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(lib, name)

        def kvs_model_load(self, params: Any, out: Any, err: Any) -> int:
            code = lib.kvs_model_load(params, out, err)
            alive["model"] += not code
            return code

        def kvs_session_new(self, model: Any, params: Any, out: Any, err: Any) -> int:
            code = lib.kvs_session_new(model, params, out, err)
            alive["session"] += not code
            return code

        def kvs_session_fork(self, session: Any, out: Any, cancel: Any, err: Any) -> int:
            code = lib.kvs_session_fork(session, out, cancel, err)
            alive["session"] += not code
            return code

        def kvs_model_free(self, model: Any) -> None:
            alive["model"] -= model != _native.ffi.NULL
            lib.kvs_model_free(model)

        def kvs_session_free(self, session: Any) -> None:
            alive["session"] -= session != _native.ffi.NULL
            lib.kvs_session_free(session)

    from pykvsmooth import model, session

    for module in (model, session, handles):
        monkeypatch.setattr(module, "lib", Counting())
    complaints: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)

    def check() -> None:
        gc.collect()
        assert alive == {"model": 0, "session": 0} and not complaints, (alive, complaints)

    yield check


def each_line(act: Callable[[], Any], check: Callable[[], None], step: int) -> int:
    """Every step-th line, others in each run; KVS_EACH_LINE=1 goes through all of them."""
    step = int(os.environ.get("KVS_EACH_LINE", step))
    for n in count(1 + SEED % step, step):
        strike = Strike(n)
        try:
            with strike:
                act()
        except Struck:
            pass
        try:
            check()
        except AssertionError as error:
            raise AssertionError(f"struck at {strike.where}") from error
        if strike.lines < n:
            return n
    raise AssertionError


def test_a_model(tiny_pair: Pair, freed: Callable[[], None]) -> None:
    assert each_line(lambda: kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, threads=1).close(), freed, step=3) > 40


def test_a_model_and_its_sessions(tiny_pair: Pair, freed: Callable[[], None]) -> None:
    def use() -> None:
        with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, threads=1) as model:
            session = model.session(n_ctx=64, policy=kvs.KVSmooth(layers=[1]))
            session.generate("a dog", image=IMAGE, max_tokens=1).result()
            with session.fork():
                pass
            model.session(n_ctx=64)

    each_line(use, freed, step=37)
