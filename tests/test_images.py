"""Pictures in, pixels out. The pictures are made here; shared data is used where it lies beside the checkout."""

from __future__ import annotations

import io
import threading
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from pykvsmooth import Limits
from pykvsmooth.errors import ImageError, ImageLimitError
from pykvsmooth.images import MEAN_COLOUR, MODES, load_image, preprocess

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "images"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def noise(rng: np.random.Generator, height: int, width: int, channels: int = 3) -> np.ndarray:
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


# ---- a plain statement of the geometry: bicubic resize as matrices, in the two passes and the 8-bit steps of Pillow ----


BITS = 22


def cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resize_matrix(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in) whole numbers: weights times 2**22, each rounded, as Pillow has them for 8-bit pictures."""
    scale = n_in / n_out
    width = max(scale, 1.0)
    centre = (np.arange(n_out)[:, None] + 0.5) * scale
    weights = cubic((np.arange(n_in)[None, :] + 0.5 - centre) / width)
    reach = np.abs(np.arange(n_in)[None, :] + 0.5 - centre) <= 2 * width + 0.5
    weights = weights * reach
    weights = weights / weights.sum(axis=1, keepdims=True) * 2**BITS
    return np.trunc(weights + np.copysign(0.5, weights)).astype(np.int64)


def along_rows(pixels: np.ndarray, width: int) -> np.ndarray:
    """One pass; back to 8 bits after it."""
    sums = np.einsum("oi,hic->hoc", resize_matrix(pixels.shape[1], width), pixels.astype(np.int64), optimize=True)
    return np.clip((sums + 2 ** (BITS - 1)) >> BITS, 0, 255)


def resize(pixels: np.ndarray, height: int, width: int, columns_first: bool) -> np.ndarray:
    if columns_first:
        return resize(pixels.transpose(1, 0, 2), width, height, False).transpose(1, 0, 2)
    return along_rows(along_rows(pixels, width).transpose(1, 0, 2), height).transpose(1, 0, 2)


def reference(pixels: np.ndarray, size: int, mode: str, columns_first: bool) -> np.ndarray:
    h, w = pixels.shape[:2]
    if mode == "pad":
        side = max(h, w)
        square = np.empty((side, side, 3))
        square[:] = MEAN_COLOUR
        top, left = (side - h) // 2, (side - w) // 2
        square[top : top + h, left : left + w] = pixels
        out = resize(square, size, size, columns_first)
    elif mode == "crop":
        h2, w2 = (size, size * w // h) if h <= w else (size * h // w, size)
        top, left = (h2 - size) // 2, (w2 - size) // 2
        out = resize(pixels, h2, w2, columns_first)[top : top + size, left : left + size]
    else:
        out = resize(pixels, size, size, columns_first)
    return ((out / 255 - MEAN) / STD).transpose(2, 0, 1)


def distance(got: np.ndarray, pixels: np.ndarray, size: int, mode: str) -> float:
    """The largest difference in levels of 0..255. Which of its two passes Pillow runs first depends on its version and the
    sizes, and moves the rounding in between: the nearer of the two orders counts."""
    apart = [np.abs(got - reference(pixels, size, mode, order)) * np.array(STD)[:, None, None] * 255 for order in (False, True)]
    return min(float(a.max()) for a in apart)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 1), (29, 41), (41, 29), (56, 56), (97, 13), (7, 120), (200, 301)])
def test_geometry_against_plain_numpy(rng, mode, shape):
    pixels = noise(rng, *shape)
    got = preprocess(load_image(pixels), 28, mode, MEAN, STD)
    assert got.shape == (3, 28, 28) and got.dtype == np.float32 and got.flags.c_contiguous
    assert distance(got, pixels, 28, mode) <= 1e-3


def test_identity_at_the_models_size(rng):
    pixels = noise(rng, 33, 33)
    for mode in MODES:
        got = preprocess(load_image(pixels), 33, mode)
        assert np.array_equal(got, (pixels / 255).astype(np.float32).transpose(2, 0, 1))


def test_padding_shows_the_mean_colour():
    got = preprocess(Image.new("RGB", (64, 16), (255, 0, 0)), 32, "pad", MEAN, STD)
    back = np.rint((got * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]) * 255).astype(int)
    assert [tuple(back[:, y, 5]) for y in (0, 31)] == [MEAN_COLOUR] * 2
    assert tuple(back[:, 16, 5]) == (255, 0, 0)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(130, 5800), (2500, 3700)])
def test_pad_in_strips_equals_the_square(rng, shape, turned):
    """Large pictures are laid out in strips: not a level differs from Pillow's resize of the whole square."""
    pixels = noise(rng, *shape)
    if turned:
        pixels = pixels.transpose(1, 0, 2)
    image = load_image(pixels)
    side = max(image.size)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    whole = np.asarray(square.resize((48, 48), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(preprocess(image, 48, "pad", MEAN, STD), ((whole / 255 - MEAN) / STD).transpose(2, 0, 1), atol=1e-6)


def test_very_long_pictures_pad_without_the_square(rng):
    pixels = noise(rng, 150, 40_000)
    got = preprocess(load_image(pixels), 336, "pad", MEAN, STD)
    levels = np.abs(got - reference_long(pixels, 336)) * np.array(STD)[:, None, None] * 255
    assert levels.max() <= 1.01


def reference_long(pixels: np.ndarray, size: int) -> np.ndarray:
    """The same sums as ``reference`` in mode pad, as one product of matrices of which only the picture's columns are made."""
    h, w = pixels.shape[:2]
    matrix = resize_matrix(max(h, w), size) / 2**BITS
    top, left = (max(h, w) - h) // 2, (max(h, w) - w) // 2
    above, beside = matrix[:, top : top + h], matrix[:, left : left + w]
    seen = np.einsum("oh,hwc,pw->opc", above, pixels.astype(float) - MEAN_COLOUR, beside, optimize=True)
    return ((np.clip(np.floor(seen + MEAN_COLOUR + 0.5), 0, 255) / 255 - MEAN) / STD).transpose(2, 0, 1)


# ---- sources ----


def test_every_source_gives_the_same_picture(rng, tmp_path):
    pixels = noise(rng, 20, 31)
    data = saved(Image.fromarray(pixels), "PNG")
    path = tmp_path / "ü picture.png"
    path.write_bytes(data)
    with open(path, "rb") as file:
        sources = [path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), file, Image.open(path), pixels]
        for source in sources:
            got = load_image(source)
            assert got.mode == "RGB" and np.array_equal(np.asarray(got), pixels)


def test_arrays(rng):
    gray = noise(rng, 9, 5, 1)
    expected = np.repeat(gray, 3, axis=2)
    assert np.array_equal(np.asarray(load_image(gray)), expected)
    assert np.array_equal(np.asarray(load_image(gray[:, :, 0])), expected)
    rgba = noise(rng, 9, 5, 4)
    rgba[..., 3] = 255
    assert np.array_equal(np.asarray(load_image(rgba)), rgba[..., :3])
    turned = noise(rng, 5, 9).transpose(1, 0, 2)  # not contiguous
    assert np.array_equal(np.asarray(load_image(turned)), turned)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((4, 4, 3), np.float32), "holds 0..1"),
        (np.zeros((4, 4), np.uint16), "uint8"),
        (np.zeros((4, 4), bool), "uint8"),
        (np.zeros((3, 4, 5), np.uint8), "transpose"),
        (np.zeros((2, 4, 5, 3), np.uint8), "one picture"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros(5, np.uint8), "height, width"),
    ],
)
def test_wrong_arrays(array, says):
    with pytest.raises(ImageError, match=says):
        load_image(array)


