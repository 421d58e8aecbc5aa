"""Ctrl-C at random times in a terminal: while Python starts and modules are read, while the model is loaded, a picture is encoded, a prompt
read, a caption written. Each time the command ends at once with 130, without a traceback, and leaves the terminal as it was.

KVS_INTERRUPTS=500 makes a campaign of it, whose figures are printed (pytest -s).
"""

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import dataclass

import numpy as np
import pytest
import tiny
from conftest import SEED
from PIL import Image
from test_errors import environment

INTERRUPTS = int(os.environ.get("KVS_INTERRUPTS", 8))
SECONDS = float(os.environ.get("KVS_INTERRUPT_SECONDS", 2.0))  # 0.5 on a quiet machine
COMMAND = "import sys; sys.argv[0] = 'pykvsmooth'; from pykvsmooth_start import main; sys.exit(main())"
PATIENCE = 60


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A caption that takes about as long in each of its phases as the start of Python."""
    folder = tmp_path_factory.mktemp("slow")
    text, mmproj, _ = tiny.write_pair(
        folder, seed=SEED, load=False, n_layer=8, n_embd=256, n_head=8, n_ff=1024, v_layer=6, v_embd=256, v_head=8, v_ff=1024, image=336
    )
    tiny.endless(text)
    Image.fromarray(np.random.default_rng(SEED).integers(0, 256, (900, 1200, 3), np.uint8)).save(folder / "picture.png")
    options = [
        "--model",
        text,
        "--mmproj",
        mmproj,
        "--max-tokens",
        "20000",
        "--n-ctx",
        "22000",
        "--threads",
        "1",
        "--prompt",
        "a dog " * 150,
    ]
    return [sys.executable, "-c", COMMAND, "caption", str(folder / "picture.png"), *options]


@dataclass
class End:
    phase: str
    code: int  # as a shell shows it
    moment: float
    seconds: float
    shown: bytes
    restored: bool


def phase_of(shown: bytes) -> str:
    if b"looking" in shown:
        last = shown.split(b"\x1b[2K")[-1]
        return "decode" if len(last) > 40 and b"looking" not in last else "encode or prefill"
    return "load" if b"loading" in shown else "start"


def strike(argv: list[str], moment: float | None) -> End:
    """Starts the command in a terminal of its own and types Ctrl-C that many seconds later; None: when it writes the caption."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # or the child would take it as this process does, which is pytest's
    pid, fd = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.execve(argv[0], argv, environment() | {"TERM": "xterm"})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    before, shown, struck = termios.tcgetattr(fd), b"", 0.0
    phase, begin = "start", time.monotonic()
    while True:
        now = time.monotonic()
        if not struck and (phase_of(shown) == "decode" if moment is None else now - begin >= moment):
            phase, struck = phase_of(shown), now
            os.write(fd, b"\x03")
        assert now - begin < (moment or 0) + PATIENCE, (phase, shown[:1000])
        if select.select([fd], [], [], 0.002)[0]:
            try:
                shown += os.read(fd, 65536)
            except OSError:  # Linux says so when the other side is closed
                break
    restored = termios.tcgetattr(fd) == before and shown.rfind(b"\x1b[?25l") <= shown.rfind(b"\x1b[?25h")  # the cursor is there
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seconds = time.monotonic() - struck
    os.close(fd)
    return End(phase, 128 - code if code < 0 else code, struck - begin, seconds, shown, restored)


def is_pythons_own(end: End) -> bool:
    """Before the command's first line has run Python shows its own traceback, or ends as it can't go on starting."""
    return (
        end.phase == "start"
        and (b"Traceback" in end.shown or b"Fatal Python error: init" in end.shown)
        and b"/pykvsmooth/" not in end.shown
    )


LOST = """
import os, signal, sys, time, weakref
from functools import partial
from pykvsmooth.cli.command import _once_more
sys.unraisablehook = partial(_once_more, sys.unraisablehook)
class Thing: pass
def strike(_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
def fail(_):
    raise ValueError("told")
one, two = Thing(), Thing()
refs = weakref.ref(one, fail), weakref.ref(two, strike)
del one
try:
    del two
    time.sleep(20)
except KeyboardInterrupt:
    print("ended")
"""


def test_ctrl_c_in_a_callback_is_not_lost() -> None:
    """Python ignores what is raised in one of a weak reference: the command, which the terminal's owner wants to end, would go on."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.stdout == "ended\n" and time.monotonic() - began < 15
    assert "ValueError: told" in done.stderr and "KeyboardInterrupt" not in done.stderr


def test_ctrl_c_at_any_time(argv: list[str]) -> None:
    rng = np.random.default_rng(SEED)
    last = 1.3 * strike(argv, None).moment
    ends = [strike(argv, float(moment)) for moment in rng.permutation(np.linspace(0.02, last, INTERRUPTS))]
    times = np.sort([end.seconds for end in ends]) * 1e3
    phases = {phase: sum(end.phase == phase for end in ends) for phase in ("start", "load", "encode or prefill", "decode")}
    early = [end for end in ends if is_pythons_own(end)]
    print(f"\n{len(ends)} interrupts {phases}, {len(early)} before the first line of the command")
    print(f"ms from Ctrl-C to the end: p50 {np.median(times):.0f}, p99 {np.quantile(times, 0.99):.0f}, max {times[-1]:.0f}")
    for end in ends:
        assert end.restored and end.seconds < SECONDS, end
        assert end in early or (end.code == 130 and b"Traceback" not in end.shown), end
