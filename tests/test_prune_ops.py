"""The ops of PruneHal one by one, on every kernel set: masses and log-sum-exps beside attention, scores of single keys, rows that
leave and come back."""

import numpy as np
import pytest
from test_attention import F32, TYPES, attend, draw, floats, stored

from pykvsmooth._native import ffi, lib

Array = np.ndarray


def ints(array: Array):
    assert array.dtype == np.int32 and array.flags.c_contiguous
    return ffi.from_buffer("int32_t[]", array, require_writable=False)


def draw_spans(rng: np.random.Generator, n_kv: int) -> Array:
    """(n, 2) first and length, rising, apart or touching; the last one may reach to the end."""
    ends = np.sort(rng.choice(n_kv + 1, min(n_kv + 1, 2 * int(rng.integers(0, 4))), replace=False))
    ends = ends[: len(ends) // 2 * 2].reshape(-1, 2)
    return np.ascontiguousarray(np.stack([ends[:, 0], ends[:, 1] - ends[:, 0]], 1), np.int32)


def taps(isa: str, kv_type: int, q: Array, k: Array, v: Array, spans: Array, exclude_self: bool = False, threads: int = 1):
    n_q, n_head, head_dim = q.shape
    out, (entropy, mass, lse) = np.full_like(q, np.nan), np.full((3, n_q, n_head), np.nan, np.float32)
    status = lib.kvs_test_taps(
        isa.encode(), threads, kv_type, floats(q), floats(k), floats(v), n_q, len(k), n_head, k.shape[1], head_dim, exclude_self,
        ints(spans), len(spans), floats(out), floats(entropy), floats(mass), floats(lse),
    )  # fmt: skip
    assert status == 0
    return out, entropy, mass, lse


def scores_of(q: Array, k: Array) -> Array:
    """float64: q (n_q, H, d) as the newest rows of k (n_kv, G, d) -> (n_q, H, n_kv), -inf where a row does not see"""
    n_q, n_kv, group = len(q), len(k), q.shape[1] // k.shape[1]
    scores = np.einsum("qhd,khd->qhk", q.astype(np.float64), k.repeat(group, axis=1)) / np.sqrt(q.shape[-1])
    hidden = np.arange(n_kv) > np.arange(n_kv - n_q, n_kv)[:, None]
    return np.where(hidden[:, None], -np.inf, scores)


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("head_dim", [2, 8, 20, 64, 128])
def test_mass_and_lse(isas: list[str], rng: np.random.Generator, head_dim: int, kv_type: str) -> None:
    """A float32 sum of e^s over a row of n keys, each to 2 ulp plus the error of its score: bounds as of the entropy beside it."""
    kind = TYPES[kv_type]
    for n_kv in (1, 2, 15, 64, 65, int(rng.integers(66, 300)), int(rng.integers(300, 701))):
        group, n_kv_head = int(rng.choice([1, 2, 4])), int(rng.integers(1, 4))
        n_q, scale = int(rng.integers(1, min(n_kv, 40) + 1)), 10 ** rng.uniform(-1, 0.5)
        q = draw(rng, n_q, n_kv_head * group, head_dim, scale=scale)
        k, v = draw(rng, n_kv, n_kv_head, head_dim, scale=scale), draw(rng, n_kv, n_kv_head, head_dim)
        spans, exclude = draw_spans(rng, n_kv), bool(rng.integers(2))
        s = scores_of(q, stored(kind, k))
        lse = np.log(np.exp(s - s.max(-1, keepdims=True)).sum(-1)) + s.max(-1)
        visual = np.zeros(n_kv, bool)
        for first, n in spans:
            visual[first : first + n] = True
        mass = np.exp(s - lse[..., None])[..., visual].sum(-1)
        for isa in isas:
            _, _, got_mass, got_lse = taps(isa, kind, q, k, v, spans, exclude)
            where = f"{isa} n_kv={n_kv} n_q={n_q} group={group} spans={spans.tolist()} scale={scale}"
            np.testing.assert_allclose(got_mass, mass, rtol=0, atol=5e-6 * max(1, scale**2), err_msg=where)
            np.testing.assert_allclose(got_lse, lse, rtol=0, atol=1e-5 * max(1, scale**2), err_msg=where)


@pytest.mark.parametrize("kv_type", TYPES)
def test_taps_change_no_bit_and_do_not_know_their_company(isas: list[str], rng: np.random.Generator, kv_type: str) -> None:
    kind, n_kv, n_kv_head = TYPES[kv_type], int(rng.integers(70, 400)), 2
    for group in (1, 3):
        n_q = int(rng.integers(34, 70))
        q = draw(rng, n_q, n_kv_head * group, 36)
        k, v, spans = draw(rng, n_kv, n_kv_head, 36), draw(rng, n_kv, n_kv_head, 36), draw_spans(rng, n_kv)
        for isa in isas:
            for exclude in (False, True):
                off = attend(isa, kind, q, k, v, exclude)
                on = taps(isa, kind, q, k, v, spans, exclude)
                assert all(a.tobytes() == b.tobytes() for a, b in zip(off, on, strict=False))
                again = taps(isa, kind, q, k, v, spans, exclude, threads=5)
                assert all(a.tobytes() == b.tobytes() for a, b in zip(on, again, strict=True))
                for i in (0, n_q // 2, n_q - 1):
                    seen = n_kv - n_q + i + 1
                    alone = taps(isa, kind, q[i : i + 1].copy(), k[:seen].copy(), v[:seen].copy(), spans, exclude)
                    assert all(a.tobytes() == b[i].tobytes() for a, b in zip(alone, on, strict=True))


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("maximum", [False, True])
def test_scores_of_single_keys(isas: list[str], rng: np.random.Generator, kv_type: str, maximum: bool) -> None:
    """A weight is e^(s - lse) <= 1: its error is that of s and lse, 1e-6 each of numbers up to about ten."""
    kind = TYPES[kv_type]
    for n_kv in (1, 40, int(rng.integers(66, 300))):
        for group in (1, 4, 70):
            n_kv_head, head_dim = int(rng.integers(1, 4)), int(rng.choice([2, 20, 64]))
            q, k = draw(rng, n_kv_head * group, head_dim), draw(rng, n_kv, n_kv_head, head_dim)
            spans = draw_spans(rng, n_kv)
            s = scores_of(q[None], stored(kind, k))[0]
            p = np.exp(s - s.max(-1, keepdims=True))
            p = (p / p.sum(-1, keepdims=True)).reshape(n_kv_head, group, n_kv)
            expected = p.max(1) if maximum else p.mean(1)
            rows = np.concatenate([np.arange(first, first + n) for first, n in spans] or [np.zeros(0, int)]).astype(int)
            for isa in isas:
                for threads in (1, 3):
                    got = np.full((n_kv_head, len(rows)), np.nan, np.float32)
                    status = lib.kvs_test_score(
                        isa.encode(), threads, kind, floats(q), floats(k), n_kv, n_kv_head * group, n_kv_head, head_dim,
                        ints(spans), len(spans), maximum, floats(got),
                    )  # fmt: skip
                    assert status == 0
                    np.testing.assert_allclose(got, expected[:, rows], rtol=0, atol=1e-5, err_msg=f"{isa} {n_kv} {group}")


@pytest.mark.parametrize("kv_type", TYPES)
def test_rows_leave_and_come_back(isas: list[str], rng: np.random.Generator, kv_type: str) -> None:
    """Exact copies, so every bit is that of a cache row; n_ctx beyond a page, so that trimmed memory is really gone behind the rows."""
    kind = TYPES[kv_type]
    for n_kv, n in ((1, 1), (2, 1), (9, 9), (65, 40), (int(rng.integers(100, 400)), int(rng.integers(1, 99)))):
        n_kv_head, head_dim = int(rng.integers(1, 4)), int(rng.choice([2, 20, 64, 128]))
        k, v = draw(rng, n_kv, n_kv_head, head_dim), draw(rng, n_kv, n_kv_head, head_dim)
        places = np.array([np.sort(rng.choice(n_kv, n, replace=False)) for _ in range(n_kv_head)], np.int32)
        for isa in isas:
            left, back = (
                np.full((2, n_kv_head, n_kv - n, head_dim), np.nan, np.float32),
                np.full((2, n_kv_head, n_kv, head_dim), 9, np.float32),
            )
            status = lib.kvs_test_gather(
                isa.encode(), int(rng.integers(1, 4)), kind, floats(k), floats(v), n_kv, n_kv_head, head_dim, 1500, ints(places), n,
                floats(left[0]), floats(left[1]), floats(back[0]), floats(back[1]),
            )  # fmt: skip
            assert status == 0
            for side, x in enumerate((k, v)):
                rows = stored(kind, x).swapaxes(0, 1)
                np.testing.assert_array_equal(back[side], rows.astype(np.float32))
                for head in range(n_kv_head):
                    np.testing.assert_array_equal(left[side, head], np.delete(rows[head], places[head], axis=0).astype(np.float32))


def test_a_key_that_is_no_number_is_seen_in_the_mass(isas: list[str], rng: np.random.Generator) -> None:
    q, k, v = draw(rng, 3, 4, 40), draw(rng, 37, 2, 40), draw(rng, 37, 2, 40)
    k[20, 1, 3] = np.nan
    for isa in isas:
        _, _, mass, lse = taps(isa, F32, q, k, v, np.array([[5, 20]], np.int32))
        assert np.isnan(mass[:, 2:]).all() and np.isnan(lse[:, 2:]).all() and np.isfinite(mass[:, :2]).all()
