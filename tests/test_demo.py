"""pykvsmooth demo: the scenes of the box, two captions each, inventions marked."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Pair
from PIL import Image

import pykvsmooth as kvs
from pykvsmooth import box
from pykvsmooth.cli import command, demo, demo_plain, judge, main, terminal

SCENES = [
    {"image_id": "test-00001", "objects": ["dog", "hot dog"], "context": "a park", "caption": ""},
    {"image_id": "test-00002", "objects": ["car"], "context": "a street", "caption": ""},
]


@pytest.fixture
def packed(tmp_path: Path, tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> Path:
    shutil.copy(tiny_pair.text, tmp_path / box.TEXT)
    shutil.copy(tiny_pair.mmproj, tmp_path / "mmproj.gguf")
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "truth.jsonl").write_text("".join(json.dumps(scene) + "\n" for scene in SCENES))
    for scene in SCENES:
        Image.fromarray(rng.integers(0, 256, (56, 56, 3), np.uint8)).save(tmp_path / "scenes" / f"{scene['image_id']}.png")
    monkeypatch.setattr(box, "FOLDERS", (tmp_path,))
    monkeypatch.delenv("PYKVSMOOTH_MODEL", raising=False)
    monkeypatch.delenv("PYKVSMOOTH_MMPROJ", raising=False)
    return tmp_path


def run(capsys: pytest.CaptureFixture, *argv: str) -> tuple[int, str, str]:
    code = command.run(["demo", *argv])
    return code, *capsys.readouterr()


def judged(text: str, objects: list[str], monkeypatch: pytest.MonkeyPatch, colour: bool = False) -> tuple[str, list[str]]:
    """What is shown of a caption whose tokens are pieces of three characters, and the objects found in it."""
    ui = terminal.Ui()
    ui.out = terminal.Screen(io.StringIO())
    monkeypatch.setattr(terminal.Screen, "colour", property(lambda self: colour))
    painter = demo.Judged(ui, objects)
    for i in range(0, len(text), 3):
        painter.token(kvs.Token(text[i : i + 3], 5, -1.0, 1.0))
    painter.end()
    return ui.out.file.getvalue(), painter.nodes


def test_inventions_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, nodes = judged("A dog and a cat. On the left is a hot dog, and two cars", ["dog", "car"], monkeypatch)
    assert shown.split() == "A dog and a [cat.] On the left is a [hot] [dog,] and two cars".split()
    assert nodes == ["dog", "cat", "hot dog", "car"]


def test_nothing_to_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged("", ["dog"], monkeypatch) == ("\n", [])
    shown, nodes = judged("Nothing is here.\nNothing at all.", [], monkeypatch)
    assert shown == "Nothing is here.\nNothing at all.\n" and nodes == []


def test_demo(packed: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, err = run(capsys, "--max-tokens", "12")
    assert code == 0 and "in the box" in err and "smoothed: KVSmooth(" in err
    for scene in SCENES:
        assert f"{scene['image_id']}: {scene['context']}; there are {', '.join(scene['objects'])}" in out
    assert out.count("\nplain:\n") == out.count("\nsmoothed:\n") == 2
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["plain", "smoothed"] and "of 3 that are there" in out
    code, out, err = run(capsys, "--max-tokens", "6", "--policy", "kvsmooth,prunehal", "--scene", "1")
    assert code == 0 and "kvsmooth+prunehal: [KVSmooth(" in err and out.count("\nkvsmooth+prunehal:\n") == 1
    code, out, err = run(capsys, "--policy", "dscr", "--depth", "map.png")
    assert code == 2 and "one map for 2 pictures" in err


def test_one_scene(packed: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(capsys, "--max-tokens", "5", "--scene", "2", "--quiet")
    assert code == 0 and "test-00002" in out and "test-00001" not in out
    code, _, err = run(capsys, "--scene", "3")
    assert code == 2 and "there are 2" in err
    code, _, err = run(capsys, "--policy", "off")
    assert code == 2 and "--policy kvsmooth" in err


def test_tally() -> None:
    tally = judge.Tally()
    tally.add(SCENES[0], ["dog", "cat", "dog"])
    tally.add(SCENES[1], ["car"])
    assert tally.line(3) == "4 objects named, 1 invented (25%) in 1 of 2 captions; 2 of 3 that are there"
    assert judge.Tally().line(3).startswith("0 objects named, 0 invented (0%)")


def test_no_box(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(box, "FOLDERS", ())
    code, _, err = run(capsys)
    assert code == 1 and "no box" in err


def test_without_rich(packed: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same captions and counts, in plain text."""
    assert main.main(["demo"]) == 0
    rich = capsys.readouterr().out
    kept = ("pykvsmooth.cli.main", "pykvsmooth.cli.demo_plain", "pykvsmooth.cli.judge")
    for name in [name for name in sys.modules if name.startswith(("rich", "pykvsmooth.cli.")) and name not in kept]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoRich(), *sys.meta_path])
    assert main.main(["demo"]) == 0
    out, err = capsys.readouterr()
    bare = str.maketrans("", "", "[] \n")  # with rich the whole word is marked, and long ones break elsewhere
    assert out.translate(bare) == rich.translate(bare) and "pykvsmooth[cli]" in err
    assert main.main(["caption", "x.png"]) == 1 and "pykvsmooth[cli]" in capsys.readouterr().err
    monkeypatch.setattr(box, "FOLDERS", ())
    assert main.main(["demo"]) == 1 and "no box" in capsys.readouterr().err


class NoRich:
    def find_spec(self, name: str, *_: object) -> None:
        if name.split(".")[0] == "rich":
            raise ModuleNotFoundError("No module named 'rich'", name="rich")


def test_brackets() -> None:
    text = "A hot dog and a cat."
    nodes, spans = judge.judge(text, ["cat"])
    assert nodes == ["hot dog", "cat"] and demo_plain.bracketed(text, spans) == "A [hot dog] and a cat."
