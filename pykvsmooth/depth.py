"""Depth maps: from what a caller has to one number for each patch of a picture, along the picture's own way into the tower.

A map goes through the same pad, crop or stretch as its picture (by areas: each pixel of the square is the mean of what it covers),
is normalised over the pixels that the picture covers, and pooled patch by patch. NaN marks patches that are padding.
"""

from __future__ import annotations

import math
import os
from typing import IO, TYPE_CHECKING, Any, Union

import numpy as np

from .errors import ImageError
from .limits import STANDARD, Limits

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

DepthLike = Union[str, "os.PathLike[str]", "NDArray[Any]"]


def check_map(name: str, values: Any, limits: Limits = STANDARD) -> NDArray[np.float32]:
    """A map as (height, width) float32, a copy. ImageError for another shape, no numbers, and values that are not finite."""
    array = np.asarray(values)
    _check_dtype(name, array.dtype)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[:, :, 0]
    if array.ndim != 2:
        raise ImageError(f"{name}: shape {array.shape} is no depth map; give one map (height, width)")
    if array.size == 0:
        raise ImageError(f"{name}: {array.shape[1]} x {array.shape[0]} has no values; give another map")
    limits.check_pixels(name, array.shape[1], array.shape[0])
    with np.errstate(over="ignore"):
        found = array.astype(np.float32)
    if not np.isfinite(found).all():
        n = int((~np.isfinite(found)).sum())
        raise ImageError(f"{name}: {n} of {found.size} values are NaN or infinite; fill the holes first")
    return found


