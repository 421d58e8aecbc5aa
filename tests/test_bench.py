"""pykvsmooth bench: what it counts, its statistics, and the command on small models. test_bench_child.py has its other processes,
test_bench_peer.py llama.cpp beside it."""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from conftest import Pair, Run
from PIL import Image

import pykvsmooth as kvs
from pykvsmooth import box, machine
from pykvsmooth._native import library_path
from pykvsmooth.bench import STAGES, Bench, Figure, Peer, Settings, plot, ratio_interval, record, roofs, spread, stages, work
from pykvsmooth.bench.child import run_child
from pykvsmooth.bench.counter import Instructions
from pykvsmooth.bench.origin import commit, compiler
from pykvsmooth.bench.record import held_against
from pykvsmooth.cli import bench as command
from pykvsmooth.gguf_in import Tensor

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
    "--repeat",
    1,
    "--tokens",
    2,
    "--depths",
    "3,9",
    "--rows",
    "24",
    "--sessions",
    "1,2",
    "--session-depth",
    20,
    "--threads",
    1,
    "--device",
    "cpu",
]

BENCH_HELP = """  -d, --n-depth <n>      (default: 0)
  -ctk, --cache-type-k <t>                          (default: f16)
  -fa, --flash-attn <on|off|auto>                   (default: auto)
  --repack <0|1>                                    (default: 1)"""
