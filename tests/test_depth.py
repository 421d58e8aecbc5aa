"""Depth maps: reading, the way onto the tower's square, normalising, pooling, what is refused, ONNX models, and the command."""

import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair, Run
from PIL import Image
from twins import picture

import pykvsmooth as kvs
from pykvsmooth import depth
from pykvsmooth.images import MODES, load_image, preprocess
from pykvsmooth.policies import dscr

BASE: dict[str, Any] = {"layers": [1]}


def patches(model: kvs.Model, source: Any, shape: tuple[int, int] = (56, 56), mode: str = "pad", **options: Any) -> np.ndarray | None:
    policy = kvs.DSCR(depth=source, **BASE, **options)
    return policy.patch_depth(model, policy.source(0), Image.new("RGB", shape[::-1]), mode)


# ---- reading ----


@pytest.mark.parametrize("kind", ["png8", "png16", "rgb", "npy", "npy_int", "tiff"])
def test_read_what_was_saved(kind: str, rng: np.random.Generator, tmp_path: Path) -> None:
    values: np.ndarray = rng.integers(0, 256 if kind in ("png8", "rgb") else 65536, (7, 9))
    path = tmp_path / f"depth.{'npy' if kind.startswith('npy') else 'tiff' if kind == 'tiff' else 'png'}"
    if kind == "npy":
        values = rng.standard_normal((7, 9))
        np.save(path, values)
    elif kind == "npy_int":
        np.save(path, values)
    elif kind == "tiff":
        Image.fromarray(values.astype(np.float32)).save(path)
    else:
        picture = Image.fromarray(values.astype(np.uint16 if kind == "png16" else np.uint8))
        (picture.convert("RGB") if kind == "rgb" else picture).save(path)
    for source in (path, str(path)):
        np.testing.assert_array_equal(depth.read_map(source), values.astype(np.float32))


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_save_and_read(suffix: str, rng: np.random.Generator, tmp_path: Path) -> None:
    values = rng.standard_normal((11, 6)).astype(np.float32)
    depth.save_map(tmp_path / f"d{suffix}", values)
    read = depth.read_map(tmp_path / f"d{suffix}")
    span = values.max() - values.min()
    tolerance = 0 if suffix == ".npy" else 0.51 / 65535
    scaled = read if suffix == ".npy" else read / 65535 * span + values.min()
    np.testing.assert_allclose(scaled, values, rtol=0, atol=tolerance * span + 1e-6)
    assert [p.name for p in tmp_path.iterdir()] == [f"d{suffix}"]
    with pytest.raises(ValueError, match=r"\.png"):
        depth.save_map(tmp_path / "d.jpg", values)
    with pytest.raises(OSError, match="can't be written: No such file") as refused:
        depth.save_map(tmp_path / "none" / "d.png", values)
    assert refused.value.filename == str(tmp_path / "none" / "d.png")


def bad_file(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    if name.startswith("empty"):
        path.write_bytes(b"")
    elif name == "text.npy" or name == "text.png":
        path.write_text("not a number")
    elif name == "words.npy":
        np.save(path, np.array([["near", "far"]]))
    elif name == "objects.npy":
        np.save(path, np.array([[None, 1]], object))
    elif name == "cut.npy":
        np.save(path, np.ones((40, 40)))
        path.write_bytes(path.read_bytes()[:500])
    elif name == "cut.png":
        data = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 65535, (64, 64)).astype(np.uint16)).save(data, "PNG")
        path.write_bytes(data.getvalue()[:900])
    elif name == "colour.png":
        Image.new("RGB", (56, 56), (255, 0, 0)).save(path)
    elif name == "folder.png":
        path.mkdir()
    elif name == "nan.npy":
        np.save(path, np.full((56, 56), np.nan))
    elif name in HEADERS:
        header = HEADERS[name].ljust(117) + b"\n"
        path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(64))
    elif name == "fields.npy":
        path.write_bytes(b"\x93NUMPY\3\0" + bytes(60))
    elif name == "zip.npy":
        path.write_bytes(b"PK\3\4" + bytes(60))
    elif name == "device.npy":
        path.symlink_to("/dev/zero")
    return path


