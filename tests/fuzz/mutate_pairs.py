"""Mutated model pairs through the Python API: python tests/fuzz/mutate_pairs.py [-n 10000] [--first SEED] [--workers N].

Each seed makes one mutant of one of two pairs (F32 and quantized): bits flipped, fields edited, files cut, pieces of one laid into the
other. A worker process loads it and, where it loads, answers with one token about a picture under a policy. A death, 20 seconds without
an answer, or an error outside KVSmoothError is reported with its seed; the exit status is then 1. Run it over a sanitizer build:

    LD_PRELOAD="$(gcc -print-file-name=libasan.so) libstdc++.so.6" ASAN_OPTIONS=detect_leaks=0 KVS_LIBRARY=build/asan/libkvs.so ...
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import selectors
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

LIMIT_S = 20.0
PAIRS = {"f32": {"type": "f32"}, "quantized": {"type": "q4_k", "v_type": "q8_0", "n_embd": 256, "n_ff": 256, "biases": True}}
EXTREMES = (0, 1, 2, 7, 8, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
FLOATS = (0.0, -1.0, 1e-38, 1e38, float("inf"), float("nan"), 2.0)
VALUE_BYTES = (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)

# ---- mutants ----


def fields(data: bytes) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(offset, width) of the header's numbers and (begin, end) of its records, for a sound file."""
    numbers, records, at = [(4, 4), (8, 8), (16, 8)], [], 24

    def number(width: int) -> int:
        nonlocal at
        numbers.append((at, width))
        at += width
        return int.from_bytes(data[at - width : at], "little")

    def text() -> None:
        nonlocal at
        length = number(8)
        at += length

    def value(kind: int) -> None:
        nonlocal at
        if kind == 8:
            text()
        elif kind == 9:
            element, count = number(4), number(8)
            for _ in range(count if element == 8 else min(count, 4)):
                value(element)
            at += 0 if element == 8 else max(0, count - 4) * VALUE_BYTES[element]
        else:
            number(VALUE_BYTES[kind])

    n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)
    for i in range(n_keys + n_tensors):
        begin = at
        text()
        if i < n_keys:
            value(number(4))
        else:
            for _ in range(number(4)):
                number(8)
            number(4), number(8)
        records.append((begin, at))
    return numbers, records


def flip(rng: random.Random, data: bytearray, header: int) -> None:
    for _ in range(2 ** rng.randint(0, 6)):
        at = rng.randrange(header if rng.random() < 0.5 else len(data))
        data[at] ^= 1 << rng.randrange(8)


