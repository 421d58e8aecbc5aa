"""pykvsmooth bench on a GPU: its roofs, the figures that are held against them, a GPU that shares the layers with the CPU. What a number is
over tests/shim says nothing: that there is one, of the right place, does."""

import json
import math

import pytest
import tiny
from test_bench import ANSWER, peer
from test_cuda import SHIM, counted

import pykvsmooth as kvs
from pykvsmooth._native import ffi, lib
from pykvsmooth.bench import Bench, Settings
from pykvsmooth.bench.roofs import GPU_MEMORY, Roofs

BUFFER = 1 << 20
KINDS = (*GPU_MEMORY, "f32", "int8", "f16_mma")
QUICK = ["--repeat", 1, "--tokens", 2, "--depths", "3,9", "--rows", 24, "--sessions", "1,2", "--max-tokens", 3]


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pykvsmooth.bench.roofs.GPU_BYTES", BUFFER)


def test_every_kind_gives_a_speed() -> None:
    with Roofs(device="cuda:0", nbytes=BUFFER) as roofs:
        assert roofs.kinds == KINDS and roofs.memory == GPU_MEMORY
        for kind in KINDS:
            assert 1e5 < roofs.measure(kind, 1e-3) < 1e17
        for kind in ("read_huge", "bf16", "amx_int8"):
            with pytest.raises(kvs.DeviceError, match="no unit of this kind"):
                roofs.measure(kind)


def test_a_gpu_is_faster_than_what_it_is_held_against() -> None:
    """A real one: tensor cores before vectors, and what is read at once before what is copied."""
    if SHIM:
        pytest.skip("the shim is no GPU")
    with Roofs(device="cuda") as roofs:
        speeds = {kind: max(roofs.measure(kind) for _ in range(3)) for kind in KINDS}
    assert 5e10 < speeds["copy"] < 2e13 and speeds["read"] > 0.8 * speeds["copy"], speeds
    assert 1e12 < speeds["f32"] < speeds["f16_mma"] < 1e16 and speeds["int8"] > speeds["f32"], speeds


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(kvs.DeviceError, match="there is no cuda:99"):
        Roofs(device="cuda:99")
    for device in ("gpu", "cuda:", "cuda:x", "auto"):
        with pytest.raises(ValueError, match="none of cpu, cuda, cuda:N"):
            Roofs(device=device)
    with pytest.raises(TypeError):
        Roofs(device=0)  # type: ignore[arg-type]


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of what is free is enough to read; with nothing left that is said, and arithmetic goes on."""
    if not SHIM:
        pytest.skip("a real GPU has no limit to set")
    monkeypatch.setenv("KVS_SHIM_MEMORY", str(12 << 20))
    with Roofs(device="cuda", nbytes=1 << 30) as roofs:
        assert roofs.measure("read", 1e-4) > 0
    monkeypatch.setenv("KVS_SHIM_MEMORY", str(1 << 20))
    with Roofs(device="cuda", nbytes=1 << 30) as roofs:
        with pytest.raises(kvs.OutOfMemoryError, match="a buffer to read") as caught:
            roofs.measure("read", 1e-4)
        assert caught.value.needed == 1 << 20 and roofs.measure("f32", 1e-4) > 0


@pytest.mark.parametrize(
    "call", ["cudaMalloc", "cudaEventCreateWithFlags", "cudaEventRecord", "cudaEventSynchronize", "cudaEventElapsedTime", "cudaSetDevice"]
)
def test_calls_that_fail(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typed error, nothing is left, and the next one is well."""
    if not SHIM:
        pytest.skip("calls fail on purpose in the shim alone")

    def measure_all() -> int:
        """How often the function was called until the handle is closed: then nobody wants to know of errors."""
        with Roofs(device="cuda", nbytes=BUFFER) as roofs:
            for kind in KINDS:
                assert roofs.measure(kind, 1e-4) > 0
            return counted("asked")

    def held() -> list[int]:
        return [counted(word) for word in ("blocks", "pinned", "objects")]

    before = held()
    monkeypatch.setenv("KVS_SHIM_FAIL", f"{call}:0")
    calls = measure_all()
    assert calls >= 1
    for n in range(1, min(calls, 25) + 1):
        monkeypatch.setenv("KVS_SHIM_FAIL", f"{call}:{n}")
        with pytest.raises((kvs.DeviceError, kvs.OutOfMemoryError)):
            measure_all()
        assert held() == before, n
    monkeypatch.delenv("KVS_SHIM_FAIL")
    measure_all()


def test_a_bench(run, tmp_path) -> None:
    """Every stage, in the table and in the record; bytes and operations are held against the roofs of the GPU."""
    out = tmp_path / "b.json"
    got = run("bench", *QUICK, "--device", "cuda", "--json", out)
    assert got.code == 0, got.out + got.err
    found = json.loads(out.read_text())
    model, figures = found["model"], found["figures"]
    assert model["device"] == "cuda:0" and model["gpu_layers"] == model["layers"] and "layers on cuda:0" in model["device_reason"]
    assert found["machine"]["cuda"].startswith("archs ") and "\ncuda:0  " in got.out
    assert [figure["at"]["kind"] for figure in figures if figure["what"] == "roof"] == list(KINDS)
    by = {figure["what"]: figure for figure in figures}
    assert not [figure for figure in figures if figure["error"]]
    assert by["decode"]["shares"].keys() == set(GPU_MEMORY) and by["prefill"]["shares"].keys() == set(KINDS) - set(GPU_MEMORY)
    read = by["decode"]["values"][0] * by["decode"]["more"]["bytes_per_token"]
    assert math.isclose(by["decode"]["shares"]["copy"]["median"], read / by["decode"]["roofs"]["copy"]["median"])
    assert by["policy"]["more"]["instructions"] == "not available: a GPU does not count them"
    assert by["caption"]["more"]["stats"]["device"] == "cuda:0" and by["load"]["more"]["peak_bytes"] > 0
    assert by["first pass"]["value"]["median"] > 0
    assert "% f16_mma" in got.out