CLI_HELP = """-fa,   --flash-attn [on|off|auto]       set Flash Attention use
--repack, -nr, --no-repack              whether to enable weight repacking
-ctk,  --cache-type-k TYPE              KV cache data type for K
-lv,   --verbosity, --log-verbosity N   Set the verbosity threshold
--log-prefix, --no-log-prefix           Enable prefix in log messages
--log-timestamps, --no-log-timestamps   Enable timestamps in log messages
--ignore-eos                            ignore end of stream token"""


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read: touching half a gigabyte takes longer than all the rest."""
    monkeypatch.setattr(roofs, "available_bytes", lambda: 64 << 20)


# ---- what is counted ----


def tensor(name: str, *shape: int, n_bytes: int = 0) -> Tensor:
    return Tensor(name, "F32", shape, "", 0, n_bytes or 4 * math.prod(shape))


def test_bytes_of_a_token():
    layers = [tensor("blk.0.attn_q.weight", 8, 8, n_bytes=100), tensor("blk.0.attn_norm.weight", 8, n_bytes=32)]
    embedding = tensor("token_embd.weight", 50, 8, n_bytes=1000)
    output = tensor("output.weight", 50, 8, n_bytes=700)
    assert work.token_bytes([embedding, *layers, output]) == 100 + 32 + 700 and work.output_bytes([embedding, *layers, output]) == 700
    assert work.token_bytes([embedding, *layers]) == 100 + 32 + 1000  # tied: the embedding is the output
    assert work.output_bytes([embedding, *layers]) == 1000


def test_operations_of_a_row():
    tensors = [
        tensor("token_embd.weight", 50, 8),
        tensor("output.weight", 50, 8),
        tensor("blk.0.attn_q.weight", 8, 8),
        tensor("blk.0.attn_q.bias", 8),
        tensor("blk.1.ffn_up.weight", 16, 8),
    ]
    assert work.row_operations(tensors) == 2 * (8 * 8 + 16 * 8)


def test_operations_of_a_picture():
    """Two of three blocks of width 4 over 9 patches of 2 x 2 and the class row, and a projector to width 6."""
    tensors = [tensor("v.patch_embd.weight", 4, 3, 2, 2), tensor("v.class_embd", 4), tensor("v.position_embd.weight", 10, 4)]
    tensors += [tensor(f"v.blk.{i}.attn_{name}.weight", 4, 4) for i in range(3) for name in ("q", "k", "v", "out")]
    tensors += [tensor(f"v.blk.{i}.ffn_{name}.weight", 8, 4) for i in range(3) for name in ("up", "down")]
    tensors += [tensor("v.blk.0.attn_q.bias", 4), tensor("mm.0.weight", 6, 4), tensor("mm.0.bias", 6), tensor("mm.2.weight", 6, 6)]
    block = 2 * 10 * (4 * 4 * 4 + 2 * 8 * 4) + 2 * (2 * 10 * 10 * 4)  # matrices; Q K and P V
    assert work.picture_operations(tensors, blocks=2, n_image=9) == 2 * 9 * (4 * 12) + 2 * block + 2 * 9 * (6 * 4 + 6 * 6)


def test_the_seven_billion_shape():
    """What is written everywhere about LLaVA-1.5-7B: 12.95 Gop a row, 374 GFLOP a picture with 22 blocks, 369 MB of F16 at depth 704."""
    text = [tensor(f"blk.{i}.{name}.weight", 4096, 4096) for i in range(32) for name in ("q", "k", "v", "o")]
    text += [tensor(f"blk.{i}.{name}.weight", 11008, 4096) for i in range(32) for name in ("gate", "up", "down")]
    assert round(work.row_operations(text) / 1e9, 2) == 12.95
    tower = [tensor("v.patch_embd.weight", 1024, 3, 14, 14), tensor("mm.0.weight", 4096, 1024), tensor("mm.2.weight", 4096, 4096)]
    tower += [tensor(f"v.blk.{i}.attn_{name}.weight", 1024, 1024) for i in range(23) for name in "qkvo"]
    tower += [tensor(f"v.blk.{i}.ffn_{name}.weight", 4096, 1024) for i in range(23) for name in ("up", "down")]
    assert round(work.picture_operations(tower, 22, 576) / 1e9) == 374


def test_work_of_a_model(tiny_pair: Pair, model: kvs.Model):
    """Against the arrays of the reference."""
    found = work.of_model(model)
    matrices = model.n_embd * model.head_dim * 2 * (model.n_head + model.n_kv_head) + 3 * model.n_embd * model._info.n_ff
    assert found.row_operations == 2 * model.n_layer * matrices
    assert 0 < found.token_bytes < model.weight_bytes and found.picture_operations > 0
    row = {"f16": 2 * model.head_dim, "f32": 4 * model.head_dim}
    for kv_type, size in row.items():
        assert work.cache_bytes(model, kv_type, 10) == 2 * model.n_layer * model.n_kv_head * size * 10
        with model.session(n_ctx=512, kv_type=kv_type) as session:
            assert session.nbytes >= work.cache_bytes(model, kv_type, 512)


# ---- statistics ----


def test_spread():
    found = spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.min, found.q1, found.median, found.q3, found.max, found.n) == (1, 2, 3, 4, 5, 5)
    assert spread([2.0]).median == 2
    with pytest.raises(ValueError):
        spread([])


def test_a_ratio_and_its_interval(rng):
    base = rng.uniform(1, 100, 400)
    median, low, high = ratio_interval(base * 1.02 * rng.normal(1, 0.01, 400), base)
    assert 1.01 < low < median < high < 1.03 and high - low < 0.01  # pairs: what is common to both does not count
    assert ratio_interval([3.0], [2.0]) == (1.5, 1.5, 1.5)
    assert ratio_interval(base, base[::-1]) == ratio_interval(base, base[::-1])
    for a, b in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError):
            ratio_interval(a, b)


def test_the_interval_covers(rng):
    """Of 60 draws with a true median of 1, nearly all intervals of 95 % hold it."""
    inside = 0
    for _ in range(60):
        _, low, high = ratio_interval(rng.normal(1, 0.1, 41), np.ones(41))
        inside += low <= 1 <= high
    assert inside >= 50


def test_ahead_is_paired_and_to_the_best_setting():
    fast = Figure("decode", "tokens/s", 1, values=[10.0, 20.0], peers={"a": Peer([5.0, 16.0]), "b": Peer([4.0, 4.0]), "c": Peer(error="?")})
    assert fast.best_peer() == "a" and fast.ahead() == [2.0, 1.25]
    slow = Figure("caption", "s", 1, values=[10.0, 20.0], peers={"a": Peer([5.0, 10.0]), "b": Peer([1.0], dropped=True)})
    assert slow.best_peer() == "a" and slow.ahead() == [0.5, 0.5]
    slow.more["unequal"] = True
    assert slow.ahead() == []
    assert Figure("load", "s", 1, values=[1.0]).best_peer() is None


def test_what_two_devices_predict():
    """32 layers of 1 ms on the GPU and 10 on the CPU; an output matrix as large as a layer, 1 ms or 10: it is the GPU's."""
    assert stages.split_seconds(gpu=33, cpu=330, on_gpu=12 / 32, output=1 / 33) == pytest.approx(12 * 1 + 20 * 10 + 1)
    assert stages.split_seconds(gpu=5, cpu=50, on_gpu=1, output=0.1) == pytest.approx(5)


