"""A checkpoint's folder, from whoever made it: only its own regular files are opened, none is read without a bound, and every
value of its JSON files is checked as it is taken."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..checks import c_path, shown
from ..errors import ModelFileError, ModelFileNotFoundError, ModelFormatError, UnsupportedModelError

MAX_BYTES = 64 << 20  # of a file that is read whole: a tokenizer.json of 128,000 tokens has 9 MB
MAX_TEXT, MAX_MESSAGE = 200, 2000  # characters


def clean(text: object, limit: int = MAX_TEXT) -> str:
    """Text out of a file, for a message: no control characters, not too long."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text))
    return shown if len(shown) <= limit else shown[:limit] + "..."


def broken(path: str, what: str, reason: str, offset: int | None = None) -> ModelFormatError:
    what = clean(what)
    return ModelFormatError(clean(f"{path}: {what}{': ' if what else ''}{reason}", MAX_MESSAGE), path, what, offset)


def unsupported(path: str, what: str, reason: str) -> UnsupportedModelError:
    what = clean(what)
    return UnsupportedModelError(clean(f"{path}: {what}: {reason}", MAX_MESSAGE), path, what)


def utf8_text(text: str, path: str, what: str) -> str:
    """The text; JSON can write what is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise broken(path, what, f"holds a lone surrogate at {error.start}") from None
    return text


class Folder:
    """Attributes: path; name, what people call the checkpoint in it."""

    def __init__(self, path: str | os.PathLike[str], argument: str = "folder") -> None:
        self.path = os.fsdecode(c_path(argument, path))
        if not os.path.isdir(self.path):
            if os.path.exists(self.path):
                raise ModelFileError(f"{self.path}: is no folder; a checkpoint's folder is wanted", self.path, errno.ENOTDIR)
            raise ModelFileNotFoundError(f"{self.path}: there is no such folder", self.path, errno.ENOENT)
        self._root = Path(self.path).resolve()
        self.name = self._name()

    def _name(self) -> str:
        if self._root.parent.name == "snapshots":  # of the Hugging Face cache: .../models--OWNER--NAME/snapshots/REVISION
            return self._root.parents[1].name.split("--")[-1]
        return self._root.name

    def path_of(self, name: str) -> str:
        return os.path.join(self.path, name)

    def find(self, name: str) -> str | None:
        """The path of a file, None if there is none. ModelFormatError for a name or a link that leads out of the folder."""
        if not name.isprintable() or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise broken(self.path, name, "is no name of a file in this folder")
        path = self.path_of(name)
        if not os.path.lexists(path):
            return None
        try:
            target = Path(path).resolve(strict=True)
            regular = stat.S_ISREG(target.stat().st_mode)
        except (OSError, RuntimeError) as error:  # RuntimeError: a ring of links, until Python 3.12
            raise ModelFileError(f"{path}: {getattr(error, 'strerror', None) or error}", path, getattr(error, "errno", None)) from None
        if not target.is_relative_to(self._root) and target.parent != self._blobs():
            raise broken(path, "", "is a link out of the folder, which is not followed; copy the file to its place")
        if not regular:
            raise broken(path, "", "is no regular file")
        return path

    def _blobs(self) -> Path | None:
        """Where the Hugging Face cache keeps the files that its snapshots link to."""
        return self._root.parents[1] / "blobs" if self._root.parent.name == "snapshots" else None

    def names(self, ending: str) -> list[str]:
        return sorted(name for name in os.listdir(self.path) if name.endswith(ending))

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """ModelFileNotFoundError, ModelFileError, ModelFormatError."""
        path = self.find(name)
        if path is None:
            raise ModelFileNotFoundError(f"{self.path_of(name)}: this file is missing", self.path_of(name), errno.ENOENT)
        try:
            with open(path, "rb") as file:
                yield file
        except OSError as error:
            if isinstance(error, ModelFileError):
                raise
            raise ModelFileError(f"{path}: {error.strerror or error}", path, error.errno) from error

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes | None:
        """A whole file, None if there is none."""
        if self.find(name) is None:
            return None
        with self.open(name) as file:
            if os.fstat(file.fileno()).st_size > limit:
                raise broken(self.path_of(name), "", f"has more than {limit} bytes")
            data = file.read()
        if is_lfs_pointer(data):
            raise broken(self.path_of(name), "", LFS)
        return data

    def text(self, name: str, limit: int) -> str | None:
        data = self.read(name, limit)
        try:
            return None if data is None else data.decode()
        except UnicodeDecodeError as error:
            raise broken(self.path_of(name), "", "is not UTF-8", error.start) from None

    def json(self, name: str) -> Section | None:
        data = self.read(name)
        return None if data is None else Section(parse_json(data, self.path_of(name)), self.path_of(name))

    def needed_json(self, name: str) -> Section:
        section = self.json(name)
        if section is None:
            path = self.path_of(name)
            raise ModelFileNotFoundError(
                f"{path}: this file is missing; what converts is the folder of a Hugging Face checkpoint of LLaVA-1.5", path, errno.ENOENT
            )
        return section


LFS = "is a Git LFS pointer, not the file itself: fetch it with git lfs pull"


def is_lfs_pointer(data: bytes) -> bool:
    return data.startswith(b"version https://git-lfs")


def parse_json(data: bytes, path: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except json.JSONDecodeError as error:
        raise broken(path, "", f"is not JSON: {clean(error.msg)}", error.pos) from None
    except (ValueError, RecursionError) as error:  # not UTF-8; a number of thousands of digits; nested too deeply
        raise broken(path, "", f"is not JSON that can be read: {clean(error)}") from None
    if not isinstance(value, dict):
        raise broken(path, "", f"holds {'a list' if isinstance(value, list) else shown(value)}, not an object")
    return value


_MISSING: Any = object()


class Section:
    """An object of a JSON file. null counts as absent. A default stands for an absent key; without one the key must be there.

    Attributes: values, path (the file)."""

    def __init__(self, values: dict[str, Any], path: str, prefix: str = "") -> None:
        self.values, self.path, self._prefix = values, path, prefix

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def key(self, key: str) -> str:
        return self._prefix + key

    def broken(self, key: str, reason: str) -> ModelFormatError:
        return broken(self.path, self.key(key), reason)

    def unsupported(self, key: str, reason: str) -> UnsupportedModelError:
        return unsupported(self.path, self.key(key), reason)

    def _take(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is _MISSING:
            raise self.broken(key, "this key is missing")
        return default if value is None else value

    def integer(self, key: str, low: int, high: int, default: Any = _MISSING) -> Any:
        """An int within [low, high]; the default may be anything."""
        value = self._take(key, default)
        if value is default:
            return value
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.broken(key, f"must be a whole number in {low}..{high}, not {shown(value)}")
        return value

    def number(self, key: str, low: float, high: float, default: Any = _MISSING) -> Any:
        """A finite float within [low, high]."""
        value = self._take(key, default)
        return value if value is default else self._number(key, value, low, high)

    def _number(self, key: str, value: Any, low: float, high: float) -> float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high and math.isfinite(value)
        if not good:
            raise self.broken(key, f"must be a number in {low:g}..{high:g}, not {shown(value)}")
        return float(value)

    def numbers(self, key: str, count: int, low: float, high: float, default: Sequence[float]) -> list[float]:
        value = self._take(key, list(default))
        if not isinstance(value, list) or len(value) != count:
            raise self.broken(key, f"must be a list of {count} numbers, not {shown(value)}")
        return [self._number(key, x, low, high) for x in value]

    def flag(self, key: str, default: bool | None = None) -> bool | None:
        value = self._take(key, default)
        if value is not None and not isinstance(value, bool):
            raise self.broken(key, f"must be true or false, not {shown(value)}")
        return value

    def text(self, key: str, default: Any = _MISSING) -> Any:
        value = self._take(key, default)
        if value is not default and not isinstance(value, str):
            raise self.broken(key, f"must be a text, not {shown(value)}")
        return value

    def section(self, key: str) -> Section | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.broken(key, f"must be an object, not {shown(value)}")
        return None if value is None else Section(value, self.path, f"{self.key(key)}.")

    def only(self, key: str, allowed: Sequence[object], reason: str) -> None:
        """UnsupportedModelError unless the key is absent or has one of these values."""
        value = self.values.get(key)
        if value is not None and not any(value == good and type(value) is type(good) for good in allowed):
            raise self.unsupported(key, f"{shown(value)} can't be converted: {reason}")
