"""Products and attention whose operands are rounded to bf16, for the vision tower: against NumPy on rounded operands, so that only the
summation in float32 is left to differ, and its bound is derived. Who does not ask for it, or can't have it, computes in float32."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from devices import DEVICE, NO_AMX, open_model
from test_matmul import ALL_SETS, FEW, block_of, check, matmul, pointer
from test_quant import TYPES, expected, random_blocks
from twins import picture, pixels

import pykvsmooth as kvs
from pykvsmooth._native import lib
from pykvsmooth.bench.roofs import Roofs
from pykvsmooth.machine import cpu_text

BF16, NONE = 1, 2  # kvs_rounding of backend.h
ULP = 2.0**-24  # half of the distance of 1 to the next float32: what an addition may lose
PANEL = 512  # columns of one chain of sums
ROUNDED = [name for name in TYPES if name != "F32"]

REASONS = {"avx512": "this CPU or this build has no AVX512-BF16, or only a slow one", "amx": f"{NO_AMX}, or no AVX512-BF16 beside them"}
with_bf16 = pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=pytest.mark.skipif(not lib.kvs_test_bf16(isa.encode()), reason=REASONS[isa])) for isa in REASONS]
)


def rounded(x: np.ndarray) -> np.ndarray:
    """To the nearest bf16, ties to even, as float64."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def check_bf16(name: str, w: np.ndarray, x: np.ndarray, bias: np.ndarray | None, y: np.ndarray) -> None:
    weights, seen = rounded(expected(name, w)), rounded(x)
    size = np.abs(seen) @ np.abs(weights).T + (0 if bias is None else np.abs(bias))
    error = np.abs(y - (seen @ weights.T + (0 if bias is None else bias)))
    cols = x.shape[1]
    bound = (min(cols, PANEL) + -(-cols // PANEL) + 1) * ULP
    assert (error <= bound * size + 1e-30).all(), f"{name} {w.shape} x {x.shape}: {(error / (size + 1e-30)).max():.2e}, bound {bound:.2e}"


@with_bf16
@pytest.mark.parametrize("name", ROUNDED)
def test_products(isa: str, name: str, rng: np.random.Generator) -> None:
    block = block_of(name)
    for n in (1, 3, 4, 5, 8, 11, 12, 13, 15, 16, 17, 24, 29, 31, 32, 33, 130):
        rows = int(rng.integers(1, 100))
        cols = block * int(rng.integers(1, 10)) if block > 1 else int(rng.integers(1, 1400))
        w = random_blocks(rng, name, rows, cols)
        x = rng.standard_normal((n, cols)).astype(np.float32) * np.float32(10 ** rng.uniform(-3, 3))
        bias = rng.standard_normal(rows).astype(np.float32) if rng.random() < 0.5 else None
        check_bf16(name, w, x, bias, matmul(isa, name, w, x, bias, int(rng.integers(1, 4)), BF16))


@with_bf16
@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_tail(isa: str, name: str, rng: np.random.Generator) -> None:
    for cols in (*range(1, 67), 511, 512, 513, 514, 1025):
        w, x = random_blocks(rng, name, 5, cols), rng.standard_normal((4, cols)).astype(np.float32)
        check_bf16(name, w, x, None, matmul(isa, name, w, x, rounding=BF16))
    for rows in range(1, 67):
        w, x = random_blocks(rng, name, rows, 7), rng.standard_normal((int(rng.integers(1, 30)), 7)).astype(np.float32)
        check_bf16(name, w, x, None, matmul(isa, name, w, x, rounding=BF16))


@with_bf16
@pytest.mark.parametrize("name", ROUNDED)
def test_a_row_does_not_depend_on_its_batch(isa: str, name: str, rng: np.random.Generator) -> None:
    block = block_of(name)
    cols = block * 5 if block > 1 else 1029
    w = random_blocks(rng, name, 37, cols)
    x = rng.standard_normal((131, cols)).astype(np.float32)
    together = matmul(isa, name, w, x, threads=3, rounding=BF16)
    for first, n in ((0, 131), (130, 1), (128, 3), (60, 12), (7, 100)):
        part = matmul(isa, name, w, x[first : first + n], rounding=BF16)
        assert part.tobytes() == together[first : first + n].tobytes(), f"{n} rows from {first} on"


@with_bf16
def test_what_is_not_finite_stays_in_its_row(isa: str, rng: np.random.Generator) -> None:
    w, x = random_blocks(rng, "F16", 40, 100), rng.standard_normal((30, 100)).astype(np.float32)
    clean = matmul(isa, "F16", w, x, rounding=BF16)
    x[3, 50], x[17, 99], x[29, 0] = np.nan, np.inf, -np.inf
    y, rest = matmul(isa, "F16", w, x, rounding=BF16), [i for i in range(30) if i not in (3, 17, 29)]
    assert not np.isfinite(y[[3, 17, 29]]).any() and y[rest].tobytes() == clean[rest].tobytes()


@pytest.mark.parametrize("isa", ALL_SETS)
@pytest.mark.parametrize("name", TYPES)
def test_float32_when_asked_for(isa: str, name: str, rng: np.random.Generator) -> None:
    """Also types with integer kernels. bf16 where there is none is float32, and so is it for weights that are F32."""
    cols = block_of(name) * 3 if block_of(name) > 1 else 700
    for n in (1, 4, 70):
        w, x = random_blocks(rng, name, 37, cols), rng.standard_normal((n, cols)).astype(np.float32)
        y = matmul(isa, name, w, x, rounding=NONE)
        check(isa, name, w, x, None, y, exact=True)
        asked = matmul(isa, name, w, x, rounding=BF16)
        if isa == "cuda":
            check(isa, name, w, x, None, asked, exact=n <= FEW)
            continue
        assert (asked.tobytes() == y.tobytes()) == (name == "F32" or not lib.kvs_test_bf16(isa.encode()))


def test_who_has_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not lib.kvs_test_bf16(b"base") and not lib.kvs_test_bf16(b"avx2") and not lib.kvs_test_bf16(b"no such kernels")
    if "avx512bf16" not in cpu_text():
        assert not lib.kvs_test_bf16(b"avx512") and not lib.kvs_test_bf16(b"amx")
    elif cpu_text().startswith("AMD ") and lib.kvs_test_isa(b"avx512"):  # fast there, where the build knows the instruction at all
        monkeypatch.setenv("KVS_CPU", "avx512")
        with Roofs(1, 1) as roofs:
            assert bool(lib.kvs_test_bf16(b"avx512")) == ("bf16" in roofs.kinds)


# ---- attention ----


def attend(isa: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int = 1, rounding: int = BF16) -> np.ndarray:
    out = np.full_like(q, np.nan)
    assert lib.kvs_test_attn_full(isa.encode(), threads, pointer(q), pointer(k), pointer(v), *q.shape, rounding, pointer(out)) == 0
    return out


def draw(rng: np.random.Generator, n: int, n_head: int, head_dim: int) -> list[np.ndarray]:
    return [rng.standard_normal((n, n_head, head_dim)).astype(np.float32) for _ in range(3)]


SHAPES = [(1, 1, 1), (2, 3, 7), (5, 3, 20), (13, 2, 33), (31, 1, 64), (197, 3, 80), (256, 1, 16), (257, 2, 48), (577, 2, 64), (40, 1, 511)]


@with_bf16
@pytest.mark.parametrize(("n", "n_head", "head_dim"), SHAPES)
def test_attention(isa: str, n: int, n_head: int, head_dim: int, rng: np.random.Generator) -> None:
    q, k, v = draw(rng, n, n_head, head_dim)
    q *= np.float32(rng.choice([0.1, 1, 4]))
    scale, a, b, c = 1 / np.sqrt(head_dim), rounded(q), rounded(k), rounded(v)
    scores = np.einsum("ihd,jhd->hij", a, b) * scale
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    # a score's error doubles in e^(s - m); weights are rounded to bf16; float32 sums of them and of outputs
    wrong_score = ((head_dim + 3) * ULP * np.einsum("ihd,jhd->hij", np.abs(a), np.abs(b)).max() + np.abs(scores).max() * 2 * ULP) * scale
    bound = (2.0**-8 + 2 * wrong_score + (2 * n + 64) * ULP) * np.einsum("hij,jhd->ihd", p, np.abs(c)) + 1e-30
    for threads in (1, 3):
        out = attend(isa, q, k, v, threads)
        error = np.abs(out - np.einsum("hij,jhd->ihd", p, c))
        assert (error <= bound).all(), (error / bound).max()


@with_bf16
def test_rows_of_attention_do_not_depend_on_each_other(isa: str, rng: np.random.Generator) -> None:
    q, k, v = draw(rng, 300, 3, 40)
    out = attend(isa, q, k, v, 3)
    order = rng.permutation(300)
    assert attend(isa, np.ascontiguousarray(q[order]), k, v, 2).tobytes() == out[order].tobytes()
    k[20, 1, 3] = np.nan
    broken = attend(isa, q, k, v, 2)
    assert np.isnan(broken[:, 1]).all() and broken[:, [0, 2]].tobytes() == out[:, [0, 2]].tobytes()


@pytest.mark.parametrize("isa", ALL_SETS)
def test_float32_attention_when_asked_for(isa: str, rng: np.random.Generator) -> None:
    q, k, v = draw(rng, 70, 2, 40)
    plain, asked = attend(isa, q, k, v, rounding=NONE), attend(isa, q, k, v, rounding=BF16)
    assert attend(isa, q, k, v, rounding=0).tobytes() == plain.tobytes()
    if isa == "cuda":  # which may round operands and weights to bf16, or to something finer
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(40)
        wrong_score = 2.01 * 2.0**-8 * np.einsum("ihd,jhd->hij", np.abs(q), np.abs(k)).max() / np.sqrt(40)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        bound = (np.expm1(2 * wrong_score) + 2.01 * 2.0**-8) * np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), np.abs(v))
        assert (np.abs(asked - plain) <= bound).all()
    else:
        assert (asked.tobytes() == plain.tobytes()) == (not lib.kvs_test_bf16(isa.encode()))


