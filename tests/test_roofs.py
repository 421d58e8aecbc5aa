"""Roofs: what the machine can do at best. Other work may run beside the tests, so that only what is impossible is refused here."""

import threading
import time
from pathlib import Path

import pytest
from devices import KERNEL_SETS

import pykvsmooth as kvs
from pykvsmooth import machine
from pykvsmooth._native import ffi, lib
from pykvsmooth.bench.roofs import CPU_MEMORY, KINDS, Roofs

BUFFER = 4 << 20
UNITS = {"base": set(), "avx2": set(), "avx512": {"bf16"}, "amx": {"bf16", "amx_int8", "amx_bf16"}}  # beyond those that every set has


@pytest.fixture(params=KERNEL_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KVS_CPU", request.param)
    return request.param


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_kind_gives_a_speed(isa, threads):
    with Roofs(threads, BUFFER) as roofs:
        assert {*CPU_MEMORY, "f32", "int8"} <= set(roofs.kinds) <= {*CPU_MEMORY, "f32", "int8", *UNITS[isa]}
        for kind in roofs.kinds:
            assert 1e5 < max(roofs.measure(kind, 0.01) for _ in range(3)) < 1e15


def test_units_that_the_cpu_has_are_found(cpu_isas):
    """bf16 where the CPU says so, the tiles of AMX where their registers can be had; SIMDe has neither."""
    if "avx512" not in cpu_isas:
        pytest.skip("this CPU does not run avx512")
    with Roofs(1, BUFFER) as roofs:
        chars = ffi.new("char[]", 1024)
        lib.kvs_cpu_info(chars, 1024)
        features = ffi.string(chars).decode().split("features: ")[1].split(";")[0].split()
        for kind, feature in (("bf16", "avx512bf16"), ("amx_int8", "amx_int8"), ("amx_bf16", "amx_bf16")):
            if feature not in features:
                with pytest.raises(kvs.DeviceError, match=f"(does not offer {feature}|no unit of this kind)"):
                    roofs.measure(kind)
                assert kind not in roofs.kinds


def test_a_kernel_set_without_a_unit_says_so(monkeypatch):
    monkeypatch.setenv("KVS_CPU", "base")
    with Roofs(1, BUFFER) as roofs, pytest.raises(kvs.DeviceError, match="the kernels base of this build have no unit"):
        roofs.measure("amx_int8")


def test_a_measurement_takes_as_long_as_it_was_told():
    with Roofs(1, BUFFER) as roofs:
        for kind in roofs.kinds:
            roofs.measure(kind, 1e-3)
            begin = time.perf_counter()
            roofs.measure(kind, 0.05)
            assert time.perf_counter() - begin >= 0.05


def test_the_default_buffer_is_larger_than_the_cache():
    """Only opened: no page of it is touched."""
    with Roofs() as roofs:
        assert roofs.kinds[:2] == roofs.memory == CPU_MEMORY


def test_refused_arguments():
    for threads, nbytes, says in ((-1, BUFFER, "threads"), (1025, BUFFER, "threads"), (1, 0, "bytes"), (1, (1 << 40) + 1, "bytes")):
        with pytest.raises(ValueError, match=says):
            Roofs(threads, nbytes)
    with Roofs(1, 1) as roofs:
        for seconds in (0, -1, 11, float("nan")):
            with pytest.raises(ValueError, match="seconds"):
                roofs.measure("f32", seconds)
        with pytest.raises(KeyError):
            roofs.measure("f64")
        out = ffi.new("double *", 7.0)
        for kind in (-1, len(KINDS)):
            assert lib.kvs_roofs_measure(roofs._pointer, kind, 0.01, out, ffi.NULL) == lib.KVS_E_ARGUMENT and out[0] == 0
        assert roofs.measure("read", 1e-3) > 0  # a buffer of one byte is a megabyte


def test_a_closed_handle():
    roofs = Roofs(2, BUFFER)
    roofs.close()
    roofs.close()
    with pytest.raises(kvs.ClosedError):
        roofs.measure("read")
    lib.kvs_roofs_free(ffi.NULL)


def test_more_memory_than_there_is():
    if not Path("/proc/sys/vm/overcommit_memory").is_file() or Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
        pytest.skip("this kernel promises any amount of memory")
    if machine.available_bytes() > 1 << 39:
        pytest.skip("this machine has that much")
    with Roofs(1, 1 << 40) as roofs:
        with pytest.raises(kvs.OutOfMemoryError, match="a buffer to read") as caught:
            roofs.measure("read")
        assert caught.value.needed >= 1 << 40 and roofs.measure("f32", 1e-3) > 0


def test_two_at_once():
    """Handles do not share anything."""
    found: list[float] = []

    def work() -> None:
        with Roofs(2, BUFFER) as roofs:
            found.extend(roofs.measure(kind, 5e-3) for kind in roofs.kinds)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) >= 12 and all(speed > 0 for speed in found)
