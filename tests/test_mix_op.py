"""The op kv_mix on its own: rows of a cache become weighted sums of them, against float64, on every instruction set."""

from dataclasses import dataclass

import numpy as np
import pytest
from reference.llama import STORES, rotate

from pykvsmooth._native import ffi, lib

K, V = lib.KVS_TARGET_K, lib.KVS_TARGET_V
TYPES = {"f32": lib.KVS_TYPE_F32, "f16": lib.KVS_TYPE_F16, "q8_0": lib.KVS_TYPE_Q8_0}
EPS = 2.0**-24  # of float32, half a unit in the last place


@dataclass
class Case:
    first: int
    n: int
    w: np.ndarray  # (n, n)
    k: np.ndarray  # (n_rows, G, D)
    v: np.ndarray
    gamma: float = 1.0
    target: int = K | V
    rope_pre: bool = False
    n_rot: int = 0
    n_exact: int = 3
    threads: int = 1

    @property
    def inv_freq(self) -> np.ndarray:
        return (10000.0 ** (-np.arange(0, self.n_rot, 2) / max(self.n_rot, 1))).astype(np.float32)


def draw(rng: np.random.Generator, n: int, heads: int, head_dim: int, density: float = 1.0) -> Case:
    """density: of the weights; some columns are empty, and so stay as they are."""
    first, behind = int(rng.integers(0, 5)), int(rng.integers(0, 4))
    w = rng.random((n, n)) * (rng.random((n, n)) < density)
    np.fill_diagonal(w, 0)
    w[:, rng.random(n) < 0.2] = 0
    w = np.divide(w, w.sum(0), out=np.zeros_like(w), where=w.sum(0) > 0).astype(np.float32)
    k, v = rng.standard_normal((2, first + n + behind, heads, head_dim)).astype(np.float32)
    return Case(first, n, w, k, v)


def mixed(isa: str, case: Case, kv_type: str = "f32") -> tuple[np.ndarray, ...]:
    """k, v, and the rings of exact rows"""
    n_rows, heads, head_dim = case.k.shape
    rings = np.full((2, case.n_exact, heads, head_dim), np.nan, np.float32)
    out = np.full((2, *case.k.shape), np.nan, np.float32)
    pointers = [ffi.from_buffer("float[]", np.ascontiguousarray(a)) for a in (case.w, case.inv_freq, case.k, case.v, *out, *rings)]
    w, inv_freq, k, v, k_out, v_out, k_ring, v_ring = pointers
    status = lib.kvs_test_mix(
        isa.encode(), case.threads, TYPES[kv_type], heads, head_dim, n_rows, case.first, case.n, w, case.gamma, case.target,
        case.rope_pre, case.n_rot, inv_freq, k, v, case.n_exact, k_out, v_out, k_ring, v_ring,
    )  # fmt: skip
    assert status == 0
    return (*out, *rings)


def expected(case: Case, kv_type: str = "f32") -> tuple[np.ndarray, np.ndarray]:
    """What the rows become, before they are rounded into the store."""
    rows = slice(case.first, case.first + case.n)
    positions = np.arange(case.first, case.first + case.n)
    taken = case.w.any(0)
    result = []
    for side, x in ((K, case.k), (V, case.v)):
        x = STORES[kv_type](x.astype(np.float64))
        part = x[rows]
        pre = case.rope_pre and side == K
        source = rotate(part, -positions, case.inv_freq.astype(np.float64)) if pre else part
        hat = np.einsum("ij,igd->jgd", case.w.astype(np.float64), source)
        hat = rotate(hat, positions, case.inv_freq.astype(np.float64)) if pre else hat
        if case.target & side:
            part[taken] = ((1 - case.gamma) * part + case.gamma * hat)[taken]
        result.append(x)
    return result[0], result[1]


def bound(case: Case) -> float:
    """Of the float32 arithmetic: a sum of n products with weights that add up to one errs by n roundings of the largest row (a pair of
    numbers turns within sqrt 2 of its larger), then come two turns by angles of float32 (a product that is rounded) and a blend."""
    largest = max(np.abs(case.k).max(), np.abs(case.v).max()) * (2**0.5 if case.rope_pre else 1)
    angle = 2 * (case.first + case.n) if case.rope_pre else 0
    return float((case.n + 8 + 3 * angle) * 2 * EPS * largest)


