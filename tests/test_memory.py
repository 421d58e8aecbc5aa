"""How much of the machine this process may have, and what of it a cache takes at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Pair

from pykvsmooth._native import lib

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def limit(what: str, groups: str, files: dict[str, str], folder: Path) -> float:
    (folder / "groups").write_text(groups)
    for name, text in files.items():
        path = folder / "trees" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return float(lib.kvs_test_cgroup(what == "bytes", os.fsencode(folder / "groups"), os.fsencode(folder / "trees")))


@pytest.mark.parametrize(
    ("groups", "files", "processors", "memory"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n", "memory.max": "4096\n"}, 1.5, 4096),
        ("0::/\n", {"cpu.max": "max 100000\n", "memory.max": "max\n"}, 0, 0),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "300000 100000", "a/b/memory.max": "7000"}, 2, 7000),
        ("0::/a/b\n", {"a/memory.max": "9000", "a/b/memory.max": "8000", "memory.max": "max"}, 0, 8000),
        ("0::/of/the/host\n", {"cpu.max": "100000 100000", "memory.max": "5000"}, 1, 5000),
        (
            "5:cpu,cpuacct:/x\n4:cpuset:/y\n3:memory:/z\n",
            {
                "cpu/x/cpu.cfs_quota_us": "50000",
                "cpu/x/cpu.cfs_period_us": "100000",
                "cpu/y/cpu.cfs_quota_us": "1",
                "memory/z/memory.limit_in_bytes": "123456789012",
            },
            0.5,
            123456789012,
        ),
        ("2:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, 0, 0),
        ("2:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "50000"}, 0, 0),
        ("3:memory:/\n0::/u\n", {"memory/memory.limit_in_bytes": "600", "u/memory.max": "500"}, 0, 500),
        ("", {}, 0, 0),
        ("no colons\n0:\n", {"cpu.max": "1 1"}, 0, 0),
        ("0::/\n", {"cpu.max": "x", "memory.max": "-5"}, 0, 0),
        ("0::/" + "d" * 3000 + "\n", {"memory.max": "5"}, 0, 5),
    ],
)
def test_limits_of_control_groups(tmp_path, groups, files, processors, memory):
    assert limit("processors", groups, files, tmp_path) == processors
    assert limit("bytes", groups, files, tmp_path) == memory


def test_no_control_groups(tmp_path):
    assert lib.kvs_test_cgroup(1, os.fsencode(tmp_path / "none"), os.fsencode(tmp_path)) == 0


CACHES = """
import os, sys
import pykvsmooth as kvs
from pykvsmooth._native import lib
def huge():
    '''Bytes of this process that ask for huge pages'''
    total = size = 0
    for line in open("/proc/self/smaps"):
        if line.startswith("Size:"):
            size = int(line.split()[1]) << 10
        elif line.startswith("VmFlags:") and "hg" in line.split():
            total += size
    return total
memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
limit = lib.kvs_test_cgroup(1, b"/proc/self/cgroup", b"/sys/fs/cgroup")
half = min(memory, limit or memory) / 2
with kvs.Model(sys.argv[1], mmproj=False, device="cpu", threads=1) as model:
    sessions, one, before = [], 0, huge()
    for _ in range(1000):
        sessions.append(model.session(n_ctx=1 << 20))
        now = huge()
        if now == before:
            break
        one, before = one or now - before, now
    sessions[0].close()
    sessions.append(model.session(n_ctx=1 << 20))
    print(half, one, before, huge(), len(sessions))
"""


@LINUX
def test_a_cache_is_on_huge_pages_only_in_half_of_the_memory(tiny_pair: Pair) -> None:
    """Nothing of these caches is touched, but for the pages at their ends."""
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("the kernel has no huge pages")
    command = [sys.executable, "-c", CACHES, str(tiny_pair.text)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    half, one, most, again, n = (float(word) for word in result.stdout.split())
    assert n > 2 and one > 64 << 20
    assert most <= half < most + one
    assert again == most  # what one session gives back, the next one has
