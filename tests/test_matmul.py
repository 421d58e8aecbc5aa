"""Matrix products: every type, every instruction set that this CPU runs, a GPU where there is one, odd sizes, threads, against NumPy in
float64.

Types of blocks have integer kernels, which round activations to int8 first; the NumPy model below does the same, and all instruction
sets must give the bits of the plain C kernels. The other types are exact up to the rounding of float32 sums. For both, a row's result
must not depend on the other rows of its batch. What a GPU rounds is another matter: gpu_bound.
"""

import numpy as np
import pytest
from devices import KERNEL_SETS, kernel_set
from test_quant import HALVES, SIZES, TYPES, expected, random_blocks, type_id

from pykvsmooth._native import ffi, lib
from pykvsmooth.machine import cpu_text

BLOCK = {name: size for name, (size, _) in SIZES.items()}  # of weights, and of rounded activations


def block_of(name: str) -> int:
    return BLOCK.get(name, 1)


def pointer(a: np.ndarray) -> object:
    return ffi.cast("float *", a.ctypes.data)


def matmul(
    isa: str, name: str, w: np.ndarray, x: np.ndarray, bias: np.ndarray | None = None, threads: int = 1, rounding: int = 0
) -> np.ndarray:
    n, rows = len(x), len(w)
    guard = 16  # nothing may be written beyond y
    y = np.full(n * rows + guard, 7.5, np.float32)
    x = np.ascontiguousarray(x)
    code = lib.kvs_test_matmul(
        isa.encode(), threads, type_id(name), ffi.from_buffer(w), rows, x.shape[1], pointer(x), n,
        ffi.NULL if bias is None else pointer(bias), rounding, pointer(y),
    )  # fmt: skip
    assert code == 0
    assert (y[n * rows :] == 7.5).all()
    return y[: n * rows].reshape(n, rows)


def rounded(x: np.ndarray, block: int) -> np.ndarray:
    """What the integer kernels see of x: 127 steps of the largest magnitude of each block."""
    parts = x.reshape(len(x), -1, block)
    top = np.abs(parts).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(top > 0, np.rint(parts * (np.float32(127) / top)), 0)
    return (q.astype(np.float64) * (top / np.float32(127))).reshape(x.shape)


def check(isa: str, name: str, w: np.ndarray, x: np.ndarray, bias: np.ndarray | None, y: np.ndarray, exact: bool = False) -> None:
    if isa == "cuda":
        check_gpu(name, w, x, bias, y, exact)
        return
    weights = expected(name, w).astype(np.float64)
    integers = name in BLOCK and not exact
    seen = rounded(x, BLOCK[name]) if integers else x.astype(np.float64)
    want = seen @ weights.T + (0 if bias is None else bias)
    # Terms of types with minima are differences of scaled sums: their rounding is relative to both parts
    size = np.abs(seen) @ np.abs(weights).T + (0 if bias is None else np.abs(bias)) + parts_of_minima(name, w, seen)
    error = np.abs(y - want) / (size + 1e-30)
    bound = 4e-7 if isa != "base" or integers else 1.5e-6  # base sums 512 columns one after the other
    assert error.max() < bound, f"{isa} {name} {w.shape} x {x.shape}: {error.max():.2e} of the sum of magnitudes"


MINIMA = {"Q4_1": 1, "Q5_1": 1, "Q2_K": 15, "Q4_K": 63, "Q5_K": 63}  # the greatest factor of m


def parts_of_minima(name: str, w: np.ndarray, seen: np.ndarray) -> np.ndarray | float:
    if name not in MINIMA:
        return 0.0
    size, width = SIZES[name]
    at = HALVES[name][1]
    m = w.reshape(len(w), -1, width)[:, :, at : at + 2].copy().view(np.float16)[:, :, 0]
    return np.abs(seen).reshape(len(seen), -1, size).sum(-1) @ np.abs(m.astype(np.float64) * MINIMA[name]).T


# ---- what a GPU rounds ----

FEW = 8  # so many rows of x are multiplied by kernels that round as the CPU's do, but in blocks of 32; more of them by tensor cores
ULP = 2.0**-24  # half a unit in the last place of a float32 between 1 and 2; a half has 2^-11


def check_gpu(name: str, w: np.ndarray, x: np.ndarray, bias: np.ndarray | None, y: np.ndarray, exact: bool) -> None:
    """exact: float32 was asked for."""
    weights, few = expected(name, w).astype(np.float64), len(x) <= FEW
    integers = name in BLOCK and few and not exact
    seen = rounded(x, 32) if integers else x.astype(np.float64)
    want = seen @ weights.T + (0 if bias is None else bias)
    if few:
        bound = warp_bound(name, w, seen, 1 if integers else 32)
    elif exact or name == "F32":
        bound = chain_bound(weights, seen)
    else:
        bound = halves_bound(name, w, seen)
    bound = bound + ULP * np.abs(want) + 1e-30
    error = np.abs(y - want)
    assert (error <= bound).all(), f"cuda {name} {w.shape} x {x.shape}: {(error / bound).max():.2f} of the bound"


