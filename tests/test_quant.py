"""The plain decoders of quant.c against the gguf package, bit by bit, on random blocks of every type."""

import gguf
import numpy as np
import pytest

from pykvsmooth._native import ffi, lib

# byte offsets of the F16 fields of a block; the rest of it may hold anything
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
SIZES = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in HALVES}  # values and bytes of a block
TYPES = ["F32", "F16", "BF16", *HALVES]


def type_id(name: str) -> int:
    return int(gguf.GGMLQuantizationType[name])


def random_blocks(rng: np.random.Generator, name: str, rows: int, cols: int, scales: np.ndarray | None = None) -> np.ndarray:
    """(rows, bytes): blocks with every bit random but the F16 fields, which come from scales (default: normal and sane)."""
    if name in ("F32", "F16", "BF16"):
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8).reshape(rows, -1)
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (rows, cols // size, width), dtype=np.uint8)
    for at in HALVES[name]:
        values = rng.choice(scales, blocks.shape[:2]) if scales is not None else 0.02 * rng.standard_normal(blocks.shape[:2])
        blocks[:, :, at : at + 2] = values.astype(np.float16)[:, :, None].view(np.uint8)
    return blocks.reshape(rows, -1)


def expected(name: str, rows: np.ndarray) -> np.ndarray:
    if name == "F32":
        return rows.view(np.float32)
    if name == "F16":
        return rows.view(np.float16).astype(np.float32)
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name])


def decode(name: str, row: np.ndarray, n: int) -> np.ndarray:
    out = np.full(n, np.nan, np.float32)
    assert lib.kvs_decode(type_id(name), ffi.from_buffer(row), n, ffi.cast("float *", out.ctypes.data)) == 0
    return out


@pytest.mark.parametrize("name", TYPES)
def test_decoder_equals_gguf(name: str, rng: np.random.Generator) -> None:
    finite = np.arange(65536, dtype=np.uint16).view(np.float16)
    scales = finite[np.isfinite(finite)].astype(np.float32)  # zeros, both signs, subnormals, the largest
    rows = random_blocks(rng, name, 64, 1024, scales)
    want = expected(name, rows)
    got = np.stack([decode(name, row, 1024) for row in rows])
    np.testing.assert_array_equal(got.view(np.uint32), want.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_half(name: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    want = bits.view(np.float16).astype(np.float32) if name == "F16" else (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(decode(name, bits.view(np.uint8), 65536), want)


@pytest.mark.parametrize("name", TYPES)
def test_unaligned_rows(name: str, rng: np.random.Generator) -> None:
    if name == "F32":
        step = 4  # the file format aligns plain types to their own size
    else:
        step = 2 if name in ("F16", "BF16") else 1
    rows = random_blocks(rng, name, 1, 512)
    shifted = np.zeros(rows.size + step, np.uint8)
    shifted[step:] = rows[0]
    np.testing.assert_array_equal(decode(name, shifted[step:], 512), decode(name, rows[0], 512))


@pytest.mark.parametrize("name", TYPES)
def test_row_bytes_and_names(name: str) -> None:
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert ffi.string(lib.kvs_type_name(type_id(name))).decode() == name
    assert lib.kvs_row_bytes(type_id(name), 6 * size) == 6 * width
    assert lib.kvs_row_bytes(type_id(name), 0) == 0
    assert lib.kvs_row_bytes(type_id(name), -size) == -1
    if size > 1:
        assert lib.kvs_row_bytes(type_id(name), size + 1) == -1
    if width > size:
        assert lib.kvs_row_bytes(type_id(name), 2**63 - 2**63 % size - size) == -1


def test_unknown_types() -> None:
    known = {type_id(name) for name in TYPES}
    for number in (*(set(range(-2, 64)) - known), 2**31 - 1, -(2**31)):
        assert lib.kvs_type_name(number) == ffi.NULL
        assert lib.kvs_row_bytes(number, 256) == -1
        assert lib.kvs_decode(number, ffi.NULL, 256, ffi.NULL) == lib.KVS_E_ARGUMENT