# ---- the tower ----

TOWERS = {"f16": {}, "bf16": {}, "q8_0": {}, "q4_0": {}, "deep": {"v_layer": 24, "v_ff": 128}}
# "auto" against float64: norm of the error over the norm of all rows, and the worst row's cosine. Of 800 deep towers (24 blocks, 64 wide):
# 0.011 at the median, 0.031 at most, and a cosine of 0.9988.
AUTO_ERROR, AUTO_COSINE = 0.05, 0.995


@pytest.mark.parametrize("tower", TOWERS)
def test_precision_of_pictures(tower: str, model_isa: str | None, rng: np.random.Generator, tmp_path: Path) -> None:
    """On every kernel set: "auto" is bf16 exactly where that is fast (f16 on a GPU), and then not what "exact" is, to the bit."""
    kind = "f16" if tower == "deep" else tower
    text, mmproj, weights = tiny.write_pair(tmp_path, seed=int(rng.integers(1 << 30)), n_layer=1, v_type=kind, **TOWERS[tower])
    image = picture(rng, weights.clip.image_size)
    truth, rows, used = weights.clip.encode(pixels(image)), {}, {}
    for precision in ("auto", "exact"):
        with open_model(text, model_isa, mmproj=mmproj, precision=precision) as model:
            rows[precision], used[precision] = model.encode_image(image).astype(np.float64), model.vision_precision
    fast = bool(lib.kvs_test_bf16((model_isa or DEVICE).encode()))
    rounded = "bf16" if DEVICE == "cpu" else "f16"
    assert used == {"auto": rounded if fast else "f32", "exact": "f32"}
    assert (rows["auto"].tobytes() == rows["exact"].tobytes()) == (not fast)
    assert np.abs(rows["exact"] - truth).max() <= 1e-3
    error = np.linalg.norm(rows["auto"] - truth) / np.linalg.norm(truth)
    cosine = (rows["auto"] * truth).sum(-1) / np.linalg.norm(rows["auto"], axis=-1) / np.linalg.norm(truth, axis=-1)
    print(f"{error:.1e} {cosine.min():.6f}")
    assert error <= AUTO_ERROR and cosine.min() >= AUTO_COSINE


def test_f32_towers_stay_float32(rng: np.random.Generator, tmp_path: Path) -> None:
    text, mmproj, weights = tiny.write_pair(tmp_path, seed=int(rng.integers(1 << 30)), n_layer=1)
    image = picture(rng, weights.clip.image_size)
    with kvs.Model(text, mmproj=mmproj) as auto, kvs.Model(text, mmproj=mmproj, precision="exact") as exact:
        assert auto.vision_precision == exact.vision_precision == "f32"
        assert auto.encode_image(image).tobytes() == exact.encode_image(image).tobytes()


def test_precision_is_one_of_two(tiny_pair: object) -> None:
    for wrong in ("bf16", "", None, 1, ["auto"]):
        with pytest.raises((TypeError, ValueError), match="precision"):
            kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, precision=wrong)
