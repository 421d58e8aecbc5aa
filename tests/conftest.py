"""Fixtures: random inputs are fresh in each run; KVS_SEED=N repeats the run whose seed a failure printed."""

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parent))  # the package that is installed is the one that is tested, if there is one; PYTHONPATH names another
SEED = int(os.environ.get("KVS_SEED", 0)) or int.from_bytes(os.urandom(4), "little")
os.environ["KVS_SEED"] = str(SEED)  # for the workers of pytest -n
if os.environ.get("KVS_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is here has its own run: make test-gpu
SHARED = HERE.parents[1] / "shared" / "data"

import tiny
from answers import SMOOTH
from devices import DEVICE, MODEL_SETS

import pykvsmooth as kvs
from pykvsmooth._native import library_path
from pykvsmooth.cli.main import main

os.environ["KVS_LIBRARY"] = str(library_path)  # for processes that tests start: python -c looks into the folder that it runs in first

# A shell that starts this in the background leaves SIGINT ignored, and the tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Pair:
    text: str
    mmproj: str
    weights: tiny.Weights


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def pytest_report_header() -> str:
    return f"KVS_SEED={SEED}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = (yield).get_result()
    if report.failed:
        report.sections.append(("seed", f"KVS_SEED={SEED} repeats this run"))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A stream of its own per test, so that a test alone sees the numbers that it saw in the whole run."""
    return np.random.default_rng([SEED, *request.node.name.encode()])


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(*tiny.write_pair(tmp_path_factory.mktemp("tiny"), seed=SEED))


def endless(pair: Pair, folder: Path) -> Pair:
    """The pair, but answers never end by themselves."""
    path = folder / "text.gguf"
    path.write_bytes(Path(pair.text).read_bytes())
    tiny.endless(path)
    return Pair(str(path), pair.mmproj, pair.weights)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("no folder shared/data beside the checkout")
    return SHARED


def _kernels(*names: str) -> list[str]:
    from pykvsmooth import _native

    return [name for name in names if _native.lib.kvs_test_isa(name.encode())]


@pytest.fixture(scope="session")
def cpu_isas() -> list[str]:
    """Kernel sets that this CPU runs."""
    return _kernels("base", "avx2", "avx512", "amx")


@pytest.fixture(scope="session")
def isas(cpu_isas: list[str]) -> list[str]:
    """Those, and "cuda" where a GPU, or tests/shim in its place, can be had: for what holds of every device. Tests loop over them, and
    say nothing of those that are not here: test_isas.py does, by a skip for each."""
    return cpu_isas + _kernels("cuda")


@pytest.fixture(scope="module", params=MODEL_SETS)
def model_isa(request: pytest.FixtureRequest) -> str | None:
    """Kernels for devices.open_model: each set in turn that the tests' device has."""
    return request.param


@pytest.fixture(scope="module")
def model(tiny_pair: Pair) -> Iterator[kvs.Model]:
    with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, device=DEVICE) as model:
        model._end_ids = frozenset()  # random weights may choose </s> anywhere
        yield model


@pytest.fixture(params=[None, SMOOTH], ids=["plain", "kvsmooth"])
def policy(request: pytest.FixtureRequest) -> kvs.KVSmooth | None:
    return request.param


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Three pictures and a text file."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("b10.png", "b9.jpg", "a.webp"):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def image(folder: Path) -> Path:
    return folder / "b10.png"


@dataclass
class Run:
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)

    @property
    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny_pair: Pair) -> Callable[..., Run]:
    """Runs a command in this process, with the tiny pair as the default model and a pipe on either side."""
    monkeypatch.setenv("PYKVSMOOTH_MODEL", tiny_pair.text)
    monkeypatch.setenv("PYKVSMOOTH_MMPROJ", tiny_pair.mmproj)

    def go(*argv: object, stdin: bytes = b"") -> Run:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        code = main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return Run(code, out, err)

    return go
