"""Attention and row entropy of every kernel set against float64; and that no result depends on company or threads."""

import numpy as np
import pytest

from pykvsmooth._native import ffi, lib

F32, F16, Q8_0 = lib.KVS_TYPE_F32, lib.KVS_TYPE_F16, lib.KVS_TYPE_Q8_0
TYPES = {"f32": F32, "f16": F16, "q8_0": Q8_0}


def floats(array: np.ndarray):
    assert array.dtype == np.float32 and array.flags.c_contiguous
    return ffi.from_buffer("float[]", array, require_writable=False)


def draw(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def stored(kv_type: int, x: np.ndarray) -> np.ndarray:
    """What a cache row of that type gives back, head by head, in float64."""
    if kv_type == F32:
        return x.astype(np.float64)
    if kv_type == F16:
        return x.astype(np.float16).astype(np.float64)
    pad = -x.shape[-1] % 32
    blocks = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)]).reshape(*x.shape[:-1], -1, 32)
    d = (np.abs(blocks).max(-1, keepdims=True) / np.float32(127)).astype(np.float16).astype(np.float32)
    q = np.clip(np.rint(blocks / np.where(d > 0, d, np.float32(1))), -127, 127)
    return (q.astype(np.float64) * d).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def attend(isa, kv_type, q, k, v, exclude_self=False, threads=1, want_entropy=True):
    n_q, n_head, head_dim = q.shape
    out, entropy = np.full_like(q, np.nan), np.full((n_q, n_head), np.nan, np.float32)
    status = lib.kvs_test_attn(
        isa.encode(), threads, kv_type, floats(q), floats(k), floats(v), n_q, len(k), n_head, k.shape[1], head_dim,
        exclude_self, floats(out), floats(entropy) if want_entropy else ffi.NULL,
    )  # fmt: skip
    assert status == 0
    return out, entropy