HEADERS = {  # on which NumPy raises TokenError, OverflowError, TypeError, MemoryError
    "brackets.npy": b"((((",
    "endless.npy": b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}",
    "set.npy": b"{[]: 1}",
    "huge.npy": b"{'descr': '<f4', 'fortran_order': False, 'shape': (4000000, 4000000)}",
    "negative.npy": b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -16)}",
    "wide.npy": b"{'descr': '<V2147483647', 'fortran_order': False, 'shape': (1, 1)}",
}
BAD_FILES = (
    "empty.png empty.npy text.npy text.png words.npy objects.npy cut.npy cut.png colour.png folder.png nan.npy missing.png missing.npy"
    " fields.npy zip.npy device.npy " + " ".join(HEADERS)
)


@pytest.mark.parametrize("name", BAD_FILES.split())
def test_bad_files(name: str, model: kvs.Model, rng: np.random.Generator, tmp_path: Path) -> None:
    """An ImageError that names the file, before any work: the session is as it was."""
    path = bad_file(tmp_path, name)
    with model.session(n_ctx=64, policy=kvs.DSCR(depth=path, **BASE)) as session:
        for call in (lambda: session.generate("a", image=picture(rng)), lambda: session.feed_image(picture(rng))):
            with pytest.raises(kvs.ImageError) as caught:
                call()
            assert name in str(caught.value)
        assert session.n_past == 0


@pytest.mark.parametrize("kind", ["png", "npy", "array", "callable"])
def test_limits_are_those_of_pictures(kind: str, tiny_pair: Pair, rng: np.random.Generator, tmp_path: Path) -> None:
    values = rng.integers(0, 256, (50, 50), np.uint8)
    source: Any = values if kind == "array" else (lambda _: values) if kind == "callable" else tmp_path / f"deep.{kind}"
    if kind == "png":
        Image.fromarray(values).save(source)
    elif kind == "npy":
        np.save(source, values)
    limits = kvs.Limits(image_pixels=1999)
    policy = kvs.DSCR(depth=source, **BASE)
    with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, limits=limits) as model, model.session(n_ctx=64, policy=policy) as session:
        with pytest.raises(kvs.ImageLimitError) as caught:
            session.generate("a", image=picture(rng, 40))
        assert (caught.value.limit, session.n_past) == ("image_pixels", 0)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (np.full((4, 4), np.nan), kvs.ImageError),
        (np.array([[1.0, np.inf]]), kvs.ImageError),
        (np.array([[1e300, 0.0]]), kvs.ImageError),  # no float32
        (np.array([["a", "b"]]), kvs.ImageError),
        (np.ones((4, 4), complex), kvs.ImageError),
        (np.ones(5), kvs.ImageError),
        (np.ones((3, 4, 5)), kvs.ImageError),
        (np.ones((0, 4)), kvs.ImageError),
        (5, TypeError),
        (b"depth.png", TypeError),
        ([5, "a"], TypeError),
        (True, TypeError),
    ],
    ids=str,
)
def test_bad_arrays(values: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="depth"):
        kvs.DSCR(depth=values)


@pytest.mark.parametrize("shape", [(56, 40), (40, 56), (10, 11), (1, 56)])
def test_another_aspect(shape: tuple[int, int], model: kvs.Model, rng: np.random.Generator) -> None:
    with model.session(policy=kvs.DSCR(depth=rng.random(shape), **BASE)) as session, pytest.raises(kvs.ImageError, match="proportions"):
        session.feed_image(picture(rng))


@pytest.mark.parametrize(
    ("shape", "size"), [((480, 640), (518, 686)), ((480, 640), (24, 32)), ((333, 500), (33, 50)), ((7, 9), (700, 900))]
)
def test_sizes_that_are_rounded(shape: tuple[int, int], size: tuple[int, int], model: kvs.Model, rng: np.random.Generator) -> None:
    assert np.isfinite(patches(model, rng.random(size), shape, "stretch")).all()


# ---- onto the square ----


def brute_force(values: np.ndarray, shape: tuple[int, int], size: int, mode: str, fine: int = 12) -> np.ndarray:
    """Each pixel of the square as the mean of fine x fine points of the picture, NaN where most of them lie outside."""
    height, width = shape
    points = (np.arange(size * fine) + 0.5) / fine
    if mode == "stretch":
        x, y = points / size, points / size
    elif mode == "crop":
        short = min(shape)
        wide, high = int(size * width / short), int(size * height / short)
        x, y = (points + (wide - size) // 2) / wide, (points + (high - size) // 2) / high
    else:
        side = max(shape)
        x, y = (points * side / size - (side - width) // 2) / width, (points * side / size - (side - height) // 2) / height
    inside = ((y >= 0) & (y < 1))[:, None] & ((x >= 0) & (x < 1))
    rows, cols = (np.clip((a * n).astype(int), 0, n - 1) for a, n in zip((y, x), values.shape, strict=True))
    sampled = np.where(inside, values[rows][:, cols], 0).reshape(size, fine, size, fine)
    n = inside.reshape(size, fine, size, fine).sum((1, 3))
    return np.divide(sampled.sum((1, 3)), n, out=np.full((size, size), np.nan), where=n > 0.499 * fine * fine)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(28, 28), (56, 42), (42, 56), (84, 14), (30, 50)])
