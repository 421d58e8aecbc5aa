"""python -m models.profile_kernels --model MODEL.gguf [--what decode|prefill] [--rows 640] [--tokens 4] [--with ncu|nsys]

The five largest kernels of a few smoothed tokens, or of a prompt, as a table in Markdown: launches, time, share of it, and by ncu (Nsight
Compute) the bytes per second that came from memory and their share of the peak. ncu runs each kernel alone, after flushing caches, a few
times over; nsys (Nsight Systems) takes times as they are and knows nothing of bytes. ncu needs the right to read the GPU's counters.
Written from the tools' documentation; it has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TOP = 5
WARM = 16  # tokens before those that are looked at
METRICS = TIME, BYTES, PEAK = "gpu__time_duration.sum", "dram__bytes.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed"
NCU = ["--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base"]
NSYS = ["--capture-range", "cudaProfilerApi", "--cuda-graph-trace", "node", "--sample", "none", "--force-overwrite", "true"]
UNITS = {"ns": 1e-9, "nsecond": 1e-9}  # what ncu calls its base unit differs by version


@dataclass
class Kernel:
    """peak: seconds times the percentage of the memory's peak; bytes and peak are 0 where they are not known."""

    name: str
    launches: int = 0
    seconds: float = 0.0
    bytes: float = 0.0
    peak: float = 0.0


def read_ncu(text: str) -> list[Kernel]:
    """--csv --page raw: a header, a row of units, then a row for each launch. Other lines are the tool's."""
    rows = list(csv.DictReader([line for line in text.splitlines() if line.startswith('"')]))
    if len(rows) < 2:
        sys.exit(f"ncu has seen no kernel:\n{text}")
    units, *launches = rows
    kernels: dict[str, Kernel] = {}
    for launch in launches:
        kernel = kernels.setdefault(launch["Kernel Name"], Kernel(shortened(launch["Kernel Name"])))
        seconds = number(launch[TIME]) * UNITS[units[TIME]]
        kernel.launches += 1
        kernel.seconds += seconds
        kernel.bytes += number(launch[BYTES])
        kernel.peak += seconds * number(launch[PEAK])
    return list(kernels.values())


def read_nsys(text: str) -> list[Kernel]:
    """stats --report cuda_gpu_kern_sum --format csv: lines of the tool, a header, a row for each kernel."""
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("Time (%),"))
    rows = csv.DictReader(line for line in lines[begin:] if line)
    return [Kernel(shortened(row["Name"]), int(row["Instances"]), number(row["Total Time (ns)"]) * 1e-9) for row in rows]


def number(text: str) -> float:
    return float(text.replace(",", ""))


def shortened(name: str) -> str:
    """Without what it returns and takes."""
    return name.rpartition("(")[0].removeprefix("void ") or name


def table(kernels: list[Kernel]) -> str:
    whole = sum(kernel.seconds for kernel in kernels)
    lines = ["| kernel | launches | time | share | memory |", "|---|---|---|---|---|"]
    for kernel in sorted(kernels, key=lambda one: -one.seconds)[:TOP]:
        memory = f"{kernel.bytes / kernel.seconds / 1e9:.0f} GB/s, {kernel.peak / kernel.seconds:.0f} %" if kernel.bytes else ""
        lines.append(f"| `{kernel.name}` | {kernel.launches} | {1e3 * kernel.seconds:.3g} ms | {kernel.seconds / whole:.0%} | {memory} |")
    return "\n".join(lines)


# ---- what is looked at, in a process of its own ----


def tell_tool(call: str) -> None:
    """Where it begins and ends to look. The driver is asked, since the runtime is inside our library; over tests/shim there is none."""
    with contextlib.suppress(OSError):
        getattr(ctypes.CDLL("libcuda.so.1"), call)()


def work(args: argparse.Namespace) -> None:
    import pykvsmooth as kvs

    with kvs.Model(args.model, mmproj=False, device="cuda") as model:
        policy, ids = kvs.KVSmooth.for_model(model), [3 + i % (model.n_vocab - 3) for i in range(args.rows)]
        with model.session(n_ctx=args.rows + WARM + args.tokens, policy=policy) as session:
            session.feed(ids)
            if args.what == "prefill":
                session.reset()
                tell_tool("cuProfilerStart")
                session.feed(ids)
            else:
                session.feed([5] * WARM, generated=True)
                tell_tool("cuProfilerStart")
                for _ in range(args.tokens):
                    session.feed([5], generated=True)
            tell_tool("cuProfilerStop")


def profile(tool: str, path: str) -> list[Kernel]:
    """Of this very command with --inside. Steps are no graphs there (KVS_CUDA_SYNC), so that each kernel is a launch that the tool sees."""
    command = [sys.executable, "-m", "models.profile_kernels", *sys.argv[1:], "--inside"]
    env = {**os.environ, "KVS_CUDA_SYNC": "1"}
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "profile")
        if tool == "ncu":
            subprocess.run(
                [path, *NCU, "--metrics", ",".join(METRICS), "--log-file", file, *command], env=env, check=False
            )  # what went wrong stands in the log, too
            return read_ncu(Path(file).read_text())
        subprocess.run([path, "profile", *NSYS, "--output", file, *command], env=env, check=True)
        stats = [path, "stats", "--report", "cuda_gpu_kern_sum", "--format", "csv", f"{file}.nsys-rep"]
        return read_nsys(subprocess.run(stats, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="text model, GGUF")
    parser.add_argument("--what", choices=("decode", "prefill"), default="decode")
    parser.add_argument("--rows", type=int, default=640, help="of the prompt (default: 640)")
    parser.add_argument("--tokens", type=int, default=4, help="behind it (default: 4)")
    parser.add_argument("--with", dest="tool", choices=("ncu", "nsys"), help="default: the first of them on PATH")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return work(args)
    found = [(tool, path) for tool in ("ncu", "nsys") if args.tool in (None, tool) and (path := shutil.which(tool))]
    if not found:
        parser.error(f"{args.tool or 'neither ncu nor nsys'} is {'not ' if args.tool else ''}on PATH; CUDA's toolkit has both")
    print(table(profile(*found[0])))


if __name__ == "__main__":
    main()
