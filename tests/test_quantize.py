"""Rows of floats to rows of blocks: errors within what the grid allows and within what others reach, odd values, refusals."""

import math

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from pykvsmooth import mixes
from pykvsmooth._native import ffi, lib, new_error
from pykvsmooth.quantize import TYPES, encode

# values of a block with a grid of its own, steps of the grid, largest s of the K types (0: none), is there an m
GRID = {
    "Q4_0": (32, 7, 0, False),
    "Q4_1": (32, 15, 0, True),
    "Q5_0": (32, 15, 0, False),
    "Q5_1": (32, 31, 0, True),
    "Q8_0": (32, 127, 0, False),
    "Q2_K": (16, 3, 15, True),
    "Q3_K": (16, 3, 31, False),
    "Q4_K": (32, 15, 63, True),
    "Q5_K": (32, 31, 63, True),
    "Q6_K": (16, 31, 127, False),
}
PLAIN = ("F32", "F16", "BF16")
BY_GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # the types that the gguf package can write, as llama-quantize writes them
TINY = 2.0**-24  # the least F16


def block_of(name: str) -> int:
    return gguf.GGML_QUANT_SIZES[T[name]][0]


def decode(blocks: np.ndarray, name: str, cols: int) -> np.ndarray:
    out = np.full((len(blocks), cols), np.nan, np.float32)
    assert lib.kvs_decode(int(T[name]), ffi.from_buffer(blocks), out.size, ffi.cast("float *", out.ctypes.data)) == 0
    return out


def there_and_back(values: np.ndarray, name: str) -> np.ndarray:
    return decode(encode(values, name), name, values.shape[1])


