"""pykvsmooth: captions with fewer invented objects, from quantized LLaVA checkpoints, on this machine.

    import pykvsmooth as kvs
    with kvs.Model("llava-v1.5-7b.Q4_K_M.gguf", mmproj="mmproj-f16.gguf") as model:
        with model.session(policy=kvs.KVSmooth()) as session:
            for token in session.generate("Please describe the image in detail.", image="street.jpg"):
                print(token.text, end="", flush=True)

A Model (weights) is shared by threads, a Session (one timeline, its own cache) belongs to one thread at a time. Nothing is printed;
the logger is "pykvsmooth".
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from .errors import (
    BusyError,
    CancelledError,
    ClosedError,
    ContextOverflowError,
    DeviceError,
    ImageError,
    ImageLimitError,
    KVSmoothError,
    LimitError,
    MemoryLimitError,
    ModelFileError,
    ModelFileNotFoundError,
    ModelFormatError,
    ModelMismatchError,
    NumericError,
    OutOfMemoryError,
    PolicyError,
    SessionFileError,
    SessionFileNotFoundError,
    SessionIOError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from .aio import AsyncStream
    from .batch import Batch
    from .depth_onnx import DepthModelError, OnnxDepth
    from .limits import Limits
    from .model import Model
    from .policies.dscr import DSCR
    from .policies.kvsmooth import KVSmooth
    from .policies.prunehal import PruneHal
    from .session import Session
    from .stats import MemoryPlan, Pruning, Result, Stats, Token
    from .stream import Stream
    from .template import VICUNA_SYSTEM, TemplateError

    __version__: str

__all__ = [
    "DSCR",
    "VICUNA_SYSTEM",
    "AsyncStream",
    "Batch",
    "BusyError",
    "CancelledError",
    "ClosedError",
    "ContextOverflowError",
    "DepthModelError",
    "DeviceError",
    "ImageError",
    "ImageLimitError",
    "KVSmooth",
    "KVSmoothError",
    "LimitError",
    "Limits",
    "MemoryLimitError",
    "MemoryPlan",
    "Model",
    "ModelFileError",
    "ModelFileNotFoundError",
    "ModelFormatError",
    "ModelMismatchError",
    "NumericError",
    "OnnxDepth",
    "OutOfMemoryError",
    "PolicyError",
    "PruneHal",
    "Pruning",
    "Result",
    "Session",
    "SessionFileError",
    "SessionFileNotFoundError",
    "SessionIOError",
    "Stats",
    "Stream",
    "TemplateError",
    "Token",
    "UnsupportedModelError",
]

# Modules of the names that are fetched when they are first used: the native library and NumPy load then, not with this package.
_HOMES = {
    "DSCR": "policies.dscr",
    "VICUNA_SYSTEM": "template",
    "AsyncStream": "aio",
    "Batch": "batch",
    "KVSmooth": "policies.kvsmooth",
    "Limits": "limits",
    "MemoryPlan": "stats",
    "Model": "model",
    "DepthModelError": "depth_onnx",
    "OnnxDepth": "depth_onnx",
    "PruneHal": "policies.prunehal",
    "Pruning": "stats",
    "Result": "stats",
    "Session": "session",
    "Stats": "stats",
    "Stream": "stream",
    "TemplateError": "template",
    "Token": "stats",
}


if not TYPE_CHECKING:  # type checkers shall know the names above only

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        elif name == "__version__":
            from ._native import lib, string

            value = string(lib.kvs_version())
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value  # the next look-up does not come here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


logging.getLogger(__name__).addHandler(logging.NullHandler())
