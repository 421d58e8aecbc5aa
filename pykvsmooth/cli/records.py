"""Captions as JSON lines, and the file of them that a later run goes on with."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import KVSmoothError
from .escape import escaped_json
from .pictures import STDIN

if TYPE_CHECKING:
    from ..stats import Result, Token

_HEAD = b'{"image": '  # how each line of ours begins
_LONGEST = 16 << 20  # bytes of a line
_DESCRIPTORS = ("/dev/fd/", "/dev/stdin", "/proc/")


def token_record(name: str, token: Token) -> dict[str, Any]:
    return {
        "type": "token",
        "image": name,
        "text": token.text,
        "id": token.id,
        "logprob": token.logprob,
        "entropy": token.entropy,
        "strength": token.strength,
        "visual_mass": token.visual_mass,
    }


def caption_record(name: str, result: Result, settings: dict[str, Any]) -> dict[str, Any]:
    """image, caption and how it came about: what --out writes and --json shows."""
    stats = {
        key: round(value, 4) if isinstance(value, float) else value for key, value in dict(result.stats).items() if key != "finish_reason"
    }
    return {"image": name, "caption": result.text, "finish_reason": result.finish_reason, "stats": stats, "settings": settings}


def dumps(record: dict[str, Any]) -> str:
    """One line of characters that may be shown anywhere; NaN and infinities become null, which JSON has instead."""
    return escaped_json(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class CaptionFile:
    """captions.jsonl, open for one process: a line per picture, each written whole and at once.

    A line that a killed run left unfinished is cut off. A file that is something else is refused, not overwritten.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._done: set[tuple[str, str]] = set()
        self.cut = 0  # bytes of an unfinished line
        try:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by close()
        except OSError as error:
            raise KVSmoothError(
                f"{path}: can't be opened for writing: {error.strerror}; check its folder and permissions, or choose another --out"
            ) from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def has(self, name: str, settings: dict[str, Any]) -> bool:
        return _lasting(name) and (name, dumps(settings)) in self._done

    def add(self, record: dict[str, Any]) -> None:
        line = dumps(record).encode("utf-8", "backslashreplace") + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)  # no half line stays behind
            raise KVSmoothError(
                f"{self.path}: can't be written: {error.strerror}; the captions before are in it, run again to go on"
            ) from error

    def close(self) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KVSmoothError(f"{self.path}: another pykvsmooth writes into it; wait for its end or choose another --out") from None
        except OSError:
            pass  # a file system without locks, or a pipe

    def _read(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            return  # a pipe or a device
        end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), 1):
                if not line.endswith(b"\n"):
                    if len(line) == _LONGEST or not (line.startswith(_HEAD) or _HEAD.startswith(line)):
                        raise self._not_ours(number)
                    self.cut = len(line)
                    self._file.truncate(end)
                    return
                end += len(line)
                self._note(line, number)

    def _note(self, line: bytes, number: int) -> None:
        try:
            record = json.loads(line)
            self._done.add((record["image"], dumps(record["settings"])))
        except (ValueError, KeyError, TypeError):
            raise self._not_ours(number) from None

    def _not_ours(self, number: int) -> KVSmoothError:
        return KVSmoothError(f"{self.path}: line {number} is no caption of ours; choose another file for --out")


@contextlib.contextmanager
def caption_file(path: str | None) -> Iterator[CaptionFile | None]:
    if path is None:
        yield None
        return
    file = CaptionFile(path)
    try:
        yield file
    finally:
        file.close()


def _lasting(name: str) -> bool:
    """Is the picture of that name the same one in every run? Not behind standard input, a pipe or the number of an open file."""
    return not (name == STDIN or os.path.abspath(name).startswith(_DESCRIPTORS) or Path(name).is_fifo())


def precision_facts(precision: str) -> dict[str, str]:
    """--precision among the settings of a caption. Not the default, so that files from before it was noted go on."""
    return {} if precision == "auto" else {"precision": precision}


def file_facts(path: str | None) -> str | None:
    """Name and size of a model file: enough to notice another one, quick enough for files of gigabytes."""
    return f"{os.path.basename(path)} ({os.path.getsize(path)} bytes)" if path else None