def test_a_split_asks_for_a_gpu(run):
    got = run("bench", *QUICK, "--only", "split")
    assert got.code == 1 and "split" in got.out and "layers are split between a GPU and the CPU; give --device cuda" in got.out


# ---- programs beside us ----


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_tiles_are_the_roof_of_who_has_them():
    speeds = {kind: [1.0] for kind in ("f32", "int8", "bf16", "amx_int8", "amx_bf16")}
    plain = {kind: [1.0] for kind in ("f32", "int8", "bf16")}
    for what, tiles, vectors in (("prefill", ["amx_int8"], ["int8"]), ("encode", ["f32", "amx_bf16"], ["f32", "bf16"])):
        assert held_against(Figure(what, "rows/s", 1, roofs=speeds, shares=speeds)) == tiles
        assert held_against(Figure(what, "rows/s", 1, roofs=plain, shares=plain)) == vectors


def test_a_tower_in_float32_has_no_roof_of_units_that_round():
    kinds = ("read", "f32", "int8", "bf16", "f16_mma")
    context = SimpleNamespace(roofs=SimpleNamespace(kinds=kinds), bench=SimpleNamespace(place=SimpleNamespace(tower=True)))
    for precision, units in (("f32", ["f32", "int8"]), ("bf16", ["f32", "int8", "bf16", "f16_mma"])):
        context.model = SimpleNamespace(vision_precision=precision)
        assert stages._tower_units(context) == units


def test_a_fair_share():
    shares = [stages._fair_share(threads, cores) for threads, cores in ((1, 1), (2, 2), (8, 8), (1, 2), (4, 8), (4, 2))]
    assert shares == [2, 1.5, 9 / 8, 1, 1, 5 / 4]


def test_beside_a_busy_process(measured, monkeypatch):
    """In turns: each repetition has a token without it and one with it, at the same depth."""
    depths, seconds = [], stages._token_seconds

    def note(session: kvs.Session, depth: int, tokens: int) -> float:
        took = seconds(session, depth, tokens)
        depths.append(session.n_past)
        return took

    monkeypatch.setattr(stages, "_token_seconds", note)
    got, (figure,) = measured("--only", "beside", "--repeat", 3)
    more = figure["more"]
    assert got.code == 0 and depths == [24] * 8 and figure["at"] == {"depth": 24} and figure["value"]["n"] == 3
    low, high = more["interval"]
    assert 0 < low <= figure["value"]["median"] <= high and more["alone_s"] > 0 and more["beside_s"] > 0
    assert more["fair"] == stages._fair_share(1, machine.facts()["cores_allowed"])
    row = next(line for line in got.out.splitlines() if line.startswith("beside a busy process at 24"))
    assert f"a fair share: {more['fair']:.2f}" in row and "95 %: " in row


def test_instructions_are_counted_or_the_reason_is_given():
    counter = Instructions()
    before = counter.read()
    sum(range(10000))
    after = counter.read()
    assert (counter.why and before is after is None) or (after > before + 10000)
    counter.close()
    counter.close()


def test_the_machine():
    facts = machine.facts()
    assert facts["cores"] >= facts["cores_allowed"] >= 1 and facts["memory_bytes"] >= facts["available_bytes"] > 0
    assert "kernels:" in facts["cpu"] and facts["cache_bytes"] >= 0 and facts["load"] >= 0
    assert machine.peak_bytes() == 0 or machine.peak_bytes() > 10 << 20
    assert machine.peak_bytes(1 << 30) == 0


