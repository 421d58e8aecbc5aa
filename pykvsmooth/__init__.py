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

import logging

from ._native import lib as _lib
from ._native import string as _string
from .batch import Batch
from .errors import (
    BusyError,
    CancelledError,
    ClosedError,
    ContextOverflowError,
    DeviceError,
    ImageError,
    KVSmoothError,
    ModelFileError,
    ModelFileNotFoundError,
    ModelFormatError,
    ModelMismatchError,
    NumericError,
    OutOfMemoryError,
    PolicyError,
    SessionFileError,
    UnsupportedModelError,
)
from .model import Model
from .policy import KVSmooth
from .session import Session
from .stats import Result, Stats, Token
from .stream import Stream
from .template import VICUNA_SYSTEM, TemplateError

__version__ = _string(_lib.kvs_version())

__all__ = [
    "VICUNA_SYSTEM",
    "Batch",
    "BusyError",
    "CancelledError",
    "ClosedError",
    "ContextOverflowError",
    "DeviceError",
    "ImageError",
    "KVSmooth",
    "KVSmoothError",
    "Model",
    "ModelFileError",
    "ModelFileNotFoundError",
    "ModelFormatError",
    "ModelMismatchError",
    "NumericError",
    "OutOfMemoryError",
    "PolicyError",
    "Result",
    "Session",
    "SessionFileError",
    "Stats",
    "Stream",
    "TemplateError",
    "Token",
    "UnsupportedModelError",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())