def test_a_shared_model(run, tmp_path) -> None:
    """No roof is that of both; the place says so."""
    out = tmp_path / "b.json"
    got = run(
        "bench", *QUICK, "--device", "cuda", "--gpu-layers", 1, "--threads", 1, "--only", "roofs,prefill,decode,load,caption", "--json", out
    )
    assert got.code == 0, got.err
    found = json.loads(out.read_text())
    assert found["model"]["gpu_layers"] == 1 and f"\ncuda:0 with 1 of {found['model']['layers']} layers, 1 thread  " in got.out
    figures = {figure["what"]: figure for figure in found["figures"]}
    assert figures["decode"]["shares"] == figures["prefill"]["shares"] == {} and figures["decode"]["value"]["median"] > 0
    assert figures["caption"]["more"]["stats"]["device"] == "cuda:0"


def test_a_model_on_two_devices(run, tmp_path) -> None:
    """The ratio is that of the seconds beside it and of the shares; where the layers are by themselves does not matter."""
    out = tmp_path / "b.json"
    got = run("bench", *QUICK, "--device", "cuda", "--gpu-layers", 1, "--threads", 1, "--only", "split", "--json", out)
    assert got.code == 0, got.err
    found = json.loads(out.read_text())
    (figure,) = found["figures"]
    model, more = found["model"], figure["more"]
    assert figure["at"] == {"depth": 24, "gpu_layers": model["layers"] // 2} and model["output_bytes"] > 0
    assert 0 < more["output_share"] < model["output_bytes"] / model["token_bytes"]
    predicted = (1 - more["output_share"]) * (more["gpu_s"] + more["cpu_s"]) / 2 + more["output_share"] * more["gpu_s"]
    assert math.isclose(figure["value"]["median"], more["half_s"] / predicted)  # one repetition
    assert f"{model['layers'] // 2} layers on the GPU, depth 24" in got.out and "a token: " in got.out


def test_a_tower_that_found_no_room(monkeypatch: pytest.MonkeyPatch, tiny_pair) -> None:
    """Then pictures are not held against the GPU's roofs."""
    bench = Bench(Settings(tiny_pair.text, mmproj=tiny_pair.mmproj, device="cuda", only=("encode",), repeat=1))
    assert bench.place.tower and bench.place.whole
    monkeypatch.setattr(kvs.Model, "device_reason", property(lambda _: "4 of 4 layers on cuda:0, the vision tower on the CPU (base)"))
    bench = Bench(Settings(tiny_pair.text, mmproj=tiny_pair.mmproj, device="cuda", only=("encode",), repeat=1))
    assert not bench.place.tower and bench.place.whole
    bench.run()
    assert bench.figures[0].values and bench.figures[0].shares == {}


@pytest.mark.parametrize(("v_type", "precision", "rounds"), [("f16", "auto", True), ("f16", "exact", False), ("f32", "auto", False)])
def test_a_tower_in_float32(tmp_path, v_type, precision, rounds) -> None:
    """It does not multiply on tensor cores, and is not held against theirs."""
    text, mmproj, _ = tiny.write_pair(tmp_path, seed=1, v_type=v_type, load=False)
    bench = Bench(Settings(text, mmproj=mmproj, device="cuda", precision=precision, only=("encode",), repeat=1))
    bench.run()
    assert bench.figures[0].values and bench.figures[0].shares.keys() == {"f32", "int8"} | ({"f16_mma"} if rounds else set())
    assert bench.model_facts["vision_precision"] == ("f16" if rounds else "f32")


def test_a_peer_gets_the_same_gpu(tiny_pair, tmp_path) -> None:
    few = {"mmproj": tiny_pair.mmproj, "threads": (1,), "against": str(peer(tmp_path / "bin", ANSWER))}
    for layers, flags in (("auto", ["-ngl", "999", "-sm", "none", "-mg", "0"]), (1, ["-ngl", "1", "-sm", "none", "-mg", "0"])):
        bench = Bench(Settings(tiny_pair.text, device="cuda", gpu_layers=layers, **few))
        assert bench.peer.place_flags() == flags
        names = [setting.name for setting in bench.peer.bench_settings()]
        assert any("repack" in name for name in names) == (layers == 1), names
    assert Bench(Settings(tiny_pair.text, device="cpu", **few)).peer.place_flags() == []


def test_a_peer_beside_the_cpu_finds_no_gpu(tiny_pair, tmp_path) -> None:
    seen = tmp_path / "seen"
    folder = peer(tmp_path / "bin", f'echo "[$CUDA_VISIBLE_DEVICES] $*" >> {seen}\n' + ANSWER)
    for device in ("cpu", "cuda"):
        bench = Bench(Settings(tiny_pair.text, mmproj=tiny_pair.mmproj, threads=(1,), device=device, against=str(folder)))
        bench.peer.decode("m", 1, 3, 2, bench.peer.bench_settings()[0])
    first, second = (line for line in seen.read_text().splitlines() if "-m m" in line)
    assert first.startswith("[] ") and "-ngl" not in first and "-ngl 999" in second


def test_the_handle_in_c() -> None:
    out, err = ffi.new("kvs_roofs **"), ffi.NULL
    assert lib.kvs_roofs_open(b"cuda:100", 0, BUFFER, out, err) == lib.KVS_E_ARGUMENT and out[0] == ffi.NULL
    assert lib.kvs_roofs_open(b"cuda", 0, 0, out, err) == lib.KVS_E_ARGUMENT
