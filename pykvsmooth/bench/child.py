"""Programs that run beside us: their time, output and peak memory, and errors that say what went wrong with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import KVSmoothError
from ..machine import peak_bytes

MOST_OUTPUT = 4 << 20  # bytes of each stream that are read
LOOK = 0.05  # seconds between two looks at its memory
BUSY = """import os, sys
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    sum(range(100000))"""  # without whoever started it it ends by itself: nobody else would know of it


class ChildError(KVSmoothError):
    """A program can't be started, failed, died of a signal, or took too long."""


@dataclass(frozen=True)
class Ended:
    """seconds: from start to end. peak_bytes: largest resident memory, seen up to 50 ms before the end; 0 where it is not known."""

    seconds: float
    out: str
    err: str
    peak_bytes: int


def run_child(argv: Sequence[str], timeout: float, env: dict[str, str] | None = None) -> Ended:
    """Runs a program to its end, without standard input and out of reach of the terminal's Ctrl-C: an exception here kills it.

    timeout: seconds. Raises ChildError.
    """
    name = os.path.basename(argv[0])
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin = time.perf_counter()
        try:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, start_new_session=True)
        except OSError as error:
            raise ChildError(f"{argv[0]}: can't be started: {error.strerror}") from error
        end, peak = _watch(process, begin + timeout)
        said = _text(err)
        if end is None:
            raise ChildError(f"{name}: not finished after {timeout:g} s, so it was killed; --timeout gives it longer")
        if process.returncode:
            raise ChildError(f"{name}: {_cause(process.returncode)}: {_last_line(said) or 'it says nothing'}")
        return Ended(end - begin, _text(out), said, peak)


@contextmanager
def busy_process() -> Iterator[None]:
    """Beside what is done within, another process has one thread that computes all the time, in few bytes. Raises ChildError."""
    argv = [sys.executable, "-I", "-S", "-c", BUSY, str(os.getpid())]
    try:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    except OSError as error:
        raise ChildError(f"{argv[0]}: can't be started: {error.strerror}") from error
    with process:
        try:
            if not process.stdout or not process.stdout.readline():
                raise ChildError("the busy process does not begin")
            yield
        finally:
            process.kill()


def of_package(module: str) -> list[str]:
    """The command that runs a module of this very package, also in a folder that has another: a checkout beside an installed package."""
    root = str(Path(__file__).resolve().parents[2])
    program = f"import runpy, sys; sys.path.insert(0, {root!r}); runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", program]


def _watch(process: subprocess.Popen[Any], deadline: float) -> tuple[float | None, int]:
    """(when it ended or None if it did not, its peak memory)"""
    ended, over = list[float](), threading.Event()  # join() would take an interrupted wait for the thread's end

    def wait() -> None:
        process.wait()
        ended.append(time.perf_counter())
        over.set()

    peak = 0
    try:
        threading.Thread(target=wait, daemon=True).start()
        while not over.wait(LOOK) and time.perf_counter() < deadline:
            peak = max(peak, peak_bytes(process.pid))
        return (ended[0] if ended else None), peak
    finally:
        if not ended:
            process.kill()
            over.wait()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(MOST_OUTPUT).decode("utf-8", "replace")


def _cause(code: int) -> str:
    if code > 0:
        return f"ended with status {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
