"""Products for more than 8 rows on CUDA (native/cuda/gemm*.cu), on a GPU or over tests/shim: every type and rounding, odd sizes, against
NumPy in float64.

Bounds: activations and weights are rounded to halves, half a unit of 11 bits each, and scales and minima are, too; the types that are
halves exactly are not. What is 2^-24 of a row's largest activation or less loses more bits. Sums are float32, as everything is under
NONE and for F32.
"""

import numpy as np
import pytest
from test_matmul import matmul, parts_of_minima
from test_quant import HALVES, SIZES, TYPES, expected, random_blocks

from pykvsmooth._native import lib

pytestmark = pytest.mark.skipif(not lib.kvs_test_isa(b"cuda"), reason="needs a GPU, or a build with KVS_CUDA_SHIM")
INT8, BF16, NONE = 0, 1, 2
UNIT, SUMS = 2.0**-11, 4e-7  # of halves; of float32 sums


def cols_of(name: str, rng: np.random.Generator, most: int) -> int:
    block = SIZES[name][0] if name in SIZES else 1
    return block * int(rng.integers(1, max(1, most // block) + 1))


def check(name: str, w: np.ndarray, x: np.ndarray, bias: np.ndarray | None, rounding: int) -> np.ndarray:
    y = matmul("cuda", name, w, x, bias, rounding=rounding)
    weights, seen = expected(name, w).astype(np.float64), x.astype(np.float64)
    add = np.zeros(len(w)) if bias is None else bias.astype(np.float64)
    minima, size = parts_of_minima(name, w, seen), np.abs(seen) @ np.abs(weights).T
    bound = SUMS * (size + minima + np.abs(add))
    if rounding != NONE and name != "F32":
        bound += UNIT * size if name in ("F16", "BF16") else UNIT * (3 * size + 2 * minima)
        bound += np.abs(seen).max(axis=1, keepdims=True) * 2.0**-34 * np.abs(weights).sum(axis=1)
    error = np.abs(y - (seen @ weights.T + add)) / (bound + 1e-30)
    assert error.max() < 1, f"{name} {w.shape} x {x.shape}, rounding {rounding}: {error.max():.2f} of the bound"
    return y


@pytest.mark.parametrize("name", TYPES)
def test_against_numpy(name: str, rng: np.random.Generator) -> None:
    for n, rounding in ((9, INT8), (16, BF16), (17, INT8), (33, NONE), (64, INT8), (65, BF16), (130, NONE), (130, INT8)):
        rows, cols = int(rng.integers(1, 200)), cols_of(name, rng, 600)
        x = rng.standard_normal((n, cols)).astype(np.float32) * np.float32(10 ** rng.uniform(-3, 3))
        bias = rng.standard_normal(rows).astype(np.float32) if rng.random() < 0.5 else None
        check(name, random_blocks(rng, name, rows, cols), x, bias, rounding)


@pytest.mark.parametrize("name", TYPES)
def test_tiles(name: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Tiles of 128 x 128, of 64 x 64, and slices; rows that are even, odd and no multiple of anything. Which tile it was can't be seen."""
    for rows in (129, int(rng.integers(130, 254)), 256):
        cols = cols_of(name, rng, 800)
        x, w = rng.standard_normal((int(rng.integers(65, 140)), cols)).astype(np.float32), random_blocks(rng, name, rows, cols)
        bias, found = rng.standard_normal(rows).astype(np.float32), {}
        for tile in ("128", "64", "0") if rows == 129 else ("128", "64"):
            monkeypatch.setenv("KVS_CUDA_TILE", tile)
            found[tile] = check(name, w, x, bias, INT8)
        assert found["128"].tobytes() == found["64"].tobytes()


# 7B's o, down and v; gate and up; q, k, v of the tower, its o and fc2, its fc1; the rest of 640 rows, and half of them; few
CARDS = (36, 82, 128, 132)
CHOSEN: list[tuple[int, list[int], tuple[int, ...]]] = [
    (512, [4096], (128, 128, 128, 128)),
    (512, [11008, 11008], (128, 128, 128, 128)),
    (577, [1024, 1024, 1024], (128, 64, 128, 128)),
    (577, [1024], (64, 64, 64, 64)),
    (577, [4096], (128, 128, 64, 64)),
    (128, [4096], (128, 64, 64, 64)),
    (320, [4096], (64, 64, 64, 64)),
    (65, [256], (0, 0, 0, 0)),
    (64, [32000], (0, 0, 0, 0)),
]


@pytest.mark.parametrize(("n", "rows", "sizes"), CHOSEN)
def test_which_tile_a_card_takes(n: int, rows: list[int], sizes: tuple[int, ...]) -> None:
    assert tuple(lib.kvs_test_tile(n_sm, n, rows, len(rows)) for n_sm in CARDS) == sizes


def test_no_card_has_slices_for_a_prompt() -> None:
    assert all(lib.kvs_test_tile(n_sm, 512, [4096], 1) > 0 for n_sm in range(8, 200))
    assert lib.kvs_test_tile(0, 512, [4096], 1) < 0 and lib.kvs_test_tile(36, 512, [1] * 5, 5) < 0


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_every_tail(name: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    for cols in (*range(1, 36), 63, 64, 65, 95, 96, 97, 127, 511, 1025):
        w, x = random_blocks(rng, name, 5, cols), rng.standard_normal((9, cols)).astype(np.float32)
        check(name, w, x, None, INT8)
        check(name, w, x, None, NONE)
    for cols in (1, 31, 33, 67):
        w, x = random_blocks(rng, name, 131, cols), rng.standard_normal((129, cols)).astype(np.float32)
        for tile in ("128", "64"):
            monkeypatch.setenv("KVS_CUDA_TILE", tile)
            check(name, w, x, None, INT8)


def test_as_many_tiles_as_a_gpu_wants(rng: np.random.Generator) -> None:
    x = rng.standard_normal((385, 64)).astype(np.float32)
    for name, rounding in (("Q4_0", INT8), ("F32", NONE)):
        check(name, random_blocks(rng, name, 4099, 64), x, None, rounding)


@pytest.mark.parametrize("name", ["F32", "F16", "Q4_K", "Q6_K", "Q8_0"])
def test_wide_rows(name: str, rng: np.random.Generator) -> None:
    w = random_blocks(rng, name, 5, 11008)
    for n in (9, 66):
        x = rng.standard_normal((n, 11008)).astype(np.float32)
        check(name, w, x, None, INT8)


@pytest.mark.parametrize("rows, n, tile", [(18, 12, ""), (18, 40, ""), (140, 132, "128"), (140, 132, "64")])
@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_K", "Q6_K"])
def test_unusual_activations(name: str, rows: int, n: int, tile: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setenv("KVS_CUDA_TILE", tile)
    w, x = random_blocks(rng, name, rows, 256), rng.standard_normal((n, 256)).astype(np.float32)
    kept = x[8:].copy()
    x[0] = 0
    x[1, :128] = 0
    x[2, 7] = 1e30  # far beyond halves; the others are nothing beside it
    x[3] *= np.float32(1e-25)
    x[4] *= np.float32(1e30)
    x[5, 1], x[6, 255], x[7, 100] = np.inf, np.nan, -np.inf
    for rounding in (INT8, NONE):
        y = matmul("cuda", name, w, x, rounding=rounding)
        assert (y[0] == 0).all()
        assert not np.isfinite(y[5:8]).any()
        if rounding == INT8 and name != "F32":
            assert np.isnan(y[5:8]).all()
        alone = matmul("cuda", name, w, np.concatenate([np.ones((8, 256), np.float32), kept]), rounding=rounding)
        assert y[8:].tobytes() == alone[8:].tobytes()  # a row is nothing to the others
        check(name, w, np.concatenate([x[:5], x[8:]]), None, rounding)


@pytest.mark.parametrize("n", [12, 132])
@pytest.mark.parametrize("name", list(SIZES))
def test_small_weights(name: str, n: int, rng: np.random.Generator) -> None:
    """Scales of 1e-6, where halves have lost bits long ago, are as exact as others."""
    cols, rows = SIZES[name][0] * 2, 130
    w, x = random_blocks(rng, name, rows, cols), rng.standard_normal((n, cols)).astype(np.float32)
    width = SIZES[name][1]
    blocks = w.reshape(rows, -1, width)
    for at in HALVES[name]:
        tiny = (rng.uniform(1e-6, 4e-6, blocks.shape[:2])).astype(np.float16)
        blocks[:, :, at : at + 2] = tiny[:, :, None].view(np.uint8)
    check(name, w, x, None, INT8)


def test_small_floats(rng: np.random.Generator) -> None:
    x = rng.standard_normal((12, 64)).astype(np.float32)
    subnormal = rng.integers(1, 1024, (20, 64)).astype(np.uint16)
    check("F16", subnormal.view(np.uint8), x, None, INT8)
    small = (rng.uniform(2e-7, 1e-6, (20, 64)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    check("BF16", small.view(np.uint8), x, None, INT8)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0"])
def test_weights_beyond_halves_are_not_lost(name: str, rng: np.random.Generator) -> None:
    """They give what finite() finds, not a number."""
    x = rng.standard_normal((12, 64)).astype(np.float32)
    w = random_blocks(rng, name, 3, 64)
    huge = {"F16": np.float16(np.inf), "Q8_0": np.float16(60000), "BF16": np.uint16(0x7F00)}[name]
    w[1, :2] = np.array([huge]).view(np.uint8)
    y = matmul("cuda", name, w, x)
    assert not np.isfinite(y[:, 1]).any() and np.isfinite(y[:, [0, 2]]).all()


@pytest.mark.parametrize("name", TYPES)
def test_the_same_again(name: str, rng: np.random.Generator) -> None:
    cols = cols_of(name, rng, 500)
    for rows, n in ((37, 24), (150, 131)):
        w, x = random_blocks(rng, name, rows, cols), rng.standard_normal((n, cols)).astype(np.float32)
        assert matmul("cuda", name, w, x).tobytes() == matmul("cuda", name, w, x).tobytes()
        turned = matmul("cuda", name, w, x[::-1])
        assert turned[::-1].tobytes() == matmul("cuda", name, w, x).tobytes()