# ---- a build of llama.cpp, as test_bench_peer.py has it, too ----


def peer(folder: Path, bench: str = "", cli: str = "") -> Path:
    """A build whose tools answer --help as real ones do, and then run these lines of shell, with all flags in $*."""
    folder.mkdir()
    for name, text, body in (("llama-bench", BENCH_HELP, bench), ("llama-mtmd-cli", CLI_HELP, cli)):
        script(folder / name, f'#!/bin/sh\nif [ "$1" = --help ]; then cat <<\'END\'\n{text}\nEND\nexit; fi\necho "$*" >> $0.log\n{body}\n')
    return folder


ANSWER = """p=0 n=0 d=0 s=1
while [ $# -gt 0 ]; do
  case $1 in -p) p=$2;; -n) n=$2;; -d) d=$2;; -fa) [ $2 = on ] && s=2;; --repack) [ $2 = 0 ] && s=${s}0;; esac
  shift
done
echo '[{"n_prompt": '$p', "n_gen": '$n', "n_depth": '$d', "avg_ts": '$s'}]'"""


# ---- the command ----


@pytest.fixture
def measured(run: Callable[..., Run], tmp_path: Path) -> Callable[..., tuple[Run, list[dict]]]:
    def go(*argv: object) -> tuple[Run, list[dict]]:
        got = run("bench", *QUICK, *argv, "--json", tmp_path / "b.json")
        return got, json.loads((tmp_path / "b.json").read_text())["figures"]

    return go


