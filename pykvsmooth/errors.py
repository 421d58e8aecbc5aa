"""The exceptions of pykvsmooth. All of them derive from KVSmoothError; where a builtin says the same, they derive from it, too.

Wrong argument types and values are plain TypeError and ValueError.
"""

from __future__ import annotations

import os

__all__ = [
    "BusyError",
    "CancelledError",
    "ClosedError",
    "ContextOverflowError",
    "DeviceError",
    "ImageError",
    "ImageLimitError",
    "KVSmoothError",
    "LimitError",
    "MemoryLimitError",
    "ModelFileError",
    "ModelFileNotFoundError",
    "ModelFormatError",
    "ModelMismatchError",
    "NumericError",
    "OutOfMemoryError",
    "PolicyError",
    "SessionFileError",
    "SessionFileNotFoundError",
    "SessionIOError",
    "UnsupportedModelError",
]


class KVSmoothError(Exception):
    """Root of all errors that this package raises on its own account."""


class ModelFormatError(KVSmoothError):
    """A model file breaks its format.

    Attributes: path (the file), what (key or tensor, may be empty), offset (byte in the file, None if it has none).
    """

    def __init__(self, message: str, path: str = "", what: str = "", offset: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.what = what
        self.offset = offset


class _FileOSError(OSError):
    """An OSError with our message and the attributes that the builtin has."""

    def _of_file(self, path: str, errno: int | None) -> None:
        self.errno = errno
        self.strerror = None if errno is None else os.strerror(errno)
        self.filename = path or None

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[type, tuple[str, str, int | None]]:
        return type(self), (str(self), self.filename or "", self.errno)


class ModelFileError(ModelFormatError, _FileOSError):
    """The operating system refuses a model file: missing, a folder, no permission. Also an OSError, with errno."""

    def __init__(self, message: str, path: str = "", errno: int | None = None) -> None:
        super().__init__(message, path)
        self._of_file(path, errno)


class ModelFileNotFoundError(ModelFileError, FileNotFoundError):
    """There is no such model file. Also a FileNotFoundError."""


class UnsupportedModelError(KVSmoothError):
    """A sound file that this runtime can't run, or something asked of a model that it can't do (a picture without an mmproj).

    Attributes: path, what.
    """

    def __init__(self, message: str, path: str = "", what: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.what = what


class ModelMismatchError(KVSmoothError):
    """Text model and mmproj do not belong together. Attributes: path, what."""

    def __init__(self, message: str, path: str = "", what: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.what = what


class ImageError(KVSmoothError, ValueError):
    """A picture can't be read or used. Never answered without it."""


class ContextOverflowError(KVSmoothError, ValueError):
    """More rows than the session has room for. Raised before any work. Attributes: needed, n_ctx (rows)."""

    def __init__(self, message: str, needed: int = 0, n_ctx: int = 0) -> None:
        super().__init__(message)
        self.needed = needed
        self.n_ctx = n_ctx


class OutOfMemoryError(KVSmoothError, MemoryError):
    """An allocation failed. Attributes: needed, free (bytes; 0 where unknown)."""

    def __init__(self, message: str, needed: int = 0, free: int = 0) -> None:
        super().__init__(message)
        self.needed = needed
        self.free = free


class LimitError(KVSmoothError, ValueError):
    """Something is larger than the Limits of the model allow. The message says how to raise the limit.

    Attributes: limit (its name in Limits), value, allowed (in the unit of that limit).
    """

    def __init__(self, message: str, limit: str = "", value: int = 0, allowed: int = 0) -> None:
        super().__init__(f"{message}; to allow more: Model(..., limits=Limits({limit}=...))" if limit else message)
        self.limit = limit
        self.value = value
        self.allowed = allowed


class ImageLimitError(LimitError, ImageError):
    """A picture has more pixels or bytes than the Limits allow."""


class MemoryLimitError(LimitError, OutOfMemoryError):
    """A session needs more memory than the Limits leave. Also has needed and free, as every OutOfMemoryError."""

    def __init__(self, message: str, limit: str = "", value: int = 0, allowed: int = 0) -> None:
        super().__init__(message, limit, value, allowed)
        self.needed = value
        self.free = allowed


class DeviceError(KVSmoothError, RuntimeError):
    """A device that was asked for by name can't be had, or failed."""


class SessionFileError(KVSmoothError):
    """A saved session is damaged, belongs to another model, or can't be written or read. Attributes: path, what, offset."""

    def __init__(self, message: str, path: str = "", what: str = "", offset: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.what = what
        self.offset = offset


class SessionIOError(SessionFileError, _FileOSError):
    """The operating system refuses to write or read a saved session. Also an OSError, with errno."""

    def __init__(self, message: str, path: str = "", errno: int | None = None) -> None:
        super().__init__(message, path)
        self._of_file(path, errno)


class SessionFileNotFoundError(SessionIOError, FileNotFoundError):
    """There is no such file, or no such folder to save into. Also a FileNotFoundError."""


class BusyError(KVSmoothError, RuntimeError):
    """A session is in use: by another thread, or by a stream that has not ended."""


class ClosedError(KVSmoothError, ValueError):
    """A model, session or stream was used after close()."""


class PolicyError(KVSmoothError, ValueError):
    """Parameters of a policy make no sense for this model, or the exact rows that a rewind needs are gone."""


class NumericError(KVSmoothError, ArithmeticError):
    """A computation gave values that are not finite, or larger than the cache can hold: damaged weights, or an overflow. The session
    is as it was before the call.

    Attributes: what (where they began: "layer 3 of 8 (blk.2)").
    """

    def __init__(self, message: str, what: str = "") -> None:
        super().__init__(message)
        self.what = what


class CancelledError(KVSmoothError):
    """A call was cancelled by its flag. Streams report finish_reason "cancelled" instead of raising this."""
