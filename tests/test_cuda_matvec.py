"""Weights in the order of a GPU, and products of up to eight activation rows with them: over the shim, or on a GPU where there is one."""

import numpy as np
import pytest
from test_matmul import BLOCK, block_of, matmul, parts_of_minima
from test_quant import TYPES, expected, random_blocks

from pykvsmooth._native import lib

pytestmark = pytest.mark.skipif(not lib.kvs_test_isa(b"cuda"), reason="no GPU, and no shim in this build")
INT8, BF16, NONE = 0, 1, 2  # kvs_rounding
FINITE = np.arange(65536, dtype=np.uint16).view(np.float16)
FINITE = FINITE[np.isfinite(FINITE)].astype(np.float32)  # zeros, both signs, subnormals, the largest


def rounded(x: np.ndarray) -> np.ndarray:
    """What integer kernels see of x: 127 steps of the largest magnitude of 32 values."""
    parts = x.reshape(len(x), -1, 32)
    top = np.abs(parts).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(top > 0, np.rint(parts * (np.float32(127) / top)), 0)
    return (q.astype(np.float64) * (top / np.float32(127))).reshape(x.shape)


def check(name: str, w: np.ndarray, x: np.ndarray, bias: np.ndarray | None, y: np.ndarray, rounding: int) -> None:
    weights = expected(name, w).astype(np.float64)
    seen = rounded(x) if name in BLOCK and rounding == INT8 else x.astype(np.float64)
    want = seen @ weights.T + (0 if bias is None else bias)
    size = np.abs(seen) @ np.abs(weights).T + (0 if bias is None else np.abs(bias)) + parts_of_minima(name, w, seen)
    error = np.abs(y - want) / (size + 1e-30)
    assert error.max() < 4e-7, f"{name} {w.shape} x {x.shape}: {error.max():.2e} of the sum of magnitudes"


@pytest.mark.parametrize("name", TYPES)
def test_every_weight_is_decoded_to_the_bit(name: str, rng: np.random.Generator) -> None:
    cols = 3 * block_of(name) if name in BLOCK else 75
    w = random_blocks(rng, name, 5, cols, FINITE)
    want = expected(name, w)
    ones = np.eye(cols, dtype=np.float32)
    for first in range(0, cols, 8):
        y = matmul("cuda", name, w, ones[first : first + 8], rounding=NONE)
        np.testing.assert_array_equal(y, want[:, first : first + 8].T)


@pytest.mark.parametrize("name", TYPES)
def test_against_numpy(name: str, rng: np.random.Generator) -> None:
    for n in range(1, 9):
        rows = int(rng.integers(1, 71))
        cols = block_of(name) * int(rng.integers(1, 10)) if name in BLOCK else int(rng.integers(1, 1400))
        w = random_blocks(rng, name, rows, cols)
        x = rng.standard_normal((n, cols)).astype(np.float32) * np.float32(10 ** rng.uniform(-3, 3))
        bias = rng.standard_normal(rows).astype(np.float32) if rng.random() < 0.5 else None
        for rounding in (INT8, BF16, NONE):
            check(name, w, x, bias, matmul("cuda", name, w, x, bias, rounding=rounding), rounding)