def test_all_that_it_measures(measured, tmp_path):
    """On the tiny pair, every stage; in the table, in the record."""
    got, figures = measured("--max-tokens", 3)
    assert got.code == 0, got.err
    whats = [figure["what"] for figure in figures]
    assert list(dict.fromkeys(whats)) == ["roof", "load", "first pass", *(name for name in list(STAGES)[2:] if name != "split")]
    by = {name: [figure for figure in figures if figure["what"] == name] for name in whats}
    for figure in figures:
        assert figure["error"] == "" and figure["threads"] == 1 and figure["value"]["median"] > 0
        assert figure["value"]["n"] == len(figure["values"]) == (2 if figure["what"] == "policy" else 1)
    for figure in (*by["decode"], *by["prefill"], *by["encode"]):
        assert figure["shares"].keys() == figure["roofs"].keys() and all(share["median"] > 0 for share in figure["shares"].values())
    assert [figure["at"] for figure in by["decode"]] == [{"depth": 3}, {"depth": 9}]
    first, second = (figure["more"]["bytes_per_token"] for figure in by["decode"])
    assert first < second
    decode = by["decode"][0]
    assert decode["shares"]["read"]["median"] == pytest.approx(decode["values"][0] * first / decode["roofs"]["read"]["median"])
    prefill = by["prefill"][0]
    assert prefill["shares"]["f32"]["median"] == pytest.approx(
        prefill["values"][0] * prefill["more"]["operations"] / 24 / prefill["roofs"]["f32"]["median"]
    )
    low, high = by["policy"][0]["more"]["interval"]
    assert low <= by["policy"][0]["value"]["median"] <= high
    assert by["load"][0]["more"]["peak_bytes"] > 1 << 20 and by["caption"][0]["more"]["tokens"] <= 3
    assert [figure["at"] for figure in by["sessions"]] == [{"sessions": 1, "depth": 20}, {"sessions": 2, "depth": 20}]
    assert by["sessions"][0]["more"]["against_one"]["median"] == 1
    for name in (
        "1 thread",
        "roof: read, huge pages",
        "load",
        "first pass",
        "encode",
        "prefill of 24 rows",
        "decode at depth 9",
        "KVSmooth on / off at 24",
    ):
        assert f"\n{name}  " in got.out
    assert "2 at once, depth 20" in got.out and "caption of 3 tokens, model loaded  " in got.out


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Type of cache and the model's precision, of all sessions that are made in this process."""
    found, init = [], kvs.Session.__init__

    def note(self: kvs.Session, *args: object, **more: object) -> None:
        init(self, *args, **more)
        found.append((self.kv_type, self.model.precision))

    monkeypatch.setattr(kvs.Session, "__init__", note)
    return found


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is started beside us."""
    started = []

    def note(argv: list[str], *more: object) -> object:
        started.append(argv)
        return run_child(argv, *more)

    monkeypatch.setattr(stages, "run_child", note)
    return started


@pytest.mark.parametrize(("kv_type", "precision"), [("q8_0", "exact"), ("f32", "auto"), (None, None)])
def test_type_of_cache_and_precision(run, tmp_path, made, children, kv_type, precision):
    """In every stage and process, in the heading, in the record; f16 and auto where nothing is said."""
    out = tmp_path / "b.json"
    asked = ["--kv-type", kv_type, "--precision", precision] if kv_type else []
    kv_type, precision = kv_type or "f16", precision or "auto"
    stages = "load,encode,prefill,decode,policy,sessions,answer,caption"
    got = run("bench", *QUICK, *asked, "--only", stages, "--max-tokens", 3, "--json", out)
    assert got.code == 0, got.err
    assert len(made) == 8 and set(made) == {(kv_type, precision)}  # of prefill, decode; off and on; one and two that step together; answer
    probes, captions = ([argv for argv in children if ("caption" in argv) == each] for each in (False, True))
    assert len(probes) == len(captions) == 2 and all(kv_type in argv and json.loads(argv[4])["precision"] == precision for argv in probes)
    assert all(f"--precision {precision} --kv-type {kv_type}" in " ".join(argv) for argv in captions)
    found = json.loads(out.read_text())
    assert (found["settings"]["kv_type"], found["settings"]["precision"], found["model"]["kv_type"]) == (kv_type, precision, kv_type)
    came = found["model"]["vision_precision"]
    assert came == "f32" or (came == "bf16" and precision == "auto")
    assert f", {kv_type} cache, precision {precision} ({came})\n" in got.out


def test_bytes_of_the_type_of_the_cache(tiny_pair, model):
    for kv_type in ("f16", "f32", "q8_0"):
        bench = Bench(Settings(tiny_pair.text, kv_type=kv_type, threads=(1,), depths=(4,), tokens=2, repeat=1, only=("decode",)))
        bench.run()
        assert bench.figures[0].more["bytes_per_token"] == work.of_model(model).token_bytes + work.cache_bytes(model, kv_type, 5)


def test_a_first_pass(measured):
    """Of each process but the first, which goes on to a caption and does not count."""
    _, (load, first) = measured("--only", "load", "--repeat", 3)
    assert (load["what"], first["what"], first["unit"], first["value"]["n"]) == ("load", "first pass", "s", 3)
    assert all(0 < value < 60 for value in first["values"])


def test_a_first_pass_that_is_not_reached(tiny_pair):
    """It says why, as the load does."""
    bench = Bench(Settings(tiny_pair.text, threads=(1,), repeat=1, only=("load",), timeout=0.001))
    bench.run()
    assert [figure.what for figure in bench.figures] == ["load", "first pass"]
    assert all("not finished after 0.001 s" in figure.error and not figure.values for figure in bench.figures)


def git(folder: Path, *argv: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    who = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *who, *argv], env=env, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
def test_the_commit(tmp_path, monkeypatch):
    """Of a checkout with the package at its top: not of one that merely holds the folder in which it is installed."""
    package = tmp_path / "lib" / "site-packages"
    package.mkdir(parents=True)
    (tmp_path / "file").write_text("a")
    assert commit(tmp_path) == ""
    git(tmp_path, "init", "--quiet")
    assert commit(tmp_path) == ""  # without any commit
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    git(tmp_path, "tag", "v1")
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # as in a hook of another checkout
    short = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert commit(tmp_path) == short and len(short) >= 4 and commit(package) == ""
    (tmp_path / "file").write_text("b")
    assert commit(tmp_path) == f"{short}-dirty"
    monkeypatch.setenv("PATH", str(package))
    assert commit(tmp_path) == ""


def test_the_compiler(tmp_path):
    library = tmp_path / "lib.so"
    for comment, says in (
        (b"GCC: (Debian 12.2.0-14) 12.2.0\0", "GCC: (Debian 12.2.0-14) 12.2.0"),
        (b"Debian clang version 14.0.6\0GCC: (GNU) 9.1\0GCC: (GNU) 9.1\0", "GCC: (GNU) 9.1; clang version 14.0.6"),
        (b"GCC", ""),
    ):
        library.write_bytes(b"\x7fELF\xff\n" + comment + b"\xff")
        assert compiler(library) == says


def test_the_record(run, tmp_path, monkeypatch):
    monkeypatch.setenv("KVS_CPU", "base")
    out = tmp_path / "b.json"
    got = run("bench", *QUICK, "--only", "roofs", "--json", out, "--threads", "1,2")
    assert got.code == 0
    found = json.loads(out.read_text())
    assert found["complete"] and found["version"] == kvs.__version__ and found["settings"]["threads"] == [1, 2]
    assert found["library"] == str(library_path) and found.get("compiler", "") == compiler(library_path)
    known = commit(Path(kvs.__file__).resolve().parents[1])  # nothing where it is installed
    assert found.get("commit", "") == known and ("commit" in found) == bool(known)
    assert f"\npykvsmooth {kvs.__version__}{f' ({known})' if known else ''}, f16 cache" in got.out
    assert found["machine"]["KVS_CPU"] == "base" and "kernels: base" in found["machine"]["cpu"]
    kinds = [(figure["threads"], figure["at"]["kind"]) for figure in found["figures"]]
    assert kinds == [(n, kind) for n in (1, 2) for kind in ("read", "read_huge", "f32", "int8")]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_the_box(tmp_path):
    """As a user types it, in a process of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYKVSMOOTH_")}
    env |= {"PYTHONPATH": str(ROOT), "KVS_LIBRARY": str(library_path)}
    out, plot = tmp_path / "b.json", tmp_path / "b.png"
    argv = [sys.executable, "-m", "pykvsmooth", "bench", *map(str, QUICK), "--max-tokens", "4", "--json", str(out), "--plot", str(plot)]
    got = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)
    assert got.returncode == 0, got.stderr
    assert "the small one in the box" in got.stderr and box.TEXT in got.stdout
    found = json.loads(out.read_text())
    assert found["model"]["path"].endswith(box.TEXT) and found["model"]["picture_operations"] > 0
    assert {figure["what"] for figure in found["figures"]} == {"roof", "first pass", *STAGES} - {"roofs", "split"}
    with Image.open(plot) as image:
        assert image.size[0] > 1000


