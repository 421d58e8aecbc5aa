"""Pictures: from whatever a caller has in hand to the exact pixels that the vision tower was trained on.

``load_image`` decodes to upright 8-bit RGB, ``preprocess`` turns that into one normalised (3, size, size) array. A picture
that can't be had is an ``ImageError`` that says which picture, what is wrong and what to do: the runtime never answers
without the picture. Nothing here changes a setting of Pillow, so both functions may run in many threads.
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, TypeVar, Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .checks import choice
from .errors import ImageError, ImageLimitError
from .limits import STANDARD, Limits
from .prompt import MODES

ImageLike = Union[str, "os.PathLike[str]", bytes, bytearray, memoryview, IO[bytes], Image.Image, "np.ndarray[Any, Any]"]

MEAN_COLOUR = (122, 116, 104)  # CLIP's mean in 8 bits: what transparent pixels show
STRIP_PIXELS = 8 << 20  # that are laid out at once; see _pad

T = TypeVar("T")
_REFUSED_FORMATS = {"EPS"}  # Pillow would start Ghostscript on a stranger's PostScript
_BROKEN_EXIF = (OSError, SyntaxError, LookupError, TypeError, ValueError, AttributeError, struct.error)
_log = logging.getLogger("pykvsmooth")


def load_image(image: ImageLike, *, limits: Limits = STANDARD) -> Image.Image:
    """Any picture as an upright RGB image of 8 bits: a path, bytes, a file object, a PIL image or an HWC uint8 array.

    EXIF turns are applied, alpha is laid over CLIP's mean colour, of an animation the first frame is taken. 16-bit gray
    becomes round(v / 257); the wide modes I and F are read as 0..1 (F only), 0..255 or 0..65535, the smallest range that
    holds every value. Pictures over ``limits.image_pixels`` or
    ``limits.image_bytes`` are an ImageLimitError before they are decoded.
    """
    if isinstance(image, Image.Image):
        name = f"PIL image {image.width} x {image.height} {image.mode}"
        return guard(name, lambda: _to_rgb(image, name, limits))
    if isinstance(image, np.ndarray):
        return _from_array(image, limits)
    if isinstance(image, (bytes, bytearray, memoryview)):
        data = bytes(image)
        limits.check_bytes(f"<{len(data)} bytes>", len(data))
        return _decode(io.BytesIO(data), f"<{len(data)} bytes>", limits)
    if isinstance(image, (str, os.PathLike)):
        return _from_path(os.fspath(image), limits)
    if hasattr(image, "read"):
        name = str(getattr(image, "name", "<file object>"))
        return _decode(_all_of(image, name, limits), name, limits)
    raise TypeError(f"image must be a path, bytes, a file object, a PIL image or a uint8 array, not {type(image).__name__}")


def preprocess(
    image: Image.Image, size: int, mode: str = "pad", mean: Sequence[float] = (0.0, 0.0, 0.0), std: Sequence[float] = (1.0, 1.0, 1.0)
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """An RGB image as (3, size, size) float32: (pixel / 255 - mean) / std after Pillow's bicubic resize.

    ``pad`` lays the picture in the middle of a square of the mean colour (the original LLaVA), ``crop`` keeps the middle
    square (Hugging Face's default), ``stretch`` ignores the proportions.
    """
    choice("mode", mode, MODES)
    if image.mode != "RGB":
        raise ValueError(f"preprocess takes an RGB image, not {image.mode}: use load_image first")
    if mode != "stretch" and max(image.size) > size * min(image.size):
        raise ImageError(
            f"a picture of {image.width} x {image.height} would be less than one pixel wide at the model's {size} x {size}"
            f" (mode {mode!r}); cut it into parts, or use mode 'stretch'"
        )
    square = _RESIZE[mode](image, size, tuple(int(m * 255) for m in mean))
    mean32, std32 = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    levels = (np.arange(256) / 255).astype(np.float32)
    table = (levels[:, None] - mean32) / std32  # each of 256 levels in each channel, computed once
    pixels = np.asarray(square)
    return np.stack([table[pixels[:, :, c], c] for c in range(3)])


# ---- sources ----


def _from_path(path: str | bytes, limits: Limits) -> Image.Image:
    with opened(path, limits) as (file, name):
        return _decode(file, name, limits)


@contextmanager
def opened(path: str | bytes, limits: Limits) -> Iterator[tuple[IO[bytes], str]]:
    """A file of no more than limits.image_bytes, open at its start, and its name for messages; of a pipe what it gave. ImageError says
    why there is none."""
    plain = os.fsdecode(path)
    name = plain if plain and plain.isprintable() else repr(plain)
    scheme = name.split(":", 1)[0].lower()
    if "://" in name or scheme == "data":
        raise ImageError(f"{name[:100]}: addresses are not fetched; download the picture and give its path or bytes")
    try:
        with open(path, "rb") as file:
            yield _bounded(file, name, limits), name
    except ImageError:
        raise
    except IsADirectoryError:
        raise ImageError(f"{name}: is a folder; give the pictures in it one by one") from None
    except FileNotFoundError:
        start = "" if os.path.isabs(plain) else f" (it starts at {os.getcwd()})"
        raise ImageError(f"{name}: no such file; check the path{start}") from None
    except OSError as error:
        raise ImageError(f"{name}: can't be opened: {error.strerror or error}; check the path and its permissions") from error
    except ValueError as error:  # a NUL in the path
        raise ImageError(f"{name}: not a path: {error}") from error


def _bounded(file: IO[bytes], name: str, limits: Limits) -> IO[bytes]:
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode):
        limits.check_bytes(name, found.st_size)
        return file
    if stat.S_ISFIFO(found.st_mode) or stat.S_ISSOCK(found.st_mode):
        return _all_of(file, name, limits)
    raise ImageError(f"{name}: is a device, not a file; give a picture file")


def _all_of(stream: Any, name: str, limits: Limits) -> io.BytesIO:
    try:
        data = stream.read(limits.image_bytes + 1)
    except UnicodeDecodeError:
        data = ""
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise ImageError(f"{name}: can't be read: {error}; open it anew, with mode 'rb'") from error
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"{name}: the file object gives {type(data).__name__}, not bytes; open it with mode 'rb'")
    limits.check_bytes(name, len(data))  # what has come so far
    return io.BytesIO(data)


def _from_array(array: np.ndarray[Any, Any], limits: Limits) -> Image.Image:
    name = f"array {array.shape} {array.dtype}"
    if array.dtype != np.uint8:
        hint = (
            "(a * 255).round().astype('uint8') if it holds 0..1"
            if array.dtype.kind == "f"
            else "scale it to 0..255, then a.astype('uint8')"
        )
        raise ImageError(f"{name}: pictures are uint8 arrays; {hint}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        chw = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        hint = "it looks like channels first: use a.transpose(1, 2, 0)" if chw else "give one picture at a time"
        raise ImageError(f"{name}: not (height, width) or (height, width, 1 | 3 | 4); {hint}")
    if array.size == 0:
        raise ImageError(f"{name}: has no pixels")
    return guard(name, lambda: _to_rgb(Image.fromarray(np.ascontiguousarray(array)), name, limits))


# ---- decoding ----


def _decode(file: IO[bytes], name: str, limits: Limits) -> Image.Image:
    return decoded(file, name, lambda picture: _to_rgb(picture, name, limits))


def decoded(file: IO[bytes], name: str, take: Callable[[Image.Image], T]) -> T:
    """take(the picture in the file). ImageError if there is none, or it is damaged."""
    head = file.read(64)
    file.seek(0)
    if not head:
        raise ImageError(f"{name}: is empty; give a picture file")
    formats = readable_formats()

    def decode() -> T:
        with Image.open(file, formats=formats) as picture:
            return take(picture)

    try:
        return guard(name, decode)
    except UnidentifiedImageError:
        raise ImageError(f"{name}: {_what_instead(head)}") from None


def readable_formats() -> list[str]:
    """Names of Pillow's formats, but for those that start other programs."""
    Image.init()
    return [name for name in Image.ID if name not in _REFUSED_FORMATS]


def guard(name: str, decode: Callable[[], T], again: str = "get the picture again, or save it anew as PNG") -> T:
    """Pillow's and NumPy's decoders raise almost anything on damaged files: every one becomes an ImageError with the file's name."""
    try:
        return decode()
    except (ImageError, UnidentifiedImageError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _beyond_pillow(name, str(error)) from error
    except MemoryError as error:
        raise ImageError(f"{name}: not enough memory to decode it; make it smaller first") from error
    except Exception as error:
        raise ImageError(f"{name}: damaged or cut short: {error}; {again}") from error


def _beyond_pillow(name: str, text: str) -> ImageLimitError:
    """Pillow has a mark of its own for the whole process, and refuses pictures of twice that before it tells their size, but in words."""
    mark = Image.MAX_IMAGE_PIXELS or 0
    found = re.search("([0-9]+) pixels", text)
    pixels = int(found[1]) if found else 2 * mark + 1
    message = f"{name}: {pixels:,} pixels are beyond what Pillow opens (PIL.Image.MAX_IMAGE_PIXELS is {mark:,}); make it smaller first"
    return ImageLimitError(message, "image_pixels", pixels, 2 * mark)


def _what_instead(head: bytes) -> str:
    """What a file that is no picture most likely is, from its first bytes."""
    text = head.lstrip().lower()
    if head[:4] == b"GGUF":
        return "is a model (GGUF), not a picture"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "is HEIC, which needs the package pillow-heif (and its register_heif_opener()); or save it as JPEG"
    if text.startswith((b"<!doctype", b"<html")):
        return "is a web page, not a picture (a download that went wrong?)"
    if text.startswith((b"<svg", b"<?xml")):
        return "is SVG or XML; save it as PNG first"
    if head[:4] in (b"%PDF", b"%!PS"):
        return "is a document; save the page as PNG first"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return f"is text ({head[:24].decode('ascii')!r}...), not a picture"
    return f"not a picture that Pillow can read, or damaged (it starts with {head[:8].hex(' ')}); save it as PNG or JPEG"


def _to_rgb(picture: Image.Image, name: str, limits: Limits) -> Image.Image:
    width, height = picture.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: has no pixels ({width} x {height})")
    limits.check_pixels(name, width, height)  # before load(): this is what stops a decompression bomb
    picture.load()
    picture = _upright(picture, name)
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = Image.fromarray(_to_8bit(np.asarray(picture), name))
    if picture.mode == "La":  # premultiplied; Pillow turns it into RGBA by this way only
        picture = picture.convert("LA")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, (*MEAN_COLOUR, 255))
        picture = Image.alpha_composite(ground, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _upright(picture: Image.Image, name: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except _BROKEN_EXIF as error:  # says nothing about the pixels
        _log.debug("%s: EXIF can't be read: %s", name, error)
        return picture


def _to_8bit(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    low, high = float(values.min()), float(values.max())  # NaN if any value is
    if values.dtype.itemsize == 2:
        top = 65535.0
    elif low >= 0 and high <= 65535:
        top = 1.0 if values.dtype.kind == "f" and high <= 1 else 255.0 if high <= 255 else 65535.0
    else:
        raise ImageError(f"{name}: holds values from {low:g} to {high:g}, for which no range of brightness is known; scale it to 0..255")
    return np.floor(values * (255.0 / top) + 0.5).astype(np.uint8)


# ---- geometry ----


def place(width: int, height: int, size: int, mode: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where preprocess lays a picture of width x height: ((left, right), (top, bottom)) of its edges in pixels of the size x size square.
    Inside it where the square is padded, outside where the picture is cropped."""
    if mode == "stretch":
        return (0.0, float(size)), (0.0, float(size))
    if mode == "crop":
        short = min(width, height)
        wide, high = int(size * width / short), int(size * height / short)
        left, top = (wide - size) // 2, (high - size) // 2
        return (float(-left), float(wide - left)), (float(-top), float(high - top))
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    return (left * size / side, (left + width) * size / side), (top * size / side, (top + height) * size / side)


def _stretch(image: Image.Image, size: int, _: tuple[int, ...]) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, size: int, _: tuple[int, ...]) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def _pad(image: Image.Image, size: int, colour: tuple[int, ...]) -> Image.Image:
    """To a square with bars of colour, then resized. Pillow resizes rows first, then columns, and rows of one colour stay what they
    are: so the rows go in strips, and a square of 100,000 pixels a side is never in memory."""
    width, height = image.size
    side = max(width, height)
    narrow = Image.new("RGB", (size, side), colour)
    n_rows = max(1, STRIP_PIXELS // side)
    for top in range(0, height, n_rows):
        strip = Image.new("RGB", (side, min(n_rows, height - top)), colour)
        strip.paste(image.crop((0, top, width, top + strip.height)), ((side - width) // 2, 0))
        narrow.paste(strip.resize((size, strip.height), Image.Resampling.BICUBIC), (0, (side - height) // 2 + top))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)


_RESIZE = {"pad": _pad, "crop": _crop, "stretch": _stretch}
