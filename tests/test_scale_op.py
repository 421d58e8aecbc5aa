"""The op kv_scale on its own: rows of a cache multiplied where they stand, to the bit, on every instruction set, and where a GPU and the
CPU are compared (KVS_CHECK) or share layers."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from device_memory import SHIM
from test_attention import TYPES, draw, floats, stored
from test_prune_ops import ints

from pykvsmooth._native import lib

Array = np.ndarray
K, V = lib.KVS_TARGET_K, lib.KVS_TARGET_V


@dataclass
class Case:
    k: Array  # (n_rows, G, D)
    v: Array
    indices: Array  # (room) in the timeline
    places: Array | None = None  # (n_sets, room), less than 0: not there; None: indices
    counts: list[int] = field(default_factory=list)  # of each step: how many of them
    factor: float = 1.1
    target: int = V
    n_exact: int = 3
    threads: int = 1


@pytest.fixture(scope="session")
def machines(isas: list[str]) -> list[str]:
    """Kernel sets, and a GPU beside the CPU in all three ways."""
    return isas + [name for name in ("check", "offload:0", "offload:1") if lib.kvs_test_isa(name.encode())]


def pick(rng: np.random.Generator, n_rows: int) -> Array:
    return rng.permutation(n_rows)[: int(rng.integers(1, n_rows + 1))].astype(np.int32)


def random_case(rng: np.random.Generator, head_dim: int) -> Case:
    n_rows, heads = int(rng.integers(1, 90)), int(rng.integers(1, 6))
    case = Case(draw(rng, n_rows, heads, head_dim), draw(rng, n_rows, heads, head_dim), pick(rng, n_rows))
    room = len(case.indices)
    if rng.integers(2):  # rows have left in front of these, of each head others
        sets = int(rng.choice([1, heads]))
        case.places = np.stack([rng.permutation(n_rows)[:room] for _ in range(sets)]).astype(np.int32)
        case.places[rng.random(case.places.shape) < 0.2] = -1
    case.counts = [int(rng.integers(0, room + 1)) for _ in range(int(rng.integers(1, 6)))]
    case.factor = float(np.float32(rng.choice([1.1, 0.3, 2.0, 0.0, -1.7])))
    case.target, case.n_exact, case.threads = int(rng.choice([K, V, K | V])), int(rng.choice([0, 1, 4, 100])), int(rng.integers(1, 4))
    return case


def scaled(isa: str, case: Case, kv_type: str) -> tuple[Array, Array]:
    """(2, n_rows, G, D) rows of K and V as they are stored, and (2, n_exact, G, D) of their rings"""
    n_rows, heads, head_dim = case.k.shape
    rows, rings = np.full((2, *case.k.shape), np.nan, np.float32), np.zeros((2, case.n_exact, heads, head_dim), np.float32)
    places, counts = ints(case.indices) if case.places is None else ints(case.places), np.array([*case.counts, 0], np.int32)
    status = lib.kvs_test_scale(
        isa.encode(), case.threads, TYPES[kv_type], heads, head_dim, n_rows, ints(case.indices), places,
        1 if case.places is None else len(case.places), len(case.indices), ints(counts), len(case.counts), case.factor, case.target,
        floats(case.k), floats(case.v), case.n_exact, *map(floats, rows), *map(floats, rings),
    )  # fmt: skip
    assert status == 0
    return rows, rings


def store(kv_type: str, x: Array) -> Array:
    return stored(TYPES[kv_type], x).astype(np.float32)


def expected(case: Case, kv_type: str) -> tuple[Array, Array]:
    """Each product is one of float32, and each is rounded into the store: so every bit is known."""
    n_rows, heads, _ = case.k.shape
    exact = np.stack([case.k, case.v])
    rows, rings = store(kv_type, exact), np.zeros((2, case.n_exact, *case.k.shape[1:]), np.float32)
    first = max(n_rows - case.n_exact, 0)
    for i in range(first, n_rows):
        rings[:, i % case.n_exact] = exact[:, i]
    factor, places = np.float32(case.factor), case.indices[None] if case.places is None else case.places
    sides = [side for side, bit in enumerate((K, V)) if case.target & bit]
    for count in case.counts:
        for head in range(heads):
            for index, place in zip(case.indices[:count], places[head % len(places)][:count], strict=True):
                for side in sides if place >= 0 else []:
                    rows[side, place, head] = store(kv_type, factor * rows[side, place, head])
                    if index >= first:
                        rings[side, index % case.n_exact, head] *= factor
    return rows, rings


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("head_dim", [1, 2, 7, 20, 33, 64, 80, 129, 512])
def test_every_bit_of_every_row(machines: list[str], rng: np.random.Generator, head_dim: int, kv_type: str) -> None:
    for _ in range(4):
        case = random_case(rng, head_dim)
        wanted = expected(case, kv_type)
        for machine in machines:
            for got, truth in zip(scaled(machine, case, kv_type), wanted, strict=True):
                np.testing.assert_array_equal(got, truth, err_msg=f"{machine} {case.counts} {case.factor} {case.target} {case.n_exact}")


@pytest.mark.parametrize("kv_type", TYPES)
def test_other_rows_keep_their_bits(machines: list[str], rng: np.random.Generator, kv_type: str) -> None:
    """Of a side that is not asked for, all of them; where nothing is chosen, or the factor is 1, all of both."""
    case = random_case(rng, 50)
    case.places, case.counts, case.factor = None, [len(case.indices)] * 2, 1.25
    others = np.ones(len(case.k), bool)
    others[case.indices] = False
    for machine in machines:
        before = scaled(machine, replace(case, counts=[]), kv_type)
        for case.target in (K, V):
            rows, rings = scaled(machine, case, kv_type)
            aside = 0 if case.target == V else 1
            assert rows[:, others].tobytes() == before[0][:, others].tobytes()
            assert rows[aside].tobytes() == before[0][aside].tobytes()
            assert rings[aside].tobytes() == before[1][aside].tobytes()
        for nothing in (replace(case, counts=[0, 0, 0]), replace(case, factor=1.0), replace(case, target=0)):
            for got, truth in zip(scaled(machine, nothing, kv_type), before, strict=True):
                assert got.tobytes() == truth.tobytes()


@pytest.mark.parametrize("kv_type", TYPES)
def test_choosing_again_compounds(machines: list[str], rng: np.random.Generator, kv_type: str) -> None:
    """Twelve times 1.1: each time the stored value errs by half a step at most, relative to its row's largest where that has the scale."""
    case = Case(draw(rng, 40, 2, 64), draw(rng, 40, 2, 64), pick(rng, 40), n_exact=40)
    case.counts = [len(case.indices)] * 12
    step = {"f32": 2.0**-23, "f16": 2.0**-11, "q8_0": 0.5 / 127 + 2.0**-11}[kv_type]
    power = float(np.float32(1.1)) ** 12
    for machine in machines:
        rows, rings = scaled(machine, case, kv_type)
        for i in case.indices:
            top = np.abs(case.v[i]).reshape(2, 2, 32).max(-1).repeat(32, -1) if kv_type == "q8_0" else np.abs(case.v[i])
            assert (np.abs(rows[1, i] - power * case.v[i]) <= 14 * step * power * top + 1e-6).all()
            np.testing.assert_allclose(rings[1, i], power * case.v[i], rtol=13 * 2**-23)


