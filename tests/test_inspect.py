"""pykvsmooth inspect: its exit status, and options that it has no use for. What it prints is in test_cli.py."""

from collections.abc import Callable
from pathlib import Path

from conftest import Pair, Run


def test_the_status_says_whether_it_loads(run: Callable[..., Run], tiny_pair: Pair, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(Path(tiny_pair.text).read_bytes().replace(b"llama", b"mamba"))
    got = run("inspect", other)
    assert got.code == 1 and "loads: no: " in got.out and got.err == ""
    assert run("inspect", other, "--no-load").code == 0
    assert run("inspect", tiny_pair.text).code == 0
    got = run("inspect", tiny_pair.mmproj, "--model", tmp_path / "none.gguf")
    assert got.code == 1 and "none.gguf: no: " in got.out and "No such file" in got.out
    alone = tmp_path / "alone" / "mmproj.gguf"
    alone.parent.mkdir()
    alone.write_bytes(Path(tiny_pair.mmproj).read_bytes())
    got = run("inspect", alone)
    assert got.code == 0 and "loads: not known" in got.out
    assert "1 it does not load" in " ".join(run("inspect", "--help").out.split())


def test_a_model_is_for_an_mmproj(run: Callable[..., Run], tiny_pair: Pair) -> None:
    got = run("inspect", tiny_pair.text, "--model", "none.gguf")
    assert got.code == 2 and not got.out and "--model none.gguf: is for an mmproj" in got.err and tiny_pair.text in got.err
    got = run("inspect", tiny_pair.mmproj, "--model", tiny_pair.text, "--no-load")
    assert got.code == 2 and not got.out and "not allowed with" in got.err