def test_geometry(mode: str, shape: tuple[int, int], rng: np.random.Generator) -> None:
    """A smooth map: points of a fine raster miss edges of its cells by less than a hundredth of its range."""
    y, x = np.meshgrid(np.linspace(0, 1, shape[0]), np.linspace(0, 1, shape[1]), indexing="ij")
    a, b = rng.random(2)
    values = (a * y + b * x).astype(np.float32)
    got = depth.on_square(values, shape[1], shape[0], 28, mode)
    wanted = brute_force(values, shape, 28, mode)
    assert (np.isnan(got) == np.isnan(wanted)).all()
    assert np.nanmax(np.abs(got - wanted)) < 0.01


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(61, 80), (80, 61), (56, 56), (200, 40)])
def test_a_map_lies_where_its_picture_lies(mode: str, shape: tuple[int, int]) -> None:
    """A bright corner of a picture as the tower sees it, and the same corner as its depth map, taken to the same square."""
    gray = np.zeros((*shape, 3), np.uint8)
    gray[: shape[0] // 2, : shape[1] // 3] = 255
    seen = preprocess(load_image(gray), 56, mode)[0]
    got = depth.on_square(gray[:, :, 0].astype(np.float32) / 255, shape[1], shape[0], 56, mode)
    valid = ~np.isnan(got)
    settled = valid & ((got == 0) | (got == 1))
    assert (np.abs(seen - got)[settled & (np.abs(seen - 0.5) > 0.2)] < 0.3).mean() > 0.97
    assert np.isnan(got).any() == (mode == "pad" and shape[0] != shape[1])


def test_area_mean_of_a_whole_multiple(rng: np.random.Generator, model: kvs.Model) -> None:
    """56 x 56 to 4 x 4 patches: exactly the mean of 14 x 14; so of a map twice and of one a quarter the size."""
    values = rng.random((28, 28)).astype(np.float32)
    wanted = values.reshape(4, 7, 4, 7).mean((1, 3)).reshape(-1)
    for scale in (1, 2, 4):
        large = values.repeat(scale, 0).repeat(scale, 1)
        np.testing.assert_allclose(patches(model, large, depth_norm="metric"), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["minmax", "percentile", "zscore", "metric"])
@pytest.mark.parametrize("pool", ["mean", "median", "center"])
def test_normalise_and_pool(norm: str, pool: str, rng: np.random.Generator, model: kvs.Model) -> None:
    values = rng.normal(5, 3, (56, 56)).astype(np.float32)
    d = values.astype(np.float64)
    if norm == "minmax":
        d = (d - d.min()) / (d.max() - d.min())
    elif norm == "percentile":
        low, high = np.percentile(d, 2), np.percentile(d, 98)
        d = (np.clip(d, low, high) - low) / (high - low)
    elif norm == "zscore":
        d = (d - d.mean()) / d.std()
    cells = d.reshape(4, 14, 4, 14).transpose(0, 2, 1, 3).reshape(16, 14, 14)
    wanted = {"mean": cells.mean((1, 2)), "median": np.median(cells.reshape(16, -1), 1), "center": cells[:, 6:8, 6:8].mean((1, 2))}[pool]
    np.testing.assert_allclose(patches(model, values, depth_norm=norm, depth_pool=pool), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("known", [True, False])
def test_padding_is_masked(known: bool, rng: np.random.Generator, model: kvs.Model) -> None:
    """A picture of half the height: the first and last of four rows of patches are padding."""
    values = rng.random((28, 56)).astype(np.float32) + 1 if known else None
    got = patches(model, values, (28, 56), depth_norm="metric").reshape(4, 4)
    assert np.isnan(got[[0, 3]]).all() and np.isfinite(got[1:3]).all()
    for mode in ("crop", "stretch"):
        found = patches(model, values, (28, 56), mode)
        assert found is None if not known else np.isfinite(found).all()
    unmasked = patches(model, values, (28, 56), mask_padding=False, depth_norm="metric")
    if known:
        np.testing.assert_allclose(unmasked.reshape(4, 4)[[0, 3]], values.min(), rtol=1e-6)
        np.testing.assert_array_equal(unmasked.reshape(4, 4)[1:3], got[1:3])
    else:
        assert unmasked is None


def test_padding_changes_nothing_else(rng: np.random.Generator, model: kvs.Model) -> None:
    """The cache rows of padded patches keep their bits, and the others never see them."""
    image = picture(rng)[:28]
    with model.session(n_ctx=64, kv_type="f32") as plain, model.session(n_ctx=64, kv_type="f32", policy=kvs.DSCR(**BASE)) as session:
        for one in (plain, session):
            one.feed_image(image)
        (k, v), (k_plain, v_plain) = session.kv(1), plain.kv(1)
        for got, was in ((k, k_plain), (v, v_plain)):
            assert (got[:, :4] == was[:, :4]).all() and (got[:, 12:] == was[:, 12:]).all()
            assert (got[:, 4:12] != was[:, 4:12]).any(axis=2).all()


def test_invert(rng: np.random.Generator, model: kvs.Model) -> None:
    values = rng.random((56, 56)) + 0.5
    np.testing.assert_allclose(patches(model, values, invert=True), patches(model, (1 / values).astype(np.float32)), rtol=0, atol=1e-6)
    with pytest.raises(kvs.ImageError, match="invert"):
        patches(model, np.zeros((56, 56)), invert=True)


@pytest.mark.parametrize("norm", ["minmax", "percentile", "zscore", "metric"])
def test_a_constant_map_is_the_spatial_term_alone(norm: str, rng: np.random.Generator, model: kvs.Model) -> None:
    image = picture(rng)
    seen = []
    for values in (None, np.full((56, 56), 3.7), np.full((9, 9), 41, np.uint16)):
        with model.session(n_ctx=64, kv_type="f32", policy=kvs.DSCR(depth=values, depth_norm=norm, **BASE)) as session:
            session.feed_image(image)
            session.feed([300])
            seen.append(session.kv(1)[0].tobytes() + session.logits().tobytes())
    assert seen[0] == seen[1] == seen[2]
    flat = np.full((56, 56, 3), 90, np.uint8)
    with model.session(n_ctx=64, policy=kvs.DSCR(depth=flat[:, :, 0], depth_norm=norm, **BASE)) as session:
        assert session.generate("a", image=flat, max_tokens=2).result().finish_reason == "length"


def test_no_depth_is_said_once(model: kvs.Model, caplog: pytest.LogCaptureFixture) -> None:
    dscr._say_no_depth.cache_clear()
    with caplog.at_level(logging.WARNING, "pykvsmooth"):
        for _ in range(2):
            model.session(n_ctx=16, policy=kvs.DSCR(**BASE)).close()
    assert [r.message for r in caplog.records if "spatial term alone" in r.message] and len(caplog.records) == 1


# ---- the policy object ----


def test_values() -> None:
    a, b = np.ones((3, 4)), np.zeros((3, 4))
    assert kvs.DSCR(depth=a) == kvs.DSCR(depth=a.tolist()) != kvs.DSCR(depth=b)
    assert hash(kvs.DSCR(depth=[a, None, "x.png"])) == hash(kvs.DSCR(depth=[a.astype(np.float32), None, "x.png"]))
    assert kvs.DSCR.paper() == kvs.DSCR() and repr(kvs.DSCR()) == "DSCR()"
    bilateral = kvs.DSCR.bilateral(gamma=0.5)
    assert (bilateral.kernel, bilateral.coord_norm, bilateral.gamma, bilateral.rope_mode) == ("product", "patch", 0.5, "pre")
    assert eval(repr(bilateral), {"DSCR": kvs.DSCR}) == bilateral
    assert kvs.DSCR(grid="4x4") != kvs.DSCR(grid=(4, 4)) or kvs.DSCR(grid="4x4").grid == (4, 4)


def test_depths_of_the_paper() -> None:
    assert kvs.DSCR().resolve_layers(40) == list(range(10, 40)) and kvs.DSCR().resolve_layers(32) == list(range(10, 32))
    with pytest.raises(kvs.PolicyError, match="none of the model's 8 layers"):
        kvs.DSCR().resolve_layers(8)
    with pytest.raises(kvs.PolicyError, match="8 layers"):
        kvs.DSCR(layers=[8]).resolve_layers(8)


def test_for_model(model: kvs.Model) -> None:
    assert kvs.DSCR.for_model(model).resolve_layers(4) == [1, 2, 3]
    assert kvs.DSCR.for_model(model, layers=[0]).resolve_layers(4) == [0]
    with pytest.raises(kvs.PolicyError, match="4 layers"):
        model.session(policy=kvs.DSCR())


def test_grid(model: kvs.Model) -> None:
    assert kvs.DSCR().resolve_grid(576) == (24, 24) and kvs.DSCR(grid="16x2").resolve_grid(32) == (16, 2)
    with pytest.raises(kvs.PolicyError, match="grid="):
        kvs.DSCR().resolve_grid(32)
    with pytest.raises(kvs.PolicyError, match="16"):
        model.session(policy=kvs.DSCR(grid=(5, 4), **BASE))
    model.session(n_ctx=16, policy=kvs.DSCR(grid=(8, 2), **BASE)).close()


def test_text_only(tiny_pair: Any, model: kvs.Model) -> None:
    with kvs.Model(tiny_pair.text, mmproj=False, device="cpu") as blind, pytest.raises(kvs.PolicyError, match="text only"):
        blind.session(policy=kvs.DSCR(**BASE))
    with model.session(n_ctx=64, policy=kvs.DSCR(**BASE)) as session, model.session(n_ctx=64) as plain:
        answers = [one.generate("a dog", max_tokens=5).result().text for one in (session, plain)]
        assert answers[0] == answers[1], "without a picture there is nothing to refine"


def test_embeddings_that_are_no_picture(model: kvs.Model, rng: np.random.Generator) -> None:
    for source in (None, rng.random((8, 8))):
        with model.session(n_ctx=64, policy=kvs.DSCR(depth=source, **BASE)) as session:
            with pytest.raises(kvs.PolicyError, match=r"4 x 4|16 patches"):
                session.feed_embeddings(rng.standard_normal((5, model.n_embd)))
            assert session.n_past == 0
            session.feed_embeddings(rng.standard_normal((16, model.n_embd)))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"sigma_d": 0}, ValueError),
        ({"sigma_s": -1}, ValueError),
        ({"sigma_s": float("nan")}, ValueError),
        ({"alpha": -0.1}, ValueError),
        ({"beta": float("inf")}, ValueError),
        ({"gamma": 1.1}, ValueError),
        ({"cut": 0.6}, ValueError),
        ({"sigma_d": "0.6"}, TypeError),
        ({"mask_padding": 1}, TypeError),
        ({"invert": "yes"}, TypeError),
        ({"layers": "ten:"}, ValueError),
        ({"layers": 10}, TypeError),
        ({"grid": "4by4"}, ValueError),
        ({"grid": (4,)}, TypeError),
        ({"grid": (0, 4)}, ValueError),
        ({"sigma": 1}, TypeError),
        *[({name: "x"}, ValueError) for name in dscr._CHOICES],
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        kvs.DSCR(**arguments)