def edit(rng: random.Random, data: bytearray, numbers: list[tuple[int, int]]) -> None:
    for _ in range(rng.randint(1, 3)):
        at, width = rng.choice(numbers)
        old = int.from_bytes(data[at : at + width], "little")
        new = rng.choice(
            (rng.choice(EXTREMES), old + rng.randint(-4, 4), old * 2, old // 2, rng.randrange(1 << 8 * width), rng.randrange(64))
        )
        if width == 4 and rng.random() < 0.2:
            new = int.from_bytes(struct.pack("<f", rng.choice(FLOATS)), "little")
        data[at : at + width] = (new % (1 << 8 * width)).to_bytes(width, "little")


def poison(rng: random.Random, data: bytearray, header: int) -> None:
    """Odd numbers among the weights."""
    for _ in range(2 ** rng.randint(0, 8)):
        at = rng.randrange(header, len(data) - 4) & ~3
        data[at : at + 4] = rng.choice((struct.pack("<f", rng.choice(FLOATS)), b"\x00\x7c\x00\x7c", b"\xff\xff\xff\xff", rng.randbytes(4)))


def cut(rng: random.Random, data: bytearray, numbers: list[tuple[int, int]]) -> None:
    at = rng.choice((rng.randrange(len(data)), rng.choice(numbers)[0], len(data) - rng.randint(1, 64)))
    if rng.random() < 0.8:
        del data[at:]
    else:
        del data[at : at + rng.randint(1, 4096)]


def splice(rng: random.Random, data: bytearray, other: bytes, records: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    """A stretch of another file, or one of its records, over or between what is here; or a record twice, or not at all."""
    kind = rng.randrange(4)
    (begin, end), (b, e) = rng.choice(records), rng.choice(others)
    if kind == 0:
        n, at = rng.randint(1, 1 << rng.randint(2, 15)), rng.randrange(len(data))
        start = rng.randrange(len(other))
        data[at : at + n] = other[start : start + n]
    elif kind == 1:
        data[begin:end] = other[b:e]
    elif kind == 2:
        data[begin:begin] = data[begin:end]
    else:
        del data[begin:end]


def mutant(seed: int, pairs: dict[str, list[bytes]]) -> tuple[str, list[bytes], int]:
    """The pair's name with what was done to it, its two files, and the options of the policies."""
    rng = random.Random(seed)
    name = rng.choice(sorted(pairs))
    files = list(pairs[name])
    victim = 0 if rng.random() < 0.6 else 1
    data, (numbers, records) = bytearray(files[victim]), fields(files[victim])
    header, kind = records[-1][1], rng.choice(("flip", "edit", "edit", "poison", "cut", "splice"))
    if kind == "splice":
        other = pairs[rng.choice(sorted(pairs))][rng.randrange(2)]
        splice(rng, data, other, records, fields(other)[1])
    else:
        {"flip": flip, "edit": edit, "poison": poison, "cut": cut}[kind](rng, data, header if kind in ("flip", "poison") else numbers)
    files[victim] = bytes(data)
    return f"{name} {kind}", files, rng.choice((0, 0, 1, 7))


def make_pairs() -> dict[str, list[bytes]]:
    import tiny

    pairs = {}
    for name, options in PAIRS.items():
        with tempfile.TemporaryDirectory() as folder:
            paths = tiny.write_pair(folder, seed=7, load=False, n_layer=2, image=28, **options)[:2]
            pairs[name] = [Path(path).read_bytes() for path in paths]
    return pairs


# ---- the worker: seeds come in as lines, verdicts go out as lines ----


def work() -> None:
    import numpy as np

    import pykvsmooth as kvs
    from fuzz.inputs import policies

    pairs = make_pairs()
    picture = np.arange(30 * 20 * 3, dtype=np.uint8).reshape(30, 20, 3)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        paths = [Path(folder, "text.gguf"), Path(folder, "mmproj.gguf")]
        print("[]", flush=True)  # ready: what comes now is timed
        for line in sys.stdin:
            done, files, options = mutant(int(line), pairs)
            for path, data in zip(paths, files, strict=True):
                path.unlink(missing_ok=True)
                path.write_bytes(data)
            verdict, where = "fine", "load"
            try:
                with kvs.Model(str(paths[0]), mmproj=str(paths[1]), threads=1, device="cpu") as model:
                    where = "step"
                    kept = policies(options) if model.n_image <= 64 else policies(options & 1)
                    with model.session(n_ctx=max(64, model.n_image + 32), policy=kept) as session:
                        list(session.generate("a dog", image=picture, max_tokens=2, template=None))
            except kvs.KVSmoothError as error:
                verdict = type(error).__name__
            except Exception as error:
                verdict = f"FOREIGN {type(error).__name__}: {error}"
            print(json.dumps([int(line), done, where, verdict]), flush=True)


# ---- the master ----


class Worker:
    """A process with one seed at a time."""

    def __init__(self) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (ends with the worker)
        command = [sys.executable, __file__, "--work"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        self.seed, self.since = -1, float("inf")  # it has to start first

    def give(self, seed: int) -> None:
        self.seed = seed
        self.process.stdin.write(b"%d\n" % seed)
        self.process.stdin.flush()

    def end(self) -> str:
        """Kills it; the end of what it said."""
        self.process.kill()
        self.process.wait()
        self.log.seek(0)
        return self.log.read()[-3000:].decode(errors="replace")


def run(first: int, n: int, n_workers: int, limit: float) -> int:
    counts, bad = collections.Counter(), []
    left, selector = iter(range(first, first + n)), selectors.DefaultSelector()

    def start() -> None:
        seed = next(left, None)
        if seed is not None:
            worker = Worker()
            worker.give(seed)
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def lost(worker: Worker, why: str) -> None:
        selector.unregister(worker.process.stdout)
        bad.append(f"seed {worker.seed}: {why}\n{worker.end()}")
        print(bad[-1], file=sys.stderr, flush=True)
        start()

    for _ in range(n_workers):
        start()
    while selector.get_map():
        for key, _ in selector.select(timeout=1):
            worker, line = key.data, key.fileobj.readline()
            if not line:
                lost(worker, "DEATH")
                continue
            worker.since = time.monotonic()
            if line == b"[]\n":
                continue
            _, done, where, verdict = json.loads(line)
            counts[f"{done}: {where}: {verdict.split(':')[0]}"] += 1
            if sum(counts.values()) % 500 == 0:
                print(f"{sum(counts.values())} of {n}", file=sys.stderr, flush=True)
            if verdict.startswith("FOREIGN"):
                bad.append(f"seed {worker.seed}: {done}: {where}: {verdict}")
                print(bad[-1], file=sys.stderr, flush=True)
            seed = next(left, None)
            if seed is None:
                selector.unregister(worker.process.stdout)
                worker.process.stdin.close()
                worker.process.wait()
            else:
                worker.give(seed)
        now = time.monotonic()
        for key in list(selector.get_map().values()):
            if now - key.data.since > limit:
                lost(key.data, f"HANG, more than {limit:g} s")
    for what, count in sorted(counts.items()):
        print(f"{count:6d}  {what}")
    print(f"{sum(counts.values())} mutants answered, {len(bad)} findings")
    return bool(bad)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for one mutant")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work()
    else:
        sys.exit(run(args.first, args.n, args.workers, args.limit))
