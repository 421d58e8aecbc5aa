"""Arguments of callers, checked before any work: one function per kind of value, which returns it as the code behind wants it.

The messages begin with the argument's name and say what is allowed. Wrong types are TypeError, wrong values ValueError.
"""

from __future__ import annotations

import math
import operator
import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def shown(value: object) -> str:
    """value for a message, in few characters. Python refuses to write integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    return reprlib.repr(value)


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """An int within [low, high]; bools are none."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{name} must be {f'at least {low}' if high is None else f'in {low}..{high}'}, not {shown(number)}")
    return number


def real(name: str, value: Any, low: float, high: float = math.inf, open_low: bool = False) -> float:
    """A finite float within [low, high], and still so as the float32 that native code works with."""
    try:
        if isinstance(value, (bool, np.bool_, complex, np.complexfloating, str, bytes)):
            raise TypeError
        number = float(value)
    except OverflowError:  # an integer beyond every float
        number = math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}") from None
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(np.float32(number))
    for x, note in ((number, ""), (rounded, f" ({rounded} in float32)")):
        if not math.isfinite(x) or not low <= x <= high or (open_low and x == low):
            lower = f"{'over' if open_low else 'at least'} {low:g}"
            limits = f"finite and {lower}" if high == math.inf else f"{lower} and at most {high:g}"
            raise ValueError(f"{name} must be {limits}, not {shown(value if isinstance(value, int) else number)}{note}")
    return number


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(choices)}, not {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {shown(value)}")
    return value


def utf8(name: str, value: Any) -> bytes:
    """The bytes of a text."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, not {type(value).__name__}")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: holds a lone surrogate at {error.start}") from None


def c_path(name: str, path: Any) -> bytes:
    """A file name for C, which would cut it at a NUL."""
    try:
        encoded = os.fsencode(path)
    except TypeError:
        raise TypeError(f"{name} must be a path, not {type(path).__name__}") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: holds a lone surrogate at {error.start}") from None
    if not encoded:
        raise ValueError(f"{name}: is empty; give the name of a file")
    if 0 in encoded:
        raise ValueError(f"{name}: embedded null byte in {shown(path)}")
    return encoded


def integers(name: str, values: Any, low: int | None = None, high: int | None = None) -> list[int]:
    """Ints in any flat list, array or iterator. Bytes and dicts iterate, too, but are a mistake."""
    try:
        if isinstance(values, (str, bytes, bytearray, memoryview, Mapping)):
            raise TypeError
        items = iter(values)
    except TypeError:
        raise TypeError(f"{name} must be a list of integers, not {type(values).__name__}") from None
    return [integer(f"{name}[{i}]", value, low, high) for i, value in enumerate(items)]


def float_rows(name: str, rows: Any, width: int) -> NDArray[np.float32]:
    """(n, width) float32, finite."""
    wanted = f"{name} must be an array of shape (n, {width}), float32"
    try:
        array = np.asarray(rows)
    except ValueError:
        raise ValueError(f"{wanted}, not lists of different lengths") from None
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{wanted}, not {array.dtype if isinstance(rows, np.ndarray) else type(rows).__name__}")
    if array.ndim != 2 or array.shape[1] != width:
        raise ValueError(f"{wanted}, not {array.shape}")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, also as float32")
    return array