@pytest.mark.parametrize("turn", range(24))
def test_sums_against_float64(isas: list[str], rng: np.random.Generator, turn: int) -> None:
    case = draw(
        rng,
        int(rng.integers(1, 70)),
        int(rng.integers(1, 4)),
        int(rng.choice([1, 2, 7, 16, 20, 64, 80, 128])),
        float(rng.choice([1, 0.3, 0.05])),
    )
    case.gamma, case.target = float(np.float32(rng.choice([1, 0.3]))), int(rng.choice([K, V, K | V]))
    case.n_rot = int(rng.integers(0, case.k.shape[2] // 2 + 1)) * 2
    case.rope_pre, case.threads = bool(rng.integers(2)), int(rng.integers(1, 4))
    truth = expected(case)
    for isa in isas:
        for got, wanted in zip(mixed(isa, case), truth, strict=False):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=bound(case), err_msg=f"{isa} {turn}")


@pytest.mark.parametrize(("kv_type", "ulp"), [("f16", 2**-10), ("q8_0", 1 / 127)])
def test_rows_are_rounded_once(isas: list[str], rng: np.random.Generator, kv_type: str, ulp: float) -> None:
    """What is stored is mixed in float32, and rounded when it is stored again."""
    case = draw(rng, 40, 2, 72)
    case.gamma, case.rope_pre, case.n_rot = 0.5, True, 72
    for isa in isas:
        for got, wanted in zip(mixed(isa, case, kv_type), expected(case, kv_type), strict=False):
            pad = np.pad(np.abs(wanted), ((0, 0), (0, 0), (0, 24))).reshape(*wanted.shape[:2], -1, 32).max(-1)
            largest = pad.repeat(32, -1)[..., : wanted.shape[2]]
            assert (np.abs(got - wanted) <= 0.51 * ulp * largest * 1.01 + bound(case)).all()


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_what_no_column_names_keeps_its_bits(isas: list[str], rng: np.random.Generator, kv_type: str) -> None:
    case = draw(rng, 30, 2, 36, 0.5)
    nothing = Case(case.first, case.n, np.zeros_like(case.w), case.k, case.v)
    kept = np.ones(len(case.k), bool)
    kept[case.first : case.first + case.n] = ~case.w.any(0)
    for isa in isas:
        for got, plain in zip(mixed(isa, case, kv_type)[:2], mixed(isa, nothing, kv_type)[:2], strict=True):
            assert got[kept].tobytes() == plain[kept].tobytes()


def test_the_ring_takes_the_new_values(isas: list[str], rng: np.random.Generator) -> None:
    """Slot = row % n_exact, the newest rows of the cache; unrounded where the store is not."""
    case = draw(rng, 20, 2, 24)
    for isa in isas:
        for case.n_exact in (1, 4, 7, 40):
            k, v, k_ring, v_ring = mixed(isa, case, "f32")
            for row in range(max(0, len(case.k) - case.n_exact), len(case.k)):
                assert k_ring[row % case.n_exact].tobytes() == k[row].tobytes()
                assert v_ring[row % case.n_exact].tobytes() == v[row].tobytes()
            truth = expected(case, "f16")[0]
            ring, last = mixed(isa, case, "f16")[2], len(case.k) - 1
            if case.first + case.n == len(case.k) and case.w[:, -1].any():
                np.testing.assert_allclose(ring[last % case.n_exact], truth[last], rtol=0, atol=bound(case))


def test_threads_change_no_bit(isas: list[str], rng: np.random.Generator) -> None:
    case = draw(rng, 50, 5, 64)
    for isa in isas:
        case.threads = 1
        alone = mixed(isa, case)
        case.threads = 4
        assert all(a.tobytes() == b.tobytes() for a, b in zip(alone[:2], mixed(isa, case)[:2], strict=True))
