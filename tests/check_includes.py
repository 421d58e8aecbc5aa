"""Includes of native/ point one way: api -> session -> model, cache and policies -> backend.h <- devices. What the system may refuse
(memory, streams, locks, threads) is asked for where kvs_refused() has its say. Part of `make lint`."""

import re
import sys
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[1] / "native"

# A file may include what stands in a lower line, or in its own.
LAYERS = [
    ["api.c"],
    ["session.h", "session.c", "session_file.c", "session_read.c"],
    ["device.h", "device.c", "split.h", "split.c", "measure.c"],
    ["llama.h", "llama.c", "vision.c"],
    ["model.h", "model.c", "load.h", "load.c", "vision_load.c", "place.c"],
    ["cache.h", "cache.c", "keep.h", "keep.c", "pruned.h", "pruned.c", "policy.h", "policy.c", "policy_*.c"],
    ["selftest.h", "selftest*.c"],
    ["cpu/*", "cuda/*", "no_cuda.c", "offload.h", "offload.c", "check.h", "check.c", "check_kv.c", "check_end.c"],
    ["twin.h", "twin.c"],
    ["backend.h", "backend.c", "measure.h"],
    ["tokenizer.h", "tokenizer.c", "sampler.h", "sampler.c"],
    ["gguf.h", "gguf.c"],
    ["quant.h", "quant.c", "strength.h", "mix.h", "mix.c"],
    ["turns.h", "turns.c", "mapped.h", "mapped.c", "cgroup.h", "cgroup.c"],
    ["util.h", "util.c"],
    ["kvs.h"],
]
# Devices know the op table and below; nobody above knows a device.
FORBIDDEN = [(device, name) for device in ("cpu/*", "cuda/*") for name in ("cache.h", "tokenizer.h", "gguf.h")]
CALLS = """malloc calloc realloc reallocarray aligned_alloc posix_memalign alloca strdup strndup mmap fopen fdopen opendir CPU_ALLOC
    cudaMalloc cudaMallocHost"""
REFUSABLE = re.compile(rf"\b({'|'.join(CALLS.split())}|pthread_create|pthread_\w+_init)\s*\(")


def layer(name: str) -> int:
    for i, patterns in enumerate(LAYERS):
        if any(Path(name).match(p) for p in patterns):
            return i
    raise SystemExit(f"{name}: no layer; give it a place in {Path(__file__).name}")


def goes_round(lines: list[str], i: int) -> bool:
    """Neither in this line nor in the few above kvs_refused() is asked."""
    return bool(REFUSABLE.search(lines[i])) and "kvs_refused()" not in "".join(lines[max(i - 10, 0) : i + 1])


def main() -> int:
    bad = 0
    for path in sorted(p for p in NATIVE.rglob("*") if p.suffix in (".c", ".h", ".cu", ".cuh")):
        name = str(path.relative_to(NATIVE))
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            if goes_round(lines, number - 1):
                print(f"native/{name}:{number}: without kvs_refused() of util.h; memory comes from its kvs_calloc() and kvs_realloc()")
                bad += 1
            found = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
            if not found:
                continue
            local = (path.parent / found[1]).resolve()
            source = local if local.exists() else NATIVE / found[1]
            if not source.exists():  # tests/shim has it
                continue
            target = str(source.relative_to(NATIVE))
            device_leak = target.startswith(("cpu/", "cuda/")) and Path(name).parent != Path(target).parent
            forbidden = any(Path(name).match(a) and Path(target).match(b) for a, b in FORBIDDEN)
            if layer(target) < layer(name) or device_leak or forbidden:
                print(f"native/{name}:{number}: may not include {target}")
                bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
