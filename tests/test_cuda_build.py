"""What the library of an installation holds for GPUs: the architectures that it says, all that its compiler knows, and nothing that a
machine without a driver lacks. What CMake says of KVS_CUDA with an nvcc, and with none; what nvcc says of tests/shim."""

import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

import pykvsmooth as kvs
from pykvsmooth._native import library_path
from pykvsmooth.machine import cuda_text

MOST_BYTES = 40 << 20
MAGIC = struct.pack("<I", 0xBA55ED50)


def output(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


ROOT = Path(__file__).resolve().parents[1]
INSTALLED = Path(library_path).parent == Path(kvs.__file__).parent  # and not a build for tests, which has no use for GPUs
WANTED = ["75", "80", "86", "89", "90", "100", "120"]  # of cmake/cuda.cmake


def find_nvcc() -> str | None:
    """Where CMake finds it, if it is new enough."""
    folders = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    path = os.pathsep.join([*folders, "/usr/local/cuda/bin", os.environ.get("PATH", "")])
    nvcc = shutil.which("nvcc", path=path)
    release = re.search(r"release (\d+)", output(nvcc, "--version")) if nvcc else None
    return nvcc if release and int(release[1]) >= 12 else None


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = find_nvcc()
    if not found:
        pytest.skip("no nvcc 12 or newer here")
    return found


@pytest.fixture
def archs() -> list[str]:
    found = re.match(r"archs ([0-9 ]+);", cuda_text())
    if not found:
        pytest.skip(f"no code for GPUs in this library: {cuda_text()}")
    return found[1].split()


@pytest.mark.skipif(not INSTALLED, reason="a library of an installation is looked at")
def test_cuda_is_not_lost(nvcc: str) -> None:
    """AUTO takes what it finds: where that was nothing, or nvcc came later, all else here would be skipped."""
    if os.environ.get("KVS_TEST_CUDA_BUILD") == "off":
        pytest.skip("KVS_TEST_CUDA_BUILD=off: the package was installed without CUDA on purpose")
    assert "archs none" not in cuda_text(), f"{nvcc} is here, but {library_path} was built without it (KVS_TEST_CUDA_BUILD=off: on purpose)"


@pytest.mark.skipif(not INSTALLED, reason="one that was compiled for a card alone is not an installation")
def test_all_architectures_that_nvcc_knows(archs: list[str], nvcc: str) -> None:
    known = re.findall(r"sm_(\d+)\b", output(nvcc, "--list-gpu-code"))
    assert archs == [arch for arch in WANTED if arch in known]


def test_the_line_of_info() -> None:
    assert re.fullmatch(r"archs (none|shim|[0-9]+( [0-9]+)*); (available: \d+ devices?, cuda:0 is .*|unavailable: .+)", cuda_text())


def inside(library: bytes) -> set[tuple[str, int]]:
    """("ptx" | "real", architecture) of all device code: fat binaries begin with a magic number, version 1, and the lengths of their header
    and of what follows; so does each entry, with its kind and, at byte 28, its architecture."""
    found, at = set(), -1
    while (at := library.find(MAGIC, at + 1)) >= 0:
        version, header, size = struct.unpack_from("<HHQ", library, at + 4)
        if version != 1 or header != 16:
            continue
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, length, payload = struct.unpack_from("<HHIQ", library, entry)
            found.add(({1: "ptx", 2: "real"}[kind], *struct.unpack_from("<I", library, entry + 28)))
            entry += length + payload
    return found


def test_the_architectures_are_inside(archs: list[str]) -> None:
    """Real code for each, and the newest as PTX for those to come."""
    assert {"75", "80", "86", "89", "90"} <= set(archs)
    assert inside(Path(library_path).read_bytes()) == {("real", int(arch)) for arch in archs} | {("ptx", int(archs[-1]))}


def test_nothing_of_a_driver_is_linked(archs: list[str]) -> None:
    if not shutil.which("readelf"):
        pytest.skip("no readelf here")
    needed = re.findall(r"NEEDED.*\[(.+)\]", output("readelf", "-d", str(library_path)))
    assert needed and not [name for name in needed if re.match(r"lib(cu|nv|stdc\+\+|gcc_s)", name)], needed
    assert Path(library_path).stat().st_size <= MOST_BYTES


def test_without_a_device(archs: list[str], tiny_pair) -> None:
    if "unavailable: " not in cuda_text():
        pytest.skip("there is a GPU")
    why = cuda_text().partition("unavailable: ")[2]
    with kvs.Model(tiny_pair.text, mmproj=False) as model:
        assert model.device == "cpu" and why in model.device_reason
    with pytest.raises(kvs.DeviceError, match=re.escape(why)):
        kvs.Model(tiny_pair.text, mmproj=False, device="cuda")
    with pytest.raises(kvs.DeviceError, match='"cuda:3"'):
        kvs.Model(tiny_pair.text, mmproj=False, device="cuda:3")


# ---- the build ----


@pytest.mark.parametrize("arch", [75, 90])
def test_the_checks_of_the_shim_compile_for_gpus(arch: int, nvcc: str, tmp_path: Path) -> None:
    """make test-gpu begins with them; a GPU machine is no place to find out that they don't. For 7.5 the primitives of device.cuh have
    branches of their own: nothing here runs them, but ptxas takes them."""
    source, target = ROOT / "tests" / "shim" / "check.cu", tmp_path / "check.o"
    done = subprocess.run([nvcc, "-std=c++17", f"-arch=sm_{arch}", "-c", "-o", target, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert {("real", arch)} <= inside(target.read_bytes())


def configured(folder: Path, kind: str, nvcc: str | Path) -> tuple[int, str]:
    """By CMake; nvcc "": as where there is none."""
    cmake = shutil.which("cmake")
    if not cmake:
        pytest.skip("no cmake here")
    argv = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DKVS_CUDA={kind}", f"-DKVS_NVCC={nvcc}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + " ".join(done.stderr.split())


def test_a_build_without_nvcc(tmp_path: Path) -> None:
    """ON is an error, AUTO says what is missing, OFF does not look."""
    code, said = configured(tmp_path / "on", "ON", "")
    assert code and "KVS_CUDA=ON, but no nvcc was found" in said
    for kind, why in {"AUTO": "no nvcc was found", "OFF": "KVS_CUDA=OFF"}.items():
        code, said = configured(tmp_path / kind, kind, "")
        assert code == 0 and f"-- CUDA: off, {why}\n" in said, said
    code, said = configured(tmp_path / "other", "YES", "")
    assert code and 'KVS_CUDA is "YES": must be AUTO, ON or OFF' in said


def test_a_build_with_an_old_nvcc(tmp_path: Path) -> None:
    old = tmp_path / "nvcc"
    old.write_text('#!/bin/sh\necho "Cuda compilation tools, release 11.8, V11.8.89"\n')
    old.chmod(0o755)
    code, said = configured(tmp_path / "on", "ON", old)
    assert code and f"KVS_CUDA=ON, but {old} is older than CUDA 12" in said.replace("\n", " ")
    code, said = configured(tmp_path / "auto", "AUTO", old)
    assert code == 0 and f"-- CUDA: off, {old} is older than CUDA 12\n" in said


def test_a_build_with_nvcc(nvcc: str, tmp_path: Path) -> None:
    code, said = configured(tmp_path / "on", "ON", nvcc)
    found = re.search(r"-- CUDA: by (\S+), for ([0-9 ]+)\n", said)
    assert code == 0 and found and found[1] == nvcc, said
    assert {"75", "80", "86", "89", "90"} <= set(found[2].split())
