"""Norms, RoPE and activations of every kernel set against float64."""

from math import erf

import numpy as np
import pytest

from pykvsmooth._native import ffi, lib

SIZES = [1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 255, 1024, 4096]


def floats(array: np.ndarray):
    assert array.dtype == np.float32 and array.flags.c_contiguous
    return ffi.from_buffer("float[]", array, require_writable=False)


def draw(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def norm(isa: str, x: np.ndarray, w: np.ndarray, b: np.ndarray | None, eps: float) -> np.ndarray:
    y = np.empty_like(x)
    bias = ffi.NULL if b is None else floats(b)
    assert lib.kvs_test_norm(isa.encode(), floats(x), floats(w), bias, eps, *x.shape, floats(y)) == 0
    return y


@pytest.mark.parametrize("cols", SIZES)
def test_rms_norm(isas: list[str], rng: np.random.Generator, cols: int) -> None:
    x, w = draw(rng, 5, cols, scale=10 ** rng.uniform(-2, 2)), draw(rng, cols)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * w
    for isa in isas:
        np.testing.assert_allclose(norm(isa, x, w, None, 1e-5), expected, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("cols", SIZES)
def test_layer_norm(isas: list[str], rng: np.random.Generator, cols: int) -> None:
    x, w, b = draw(rng, 5, cols) + np.float32(rng.uniform(-20, 20)), draw(rng, cols), draw(rng, cols)
    wide = x.astype(np.float64)
    sd = np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    expected = (wide - wide.mean(-1, keepdims=True)) / sd * w + b
    bound = 1e-6 + 1e-5 * np.abs(expected) + 4e-7 * np.abs(x).max() / sd * np.abs(w)  # the mean is rounded as large as x, then divided
    for isa in isas:
        assert (np.abs(norm(isa, x, w, b, 1e-5) - expected) <= bound).all(), isa


def test_a_row_is_normalised_alike_among_any_others(isas: list[str], rng: np.random.Generator) -> None:
    x, w, b = draw(rng, 9, 333), draw(rng, 333), draw(rng, 333)
    for isa in isas:
        for bias in (None, b):
            alone = norm(isa, x[4:5].copy(), w, bias, 1e-6)
            assert norm(isa, x, w, bias, 1e-6)[4].tobytes() == alone[0].tobytes()


@pytest.mark.parametrize(("head_dim", "n_rot"), [(2, 2), (8, 8), (20, 20), (64, 64), (80, 32), (128, 128)])
def test_rope(isas: list[str], rng: np.random.Generator, head_dim: int, n_rot: int) -> None:
    n, n_head = 6, 3
    pos = rng.integers(0, 100_000, n).astype(np.int32)
    inv_freq = (10000.0 ** (-np.arange(0, n_rot, 2) / n_rot)).astype(np.float32)
    x = draw(rng, n, n_head, head_dim)
    angle = (pos[:, None, None].astype(np.float32) * inv_freq).astype(np.float64)  # the product in float32, as transformers has it
    turned = x[..., 0:n_rot:2].astype(np.float64) + 1j * x[..., 1:n_rot:2]
    turned = turned * np.exp(1j * angle)
    expected = x.astype(np.float64)
    expected[..., 0:n_rot:2], expected[..., 1:n_rot:2] = turned.real, turned.imag
    for isa in isas:
        y = x.copy()
        positions = ffi.from_buffer("int32_t[]", pos)
        assert lib.kvs_test_rope(isa.encode(), floats(y), positions, n, n_head, head_dim, floats(inv_freq), n_rot) == 0
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)
        assert y[..., n_rot:].tobytes() == x[..., n_rot:].tobytes()


def logistic(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


REFERENCES = {
    "gelu": lambda x, _: x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x, _: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_quick": lambda x, _: x * logistic(1.702 * x),
    "silu_mul": lambda x, y: x * logistic(x) * y,
    "add": lambda x, y: x + y,
}


def unary(isa: str, op: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    out = x.copy()
    assert lib.kvs_test_unary(isa.encode(), op.encode(), floats(out), floats(y), out.size) == 0
    return out


@pytest.mark.parametrize("op", REFERENCES)
def test_elementwise(isas: list[str], rng: np.random.Generator, op: str) -> None:
    edges = np.array([0, -0.0, 1e-30, -1e-30, 1, -1, 3, -3, 6, -6, 12, -12, 100, -100, 1e10, -1e10], np.float32)
    for size in SIZES:
        x = np.concatenate([edges, draw(rng, size, scale=3)])
        y = draw(rng, x.size)
        expected = REFERENCES[op](x.astype(np.float64), y.astype(np.float64))
        for isa in isas:
            np.testing.assert_allclose(unary(isa, op, x, y), expected, rtol=2e-6, atol=3e-7, err_msg=isa)


@pytest.mark.parametrize("op", REFERENCES)
def test_a_value_does_not_depend_on_its_place(isas: list[str], rng: np.random.Generator, op: str) -> None:
    x, y = draw(rng, 77), draw(rng, 77)
    for isa in isas:
        whole = unary(isa, op, x, y)
        for first in (1, 5, 64, 76):
            assert unary(isa, op, x[first:].copy(), y[first:].copy()).tobytes() == whole[first:].tobytes()


def test_an_unknown_op_and_an_unknown_kernel_set_are_refused(rng: np.random.Generator) -> None:
    x = draw(rng, 4)
    assert lib.kvs_test_unary(b"base", b"cube", floats(x), floats(x), 4) == lib.KVS_E_ARGUMENT
    assert lib.kvs_test_unary(b"vax", b"gelu", floats(x), floats(x), 4) == lib.KVS_E_DEVICE


def test_cpu_info_names_the_kernels(cpu_isas: list[str]) -> None:
    needed = lib.kvs_cpu_info(ffi.NULL, 0)
    text = ffi.new("char[]", needed + 1)
    assert lib.kvs_cpu_info(text, needed + 1) == needed
    info = ffi.string(text).decode()
    assert len(info) == needed and "; features: " in info and "; kernels: " in info
    assert any(f"kernels: {isa} (" in info for isa in cpu_isas)
    short = ffi.new("char[]", 9)
    assert lib.kvs_cpu_info(short, 9) == needed and ffi.string(short).decode() == info[:8]
