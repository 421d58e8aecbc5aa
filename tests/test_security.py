"""SECURITY.md: its list of what a wheel contains and needs is the truth, and so are the numbers in it."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from pykvsmooth import sandbox
from pykvsmooth._native import library_path

if sys.version_info < (3, 11):
    pytest.skip("tomllib is of Python 3.11", allow_module_level=True)
import tomllib

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "SECURITY.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def section(title: str) -> str:
    return TEXT.split(f"## {title}\n")[1].split("\n## ")[0]


def patterns() -> list[str]:
    """The files of the first table."""
    rows = re.findall(r"^\| (`.*?) \|", section("What a wheel contains").split("| inside")[0], re.MULTILINE)
    return [pattern for row in rows for pattern in re.findall(r"`([^`]+)`", row)]


def shipped() -> list[str]:
    """What pyproject.toml and CMakeLists.txt put into a wheel: packages, the library and its header, the folder models/demo as box/."""
    files = [
        str(path.relative_to(ROOT))
        for package in PROJECT["tool"]["scikit-build"]["wheel"]["packages"]
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    box = ROOT / "models" / "demo"
    files += [f"pykvsmooth/box/{path.relative_to(box)}" for path in box.rglob("*") if path.is_file()]
    return [*files, "pykvsmooth/libkvs.so", "pykvsmooth/kvs.h", "pykvsmooth/_kvs_cffi.py"]


def test_every_file_of_a_wheel_is_in_the_list() -> None:
    files, listed = shipped(), patterns()
    assert len(files) > 80 and len(listed) > 10
    assert not [file for file in files if not any(fnmatch(file, pattern) and file.count("/") == pattern.count("/") for pattern in listed)]
    assert not [pattern for pattern in listed if not any(fnmatch(file, pattern) for file in files)], "nothing is like that any more"
    installed = (ROOT / "CMakeLists.txt").read_text()
    assert len(re.findall(r"install\(", installed)) == 4, "something else is installed: enter it here and in SECURITY.md"


def test_every_dependency_is_in_the_list() -> None:
    table = section("What a wheel contains").split("| needs")[1]
    listed = set(re.findall(r"^\| `([a-z0-9]+)`(?:, with `\[([a-z]+)\]`)?", table, re.MULTILINE))

    def names(requirements: list[str], extra: str) -> set[tuple[str, str]]:
        return {(re.match(r"[a-z0-9]+", r).group(), extra) for r in requirements}  # type: ignore[union-attr]

    extras = PROJECT["project"]["optional-dependencies"]
    needed = names(PROJECT["project"]["dependencies"], "")
    for extra in extras.keys() - {"all", "test", "train"}:
        needed |= names(extras[extra], extra)
    assert listed == needed


def test_every_library_inside_is_in_the_list() -> None:
    """What cmake links into libkvs.so, but for what is the system's or this project's."""
    table = section("What a wheel contains").split("| inside")[1].split("| needs")[0]
    listed = set(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))
    cmake = "".join(path.read_text() for path in (ROOT / "CMakeLists.txt", *sorted((ROOT / "cmake").glob("*.cmake"))))
    linked = {word for found in re.findall(r"target_link_libraries\(kvs \w+ (.*)\)", cmake) for word in found.split()}
    system = {"m", "rt", "Threads::Threads", "${CMAKE_DL_LIBS}"}
    names = {"${KVS_CUDART}": "`cudart_static`", "-static-libstdc++": "`libstdc++`, `libgcc`", "-static-libgcc": "`libstdc++`, `libgcc`"}
    assert {names.get(word, word) for word in linked - system} == listed
    assert re.findall(r"find_library\(KVS_CUDART (\w+)", cmake) == ["cudart_static"]


def test_the_library_needs_the_system_alone() -> None:
    """No libgomp, no libstdc++; sanitizers have libraries of their own."""
    try:
        found = subprocess.run(["readelf", "-d", library_path], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("no readelf here")
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\.so", found))
    assert {name for name in needed if not name.endswith("san")} <= {
        "libc",
        "libm",
        "libpthread",
        "libgcc_s",
        "ld-linux-x86-64",
        "libdl",
        "librt",
    }


def test_the_numbers() -> None:
    limits = section("Limits")
    for row, numbers in (
        ("template: source", f"{sandbox.MAX_SOURCE:,} characters; {sandbox.MAX_NESTING}"),
        ("template: processor time", f"{sandbox.MAX_SECONDS:g} s"),
        ("template: calls", f"{sandbox.MAX_CALLS}; {sandbox.MAX_FORMAT}; {sandbox.MAX_BITS:,}"),
        ("template: one value", f"an entry of a list counts {sandbox.ENTRY}"),
    ):
        assert any(line.startswith(f"| {row}") and numbers in line for line in limits.splitlines()), row
    assert (sandbox.MAX_VALUE, sandbox.MAX_MADE) == (2**20, 2**24) and "2^20 and 2^24" in limits
    source = "".join((ROOT / "native" / name).read_text() for name in ("gguf.c", "model.h", "backend.h", "session.c"))
    for constant in ("MAX_ENTRIES = 1 << 20", "MAX_METADATA ((uint64_t)256 << 20)", "KVS_MAX_LAYERS = 1024", "KVS_MAX_PARTS = 64",
                     "KVS_MAX_HEAD_DIM = 512", "MAX_CTX = 1 << 20", "MAX_BATCH = 256"):  # fmt: skip
        assert constant in source, f"{constant}: SECURITY.md has this number"


def test_the_way_to_it() -> None:
    assert "SECURITY.md" in (ROOT / "README.md").read_text()
    assert "@" not in TEXT.replace("`", ""), "no mail address"
    for name in re.findall(r"`((?:native|pykvsmooth|tests)/[a-z_/]+\.(?:py|c|h))`", TEXT):
        assert (ROOT / name).exists() or name == "pykvsmooth/_kvs_cffi.py" or name == "pykvsmooth/kvs.h", name
