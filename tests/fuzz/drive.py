"""Drives a Python fuzz target: with atheris, where it is installed, else by blind changes to the files of the corpus."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None


def instrumented() -> AbstractContextManager[None]:
    """What is imported inside is instrumented, in a fuzzing process that has atheris."""
    fuzzing = atheris is not None and Path(sys.argv[0]).name.startswith("fuzz_")
    return atheris.instrument_imports(include=["pykvsmooth", "jinja2", "PIL"]) if fuzzing else nullcontext()


def main(try_one: Callable[[bytes], None]) -> None:
    if atheris is None:
        _blindly(try_one)
    else:
        atheris.Setup(sys.argv, try_one)
        atheris.Fuzz()


def _mutant(rng: random.Random, corpus: list[bytes]) -> bytes:
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.randint(1, 8)):
        at, n, kind = rng.randint(0, len(data)), rng.randint(1, 16), rng.randint(0, 4)
        other = rng.choice(corpus)
        start = rng.randint(0, len(other))
        if kind == 0:
            del data[at : at + n]
        elif kind == 1:
            data[at:at] = rng.randbytes(n)
        elif kind == 2:
            data[at : at + n] = other[start : start + n]
        elif at < len(data):
            data[at] = data[at] ^ 1 << rng.randint(0, 7) if kind == 3 else rng.choice((0, 1, 127, 128, 255))
    return bytes(data)


def _blindly(try_one: Callable[[bytes], None]) -> None:
    options = dict(arg[1:].split("=", 1) for arg in sys.argv[1:] if arg.startswith("-") and "=" in arg)
    folders = [Path(arg) for arg in sys.argv[1:] if not arg.startswith("-")]
    corpus = [path.read_bytes() for folder in folders for path in sorted(folder.iterdir())] or [b"\0"]
    seed, runs = int.from_bytes(os.urandom(4), "little"), 0
    rng, end = random.Random(seed), time.monotonic() + float(options.get("max_total_time", 60))
    while time.monotonic() < end:
        data = _mutant(rng, corpus)
        try:
            try_one(data)
        except BaseException:
            path = Path(options.get("artifact_prefix", "") + f"crash-{seed}-{runs}")
            path.write_bytes(data)
            print(f"found after {runs} runs: {path}", file=sys.stderr)
            raise
        runs += 1
    print(f"Done {runs} runs, blindly, seed {seed}", file=sys.stderr)
