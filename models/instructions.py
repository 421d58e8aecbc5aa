"""python -m models.instructions [--model F.gguf] [--depth 640] [--tokens 4]

Instructions of a token with KVSmooth against those of one without it, by callgrind, as virtual machines mostly have no counters of them;
Python's are among them. One thread, by the best kernels that valgrind knows (AVX2). Rows before the tokens are fed outside of it, and each
session's first token, which brings the weights into their order, is not counted. Needs valgrind.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pykvsmooth import KVSmooth, KVSmoothError, Model, Session

QUEUE = 16  # generated rows before KVSmooth has ranks for all that come
ROUNDS = 3
NAMES = ("off", "on")


def policies(model: Model) -> tuple[None, KVSmooth]:
    return None, KVSmooth.for_model(model)


def prepare(model: Model, folder: Path, depth: int, tokens: int) -> None:
    """Two sessions, saved."""
    ids = np.random.default_rng(0).integers(min(3, model.n_vocab - 1), model.n_vocab, depth).tolist()
    for name, policy in zip(NAMES, policies(model), strict=True):
        with model.session(n_ctx=depth + QUEUE + tokens + 1, policy=policy) as session:
            session.feed(ids)
            session.feed([ids[i % depth] for i in range(QUEUE)], generated=True)
            session.save(folder / name)


def control(*words: str) -> None:
    """Speaks to the valgrind around this process."""
    subprocess.run(["callgrind_control", *words, str(os.getpid())], stdout=subprocess.DEVNULL, check=True)


def steps(path: str, folder: Path, tokens: int) -> None:
    """Under valgrind: tokens of both sessions in turns, after one that does not count. Each turn's count goes to a file."""
    with Model(path, mmproj=False, threads=1) as model:
        pair = [Session.load(model, folder / name, policy=policy) for name, policy in zip(NAMES, policies(model), strict=True)]
        ids = [3 + i % (model.n_vocab - 3) for i in range(tokens)]
        for session in pair:
            session.feed(ids[:1], generated=True)
        control("--instr=on")
        for _ in range(ROUNDS):
            for session in pair:
                control("--zero")
                session.feed(ids, generated=True)
                control("--dump")
                session.rewind(tokens)


def counts(folder: Path) -> list[int]:
    """Of each turn, in their order. What was counted until the end has a file without a number."""
    parts = sorted(folder.glob("turns.*"), key=lambda path: int(path.suffix[1:]))
    return [int(re.findall(r"^totals: (\d+)", part.read_text(), re.MULTILINE)[0]) for part in parts]


def count(path: str, folder: Path, tokens: int) -> tuple[float, float]:
    """Instructions of a token, off and on: the medians of the turns."""
    tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder / 'turns'}"]
    worker = [sys.executable, "-m", "models.instructions", "--model", path, "--tokens", str(tokens), "--worker", str(folder)]
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # valgrind has one thread run at a time: no others that wait
    done = subprocess.run([*tool, *worker], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    found = counts(folder)
    if done.returncode or len(found) != 2 * ROUNDS:
        raise KVSmoothError(f"valgrind: status {done.returncode}, {len(found)} turns counted: {done.stderr.strip()[-400:]}")
    return statistics.median(found[::2]) / tokens, statistics.median(found[1::2]) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="F.gguf", help="text model (default: the small one in the box)")
    parser.add_argument("--depth", type=int, default=640)
    parser.add_argument("--tokens", type=int, default=4, help="of each session, beside the first one")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return steps(args.model, args.worker, args.tokens)
    if min(args.depth, args.tokens) < 1:
        parser.error("--depth and --tokens: must be at least 1")
    if not shutil.which("valgrind"):
        parser.error("there is no valgrind: install it first")
    try:
        with tempfile.TemporaryDirectory() as name:
            with Model(args.model, mmproj=False) as model:
                path = model.path
                prepare(model, Path(name), args.depth, args.tokens)
            off, on = count(path, Path(name), args.tokens)
    except KVSmoothError as error:
        parser.error(str(error))
    print(f"a token at depth {args.depth + QUEUE + 1}: {off:,.0f} instructions, smoothed {on:,.0f}: {on / off:.4f} times as many")


if __name__ == "__main__":
    main()
