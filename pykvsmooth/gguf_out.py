"""A GGUF file that is written tensor by tensor: what a converter needs around the writer of the gguf package.

    with gguf_out.create(path, "llama") as out:
        out.keys.add_context_length(2048)                      # keys is a gguf.GGUFWriter, with all its add_*
        out.begin([Spec("token_embd.weight", (32000, 4096), "Q8_0"), ...])
        for ...:
            out.write(rows)                                    # the data of the tensors, in the order of begin, in any pieces

The file gets its name when all is written; whatever ends the block before that leaves nothing behind.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._native import lib
from .checks import c_path
from .errors import ModelFileError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Spec:
    """A tensor before its data: shape as NumPy has it, the length of a row last; type by its name in GGUF, "Q4_K"."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def n_bytes(self) -> int:
        row: int = lib.kvs_row_bytes(getattr(lib, f"KVS_TYPE_{self.type}"), self.shape[-1])
        return math.prod(self.shape[:-1]) * row


class Out:
    """A file in the making. Attributes: keys, the GGUFWriter whose add_* put metadata into the file until begin()."""

    def __init__(self, path: str, architecture: str) -> None:
        self.path, self.temporary = path, f"{path}.{os.getpid()}.tmp"
        self.keys = _package().GGUFWriter(self.temporary, architecture)
        self._left: list[int] = []  # bytes that the tensors still wait for, in their order

    def begin(self, tensors: Sequence[Spec]) -> None:
        """Writes the keys and the table of all tensors. ModelFileError, as from write: the disk is full, or the system says no."""
        kinds = _package().GGMLQuantizationType
        for spec in tensors:
            self.keys.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), spec.n_bytes, raw_dtype=kinds[spec.type])
        self._left = [spec.n_bytes for spec in tensors]
        with self._writing():
            self._check_room()
            self.keys.write_header_to_file()
            self.keys.write_kv_data_to_file()
            self.keys.write_ti_data_to_file()
            self._pad()

    def write(self, data: NDArray[Any]) -> None:
        """The next bytes of the tensor whose turn it is; no call goes beyond its end."""
        view = np.ascontiguousarray(data).data.cast("B")
        if not self._left or len(view) > self._left[0]:
            raise ValueError(f"data: has {len(view)} bytes, the tensor waits for {self._left[0] if self._left else 0}")
        with self._writing():
            self.keys.fout[0].write(view)
            self._left[0] -= len(view)
            if not self._left[0]:
                del self._left[0]
                self._pad()

    def _pad(self) -> None:
        file = self.keys.fout[0]
        file.write(bytes(-file.tell() % self.keys.data_alignment))

    def _check_room(self) -> None:
        disk, needed = os.statvfs(os.path.dirname(self.path) or "."), sum(self._left)
        if disk.f_blocks and needed > disk.f_bavail * disk.f_frsize:  # some file systems do not tell their size
            raise OSError(errno.ENOSPC, f"{needed} bytes are needed, its disk has {disk.f_bavail * disk.f_frsize} left")

    def _finish(self) -> None:
        if self._left:
            raise ValueError(f"{len(self._left)} tensors have no data")
        with self._writing():
            self.keys.flush()
            os.fsync(self.keys.fout[0].fileno())
            self.keys.close()
            os.replace(self.temporary, self.path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ModelFileError(f"{self.path}: can't be written: {error.strerror or error}", self.path, error.errno) from error


@contextmanager
def create(path: str | os.PathLike[str], architecture: str) -> Iterator[Out]:
    """A file that will stand at path, in the place of a regular one if there is one. ModelFileError, ImportError without gguf."""
    name = os.fsdecode(c_path("path", path))
    if os.path.lexists(name) and not os.path.isfile(name):
        raise ModelFileError(f"{name}: is no regular file and will not be replaced", name, errno.EEXIST)
    out = Out(name, architecture)
    try:
        yield out
        out._finish()
    finally:
        with suppress(OSError):
            out.keys.close()
        with suppress(OSError):  # on a read-only file system also where there is no such file
            os.unlink(out.temporary)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("writing GGUF files needs the package gguf: pip install 'pykvsmooth[convert]'") from error
    return gguf
