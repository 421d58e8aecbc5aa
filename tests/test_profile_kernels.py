"""models/profile_kernels.py: what it reads of ncu and nsys, and the whole of it with an ncu that runs the command and answers from paper.
The samples are written after the tools' documentation."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from devices import DEVICE

from models import profile_kernels
from pykvsmooth._native import library_path

ROOT = Path(__file__).resolve().parents[1]
MATVEC = '"4711","python3.11","h","void matvec_kernel<(int)12, (int)1>(matvec_args)","1","7","(32, 8, 1)","(132, 1, 1)","0","9.0"'
FRONT = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC"'
NCU = f"""==PROF== Connected to process 4711 (/usr/bin/python3.11)
==PROF== Profiling "matvec_kernel" - 0: 0%....50%....100% - 1 pass
{FRONT},"dram__bytes.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum"
"","","","","","","","","","","","byte","%","ns"
"0",{MATVEC},"9,000,000","60.00","4,000"
"1","4711","python3.11","h","void norm_kernel(norm_args)","1","7","(256, 1, 1)","(1, 1, 1)","0","9.0","16,384","1.00","2,000"
"2",{MATVEC},"3,000,000","30.00","2,000"
"""
NSYS = """Processing [profile.sqlite] with [reports/cuda_gpu_kern_sum.py]...

Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name
75.0,6000,2,3000.0,3000.0,2000,4000,1414.2,"void matvec_kernel<(int)12, (int)1>(matvec_args)"
25.0,2000,1,2000.0,2000.0,2000,2000,0.0,void norm_kernel(norm_args)
"""
HEAD = "| kernel | launches | time | share | memory |\n|---|---|---|---|---|\n"


def test_bytes_and_peaks_are_of_the_time() -> None:
    """12 MB in 6 us are 2000 GB/s; 60 % for 4 us and 30 % for 2 us are 50 %."""
    assert profile_kernels.table(profile_kernels.read_ncu(NCU)) == (
        f"{HEAD}| `matvec_kernel<(int)12, (int)1>` | 2 | 0.006 ms | 75% | 2000 GB/s, 50 % |\n"
        "| `norm_kernel` | 1 | 0.002 ms | 25% | 8 GB/s, 1 % |"
    )
    older = NCU.replace('"ns"', '"nsecond"')
    assert profile_kernels.read_ncu(older) == profile_kernels.read_ncu(NCU)


def test_times_without_bytes() -> None:
    assert profile_kernels.table(profile_kernels.read_nsys(NSYS)) == (
        f"{HEAD}| `matvec_kernel<(int)12, (int)1>` | 2 | 0.006 ms | 75% |  |\n| `norm_kernel` | 1 | 0.002 ms | 25% |  |"
    )


def test_what_ncu_says_instead() -> None:
    with pytest.raises(SystemExit, match="ERR_NVGPUCTRPERM"):
        profile_kernels.read_ncu("==ERROR== ERR_NVGPUCTRPERM - no permission to read the counters")


def test_five_are_shown() -> None:
    kernels = [profile_kernels.Kernel(str(i), 1, float(i)) for i in range(1, 9)]
    rows = profile_kernels.table(kernels).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == ["8", "7", "6", "5", "4"] and "| 22% |" in rows[0]


@pytest.mark.skipif(DEVICE == "cpu", reason="it looks at a GPU")
@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_the_command(tiny_pair, tmp_path, what) -> None:
    (tmp_path / "answer").write_text(NCU)
    ncu = tmp_path / "ncu"
    log = 'while [ $# -gt 0 ] && [ "$1" != --log-file ]; do shift; done; log=$2; shift 2'
    ncu.write_text(f'#!/bin/sh\nset -e\n{log}\necho "$KVS_CUDA_SYNC $*" > {tmp_path}/ran\n"$@"\ncat {tmp_path}/answer > "$log"\n')
    ncu.chmod(ncu.stat().st_mode | stat.S_IXUSR)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "KVS_LIBRARY": str(library_path)}
    argv = [sys.executable, "-m", "models.profile_kernels", "--model", tiny_pair.text, "--what", what, "--rows", "24", "--tokens", "2"]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(HEAD) and "2000 GB/s" in done.stdout, done.stderr
    assert (tmp_path / "ran").read_text().startswith("1 ") and "--inside" in (tmp_path / "ran").read_text()
