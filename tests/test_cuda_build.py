"""What the library of an installation holds for GPUs: the architectures that it says, and nothing that a machine without a driver lacks."""

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


@pytest.fixture
def archs() -> list[str]:
    found = re.match(r"archs ([0-9 ]+);", cuda_text())
    if not found:
        pytest.skip(f"no code for GPUs in this library: {cuda_text()}")
    return found[1].split()


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