def warp_bound(name: str, w: np.ndarray, seen: np.ndarray, steps: int) -> np.ndarray:
    """A warp for a row of weights: each lane adds up every 32nd group of 32 values, in steps for each (or whole numbers, with a few
    operations behind them); then the lanes are added up."""
    size = np.abs(seen) @ np.abs(expected(name, w).astype(np.float64)).T + parts_of_minima(name, w, seen)
    return (-(-seen.shape[1] // 1024) * steps + 11) * ULP * size


def partial_sums(weights: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes of all sums of the first k terms: their sum over k, and the largest of them and of the terms."""
    terms = seen[:, None] * weights
    sums = np.abs(np.cumsum(terms, -1))
    return sums.sum(-1), np.maximum(sums, np.abs(terms)).max(-1)


def chain_bound(weights: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """One fmaf after the other, each rounded by half a unit of its result."""
    return 1.001 * ULP * partial_sums(weights, seen)[0]


def halves_bound(name: str, w: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """x is rounded to halves with a scale for each row; weights d q - m to halves: d, m, then all of it. d and m are times 64 there, and
    what lies below the normal halves has errors of 2^-25 / 64 (times q, which is at most 128). F16 and BF16 are as they are. Sums are
    float32, but tensor cores cut off what is below the last bit of the largest of 16 terms or so, instead of rounding once."""
    weights, half = expected(name, w).astype(np.float64), 2.0**-11
    error_w = half * (1.001 * np.abs(weights) + sum(scaled_and_minima(name, w))) + 130 * 2.0**-31 if name in BLOCK else 2.0**-31
    error_x = half * np.abs(seen) + 2.0**-33 * np.abs(seen).max(-1, keepdims=True)
    operands = np.abs(seen) @ np.broadcast_to(error_w, weights.shape).T + error_x @ (np.abs(weights) + error_w).T
    return operands + seen.shape[1] * 4 * ULP * partial_sums(weights, seen)[1]


def scaled_and_minima(name: str, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of weights d q - m: the magnitudes of both parts."""
    width = SIZES[name][1]
    scaled, minima = w.reshape(-1, width).copy(), w.reshape(-1, width).copy()
    minima[:, HALVES[name][0] : HALVES[name][0] + 2] = 0
    if name in MINIMA:
        scaled[:, HALVES[name][1] : HALVES[name][1] + 2] = 0
    parts = (np.abs(expected(name, part.reshape(w.shape)).astype(np.float64)) for part in (scaled, minima))
    return next(parts), next(parts)


ALL_SETS = [*KERNEL_SETS, kernel_set("cuda")]


@pytest.mark.parametrize("isa", ALL_SETS)
@pytest.mark.parametrize("name", TYPES)
def test_against_numpy(isa: str, name: str, rng: np.random.Generator) -> None:
    block = block_of(name)
    for n in (1, 2, 3, 4, 5, 8, 23, 64, 322):
        rows = int(rng.integers(1, 71))
        cols = block * int(rng.integers(1, 10)) if block > 1 else int(rng.integers(1, 1400))
        w = random_blocks(rng, name, rows, cols)
        x = rng.standard_normal((n, cols)).astype(np.float32) * np.float32(10 ** rng.uniform(-3, 3))
        bias = rng.standard_normal(rows).astype(np.float32) if rng.random() < 0.5 else None
        y = matmul(isa, name, w, x, bias, int(rng.integers(1, 4)))
        check(isa, name, w, x, bias, y)


@pytest.mark.parametrize("name", TYPES)
def test_edges(name: str, isas: list[str], rng: np.random.Generator) -> None:
    block = block_of(name)
    for rows, n_blocks, n in ((1, 1, 1), (1, 3, 4), (33, 1, 5), (15, 3, 1), (16, 8, 16), (65, 5, 2), (70, 43, 3)):
        cols = n_blocks * block
        w, x = random_blocks(rng, name, rows, cols), rng.standard_normal((n, cols)).astype(np.float32)
        for isa in isas:
            check(isa, name, w, x, None, matmul(isa, name, w, x))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_every_tail(name: str, isas: list[str], rng: np.random.Generator) -> None:
    for cols in (*range(1, 34), 511, 512, 513, 1025):
        w, x = random_blocks(rng, name, 5, cols), rng.standard_normal((4, cols)).astype(np.float32)
        for isa in isas:
            check(isa, name, w, x, None, matmul(isa, name, w, x))
            check(isa, name, w, x[:1], None, matmul(isa, name, w, x[:1]))


@pytest.mark.parametrize("isa", KERNEL_SETS[1:])
@pytest.mark.parametrize("name", list(BLOCK))
def test_integer_kernels_agree_to_the_bit(isa: str, name: str, rng: np.random.Generator) -> None:
    for n in (*range(1, 18), 23, 31, 32, 33, 321, 512):
        cols = block_of(name) * int(rng.integers(1, 20))
        w = random_blocks(rng, name, int(rng.integers(1, 71)), cols)
        x = rng.standard_normal((n, cols)).astype(np.float32)
        y, base = matmul(isa, name, w, x), matmul("base", name, w, x)
        np.testing.assert_array_equal(y.view(np.uint32), base.view(np.uint32), f"{n} rows")


@pytest.mark.parametrize("name", TYPES)
def test_a_row_does_not_depend_on_its_batch(name: str, isas: list[str], monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """On a GPU: as long as the same kernels multiply it."""
    block = block_of(name)
    cols = block * 5 if block > 1 else 1029
    w = random_blocks(rng, name, 37, cols)
    x = rng.standard_normal((323, cols)).astype(np.float32)
    for isa in isas:
        kernels = [("", (1, 2, 3, 4, 6, 7, FEW)), *((tile, (FEW + 1, 10, 23, 66, 131)) for tile in ("0", "64", "128"))]
        for tile, rows in kernels if isa == "cuda" else [("", (*range(1, 14), 23, 323))]:
            monkeypatch.setenv("KVS_CUDA_TILE", tile)
            together = matmul(isa, name, w, x[-rows[-1] :], threads=2)
            for n in rows[:-1]:
                part = matmul(isa, name, w, x[-n:], threads=1)
                np.testing.assert_array_equal(part.view(np.uint32), together[-n:].view(np.uint32), f"{isa}: {n} rows against {rows[-1]}")


@pytest.mark.parametrize("name", list(BLOCK))
def test_extreme_integers(name: str, isas: list[str], rng: np.random.Generator) -> None:
    """The largest products of one sign, which is where sums of 16 bits would overflow."""
    cols = block_of(name) * 4
    for fill in (0x00, 0xFF, 0x80, 0x7F, 0xF0, 0x0F):
        w = random_blocks(rng, name, 20, cols)
        d = random_blocks(rng, name, 20, cols)
        w[:] = fill
        for at in halves_of(name, cols):
            w[:, at : at + 2] = d[:, at : at + 2]
        for sign in (np.ones(cols), -np.ones(cols), np.where(np.arange(cols) % 2, 1, -1)):
            x = np.tile(sign.astype(np.float32), (9, 1))
            for isa in isas:
                check(isa, name, w, x, None, matmul(isa, name, w, x))
                check(isa, name, w, x[:6], None, matmul(isa, name, w, x[:6]))
                check(isa, name, w, x[:1], None, matmul(isa, name, w, x[:1]))


def halves_of(name: str, cols: int) -> list[int]:
    size, width = SIZES[name]
    return [b * width + at for b in range(cols // size) for at in HALVES[name]]


@pytest.mark.parametrize("name", list(BLOCK))
def test_unusual_activations(name: str, isas: list[str], rng: np.random.Generator) -> None:
    cols = block_of(name) * 6
    w = random_blocks(rng, name, 18, cols)
    x = rng.standard_normal((5, cols)).astype(np.float32)
    x[0] = 0
    x[1, : cols // 2] = 0
    x[2] *= np.float32(1e-38)  # too small to count: no overflow of the inverse scale
    x[3, 1], x[4, cols - 1] = np.inf, np.nan
    for isa in isas:
        for y in (matmul(isa, name, w, x), np.concatenate([matmul(isa, name, w, row[None]) for row in x])):
            assert (y[0] == 0).all() and (y[2] == 0).all()
            assert np.isnan(y[3]).all() and np.isnan(y[4]).all()
            check(isa, name, w, x[:2], None, y[:2])


@pytest.mark.parametrize("name", TYPES)
def test_wide_rows(name: str, isas: list[str], rng: np.random.Generator) -> None:
    """11008 columns, as in a feed-forward matrix of 7B width."""
    w = random_blocks(rng, name, 9, 11008)
    x = rng.standard_normal((5, 11008)).astype(np.float32)
    for isa in isas:
        check(isa, name, w, x, None, matmul(isa, name, w, x, threads=2))
        check(isa, name, w, x[:1], None, matmul(isa, name, w, x[:1]))


@pytest.mark.parametrize("name", TYPES)
def test_every_weight(name: str, isas: list[str], rng: np.random.Generator) -> None:
    """One activation that is not 0 gives a column of weights: no error of one hides in a sum."""
    cols = 512
    w, x = random_blocks(rng, name, 70, cols), np.eye(cols, dtype=np.float32)[rng.permutation(cols)]
    for isa in isas:
        check(isa, name, w, x, None, matmul(isa, name, w, x))


def test_tiles_in_plain_c_are_chosen_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVS_CPU", raising=False)
    assert "amx_int8" in cpu_text() or "kernels: amx" not in cpu_text()


def test_bad_arguments() -> None:
    y = np.zeros(8, np.float32)
    args = (ffi.from_buffer(bytes(1024)), 1, 100, pointer(y), 1, ffi.NULL, 0, pointer(y))
    assert lib.kvs_test_matmul(b"base", 1, type_id("Q4_K"), *args) == lib.KVS_E_ARGUMENT
    assert lib.kvs_test_matmul(b"base", 1, 99, *args) == lib.KVS_E_ARGUMENT
    assert lib.kvs_test_matmul(b"no such kernels", 1, type_id("F32"), *args) == lib.KVS_E_DEVICE
    assert lib.kvs_test_isa(b"base") == 1 and lib.kvs_test_isa(b"no such kernels") == 0
