"""What a model says, what a file holds and what it is called reach a terminal as text. And what the package never does with a file."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
from gguf import GGUFReader
from PIL import Image
from test_cli_process import Window

import pykvsmooth as kvs
from pykvsmooth.cli.records import dumps
from pykvsmooth.depth import read_map

ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    "\x1b[31mA",
    "\x1b]0;owned\x07B",
    "\x1b]8;;http://e.example\x1b\\C",
    "\rD",
    "\x08\x7fE",
    "\x9b2JF",
    "\x90qG\x9c",
    "\u202eH",
    "\u2066I\u2069",
    "[red]J[/red]",
    "[link=http://e.example]K[/link]",
    "[/]L",
    ":smile:M",
    "\u2028N\x85",
    "\x00O",
]
# what a terminal would obey if it came from a stranger; rich's own colours, erasures and line feeds are none of these
OBEYED = [word.encode() for word in WORDS if not word.startswith(("[", ":", "\r"))] + [
    b"\x1b]",
    b"\x07",
    b"\xc2\x9b",
    b"\xe2\x80\xae",
    b"\x90",
]
NAME = "p\x1b[31m\x1b]0;x\x07\n\u202e[red]q.png"


@dataclass
class Hostile:
    text: str
    mmproj: str
    picture: Path
    environment: dict[str, str]

    def show(self, *arguments: object, typed: bytes = b"") -> str:
        """All that a terminal is sent."""
        window = Window([sys.executable, "-m", "pykvsmooth", *map(str, arguments)], self.environment)
        if typed:
            window.read(lambda shown: shown.endswith(b"> "))
            window.type(typed)
        window.end()
        for obeyed in OBEYED:
            assert obeyed not in window.shown, (obeyed, window.shown)
        return window.shown.decode()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hostile]:
    """A pair that has nothing else to say, and a picture whose name is no better."""
    folder = tmp_path_factory.mktemp("hostile")
    tokens, scores, kinds = tiny.vocabulary()
    normal = [i for i, kind in enumerate(kinds) if kind == 1]
    for i, at in enumerate(normal):
        tokens[at] = WORDS[i % len(WORDS)] + str(i)
    original, tiny.vocabulary = tiny.vocabulary, lambda n_vocab=None: (tokens, scores, kinds)
    try:
        text, mmproj, _ = tiny.write_pair(folder, seed=12, load=False, type="f32")
    finally:
        tiny.vocabulary = original
    weights = next(t for t in GGUFReader(text).tensors if t.name == "output.weight")
    output = np.memmap(text, np.float32, "r+", weights.data_offset, tuple(weights.shape[::-1]))
    output[[i for i in range(len(tokens)) if i not in normal]] = 0  # the best of all logits is above 0
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(folder / "plain.png")
    os.rename(folder / "plain.png", folder / NAME)
    environment = os.environ | {
        "PYKVSMOOTH_MODEL": text,
        "PYKVSMOOTH_MMPROJ": mmproj,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TERM": "xterm-256color",
        "PYTHONIOENCODING": "utf-8",
    }
    environment.pop("NO_COLOR", None)
    yield Hostile(text, mmproj, folder / NAME, environment)


@pytest.mark.parametrize("how", [[], ["--heat", "--strengths"], ["--compare"], ["--parallel", "2"]], ids=" ".join)
def test_captions(hostile: Hostile, how: list[str]) -> None:
    shown = hostile.show("caption", *[hostile.picture] * 3, "--max-tokens", 60, "--temperature", 1, "--seed", 5, *how)
    assert len(re.findall(r"\\x1b|\\x9b|\\u202e|\\x90|\\x07|\\x85|\\r|\\x00", re.sub(r"\s", "", shown))) > 20
    assert any(part in shown for part in ("[red", "red]", "[/red", "[link", "[/lin", "http:", "[/]"))  # no markup; columns cut words


def test_json_is_json_and_harmless(hostile: Hostile) -> None:
    shown = hostile.show("caption", hostile.picture, "--max-tokens", 60, "--temperature", 1, "--json", "--seed", 5)
    lines = [json.loads(line) for line in shown.replace("\r\n", "\n").split("\n") if line.startswith("{")]
    assert lines[-1]["image"] == str(hostile.picture)
    assert lines[-1]["caption"] == "".join(line["text"] for line in lines[:-1])
    piped = subprocess.run(
        [
            sys.executable,
            "-m",
            "pykvsmooth",
            "caption",
            hostile.picture,
            "--max-tokens",
            "60",
            "--temperature",
            "1",
            "--json",
            "--seed",
            "5",
        ],
        env=hostile.environment,
        capture_output=True,
        check=True,
    )
    assert [json.loads(line) for line in piped.stdout.decode().splitlines()][-1]["caption"] == lines[-1]["caption"]


def test_a_record_is_the_same_text_to_a_reader() -> None:
    record = {"image": NAME + "\udcff", "caption": "".join(WORDS) + "é中😀", "x": float("nan")}
    line = dumps(record)
    assert json.loads(line) == record | {"x": None}
    assert "é中😀" in line and not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", line)


def test_chat(hostile: Hostile) -> None:
    assert "\\x" in hostile.show("chat", "--max-tokens", 40, "--temperature", 1, typed=b"hello\n/image \\x1b[31m\n/quit\n")


def test_errors_and_logs(hostile: Hostile, tmp_path: Path) -> None:
    missing = tmp_path / NAME
    for arguments in (
        ["caption", missing],
        ["caption", hostile.picture, "--model", missing],
        ["caption", missing, "--debug"],
        ["eval", "chair", "--captions", missing, "--truth", missing],
        ["caption", hostile.picture, f"--{NAME}"],
    ):
        shown = hostile.show(*arguments)
        assert "\\x1b[31m" in shown or "?[31m" in shown, shown


def test_inspect(hostile: Hostile, tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "\x1b[31mllama")
    writer.add_string("general.name", NAME)
    writer.add_array("words", WORDS)
    writer.add_string("words.red", "[red]x[/red]")
    writer.add_tensor("t", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shown = hostile.show("inspect", path)
    assert "[red]x[/red]" in shown and "\\x1b[31m" in shown
    data = path.read_bytes()
    path.write_bytes(data.replace(b"general.name", b"general\x1b[31m"))  # names of keys and tensors must be printable
    assert "printable ASCII" in hostile.show("inspect", path)


# ---- what is never done ----


def test_no_pickle_no_eval() -> None:
    """Nothing in the package turns data into code: the names that could are not in it."""
    forbidden = {"pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "runpy", "code", "codeop"}
    builtins = {"eval", "exec", "compile", "__import__"}
    for path in sorted((ROOT / "pykvsmooth").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not forbidden & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else ""
                assert called not in builtins, (path, node.lineno)
                for keyword in node.keywords:
                    allows = keyword.arg == "allow_pickle" and not (
                        isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                    )
                    shell = keyword.arg == "shell"
                    assert not allows and not shell, (path, node.lineno)


def test_numpy_files_hold_no_objects(tmp_path: Path) -> None:
    """np.load() would unpickle them, if it were asked to."""
    np.save(tmp_path / "depth.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(kvs.ImageError):
        read_map(tmp_path / "depth.npy")
