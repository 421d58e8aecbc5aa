"""pykvsmooth bench's other processes: children that are measured, and a busy one beside what is."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from test_bench import ROOT, script

import pykvsmooth as kvs
from pykvsmooth._native import library_path
from pykvsmooth.bench.child import ChildError, busy_process, of_package, run_child


def test_a_folder_with_another_package(tmp_path, monkeypatch):
    """As make bench in a checkout, whose package has no library, finds it."""
    (tmp_path / "pykvsmooth").mkdir()
    (tmp_path / "pykvsmooth" / "__init__.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    assert run_child([*of_package("pykvsmooth"), "--version"], 60).out.split()[-1] == kvs.__version__


def test_a_child(tmp_path):
    program = "import sys, time; x = bytearray(80 << 20); print('out'); print('err', file=sys.stderr); time.sleep(.3)"
    ended = run_child([sys.executable, "-c", program], 60)
    assert (ended.out, ended.err) == ("out\n", "err\n") and 0.3 < ended.seconds < 60
    assert ended.peak_bytes == 0 or 80 << 20 < ended.peak_bytes < 1 << 30


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("#!/bin/sh\necho no such model >&2; exit 3", "ended with status 3: no such model"),
        ("#!/bin/sh\nkill -ABRT $$", "died of SIGABRT: it says nothing"),
        ("#!/bin/sh\nexec sleep 60", "not finished after 0.5 s"),
        ("neither a script nor a program", "can't be started"),
    ],
)
def test_children_that_fail(tmp_path, text, says):
    begin = time.monotonic()
    with pytest.raises(ChildError, match=says):
        run_child([str(script(tmp_path / "tool", text))], 0.5 if "sleep" in text else 60)
    assert time.monotonic() - begin < 30


def test_a_missing_child(tmp_path):
    with pytest.raises(ChildError, match="can't be started: No such file"):
        run_child([str(tmp_path / "none")], 1)


def test_an_interrupt_kills_the_child(tmp_path):
    pid = tmp_path / "pid"
    old = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(KeyboardInterrupt):
            run_child([str(script(tmp_path / "tool", f"#!/bin/sh\necho $$ > {pid}\nexec sleep 60"))], 60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def processor_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of those that have ended and were waited for
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_busy_process(error):
    """It takes a good part of a processor while the block lasts, and has ended behind it, however that is left."""
    before = processor_seconds_of_children()
    with contextlib.suppress(KeyboardInterrupt), busy_process():
        time.sleep(1)
        if error:
            raise error
    used = processor_seconds_of_children() - before
    assert used > 0.2  # other work may take the rest
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_busy_process_does_not_outlive_who_started_it(tmp_path):
    """Even if that is killed. It has the same standard error, which ends when both have."""
    program = (
        "import os, signal\nfrom pykvsmooth.bench.child import busy_process\nwith busy_process(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KVS_LIBRARY": str(library_path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=tmp_path, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == -signal.SIGKILL and done.stderr == b""


def test_a_busy_process_that_does_not_begin(monkeypatch, tmp_path):
    for program, says in (("/bin/false", "does not begin"), (str(tmp_path / "none"), "can't be started: No such file")):
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(ChildError, match=says), busy_process():
            pytest.fail("there is none")