@pytest.mark.parametrize("wrong", [None, 3, 1.5, ["a.png"], object()])
def test_wrong_types(wrong):
    with pytest.raises(TypeError, match="image must be"):
        load_image(wrong)
    with pytest.raises(TypeError, match="'rb'"):
        load_image(io.StringIO("text"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"hello, this is text\n", "is text"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"GGUF\x03\0\0\0" + bytes(40), "is a model"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "document"),
        (b"<svg xmlns='x'/>", "SVG"),
        (bytes(range(128, 190)), "80 81 82"),
    ],
)
def test_what_is_no_picture(data, says, tmp_path):
    path = tmp_path / "file.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=says) as info:
        load_image(path)
    assert str(info.value).startswith(f"{path}: ")
    with pytest.raises(ImageError, match=f"<{len(data)} bytes>"):
        load_image(data)


def test_what_is_no_file(tmp_path):
    with pytest.raises(ImageError, match="folder"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "missing.png")
    for address in ("https://example.org/a.png", "data:image/png;base64,AAAA", "file:///a.png"):
        with pytest.raises(ImageError, match="not fetched"):
            load_image(address)
    with pytest.raises(ImageError, match="not a path"):
        load_image("a\0b.png")
    with pytest.raises(ImageError, match="device"):
        load_image("/dev/zero")


