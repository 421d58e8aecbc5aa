"""Depth from one picture with an ONNX model that the user has: Depth-Anything-V2, MiDaS, or another of their kind (extra `depth`)."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from .checks import c_path, integer
from .errors import ImageError, KVSmoothError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet: what both families were trained with
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


class DepthModelError(KVSmoothError):
    """An ONNX file can't be loaded, is no depth model, or failed."""


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("depth from an ONNX model needs the package onnxruntime: pip install 'pykvsmooth[depth]'") from error
    return onnxruntime


class OnnxDepth:
    """A depth model as a callable: a picture (PIL, RGB) in, (height, width) float32 of the same size out, larger = nearer for the models
    named above (relative inverse depth).

    path: the model's file. It must have one picture as its input, (1, 3, H, W) or (1, H, W, 3), and (1, H, W) or (1, 1, H, W) as its first
    output. Where the file fixes H and W (MiDaS: 256 or 384) the picture is stretched to them; where it leaves them open
    (Depth-Anything-V2) its short side becomes size and both a multiple of multiple. mean, std: of the channels, in 0..1. threads: None
    lets onnxruntime choose. May be used from several threads, and is loaded with the first picture.

    Raises ImportError without onnxruntime, DepthModelError for a file that is none, TypeError, ValueError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int = 518,
        multiple: int = 14,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        threads: int | None = None,
    ) -> None:
        c_path("path", path)
        self.path = os.fsdecode(path)
        self.size = integer("size", size, 1, 1 << 14)
        self.multiple = integer("multiple", multiple, 1, 1 << 14)
        self.threads = None if threads is None else integer("threads", threads, 1, 1024)
        self._mean, self._std = (np.asarray(list(values), np.float32).reshape(3) for values in (mean, std))
        self._session: Any = None
        self._lock = threading.Lock()
        _runtime()

    def __repr__(self) -> str:
        return f"OnnxDepth({self.path!r})"

    def __call__(self, picture: Image.Image) -> NDArray[np.float32]:
        session = self._load()
        source = session.get_inputs()[0]
        pixels = self._pixels(picture, source)
        try:
            found = np.asarray(session.run([session.get_outputs()[0].name], {source.name: pixels})[0], np.float32)
        except Exception as error:  # onnxruntime's own exceptions have no common root
            raise DepthModelError(f"{self.path}: fails on a picture of {picture.width} x {picture.height}: {error}") from error
        return self._to_picture(found, picture)

    def _load(self) -> Any:
        with self._lock:
            if self._session is None:
                self._session = self._open()
            return self._session

    def _open(self) -> Any:
        runtime = _runtime()
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if not os.path.isfile(self.path):
            raise DepthModelError(f"{self.path}: no such file; give the .onnx file of a depth model")
        try:
            session = runtime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise DepthModelError(f"{self.path}: does not load as an ONNX model: {error}") from error
        source = session.get_inputs()[0]
        pictures = len(session.get_inputs()) == 1 and len(source.shape) == 4 and 3 in (source.shape[1], source.shape[3])
        if not pictures or source.type not in _TYPES:
            raise DepthModelError(f"{self.path}: takes {source.type} {source.shape}, not one picture (1, 3, H, W): no depth model")
        return session

    def _pixels(self, picture: Image.Image, source: Any) -> NDArray[Any]:
        """The picture as the model wants it: resized, normalised, in its layout and type."""
        from PIL import Image

        channels_first = source.shape[1] == 3
        wanted = source.shape[2:] if channels_first else source.shape[1:3]
        height, width = (n if isinstance(n, int) and n > 0 else 0 for n in wanted)
        if not height or not width:
            width, height = self._free_size(*picture.size)
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        values = (np.asarray(resized, np.float32) / 255 - self._mean) / self._std
        values = values.transpose(2, 0, 1) if channels_first else values
        return np.ascontiguousarray(values[None], _TYPES[source.type])

    def _free_size(self, width: int, height: int) -> tuple[int, int]:
        scale = self.size / min(width, height)
        across, down = (max(1, round(n * scale / self.multiple)) * self.multiple for n in (width, height))
        return across, down

    def _to_picture(self, found: NDArray[np.float32], picture: Image.Image) -> NDArray[np.float32]:
        from PIL import Image

        values = found.reshape([n for n in found.shape if n != 1])
        if values.ndim != 2:
            raise DepthModelError(f"{self.path}: gives {found.shape}, not one map (1, H, W): no depth model")
        if not np.isfinite(values).all():
            raise ImageError(f"{self.path}: gives depth that is not finite for this picture")
        return np.asarray(Image.fromarray(np.ascontiguousarray(values)).resize(picture.size, Image.Resampling.BILINEAR), np.float32)
