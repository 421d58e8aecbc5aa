"""What the library of an installation holds for GPUs: the architectures that it says, and nothing that a machine without a driver lacks."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import pykvsmooth as kvs
from pykvsmooth._native import library_path
from pykvsmooth.machine import cuda_text

MOST_BYTES = 40 << 20
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def output(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def archs() -> list[str]:
    found = re.match(r"archs ([0-9 ]+);", cuda_text())
    if not found:
        pytest.skip(f"no code for GPUs in this library: {cuda_text()}")
    return found[1].split()


def test_the_line_of_info() -> None:
    assert re.fullmatch(r"archs (none|shim|[0-9]+( [0-9]+)*); (available: \d+ devices?, cuda:0 is .*|unavailable: .+)", cuda_text())


def test_the_architectures_are_inside(archs: list[str]) -> None:
    if not NVCC:
        pytest.skip("no CUDA toolkit here to look into the library with")
    tool = str(Path(NVCC).resolve().with_name("cuobjdump"))
    real = set(re.findall(r"\.sm_(\d+)\.cubin", output(tool, "--list-elf", str(library_path))))
    assert real == set(archs)
    assert {"75", "80", "86", "89", "90"} <= real
    assert set(re.findall(r"\.sm_(\d+)\.ptx", output(tool, "--list-ptx", str(library_path)))) == {archs[-1]}


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