def test_streams_that_can_not_be_read(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    with open(path, "rb") as file:
        pass
    for stream, name in ((file, str(path)), (closed(io.BytesIO(b"x")), "<file object>")):
        with pytest.raises(ImageError, match="closed") as info:
            load_image(stream)
        assert str(info.value).startswith(f"{name}: can't be read")

    class Nothing:
        def read(self, n):
            return None

    with pytest.raises(TypeError, match="NoneType, not bytes"):
        load_image(Nothing())


def closed(stream):
    stream.close()
    return stream


# ---- modes ----


def test_exif_turns(rng):
    pixels = noise(rng, 12, 20)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = Image.fromarray({1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1]}.get(orientation, pixels))
        if orientation in (5, 6, 7, 8):  # the stored picture lies on its side
            side = pixels.transpose(1, 0, 2)
            turned = Image.fromarray(np.ascontiguousarray({5: side, 6: side[::-1], 7: side[::-1, ::-1], 8: side[:, ::-1]}[orientation]))
        got = load_image(saved(turned, "PNG", exif=exif))
        assert np.array_equal(np.asarray(got), pixels), orientation


def test_broken_exif_is_no_reason_to_refuse(rng):
    data = saved(Image.fromarray(noise(rng, 8, 8)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert load_image(data).size == (8, 8)


def test_alpha_lies_on_the_mean_colour(rng):
    pixels = noise(rng, 16, 16, 4)
    pixels[:4, :, 3], pixels[4:8, :, 3] = 0, 255
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + np.array(MEAN_COLOUR) * (1 - alpha)
    got = np.asarray(load_image(saved(Image.fromarray(pixels), "PNG"))).astype(float)
    assert np.abs(got - expected).max() <= 1
    assert np.array_equal(got[:4], np.broadcast_to(MEAN_COLOUR, (4, 16, 3)))
    assert np.array_equal(got[4:8], pixels[4:8, :, :3])
    la = load_image(saved(Image.fromarray(pixels[..., [0, 3]], "LA"), "PNG"))
    expected = pixels[..., :1] * alpha + np.array(MEAN_COLOUR) * (1 - alpha)
    assert np.abs(np.asarray(la) - expected).max() <= 1


def test_palette_with_and_without_transparency():
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    assert np.asarray(load_image(saved(palette, "PNG")))[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    seen = np.asarray(load_image(saved(palette, "PNG", transparency=1)))[0].tolist()
    assert seen == [[255, 0, 0], list(MEAN_COLOUR), [0, 0, 255]]
    key = Image.new("RGB", (2, 1), (9, 9, 9))
    key.putpixel((1, 0), (1, 2, 3))
    seen = np.asarray(load_image(saved(key, "PNG", transparency=(1, 2, 3))))[0].tolist()
    assert seen == [[9, 9, 9], list(MEAN_COLOUR)]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "La", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
def test_every_mode_of_pillow_gives_rgb(mode):
    got = load_image(Image.new(mode, (5, 4)))
    assert got.mode == "RGB" and got.size == (5, 4)


def test_cmyk():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    got = np.asarray(load_image(saved(cmyk, "JPEG", quality=100)))[0, 0].astype(int)
    assert np.abs(got - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits(rng, kind):
    values = rng.integers(0, 65536, (6, 7), np.uint16)
    values[0, :5] = 0, 65535, 128, 129, 257
    got = np.asarray(load_image(saved(Image.fromarray(values), kind)))
    assert np.array_equal(got, np.repeat(np.rint(values / 257)[..., None], 3, 2))
    assert got[0, :5, 0].tolist() == [0, 255, 0, 1, 1]


def test_wide_modes():
    def gray(values, dtype):
        return np.asarray(load_image(Image.fromarray(np.array([values], dtype))))[0, :, 0].tolist()

    assert gray([0, 0.5, 1], np.float32) == [0, 128, 255]
    assert gray([0, 7.4, 255], np.float32) == [0, 7, 255]
    assert gray([0, 65535], np.float32) == [0, 255]
    assert gray([0, 1, 200], np.int32) == [0, 1, 200]
    assert gray([0, 257, 65535], np.int32) == [0, 1, 255]
    for values in ([-1.0, 2], [0, 1e6], [np.nan, 0]):
        with pytest.raises(ImageError, match="no range"):
            gray(values, np.float32)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    got = load_image(data)
    assert got.size == (16, 16) and got.getpixel((3, 3)) == (250, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated(rng, kind):
    data = saved(Image.fromarray(noise(rng, 64, 64)), kind)
    assert load_image(data).size == (64, 64)
    for part in (0.9, 0.5, 0.2):
        with pytest.raises(ImageError, match=r"damaged|picture"):
            load_image(data[: int(len(data) * part)])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_damaged_bytes_give_a_picture_or_an_image_error(rng, kind):
    warnings.simplefilter("ignore")  # Pillow's, about the damage
    data = np.frombuffer(saved(Image.fromarray(noise(rng, 24, 24)), kind), np.uint8)
    for _ in range(60):
        broken = data.copy()
        broken[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
        try:
            assert load_image(broken.tobytes(), limits=Limits(image_pixels=1 << 16)).mode == "RGB"
        except ImageError:
            pass


# ---- sizes ----


@pytest.mark.parametrize("side", [11_000, 30_000])
def test_a_bomb_is_refused_before_it_is_decoded(side):
    limit = Image.MAX_IMAGE_PIXELS
    bomb = saved(Image.new("1", (side, 1)), "PNG")
    header = bomb[12:20] + side.to_bytes(4, "big") + bomb[24:29]  # says: square
    bomb = bomb[:12] + header + zlib.crc32(header).to_bytes(4, "big") + bomb[33:]
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageLimitError, match="make it smaller") as caught:
            load_image(bomb)
    assert (caught.value.limit, caught.value.value) == ("image_pixels", side * side)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
    assert limit == Image.MAX_IMAGE_PIXELS


def test_empty_pictures():
    for size in ((0, 4), (4, 0), (0, 0)):
        with pytest.raises(ImageError, match="no pixels"):
            load_image(Image.new("RGB", size))


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_a_line_of_100000_pixels(size):
    start = time.monotonic()
    line = load_image(saved(Image.new("RGB", size, (255, 0, 0)), "PNG"))
    for mode in ("pad", "crop"):
        with pytest.raises(ImageError, match="stretch"):
            preprocess(line, 336, mode, MEAN, STD)
    got = preprocess(line, 336, "stretch")
    assert (got[0] == 1).all() and (got[1:] == 0).all()
    assert time.monotonic() - start < 5


def test_wrong_calls():
    with pytest.raises(ValueError, match="pad, crop, stretch"):
        preprocess(Image.new("RGB", (4, 4)), 4, "fit")
    with pytest.raises(ValueError, match="load_image"):
        preprocess(Image.new("L", (4, 4)), 4)


def test_many_threads(rng):
    data = saved(Image.fromarray(noise(rng, 300, 200)), "PNG")
    expected = preprocess(load_image(data), 56, "pad", MEAN, STD)
    wrong: list[int] = []

    def work(i: int) -> None:
        if not np.array_equal(preprocess(load_image(data), 56, "pad", MEAN, STD), expected):
            wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- real files ----


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared pictures beside the checkout")
def test_shared_pictures():
    paths = [p for p in sorted(SHARED.rglob("*")) if p.suffix in (".png", ".jpg", ".webp")]
    assert len(paths) >= 15
    for path in paths:
        image = load_image(path)
        for mode in MODES:
            got = preprocess(image, 56, mode, MEAN, STD)
            assert distance(got, np.asarray(image), 56, mode) <= 1e-3, (path.name, mode)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared pictures beside the checkout")
def test_turned_picture_is_the_upright_one():
    upright, turned = load_image(SHARED / "coffee.png"), load_image(SHARED / "derived" / "coffee_exif6.jpg")
    assert upright.size == turned.size
    assert np.abs(np.asarray(upright).astype(int) - np.asarray(turned)).mean() < 8