def weights(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Heavy tails, rows and columns of different size, a mean that is not zero: as in models."""
    values = rng.standard_t(4, (rows, cols)) * rng.lognormal(-3, 1, (rows, 1)) * rng.lognormal(0, 0.3, cols)
    return (values + 0.01 * rng.standard_normal((rows, 1))).astype(np.float32)


def bound(values: np.ndarray, name: str) -> np.ndarray:
    """Per block, the root of the mean squared error that is never exceeded. One of the grids that are tried spans the block with nine
    tenths of its steps, so that its error is half a step at most. K types then move d and m by half a step of s and t, whose largest
    belong to the widest grid of the super-block; F16 moves D, M, d and m by a 2048th part."""
    n, steps, s_max, has_m = GRID[name]
    blocks = values.astype(np.float64).reshape(-1, n)
    low, high = blocks.min(1), blocks.max(1)
    if s_max or not has_m:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    span = high - low if has_m else np.maximum(high, -low)
    error = 0.5 * span / (0.9 * steps) + np.maximum(high, -low) / 2048 + 0.5 * TINY * steps
    if s_max:
        per = 256 // n
        widest = span.reshape(-1, per).max(1).repeat(per) + np.abs(low).reshape(-1, per).max(1).repeat(per)
        error = error + 0.5 * widest / (0.9 * s_max) + 0.5 * TINY * s_max * steps
    return error


def check_bound(values: np.ndarray, name: str) -> None:
    errors = (there_and_back(values, name).astype(np.float64) - values).reshape(-1, GRID[name][0])
    rms = np.sqrt((errors**2).mean(1))
    worst = (rms / np.maximum(bound(values, name), 1e-300)).argmax()
    assert (rms <= bound(values, name)).all(), (name, worst, rms[worst], bound(values, name)[worst])


# ---- how good ----


@pytest.mark.parametrize("name", GRID)
def test_error_is_within_the_grid(name: str, rng: np.random.Generator) -> None:
    check_bound(weights(rng, 32, 512), name)
    check_bound(rng.standard_normal((8, 256)).astype(np.float32), name)
    check_bound(rng.uniform(-1, 3, (8, 256)).astype(np.float32), name)


@pytest.mark.parametrize("name", BY_GGUF)
def test_error_is_below_that_of_the_usual_rounding(name: str, rng: np.random.Generator) -> None:
    values = weights(rng, 512, 256)
    usual = gguf.quants.dequantize(gguf.quants.quantize(values, T[name]), T[name])
    ours, theirs = (np.square(x.astype(np.float64) - values).reshape(-1, 32).sum(1) for x in (there_and_back(values, name), usual))
    assert ours.sum() < 0.97 * theirs.sum()
    assert (ours <= theirs * (1 + 1e-5)).all()  # in each block: the usual grid is one of those that are tried


@pytest.mark.parametrize("small, large", [("Q2_K", "Q3_K"), ("Q3_K", "Q4_K"), ("Q4_K", "Q5_K"), ("Q5_K", "Q6_K"), ("Q6_K", "Q8_0")])
def test_more_bits_are_better(small: str, large: str, rng: np.random.Generator) -> None:
    values = weights(rng, 16, 1024)
    few, many = (np.square(there_and_back(values, name) - values).sum() for name in (small, large))
    assert many < 0.6 * few


@pytest.mark.parametrize("name", GRID)
def test_values_on_a_grid_come_back(name: str, rng: np.random.Generator) -> None:
    """Every block spans its whole grid with the same power of two as its step: the search must find that step."""
    n, steps, s_max, has_m = GRID[name]
    low = 0 if has_m else -steps - (name != "Q8_0")
    levels = rng.integers(low, steps + 1, (16, 256 // n, n))
    levels[:, :, 0], levels[:, :, 1] = low, steps
    values = (levels * 2.0**-6).astype(np.float32).reshape(16, 256)
    back = there_and_back(values, name)
    np.testing.assert_allclose(back, values, atol=2.0**-6 * steps * (1 / 512 if s_max else 1 / 2048))


@pytest.mark.parametrize("name", PLAIN)
def test_float_types_round_to_nearest(name: str, rng: np.random.Generator) -> None:
    exponents = rng.integers(-30, 16, (4, 333))
    values = np.clip(rng.uniform(-2, 2, (4, 333)) * 2.0**exponents, -65504, 65504).astype(np.float32)
    expected = gguf.quants.quantize(values, T[name]).view(np.uint8).reshape(4, -1)
    np.testing.assert_array_equal(encode(values, name), expected)


# ---- the blocks ----


@pytest.mark.parametrize("name", GRID)
def test_gguf_reads_our_blocks(name: str, rng: np.random.Generator) -> None:
    blocks = encode(weights(rng, 8, 768), name)
    assert blocks.shape == (8, lib.kvs_row_bytes(int(T[name]), 768))
    np.testing.assert_array_equal(gguf.quants.dequantize(blocks, T[name]).view(np.uint32), decode(blocks, name, 768).view(np.uint32))


@pytest.mark.parametrize("name", TYPES)
def test_rows_do_not_depend_on_their_neighbours(name: str, rng: np.random.Generator) -> None:
    """Any number of rows and blocks, by one thread or three: the blocks of a row are the same."""
    size = block_of(name)
    for rows, n_blocks in ((1, 1), (7, 3), (5, 17), (33, 2)):
        values = weights(rng, rows, n_blocks * size)
        whole = encode(values, name, threads=3)
        np.testing.assert_array_equal(whole, np.concatenate([encode(row[None], name, threads=1) for row in values]))
        pieces = encode(values.reshape(-1, size), name).reshape(rows, -1)
        np.testing.assert_array_equal(whole, pieces)
    assert encode(np.empty((0, size), np.float32), name).shape == (0, gguf.GGML_QUANT_SIZES[T[name]][1])


@pytest.mark.parametrize("name", GRID)
def test_every_kernel_set_writes_the_same_bits(
    name: str, rng: np.random.Generator, cpu_isas: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = weights(rng, 9, 512)
    found = []
    for isa in cpu_isas:
        monkeypatch.setenv("KVS_CPU", isa)
        found.append(encode(values, name))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_other_floats_and_strides(rng: np.random.Generator) -> None:
    values = weights(rng, 12, 512)
    expected = encode(values, "Q5_K")
    np.testing.assert_array_equal(encode(values.astype(np.float64), "Q5_K"), expected)
    np.testing.assert_array_equal(encode(np.asfortranarray(values), "Q5_K"), expected)
    np.testing.assert_array_equal(encode(values[::3], "Q5_K"), expected[::3])
    np.testing.assert_array_equal(encode(values.astype(np.float16), "F16"), values.astype(np.float16).view(np.uint8))


# ---- odd values ----


@pytest.mark.parametrize("name", TYPES)
def test_zeros_stay_zeros(name: str) -> None:
    values = np.zeros((3, 512), np.float32)
    values[1] = -0.0
    assert not there_and_back(values, name).any()


@pytest.mark.parametrize("name", GRID)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.3, -0.003, 1e-4, 60000.0, -60000.0])
def test_constant_rows(name: str, value: float) -> None:
    values = np.full((2, 256), value, np.float32)
    np.testing.assert_allclose(there_and_back(values, name), values, rtol=2e-3, atol=TINY * 64)


@pytest.mark.parametrize("name", GRID)
def test_one_value_alone(name: str, rng: np.random.Generator) -> None:
    """The rest of its block is zero, and stays so where no m must take back what d q gives."""
    values = np.zeros((16, 256), np.float32)
    at = rng.integers(0, 256, 16)
    values[np.arange(16), at] = rng.choice([-1.0, 1.0], 16) * rng.uniform(0.01, 10, 16)
    back = there_and_back(values, name)
    largest = np.abs(values).max(1, keepdims=True)
    _, steps, s_max, has_m = GRID[name]
    half_step_of_D = TINY / 2 * (steps + 1) * (s_max + 1)  # below 2^-14 an F16 has steps that do not shrink with it
    assert (np.abs(back - values) < 2e-3 * largest + half_step_of_D).all()
    assert has_m or not back[values == 0].any()


@pytest.mark.parametrize("name", GRID)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-20, 1e-8, 3e-7, 1e-5, 65504 / 1.5])
def test_very_small_and_very_large(name: str, size: float, rng: np.random.Generator) -> None:
    """Scales are F16: none overflows; what is below the least of them is at most lost, and never blown up."""
    values = np.clip(rng.uniform(-1.5, 1.5, (8, 256)) * size, -65504, 65504).astype(np.float32)
    back = there_and_back(values, name)
    assert np.isfinite(back).all()
    if size < 1e-6:  # the steps of d are as large as d itself
        assert np.abs(back - values).max() <= np.abs(values).max() + TINY
    else:
        check_bound(values, name)


@pytest.mark.parametrize("name", GRID)
def test_large_and_small_in_one_row(name: str, rng: np.random.Generator) -> None:
    values = (rng.standard_normal((8, 512)) * 10.0 ** rng.uniform(-6, 4, (8, 512))).clip(-65504, 65504).astype(np.float32)
    check_bound(values, name)


# ---- refusals ----


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers(name: str, value: float, rng: np.random.Generator) -> None:
    values = weights(rng, 40, 512)
    values[29, 307] = values[35, 0] = value
    with pytest.raises(ValueError, match=rf"row 29, column 307: {name} holds finite values up to [0-9.e+]+, not -?(nan|inf)"):
        encode(values, name, threads=3)


@pytest.mark.parametrize("name", [name for name in TYPES if name not in ("F32", "BF16")])
def test_values_that_are_too_large(name: str) -> None:
    values = np.zeros((2, 256), np.float32)
    values[1, 255] = 65504
    assert np.isfinite(there_and_back(values, name)).all()
    values[1, 255] = -65536
    with pytest.raises(ValueError, match=rf"row 1, column 255: {name} holds finite values up to 65504, not -65536"):
        encode(values, name)


def test_largest_bfloat() -> None:
    largest = np.array([[0x7F7F0000]], np.uint32).view(np.float32)
    assert (there_and_back(largest, "BF16") == largest).all()
    with pytest.raises(ValueError, match="BF16 holds finite values"):
        encode(np.full((1, 1), np.finfo(np.float32).max), "BF16")


def test_arguments() -> None:
    good = np.zeros((2, 256), np.float32)
    for name in GRID:
        with pytest.raises(ValueError, match=f"values: rows of {block_of(name) - 1} are not whole blocks of {name}"):
            encode(good[:, : block_of(name) - 1], name)
    for wrong in (good[0], good[None], good.astype(np.int32), good > 0, "text", None):
        with pytest.raises(TypeError, match="values must be a float array of shape"):
            encode(wrong, "Q8_0")  # type: ignore[arg-type]
    for name in ("IQ4_NL", "Q8_K", "q8_0", ""):
        with pytest.raises(ValueError, match="type must be one of F32, F16"):
            encode(good, name)
    with pytest.raises(ValueError, match="threads must be"):
        encode(good, "Q8_0", threads=0)


def test_the_native_call_refuses_too() -> None:
    values, out = ffi.new("float[256]"), ffi.new("uint8_t[2048]", b"\xaa" * 2048)
    for kind in (lib.KVS_TYPE_IQ4_NL, lib.KVS_TYPE_IQ4_XS, 4, 9, 15, -1, 2**31 - 1):
        assert lib.kvs_encode(kind, values, 1, 256, out, ffi.NULL) == lib.KVS_E_ARGUMENT
    for rows, cols in ((1, 31), (1, -32), (-1, 32)):
        err = new_error()
        assert lib.kvs_encode(lib.KVS_TYPE_Q8_0, values, rows, cols, out, err) == lib.KVS_E_ARGUMENT
        assert b"cols" in ffi.string(err.message)
    for rows, cols in ((1 << 58, 32), (1 << 62, 64), ((1 << 63) - 1, (1 << 63) - 32)):
        err = new_error()
        assert lib.kvs_encode(lib.KVS_TYPE_Q8_0, values, rows, cols, out, err) == lib.KVS_E_ARGUMENT
        assert f"rows: {rows} rows of {cols} values are more than there can be" in ffi.string(err.message).decode()
    values[100] = math.nan
    err = new_error()
    assert lib.kvs_encode(lib.KVS_TYPE_Q8_0, values, 2, 128, out, err) == lib.KVS_E_ARGUMENT
    assert err.offset == 100
    assert bytes(ffi.buffer(out)) == b"\xaa" * 2048


# ---- which type ----

WIDTH, FFN = 4096, 11008
SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH, WIDTH),
    "attn_v": (WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (FFN, WIDTH),
    "ffn_up": (FFN, WIDTH),
    "ffn_down": (WIDTH, FFN),
}


def seven_billion() -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (32000, WIDTH),
        "output.weight": (32000, WIDTH),
        "output_norm.weight": (WIDTH,),
    }
    for i in range(32):
        tensors |= {f"blk.{i}.{part}.weight": shape for part, shape in SHAPES.items()}
        tensors |= {f"blk.{i}.{part}_norm.weight": (WIDTH,) for part in ("attn", "ffn")}
    return tensors


@pytest.mark.parametrize(
    "mix, gigabytes",
    [
        ("q4_0", 3.83),
        ("q4_k_s", 3.86),
        ("q4_k_m", 4.08),
        ("q5_0", 4.65),
        ("q5_k_s", 4.65),
        ("q5_k_m", 4.78),
        ("q6_k", 5.53),
        ("q8_0", 7.16),
    ],
)
def test_sizes_are_those_of_published_files(mix: str, gigabytes: float) -> None:
    """LLaVA-1.5-7B as it is on the hub, metadata aside (a megabyte)."""
    total = 0
    for name, shape in seven_billion().items():
        kind = mixes.tensor_type(name, shape, mix, 32)
        total += math.prod(shape[:-1]) * lib.kvs_row_bytes(int(T[kind]), shape[-1])
    assert abs(total / 1e9 - gigabytes) < 0.007


def types_of(mix: str, part: str, n_layer: int = 32, shape: tuple[int, int] = (WIDTH, WIDTH)) -> list[str]:
    return [mixes.tensor_type(f"blk.{i}.{part}.weight", shape, mix, n_layer) for i in range(n_layer)]


def test_what_the_mixes_treat_better() -> None:
    often = [i < 4 or i >= 28 or (i - 4) % 3 == 2 for i in range(32)]
    for part in ("attn_v", "ffn_down"):
        assert types_of("q4_k_m", part) == ["Q6_K" if more else "Q4_K" for more in often]
        assert types_of("q5_k_m", part) == ["Q6_K" if more else "Q5_K" for more in often]
        assert types_of("q5_k_s", part) == ["Q5_K"] * 32
        assert types_of("q4_k_s", part) == ["Q5_K"] * 4 + ["Q4_K"] * 28
    assert types_of("q3_k_m", "attn_v") == types_of("q3_k_m", "ffn_down") == ["Q5_K"] * 2 + ["Q4_K"] * 30
    assert types_of("q3_k_m", "attn_output") == ["Q4_K"] * 32
    assert types_of("q2_k", "attn_v") == types_of("q2_k", "ffn_down") == types_of("q2_k", "attn_output") == ["Q3_K"] * 32
    assert types_of("q2_k", "attn_v", shape=(WIDTH // 4, WIDTH)) == ["Q4_K"] * 32
    assert types_of("q4_k", "ffn_up") == ["Q4_K"] * 32


@pytest.mark.parametrize("mix", mixes.MIXES)
def test_what_every_mix_leaves_alone(mix: str) -> None:
    base = mixes.MIXES[mix].type
    tower = {"F32": "F32", "BF16": "F32"}.get(base, "F16")
    for name, shape, expected in (
        ("blk.0.attn_norm.weight", (256,), "F32"),
        ("blk.0.attn_q.bias", (256,), "F32"),
        ("rope_freqs.weight", (64,), "F32"),
        ("v.class_embd", (256,), "F32"),
        ("v.position_embd.weight", (65, 256), "F32"),
        ("v.patch_embd.weight", (256, 3, 14, 14), tower),
        ("v.blk.0.attn_v.weight", (256, 256), base),
        ("mm.2.weight", (256, 256), base),
        ("token_embd.weight", (1000, 256), base),
    ):
        assert mixes.tensor_type(name, shape, mix, 8) == expected, name
    better = base if base in (*PLAIN, "Q8_0") else "Q6_K"
    assert mixes.tensor_type("output.weight", (1000, 256), mix, 8) == better
    assert mixes.tensor_type("token_embd.weight", (1000, 256), mix, 8, tied=True) == better


def test_rows_that_are_no_whole_blocks() -> None:
    """No fewer bits than were asked for."""
    for wanted in (*GRID, "F16"):
        for cols in (256, 512, 320, 96, 172, 1):
            got = mixes.fitting_type(wanted, cols)
            assert cols % block_of(got) == 0
            bits = [8 * size / n for n, size in (gguf.GGML_QUANT_SIZES[T[name]] for name in (got, wanted))]
            assert got == wanted or bits[0] >= bits[1]


def test_unknown_mixes() -> None:
    for wrong in ("q4", "iq4_nl", "", "q8_k"):
        with pytest.raises(ValueError, match="mix must be one of f32, f16"):
            mixes.tensor_type("output.weight", (2, 256), wrong, 1)
    assert mixes.mix_name("Q4_K") == "q4_k_m"
