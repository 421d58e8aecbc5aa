"""python -m models.instructions: counted by valgrind, or a reason."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pykvsmooth._native import library_path

ROOT = Path(__file__).resolve().parents[1]


def run(*options: str, **env: str) -> "subprocess.CompletedProcess[Any]":
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KVS_LIBRARY": str(library_path), **env}
    argv = [sys.executable, "-m", "models.instructions", *options]
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not shutil.which("valgrind"), reason="needs valgrind")
def test_tokens_are_counted():
    done = run("--depth", "20", "--tokens", "2")
    found = re.match(r"a token at depth 37: ([0-9,]+) instructions, smoothed ([0-9,]+): ([0-9.]+) times as many\n", done.stdout)
    assert found, done.stderr
    off, on = (int(text.replace(",", "")) for text in found.groups()[:2])
    assert 1_000_000 < off < 20_000_000 and 0.9 < float(found[3]) < 1.1 and abs(on / off - float(found[3])) < 1e-3


def test_without_valgrind(tmp_path):
    done = run(PATH=str(tmp_path))
    assert done.returncode == 2 and "there is no valgrind" in done.stderr
