"""Attention at shapes that few models have, and several sessions in one step: every kernel set against float64, and to the last bit against
each row by itself."""

import numpy as np
import pytest
from test_attention import TYPES, draw, floats, stored
from test_prune_ops import draw_spans, ints, scores_of, taps

from pykvsmooth._native import lib

Array = np.ndarray


def expected(q: Array, k: Array, v: Array, spans: Array, exclude_self: bool) -> tuple[Array, ...]:
    """out, entropy, mass, lse in float64 of q (n_q, H, d) as the newest rows of k, v (n_kv, G, d)"""
    s = scores_of(q, k)
    top = s.max(-1, keepdims=True)
    lse = np.log(np.exp(s - top).sum(-1)) + top[..., 0]
    p = np.exp(s - lse[..., None])
    visual = np.zeros(len(k), bool)
    for first, n in spans:
        visual[first : first + n] = True
    if exclude_self:
        own = np.arange(len(k)) == np.arange(len(k) - len(q), len(k))[:, None]
        s = np.where(own[:, None], -np.inf, s)
    with np.errstate(divide="ignore", invalid="ignore"):
        e = np.exp(s - s.max(-1, keepdims=True))
        share = np.nan_to_num(e / e.sum(-1, keepdims=True))
        entropy = -np.where(share > 0, share * np.log(share), 0).sum(-1)
    return np.einsum("qhk,khd->qhd", p, v.repeat(q.shape[1] // v.shape[1], axis=1)), entropy, p[..., visual].sum(-1), lse


SHAPES = [(1, 1, 1), (3, 2, 5), (12, 1, 64), (31, 2, 3), (33, 1, 7), (36, 1, 9), (72, 2, 2), (100, 3, 1), (127, 1, 4), (136, 1, 8)]
SHAPES += [(160, 2, 1), (257, 1, 2), (264, 1, 6), (320, 1, 1), (511, 1, 3), (512, 1, 2)]


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize(("head_dim", "n_kv_head", "group"), SHAPES)
def test_any_shape(isas: list[str], rng: np.random.Generator, head_dim: int, n_kv_head: int, group: int, kv_type: str) -> None:
    """Few rows and many; a bound as in test_attention.py, which holds up to 128 products in a sum."""
    kind = TYPES[kv_type]
    for n_q in (1, int(rng.integers(2, 17)), int(rng.integers(17, 40))):
        n_kv = int(rng.choice([n_q, 64, 65, 129, int(rng.integers(66, 260))]))
        n_kv = max(n_kv, n_q)
        q = draw(rng, n_q, n_kv_head * group, head_dim)
        k, v = draw(rng, n_kv, n_kv_head, head_dim), draw(rng, n_kv, n_kv_head, head_dim)
        spans, exclude = draw_spans(rng, n_kv), bool(rng.integers(2))
        want = expected(q.astype(np.float64), stored(kind, k), stored(kind, v), spans, exclude)
        row = int(rng.integers(n_q))
        seen = n_kv - n_q + row + 1
        for isa in isas:
            where = f"{isa} n_kv={n_kv} n_q={n_q} exclude_self={exclude} spans={spans.tolist()}"
            got = taps(isa, kind, q, k, v, spans, exclude)
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, head_dim / 128), err_msg=where)
            alone = taps(isa, kind, q[row : row + 1].copy(), k[:seen].copy(), v[:seen].copy(), spans, exclude)
            assert all(a[0].tobytes() == b[row].tobytes() for a, b in zip(alone, got, strict=True)), where


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("head_dim", [20, 64, 128])
def test_sessions_of_one_step(isas: list[str], rng: np.random.Generator, head_dim: int, many: bool) -> None:
    """Of different lengths and types of cache: no row knows that the others are there."""
    for n_sessions in (2, 3, 8):
        n_kv_head, group, exclude = int(rng.integers(1, 3)), int(rng.integers(1, 4)), bool(rng.integers(2))
        kinds = rng.choice(list(TYPES.values()), n_sessions)
        shape = [(int(kind), int(rng.integers(40, 300)), int(rng.integers(1, 40 if many else 3))) for kind in kinds]
        n_kv, n_q = sum(s[1] for s in shape), sum(s[2] for s in shape)
        q = draw(rng, n_q, n_kv_head * group, head_dim)
        k, v, spans = draw(rng, n_kv, n_kv_head, head_dim), draw(rng, n_kv, n_kv_head, head_dim), draw_spans(rng, 300)
        for isa in isas:
            out, stats = np.full_like(q, np.nan), np.full((3, *q.shape[:2]), np.nan, np.float32)
            status = lib.kvs_test_attn_step(
                isa.encode(), 2, ints(np.array(shape, np.int32)), n_sessions, floats(q), floats(k), floats(v), n_kv_head * group, n_kv_head,
                head_dim, exclude, ints(spans), len(spans), floats(out), *(floats(x) for x in stats),
            )  # fmt: skip
            assert status == 0
            at_q = at_kv = 0
            for kind, length, rows in shape:
                mine, theirs = slice(at_q, at_q + rows), slice(at_kv, at_kv + length)
                alone = taps(isa, kind, q[mine].copy(), k[theirs].copy(), v[theirs].copy(), spans, exclude)
                both = zip(alone, (out, *stats), strict=True)
                assert all(a.tobytes() == b[mine].tobytes() for a, b in both), f"{isa} {shape} group={group}"
                at_q, at_kv = at_q + rows, at_kv + length