def test_beyond_the_limit(machines: list[str]) -> None:
    """As kv_put stores it: an infinity, or the largest value that Q8_0 has."""
    x = np.array([1.0, -1000.0, 3.0], np.float32)[:, None, None] * np.ones((1, 1, 34), np.float32)
    cases = {"f32": (1e38, [-np.inf, np.inf]), "f16": (100.0, [-np.inf, 300.0]), "q8_0": (1e30, [-127 * 65504.0, 127 * 65504.0])}
    for kv_type, (factor, wanted) in cases.items():
        factor = float(np.float32(factor))
        case = Case(x, 4 * x if kv_type == "f32" else x, np.array([1, 2], np.int32), counts=[2], factor=factor, n_exact=0)
        for machine in machines:
            rows, _ = scaled(machine, case, kv_type)
            np.testing.assert_array_equal(rows[1, 1:, 0, 33], np.array(wanted, np.float32), err_msg=f"{machine} {kv_type}")


def test_threads_change_no_bit(machines: list[str], rng: np.random.Generator) -> None:
    case = Case(draw(rng, 300, 4, 32), draw(rng, 300, 4, 32), pick(rng, 300), counts=[300], target=K | V)
    case.counts = [len(case.indices)]
    for machine in machines:
        alone, many = scaled(machine, case, "q8_0"), scaled(machine, replace(case, threads=4), "q8_0")
        assert all(a.tobytes() == b.tobytes() for a, b in zip(alone, many, strict=True))


@pytest.mark.skipif(not SHIM, reason="tests/shim counts graphs")
@pytest.mark.parametrize("machine", ["cuda", "offload:0"])
def test_other_rows_in_each_step_are_one_graph(machine: str, rng: np.random.Generator) -> None:
    from test_cuda import counted  # which is a module of tests for GPUs alone

    case = Case(draw(rng, 70, 2, 24), draw(rng, 70, 2, 24), rng.permutation(70).astype(np.int32), counts=[5, 1, 70, 3, 41, 70])
    before = counted("captures"), counted("graphs")
    rows, _ = scaled(machine, case, "f16")
    assert (counted("captures") - before[0], counted("graphs") - before[1]) == (1, len(case.counts) - 1)
    np.testing.assert_array_equal(rows, expected(case, "f16")[0])