def test_a_plot(run, tiny_pair, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    folder = peer(tmp_path / "bin", ANSWER)
    few = Settings(tiny_pair.text, depths=(3, 9), tokens=2, rows=(8, 24), repeat=2, sessions=(1, 2), only=("prefill", "decode", "sessions"))
    bench = Bench(replace(few, mmproj=tiny_pair.mmproj, threads=(1, 2), against=str(folder)))
    bench.run()
    for name in ("p.png", "p.svg"):
        plot.draw(bench, str(tmp_path / name))
    assert Image.open(tmp_path / "p.png").size[0] > 1000
    assert "llama.cpp, 2 threads" in (tmp_path / "p.svg").read_text()
    for path, says in ((tmp_path / "p.gif", "a plot is .png"), (tmp_path / "none" / "p.png", "no such folder")):
        got = run("bench", *QUICK, "--plot", path)
        assert got.code == 1 and says in got.err and not got.out
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    got = run("bench", *QUICK, "--plot", tmp_path / "q.png")
    assert got.code == 1 and "pip install 'pykvsmooth[plot]'" in got.err


def test_prompts_of_several_lengths(run, tmp_path):
    out = tmp_path / "b.json"
    got = run("bench", *QUICK, "--rows", "24,8", "--only", "prefill,policy", "--json", out)
    assert got.code == 0, got.err
    figures = json.loads(out.read_text())["figures"]
    assert [(figure["what"], *figure["at"].values()) for figure in figures] == [("prefill", 8), ("prefill", 24), ("policy", 24)]
    operations = [figure["more"]["operations"] for figure in figures[:2]]
    assert operations[1] == 3 * operations[0]


def test_models_side_by_side(tiny_pair, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    few = Settings(
        tiny_pair.text, depths=(3, 128), tokens=2, rows=(8, 24), repeat=1, sessions=(1, 2), only=("prefill", "decode", "sessions")
    )
    for name in ("a", "b"):
        bench = Bench(replace(few, threads=(1,)))
        bench.run()
        (tmp_path / f"{name}.json").write_text(json.dumps(record(bench)))
    argv = [sys.executable, "-m", "models.scaling", tmp_path / "a.json", tmp_path / "b.json", "--out", tmp_path / "s.svg"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, argv)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    drawn = (tmp_path / "s.svg").read_text()
    assert drawn.count("G weights") == 6 and "GB that a token reads" in drawn  # two lines in three panels


def test_a_text_model(run, tmp_path, monkeypatch):
    """What needs a picture says why not; the rest is measured, and the exit code says that something is missing."""
    text, _, _ = tiny.write_pair(tmp_path, seed=1, vision=False, load=False)
    monkeypatch.setenv("PYKVSMOOTH_MMPROJ", "")
    got = run("bench", *QUICK, "--model", text, "--only", "load,encode,decode,answer,caption", "--max-tokens", 3)
    assert got.code == 1
    rows = {line.split("  ")[0]: line for line in got.out.splitlines()}
    assert "error: " in rows["caption of 3 tokens, model loaded"]
    for name in ("encode", "caption of 3 tokens"):
        assert "no picture without an mmproj; give --mmproj FILE" in rows[name]
    assert "tok/s" in rows["decode at depth 3"] and "peak" in rows["load"]


def test_usage(run, tmp_path):
    for argv, says in (
        (["--only", "speed"], "there is no stage 'speed'"),
        (["--threads", "0"], "must be at least 1"),
        (["--threads", "2000"], "at most 1024"),
        (["--depths", "1,x"], "must be a whole number"),
        (["--repeat", 0], "must be at least 1"),
        (["--kv-type", "q4_0"], "invalid choice: 'q4_0'"),
        (["--precision", "half"], "invalid choice: 'half'"),
        (["--json", tmp_path / "none" / "b.json"], "there is no such folder"),
        (["--against", tmp_path / "none"], "there is no such folder"),
    ):
        got = run("bench", *argv)
        assert got.code == 2 and says in got.err and not got.out, argv
    got = run("bench", "--model", tmp_path / "none.gguf")
    assert got.code == 1 and "none.gguf" in got.err
    assert run("--help").code == 0 and "bench" in run("--help").out
    assert tuple(STAGES) == command.STAGES


def test_the_table_without_a_peer():
    """Remarks begin where shares end; behind llama.cpp's two columns of figures it is the same."""
    shown = ["decode", "12.5", "tok/s", "9 .. 13", "39% f32", "a remark"]
    widths = [8, 6, 5, 9, 12, 20]
    assert command._aligned(shown, widths) == "decode      12.5  tok/s    9 .. 13  39% f32       a remark"
    behind = command._aligned([*shown[:5], "7.5", "1.67 x", "a remark"], [*widths[:5], 9, 7, 20])
    assert behind == "decode      12.5  tok/s    9 .. 13  39% f32             7.5   1.67 x  a remark"


def test_the_columns_of_a_run(run):
    """A long remark beside a short one: both begin in the same column, without --against, too."""
    got = run("bench", *QUICK, "--only", "decode,policy,caption", "--max-tokens", 3)
    rows = {line.split("  ")[0]: line for line in got.out.splitlines()}
    assert rows["caption of 3 tokens"].index("peak") == rows["KVSmooth on / off at 24"].index("95 %: ")


def test_a_place_that_cannot_be_written_is_known_at_once(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "run", lambda _: pytest.fail("it measures"))
    (tmp_path / "folder").mkdir()
    for path, says in (
        (tmp_path / "folder", "folder: is no regular file and will not be replaced"),
        ("/dev/null", "/dev/null: is no regular file and will not be replaced"),
        (tmp_path / ("n" * 255), "nnn: can't be written: File name too long"),
    ):
        got = run("bench", *QUICK, "--json", path)
        assert got.code == 1 and says in got.err and got.err.count("\n") == 1 and not got.out

    monkeypatch.setattr(command, "open", lambda *_: open("/dev/full", "wb"), raising=False)  # noqa: SIM115  closed by the command
    got = run("bench", *QUICK, "--json", tmp_path / "b.json")
    assert got.code == 1 and "b.json: can't be written: No space left on device" in got.err and os.listdir(tmp_path) == ["folder"]


def test_a_disk_that_is_full_in_the_end(run, tmp_path, monkeypatch):
    """The table is there, and the file that was there before."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "b.json"
    out.write_text("before")
    monkeypatch.setattr(os, "replace", full)
    got = run("bench", *QUICK, "--only", "roofs", "--json", out)
    assert got.code == 1 and "roof: f32" in got.out and f"error: {out}: can't be written: No space left on device" in got.err
    assert out.read_text() == "before" and os.listdir(tmp_path) == ["b.json"]


def test_what_does_not_fit_is_a_row_and_the_rest_goes_on(measured):
    got, figures = measured("--only", "decode,policy", "--depths", str(1 << 20))
    assert got.code == 1 and [figure["what"] for figure in figures] == ["decode", "policy"]
    assert "n_ctx" in figures[0]["error"] and figures[1]["values"]


def test_an_interrupt_shows_what_there_is(run, tmp_path, monkeypatch):
    """The third repetition of the second figure does not come: two of it are there."""
    steps = []

    def step(self: Bench, figure: Figure, repetition: int) -> None:
        steps.append((figure.what, repetition))
        if steps[-1] == ("decode", 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "step", step)
    out = tmp_path / "b.json"
    got = run("bench", *QUICK, "--only", "prefill,decode,policy", "--depths", 3, "--repeat", 3, "--json", out)
    assert got.code == 130 and "interrupted" in got.err
    found = json.loads(out.read_text())
    assert not found["complete"] and [len(figure["values"]) for figure in found["figures"]] == [3, 2]
    assert "decode at depth 3" in got.out


def test_ctrl_c(tmp_path, tiny_pair):
    """In a process of its own, while a peer hangs: it ends at once, with the table, and takes the peer with it."""
    pid = tmp_path / "pid"
    folder = peer(tmp_path / "bin", f"echo $$ > {pid}\nexec sleep 600")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KVS_LIBRARY": str(library_path)}
    argv = ["bench", *map(str, QUICK), "--model", tiny_pair.text, "--only", "roofs,prefill", "--against", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pykvsmooth", *argv], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (pid.exists() and pid.read_text().strip()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "roof: f32" in out and "interrupted" in err and "Traceback" not in err
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
        pytest.fail("the peer is still there")


def test_the_library(tiny_pair):
    """Bench as the README of bench/ has it."""
    said = []
    bench = Bench(
        Settings(model=tiny_pair.text, mmproj=tiny_pair.mmproj, threads=(1, 2), depths=(4,), tokens=2, repeat=2, only=("decode",)),
        lambda *progress: said.append(progress),
    )
    bench.run()
    assert [(figure.threads, len(figure.values)) for figure in bench.figures] == [(1, 2), (2, 2)] and bench.complete
    assert [done for _, done, _ in said] == list(range(6)) and {total for *_, total in said} == {6}
    assert said[0][0] == "decode, depth 4, 1 thread: warming up" and said[-1][0].endswith("2 threads: repetition 2 of 2")
    assert record(bench)["model"]["token_bytes"] > 0