def test_two_of_a_kind(model: kvs.Model) -> None:
    with pytest.raises(kvs.PolicyError, match="two DSCR"):
        model.session(policy=[kvs.DSCR(**BASE), kvs.DSCR(**BASE)])


# ---- callables and ONNX ----


def test_a_callable_sees_the_picture(model: kvs.Model, rng: np.random.Generator) -> None:
    image, seen = picture(rng), []

    def far(given: Image.Image) -> np.ndarray:
        seen.append(np.asarray(given))
        return np.asarray(given)[:, :, 0].astype(np.float32)

    with model.session(n_ctx=64, kv_type="f32", policy=kvs.DSCR(depth=far, **BASE)) as session:
        session.feed_image(image)
        ours = session.kv(1)[0]
    np.testing.assert_array_equal(seen[0], image)
    with model.session(n_ctx=64, kv_type="f32", policy=kvs.DSCR(depth=image[:, :, 0], **BASE)) as session:
        session.feed_image(image)
        np.testing.assert_array_equal(session.kv(1)[0], ours)
    for bad in (lambda _: np.full((56, 56), np.nan), lambda _: np.ones((5, 9)), lambda _: None):
        with model.session(n_ctx=64, policy=kvs.DSCR(depth=bad, **BASE)) as session, pytest.raises(kvs.ImageError):
            session.feed_image(image)