def _check_dtype(name: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "fiub":
        raise ImageError(f"{name}: {dtype} is no depth; give an array (height, width) of numbers")


def read_map(source: DepthLike, limits: Limits = STANDARD) -> NDArray[np.float32]:
    """(height, width) float32 of a PNG (gray, 8 or 16 bits; any other gray picture too), a .npy file, or an array; limits as of pictures.
    ImageError."""
    if not isinstance(source, (str, os.PathLike)):
        return check_map("depth", source, limits)
    from .images import opened  # here, because Pillow is slow to import

    with opened(os.fspath(source), limits) as (file, name):
        return check_map(name, read_values(file, name, limits), limits)


def read_values(file: IO[bytes], name: str, limits: Limits) -> Any:
    """What a file holds, as an array. ImageError if it is damaged, or no depth."""
    from .images import decoded, guard

    if name.lower().endswith(".npy"):
        return guard(name, lambda: _npy_values(file, name, limits), "save the depth with numpy.save, as an array of numbers")
    return decoded(file, name, lambda picture: _gray_values(name, picture, limits))


def _npy_values(file: IO[bytes], name: str, limits: Limits) -> Any:
    """read_array() would allocate what the header says before it reads: the header is looked at first."""
    form = np.lib.format
    version = form.read_magic(file)
    header = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
    if version not in header:  # 3.0 is for names of fields
        raise ImageError(
            f"{name}: .npy {version[0]}.{version[1]} is not of plain numbers; save the depth with numpy.save as (height, width)"
        )
    shape, _, dtype = header[version](file)
    _check_dtype(name, dtype)
    limits.check_pixels(name, math.prod(shape[1:]), shape[0] if shape else 1)
    file.seek(0)
    return form.read_array(file, allow_pickle=False)


def _gray_values(name: str, picture: Image.Image, limits: Limits) -> Any:
    """Values as they are in the file: load_image would make eight bits of them."""
    limits.check_pixels(name, *picture.size)
    if picture.mode == "L" or picture.mode == "F" or picture.mode.startswith("I"):
        return np.asarray(picture)
    colours = np.asarray(picture.convert("RGB"))
    if (colours != colours[:, :, :1]).any():
        raise ImageError(f"{name}: is a colour picture, and colours have no order; save the depth in shades of gray")
    return colours[:, :, 0]


def save_map(path: str | os.PathLike[str], values: NDArray[np.float32]) -> None:
    """(height, width) as a .npy file of these numbers, or as a gray PNG of 16 bits from the least value to the largest. Written whole or
    not at all. ValueError for another suffix, OSError with this name."""
    name = os.fsdecode(path)
    check_suffix(name)
    part = f"{name}.{os.getpid()}.tmp"
    try:
        with open(part, "wb") as file:
            if name.lower().endswith(".npy"):
                np.save(file, values)
            else:
                _write_png(file, values)
        os.replace(part, name)
    except OSError as error:
        raise OSError(error.errno, f"can't be written: {error.strerror or error}", name) from error
    finally:
        if os.path.exists(part):
            os.unlink(part)


def check_suffix(name: str) -> None:
    if not name.lower().endswith((".png", ".npy")):
        raise ValueError(f"{name}: depth is saved as .png (gray, 16 bits) or .npy; name the file so")


def _write_png(file: Any, values: NDArray[np.float32]) -> None:
    from PIL import Image

    levels = values.astype(np.float64) - float(values.min())
    top = levels.max()
    if top > 0:
        levels *= 65535 / top
    Image.fromarray(np.rint(levels).astype(np.uint16)).save(file, "PNG")


# ---- onto the square of the tower ----


def _cover(edges: tuple[float, float], n: int, size: int) -> NDArray[np.float64]:
    """(size, n): how much of each pixel of the square is covered by each of n cells between edges."""
    cells = edges[0] + (edges[1] - edges[0]) * np.arange(n + 1) / n
    pixels = np.arange(size)[:, None]
    low, high = np.maximum(cells[:-1], pixels), np.minimum(cells[1:], pixels + 1)
    cover: NDArray[np.float64] = np.maximum(high - low, 0.0)
    return cover


def check_proportions(values: NDArray[np.float32], width: int, height: int) -> None:
    """ImageError for a map of other proportions than the picture of width x height: less than a pixel is rounding, and so are two
    percent, for depth models round sides to multiples of 14 or 32."""
    rows, cols = values.shape
    apart = abs(cols * height - rows * width)
    if apart >= max(width, height) and apart > 0.02 * rows * width:
        raise ImageError(
            f"depth: {cols} x {rows} is of other proportions than the picture's {width} x {height}; give the map of this picture"
        )


def on_square(values: NDArray[np.float32], width: int, height: int, size: int, mode: str) -> NDArray[np.float64]:
    """The map of a picture of width x height as (size, size) float64, NaN where more than half a pixel is padding."""
    from .images import place

    across, down = place(width, height, size, mode)
    x, y = _cover(across, values.shape[1], size), _cover(down, values.shape[0], size)
    area = y.sum(1)[:, None] * x.sum(1)
    total = y @ (values.astype(np.float64) @ x.T)
    square: NDArray[np.float64] = np.divide(total, area, out=np.full((size, size), np.nan), where=area > 0.499)
    return square


def normalise(values: NDArray[np.float64], norm: str) -> NDArray[np.float64]:
    """Over what is not NaN: minmax to [0, 1]; percentile: the 2nd to the 98th, clipped; zscore; metric: as it is. One value everywhere
    says nothing of depth: it becomes 0."""
    if norm == "metric":
        return values
    seen = values[~np.isnan(values)]
    if norm == "zscore":
        low, span = seen.mean(), seen.std()
    else:
        low, high = np.percentile(seen, (2, 98)) if norm == "percentile" else (seen.min(), seen.max())
        span = high - low
        values = np.clip(values, low, high)
    if span <= 1e-6 * np.abs(seen).max():  # the noise of float32
        flat: NDArray[np.float64] = np.where(np.isnan(values), np.nan, 0.0)
        return flat
    scaled: NDArray[np.float64] = (values - low) / span
    return scaled


def pool(values: NDArray[np.float64], grid: tuple[int, int], how: str) -> NDArray[np.float32]:
    """(width * height of grid,) float32, row by row: mean or median of a patch's pixels, or the one nearest to its centre. Padding counts
    nowhere; a patch of nothing else is NaN."""
    size = len(values)
    x, y = ([round(i * size / n) for i in range(n + 1)] for n in grid)
    patches = [values[y[j] : y[j + 1], x[i] : x[i + 1]] for j in range(grid[1]) for i in range(grid[0])]
    return np.array([_pool_one(patch, how) for patch in patches], np.float32)


def _pool_one(patch: NDArray[np.float64], how: str) -> float:
    seen = ~np.isnan(patch)
    if not seen.any():
        return float("nan")
    if how != "center":
        return float((np.mean if how == "mean" else np.median)(patch[seen]))
    down, across = np.indices(patch.shape)
    far = (down - (patch.shape[0] - 1) / 2) ** 2 + (across - (patch.shape[1] - 1) / 2) ** 2
    far[~seen] = np.inf
    return float(patch[far == far.min()].mean())  # of an even patch the four in the middle
