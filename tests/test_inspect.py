"""pykvsmooth inspect: its exit status, and options that it has no use for. What it prints of files is in test_cli.py."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Pair, Run
from devices import DEVICE

import pykvsmooth as kvs


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


def memory(text: str, unit: str) -> float:
    return float(text) * {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit]


def test_the_memory_that_it_takes(run: Callable[..., Run], tiny_pair: Pair) -> None:
    got = run("inspect", tiny_pair.mmproj, "--model", tiny_pair.text, "--device", DEVICE)
    part = r"([0-9.]+) (B|KiB|MiB|GiB)"
    own = f", {part} for the device itself" if DEVICE != "cpu" else "()()"
    free = "were free" if DEVICE != "cpu" else "are available"
    parts = rf"{part} weights, {part} cache of (\d+) rows, {part} working space{own}"
    said = re.search(rf"; memory {part} \({parts}\), {part} {free}$", got.out, re.M)
    assert got.code == 0 and said, got.out
    with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, device=DEVICE) as model:
        plan = model.memory_plan
        assert said[7] == str(plan.n_ctx) == str(min(model.n_ctx_train, 4096))
        reckoned = [memory(*said.groups()[i : i + 2]) for i in (0, 2, 4, 7)]
        assert reckoned == pytest.approx([plan.needed, plan.weights, plan.cache, plan.work], rel=0.05)
        heads = 2 * model.n_kv_head * model.head_dim * 2  # K and V in F16; and three numbers beside them
        assert plan.cache == model.n_layer * plan.n_ctx * (heads + 12)
        if DEVICE == "cpu":
            assert plan.weights == model.weight_bytes and not plan.reserve and not plan.free
        else:
            assert plan.free > plan.needed and 0.9 < plan.weights / model.weight_bytes < 1.3 and f"{DEVICE}:" in model.device
    got = run("inspect", tiny_pair.text, "--no-load", "--device", "cpu")
    assert got.code == 2 and not got.out and "not allowed with --no-load" in got.err
    got = run("inspect", tiny_pair.text, "--device", "cuda:99")
    assert got.code == 1 and "loads: no: " in got.out