@pytest.mark.parametrize("name", TYPES)
def test_rows_and_columns_at_the_edges_of_warps(name: str, rng: np.random.Generator) -> None:
    block = block_of(name)
    lane = 32 if name in BLOCK else 4 if name == "F32" else 8  # values that a lane takes at a time
    for units in (1, 31, 32, 33, 64, 65, 96, 129):
        cols = -(-units * lane // block) * block
        w, x = random_blocks(rng, name, 3, cols), rng.standard_normal((5, cols)).astype(np.float32)
        for n in (1, 2, 5):
            check(name, w, x[:n], None, matmul("cuda", name, w, x[:n]), INT8)
    for rows in (1, 2, 7, 8, 9, 17):
        w, x = random_blocks(rng, name, rows, 4 * block), rng.standard_normal((3, 4 * block)).astype(np.float32)
        for n in (1, 3):
            check(name, w, x[:n], None, matmul("cuda", name, w, x[:n]), INT8)


@pytest.mark.parametrize("name", TYPES)
def test_long_rows_are_shared_by_warps(name: str, rng: np.random.Generator) -> None:
    for cols in (8192, 8192 + 256, 11008):  # shares of equal length; with a last one that is empty; shorter
        w, x = random_blocks(rng, name, 3, cols), rng.standard_normal((5, cols)).astype(np.float32)
        together = matmul("cuda", name, w, x)
        check(name, w, x, None, together, INT8)
        for n in (1, 2, 3):
            np.testing.assert_array_equal(matmul("cuda", name, w, x[:n]).view(np.uint32), together[:n].view(np.uint32))
        check(name, w, x[:1], None, matmul("cuda", name, w, x[:1], rounding=NONE), NONE)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_every_tail(name: str, rng: np.random.Generator) -> None:
    for cols in (*range(1, 34), 127, 128, 129, 255, 256, 257, 588):
        w, x = random_blocks(rng, name, 5, cols), rng.standard_normal((4, cols)).astype(np.float32)
        check(name, w, x, None, matmul("cuda", name, w, x), INT8)
        check(name, w, x[:1], None, matmul("cuda", name, w, x[:1]), INT8)


@pytest.mark.parametrize("rounding", [INT8, NONE])
@pytest.mark.parametrize("name", TYPES)
def test_a_row_does_not_depend_on_its_batch(name: str, rounding: int, rng: np.random.Generator) -> None:
    cols = block_of(name) * 9 if name in BLOCK else 1029
    w, x = random_blocks(rng, name, 7, cols), rng.standard_normal((8, cols)).astype(np.float32)
    together = matmul("cuda", name, w, x, rounding=rounding)
    for n in range(1, 8):
        part = matmul("cuda", name, w, x[-n:], rounding=rounding)
        np.testing.assert_array_equal(part.view(np.uint32), together[-n:].view(np.uint32), f"{n} rows against 8")


@pytest.mark.parametrize("name", list(BLOCK))
def test_unusual_activations(name: str, rng: np.random.Generator) -> None:
    cols = block_of(name) * 6
    w, x = random_blocks(rng, name, 18, cols), rng.standard_normal((8, cols)).astype(np.float32)
    x[0] = 0
    x[1, : cols // 2] = 0
    x[2] *= np.float32(1e-38)  # too small to count: no overflow of the inverse scale
    x[3, 1], x[4, cols - 1], x[5, 33] = np.inf, np.nan, -np.inf
    x[6] = np.float32(3e38) * np.sign(x[6])  # steps of 3e38 / 127 times weights: infinity or NaN, or a number if it fits
    for y in (matmul("cuda", name, w, x), np.concatenate([matmul("cuda", name, w, row[None]) for row in x])):
        assert (y[0] == 0).all() and (y[2] == 0).all()
        assert np.isnan(y[3:6]).all()
        check(name, w, x[:2], None, y[:2], INT8)
        check(name, w, x[7:], None, y[7:], INT8)


@pytest.mark.parametrize("name", TYPES)
def test_weights_that_are_not_finite_are_not_lost(name: str, rng: np.random.Generator) -> None:
    cols = block_of(name) * 3 if name in BLOCK else 100
    x = rng.standard_normal((3, cols)).astype(np.float32)
    for bad in (np.inf, np.nan):
        if name in BLOCK:
            w = random_blocks(rng, name, 4, cols)
            w[1] = random_blocks(rng, name, 1, cols, np.array([bad]))
        else:
            values = rng.standard_normal((4, cols)).astype(np.float32)
            values[1, cols - 1] = bad
            as_type = {"F32": np.float32, "F16": np.float16}.get(name)
            w = (values.view(np.uint32) >> 16).astype(np.uint16) if as_type is None else values.astype(as_type)
            if as_type is None:
                w[1, cols - 1] = 0x7FC0 if np.isnan(bad) else 0x7F80
            w = w.view(np.uint8)
        for rounding in (INT8, NONE):
            y = matmul("cuda", name, w, x, rounding=rounding)
            assert not np.isfinite(y[:, 1]).any() and np.isfinite(y[:, [0, 2, 3]]).all()


def test_matrices_of_several_pieces(rng: np.random.Generator) -> None:
    """17 MiB: two pieces of 8 MiB, which end within rows, and a third."""
    w = random_blocks(rng, "Q8_0", 65, 8192)
    w = np.concatenate([w] * 32)[:2049]
    x = rng.standard_normal((1, 8192)).astype(np.float32)
    check("Q8_0", w, x, None, matmul("cuda", "Q8_0", w, x), INT8)