def onnx_file(path: Path, shape: list[Any], channels: int = 3, kind: str = "FLOAT", squeeze: bool = True) -> Path:
    """A model that gives the mean of the channels."""
    onnx = pytest.importorskip("onnx")
    helper, element = onnx.helper, getattr(onnx.TensorProto, kind)
    axis = 1 if shape[1] == channels else 3
    nodes = [helper.make_node("ReduceMean", ["pixels", "axes"], ["depth"], keepdims=0 if squeeze else 1)]
    out = [n for i, n in enumerate(shape) if i != axis] if squeeze else [1 if i == axis else n for i, n in enumerate(shape)]
    graph = helper.make_graph(
        nodes,
        "depth",
        [helper.make_tensor_value_info("pixels", element, shape)],
        [helper.make_tensor_value_info("depth", element, out)],
        [helper.make_tensor("axes", onnx.TensorProto.INT64, [1], [axis])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


SHAPES = [[1, 3, 28, 42], ["batch", 3, "height", "width"], [1, 32, 32, 3]]


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_onnx(shape: list[Any], kind: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """The model's own layout, size and type; the map has the picture's size."""
    pytest.importorskip("onnxruntime")
    y, x = np.meshgrid(np.arange(60), np.arange(90), indexing="ij")
    image = np.stack([2 * y, x, x + y], 2).astype(np.uint8)
    estimate = kvs.OnnxDepth(onnx_file(tmp_path / "m.onnx", shape, kind=kind, squeeze=bool(rng.integers(2))), size=56)
    got = estimate(Image.fromarray(image))
    assert got.shape == (60, 90) and got.dtype == np.float32
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    wanted = ((image / 255 - mean) / std).mean(2)
    assert np.abs(got - wanted)[5:-5, 5:-5].max() < 0.1, "a slope stays a slope through two resizes"
    assert estimate._free_size(640, 480) == (70, 56) and kvs.OnnxDepth("x")._free_size(640, 480) == (686, 518)


def test_onnx_in_a_session(model: kvs.Model, rng: np.random.Generator, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    estimate = kvs.OnnxDepth(onnx_file(tmp_path / "m.onnx", [1, 3, "h", "w"]), size=28)
    with model.session(n_ctx=128, policy=kvs.DSCR(depth=estimate, **BASE)) as session:
        images = [picture(rng), picture(rng)]
        assert session.generate("a dog", images=images, max_tokens=3).result().finish_reason == "length"


@pytest.mark.parametrize("what", ["missing", "text", "two_channels", "wrong_type"])
def test_onnx_files_that_are_no_depth_model(what: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "m.onnx"
    if what == "text":
        path.write_text("no model")
    elif what == "two_channels":
        onnx_file(path, [1, 2, 28, 28], channels=2)
    elif what == "wrong_type":
        onnx_file(path, [1, 3, 28, 28], kind="INT32")
    with pytest.raises(kvs.DepthModelError, match=r"m\.onnx"):
        kvs.OnnxDepth(path)(Image.new("RGB", (30, 20)))


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'pykvsmooth\[depth\]'"):
        kvs.OnnxDepth("model.onnx")


def test_command(run: Callable[..., Run], rng: np.random.Generator, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    Image.fromarray(picture(rng)).save(tmp_path / "street.png")
    file = onnx_file(tmp_path / "m.onnx", [1, 3, "h", "w"])
    for name in ("depth.png", "depth.npy"):
        done = run("depth", tmp_path / "street.png", "-o", tmp_path / name, "--model", file, "--size", 28)
        assert (done.code, done.out) == (0, "") and name in done.err
        assert depth.read_map(tmp_path / name).shape == (56, 56)
    with Image.open(tmp_path / "depth.png") as written:
        assert written.mode.startswith("I;16") and np.asarray(written).min() == 0 and np.asarray(written).max() == 65535
    piped = run("depth", "-", "-o", tmp_path / "two.png", "--model", file, "--quiet", stdin=(tmp_path / "street.png").read_bytes())
    assert (piped.code, piped.err) == (0, "")


def test_command_refuses(run: Callable[..., Run], rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture(rng)).save(tmp_path / "street.png")
    monkeypatch.delenv("PYKVSMOOTH_DEPTH_MODEL", raising=False)
    missing = run("depth", tmp_path / "street.png", "-o", tmp_path / "d.png")
    assert missing.code == 2 and "--model FILE" in missing.err
    assert run("depth", tmp_path / "street.png", "-o", tmp_path / "d.jpg", "--model", "m.onnx").code == 2
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    absent = run("depth", tmp_path / "street.png", "-o", tmp_path / "d.png", "--model", "m.onnx")
    assert absent.code == 1 and "pip install 'pykvsmooth[depth]'" in absent.err and absent.err.count("\n") == 1
    assert not (tmp_path / "d.png").exists()