def softmax_rows(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    e = np.exp(scores - scores.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    return p, -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def reference(q, k, v, exclude_self=False):
    """q (n_q, H, d) as the newest rows of k, v (n_kv, G, d), all float64."""
    n_q, n_head, head_dim = q.shape
    n_kv, group = len(k), n_head // k.shape[1]
    out, entropy = np.zeros(q.shape), np.zeros((n_q, n_head))
    for i in range(n_q):
        seen = n_kv - n_q + i + 1
        for h in range(n_head):
            scores = k[:seen, h // group] @ q[i, h] / np.sqrt(head_dim)
            p, entropy[i, h] = softmax_rows(scores)
            out[i, h] = p @ v[:seen, h // group]
            if exclude_self:
                entropy[i, h] = softmax_rows(scores[:-1])[1] if seen > 1 else 0
    return out, entropy


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("head_dim", [2, 8, 16, 20, 64, 80, 128])
def test_against_float64(isas: list[str], rng: np.random.Generator, head_dim: int, kv_type: str) -> None:
    kind = TYPES[kv_type]
    for n_kv in (1, 2, 8, 63, 64, 65, int(rng.integers(66, 300)), int(rng.integers(300, 701))):
        group = int(rng.choice([1, 2, 4]))
        n_q, n_kv_head = int(rng.integers(1, min(n_kv, 40) + 1)), int(rng.integers(1, 4))
        scale = 10 ** rng.uniform(-1, 0.5)
        q = draw(rng, n_q, n_kv_head * group, head_dim, scale=scale)
        k, v = draw(rng, n_kv, n_kv_head, head_dim, scale=scale), draw(rng, n_kv, n_kv_head, head_dim)
        exclude = bool(rng.integers(2))
        out, entropy = reference(q.astype(np.float64), stored(kind, k), stored(kind, v), exclude)
        for isa in isas:
            got, got_entropy = attend(isa, kind, q, k, v, exclude)
            where = f"{isa} n_kv={n_kv} n_q={n_q} group={group} exclude_self={exclude} scale={scale}"
            np.testing.assert_allclose(got, out, rtol=0, atol=2e-5 * max(1, scale**2), err_msg=where)
            np.testing.assert_allclose(got_entropy, entropy, rtol=0, atol=1e-5 * max(1, scale**2), err_msg=where)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("offset", [0.0, 100.0, -1000.0, 1000.0])
def test_entropy_keeps_its_digits_under_large_scores(isas: list[str], rng: np.random.Generator, offset: float, spread: float) -> None:
    """head_dim 4 and multiples of 1/1024: every score is exact in float32, so that only softmax and entropy are measured."""
    worst = 0.0
    for n_kv in (1, 5, 64, 129, int(rng.integers(200, 2000))):
        scores = np.rint(rng.standard_normal(n_kv) * spread * 64) / 64 + offset
        k = np.zeros((n_kv, 1, 4), np.float32)
        k[:, 0, 0] = scores * 2  # 1/sqrt(head_dim) is 1/2
        q = np.zeros((1, 1, 4), np.float32)
        q[..., 0] = 1
        v = draw(rng, n_kv, 1, 4)
        out, entropy = reference(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64))
        for isa in isas:
            got, got_entropy = attend(isa, F32, q, k, v)
            worst = max(worst, float(np.abs(got_entropy - entropy).max()))
            np.testing.assert_allclose(got, out, rtol=0, atol=5e-6, err_msg=isa)
            assert got_entropy.min() >= 0 and got_entropy.max() <= np.log(n_kv) + 1e-5
    assert worst < 5e-6, f"entropy is off by {worst:.2e}"


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("head_dim", [20, 128])
def test_a_query_gives_the_same_bits_in_any_company(isas: list[str], rng: np.random.Generator, head_dim: int, kv_type: str) -> None:
    """Strengths are ranks of entropies: one bit that depended on the batch could change a caption."""
    kind, n_kv, n_kv_head = TYPES[kv_type], int(rng.integers(70, 400)), 2
    for group in (1, 3):
        n_q = int(rng.integers(34, 70))
        q = draw(rng, n_q, n_kv_head * group, head_dim)
        k, v = draw(rng, n_kv, n_kv_head, head_dim), draw(rng, n_kv, n_kv_head, head_dim)
        for isa in isas:
            for exclude in (False, True):
                out, entropy = attend(isa, kind, q, k, v, exclude)
                for threads in (2, 5):
                    again, again_entropy = attend(isa, kind, q, k, v, exclude, threads)
                    assert again.tobytes() == out.tobytes() and again_entropy.tobytes() == entropy.tobytes()
                for i in (0, 1, n_q // 2, n_q - 1):
                    seen = n_kv - n_q + i + 1
                    alone, alone_entropy = attend(isa, kind, q[i : i + 1].copy(), k[:seen].copy(), v[:seen].copy(), exclude)
                    assert alone.tobytes() == out[i].tobytes() and alone_entropy.tobytes() == entropy[i].tobytes()


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_keys_that_are_not_seen_do_no_harm(isas: list[str], rng: np.random.Generator, kv_type: str) -> None:
    """A later row with infinities must not reach the rows before it as 0 * inf."""
    n_kv = n_q = 75
    q, k, v = draw(rng, n_q, 2, 16), draw(rng, n_kv, 1, 16), draw(rng, n_kv, 1, 16)
    clean, clean_entropy = {}, {}
    for isa in isas:
        clean[isa], clean_entropy[isa] = attend(isa, TYPES[kv_type], q, k, v)
    k[70:], v[70:] = np.inf, np.nan
    for isa in isas:
        out, entropy = attend(isa, TYPES[kv_type], q, k, v)
        assert out[:70].tobytes() == clean[isa][:70].tobytes()
        assert entropy[:70].tobytes() == clean_entropy[isa][:70].tobytes()


def test_entropy_is_optional_and_a_first_row_has_none(isas: list[str], rng: np.random.Generator) -> None:
    q, k, v = draw(rng, 3, 2, 8), draw(rng, 3, 2, 8), draw(rng, 3, 2, 8)
    for isa in isas:
        out, entropy = attend(isa, F32, q, k, v)
        assert (entropy[0] == 0).all() and (attend(isa, F32, q, k, v, exclude_self=True)[1][:2] == 0).all()
        silent, untouched = attend(isa, F32, q, k, v, want_entropy=False)
        assert silent.tobytes() == out.tobytes() and np.isnan(untouched).all()
        np.testing.assert_array_equal(out[0], v[0])


@pytest.mark.parametrize(("n", "n_head", "head_dim"), [(1, 1, 2), (5, 3, 20), (64, 2, 64), (197, 3, 80), (577, 2, 64)])
def test_full_attention(isas: list[str], rng: np.random.Generator, n: int, n_head: int, head_dim: int) -> None:
    q, k, v = (draw(rng, n, n_head, head_dim) for _ in range(3))
    scores = np.einsum("ihd,jhd->hij", q.astype(np.float64), k.astype(np.float64)) / np.sqrt(head_dim)
    expected = np.einsum("hij,jhd->ihd", softmax_rows(scores)[0], v.astype(np.float64))
    for isa in isas:
        for threads in (1, 3):
            out = np.full_like(q, np.nan)
            assert lib.kvs_test_attn_full(isa.encode(), threads, floats(q), floats(k), floats(v), n, n_head, head_dim, 0, floats(out)) == 0
            np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5, err_msg=isa)


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_a_key_that_is_no_number_is_not_passed_over(kv_type: str, isas: list[str], rng: np.random.Generator) -> None:
    """Its score would otherwise count as the lowest, and a broken model would look healthy."""
    q, k, v = draw(rng, 3, 4, 40), draw(rng, 37, 2, 40), draw(rng, 37, 2, 40)
    k[20, 1, 3] = np.nan
    for isa in isas:
        out, entropy = attend(isa, TYPES[kv_type], q, k, v)
        assert np.isnan(out[:, 2:]).all() and np.isnan(entropy[:, 2:]).all()
        assert np.isfinite(out[:, :2]).all() and np.isfinite(entropy[:, :2]).all()
