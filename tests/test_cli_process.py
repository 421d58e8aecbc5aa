"""The command line as a process: what the shell closes or fills, terminals, Ctrl-C."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Pair, endless

from pykvsmooth._native import library_path


@pytest.fixture(scope="module")
def tiny_pair(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return endless(tiny_pair, tmp_path_factory.mktemp("endless"))


@pytest.fixture
def command(tiny_pair: Pair) -> Iterator[Callable[..., list[str]]]:
    yield lambda *argv: [sys.executable, "-m", "pykvsmooth", *map(str, argv)]


@pytest.fixture
def environment(tiny_pair: Pair) -> dict[str, str]:
    ours = {
        "PYKVSMOOTH_MODEL": tiny_pair.text,
        "PYKVSMOOTH_MMPROJ": tiny_pair.mmproj,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TERM": "xterm",
    }
    return {**os.environ, **ours, "KVS_LIBRARY": str(library_path)}


def test_help_loads_no_library(command, environment):
    broken = {**environment, "KVS_LIBRARY": "/nowhere/libkvs.so"}
    done = subprocess.run(command("--help"), capture_output=True, env=broken)
    assert done.returncode == 0 and b"caption" in done.stdout
    done = subprocess.run(command("info"), capture_output=True, env=broken, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "/nowhere/libkvs.so" in done.stderr


def test_without_rich_one_line_says_what_to_do(environment):
    code = "import sys; sys.modules['rich'] = None; from pykvsmooth.cli.main import main; sys.exit(main(['info']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "pip install 'pykvsmooth[cli]'" in done.stderr


def test_nobody_reads_any_more(command, environment, image):
    process = subprocess.Popen(
        command("caption", image, "--max-tokens", 400), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 141 and err == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_standard_output_is_full(command, environment, image):
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("caption", image), stdout=full, stderr=subprocess.PIPE, env=environment)
    assert done.returncode == 1 and b"No space left" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "argv", [["caption", "--json", "missing.png"], ["info"], ["demo", "--scene", "99"], ["caption", "--nonsense"]], ids=str
)
def test_standard_error_is_closed(command, environment, image, argv):
    """What is said there is not said elsewhere."""
    argv = [*argv, image, "--max-tokens", "2"] if "--json" in argv else argv
    expected = subprocess.run(command(*argv), capture_output=True, env=environment)
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command(*argv)], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (expected.returncode, b"")
    assert [line[:9] for line in done.stdout.splitlines()] == [line[:9] for line in expected.stdout.splitlines()]


@pytest.mark.parametrize(
    "how", [["caption"], ["caption", "--json"], ["caption", "--compare"], ["chat"], ["info"], ["demo"], ["--version"]], ids=str
)
def test_standard_output_is_closed(command, environment, image, how):
    argv = [*how, image] if how[0] == "caption" else how
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command(*argv)], capture_output=True, env=environment, input=b"hello\n")
    assert done.returncode == 1 and b"standard output: is closed" in done.stderr and b"Traceback" not in done.stderr


def test_a_file_needs_no_standard_output(command, environment, image, tmp_path):
    out = tmp_path / "captions.jsonl"
    argv = command("caption", image, "--out", out, "--max-tokens", 2)
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *argv], env=environment)
    assert done.returncode == 0 and json.loads(out.read_text())["image"] == str(image)


def test_the_demo_does_not_warn_of_its_own_model(command, environment):
    for name in ("PYKVSMOOTH_MODEL", "PYKVSMOOTH_MMPROJ"):
        environment.pop(name)
    done = subprocess.run(command("demo", "--scene", 1, "--max-tokens", 2), capture_output=True, env=environment)
    assert done.returncode == 0 and done.stderr.startswith(b"the model in the box; smoothed: KVSmooth(") and b"WARNING" not in done.stderr


class Window:
    """A process in a pseudo terminal."""

    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        self.shown = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(argv[0], argv, env)

    def read(self, until: Callable[[bytes], bool] = lambda _: False, seconds: float = 30) -> bytes:
        """What was shown, as soon as until says so, or at the end of the process."""
        end = time.monotonic() + seconds
        while not until(self.shown):
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"nothing happened; shown so far: {self.shown!r}")
            if select.select([self.fd], [], [], 0.05)[0]:
                try:
                    data = os.read(self.fd, 65536)
                except OSError:  # Linux says so when the other side is closed
                    data = b""
                if not data:
                    break
                self.shown += data
        return self.shown

    def type(self, data: bytes) -> None:
        os.write(self.fd, data)

    def end(self) -> int:
        self.read()
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def settled(shown: bytes) -> bool:
    """Text of an answer is there: something longer stands behind the last line that said what was being waited for."""
    *waiting, text = shown.split(b"\x1b[2K")
    return len(waiting) > 1 and len(text) > 40 and b"looking" not in text and b"reading" not in text


def test_interrupt_while_decoding(command, environment, image):
    window = Window(command("caption", image, "--max-tokens", 30000, "--n-ctx", 32768), environment)
    window.read(settled)
    window.type(b"\x03")
    begin = time.monotonic()
    assert window.end() == 130
    assert time.monotonic() - begin < 2  # half a second on a quiet machine
    assert b"Traceback" not in window.shown


def test_interrupt_keeps_the_lines_written(command, environment, folder, tmp_path):
    out = tmp_path / "captions.jsonl"
    names = [folder / "a.webp"] * 3000
    window = Window(command("caption", *names, "--out", out, "--max-tokens", 20), environment)
    window.read(lambda _: out.exists() and out.stat().st_size > 3000)
    window.type(b"\x03")
    assert window.end() == 130 and b"Traceback" not in window.shown
    text = out.read_text()
    assert text.endswith("\n") and len([json.loads(line) for line in text.splitlines()]) < 3000


def test_chat_in_a_terminal(command, environment):
    window = Window(command("chat", "--max-tokens", 30000, "--n-ctx", 32768), environment)
    window.read(lambda shown: shown.endswith(b"> "))
    window.type(b"hello\n")
    window.read(lambda shown: b"hello" in shown and settled(shown.split(b"hello")[-1]))
    window.type(b"\x03")
    window.read(lambda shown: b"(stopped)" in shown and shown.endswith(b"> "))
    time.sleep(0.3)  # CPython's readline loses a signal that comes between its prompt and its select()
    window.type(b"\x03")
    assert window.end() == 130 and b"Traceback" not in window.shown


def test_chat_in_a_terminal_goes_on_after_an_error(command, environment):
    """And with status 0: a person has seen it."""
    window = Window(command("chat", "--max-tokens", 3), environment)
    for typed, says in ((b"an <image>\n", b"<image> marks for 0 pictures"), (b"hello\n", b"tok/s")):
        window.read(lambda shown: shown.endswith(b"> "))
        window.shown = b""
        window.type(typed)
        window.read(lambda shown, says=says: says in shown and shown.endswith(b"> "))
    window.type(b"/quit\n")
    assert window.end() == 0 and b"Traceback" not in window.shown
