"""The sampler against its definition in NumPy, on the CPU and on the device "cuda" where it can be had: cut sets exactly, distributions by
chi-square, random numbers bit for bit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np
import pytest

from pykvsmooth._native import ffi, lib

MASK = (1 << 64) - 1
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "n_top": 0}


@dataclass
class Drawn:
    status: int
    ids: np.ndarray
    logprob: float = 0.0
    top: list[tuple[int, float]] = field(default_factory=list)
    bad: tuple[int, int] = (0, 0)  # if the status says that there are some: the first and how many


def draw_on(isa: str, logits: np.ndarray, draws: int = 1, seed: int = 0, seen: Sequence[int] = (), **params: float) -> Drawn:
    """Draws from one row; isa "base" is the CPU. On the device fewer of many: over tests/shim one takes milliseconds."""
    draws = draws if isa == "base" else min(draws, 200)
    logits, ids, last = np.ascontiguousarray(logits, np.float32), np.zeros(draws, np.int32), ffi.new("kvs_sample *")
    sampling = ffi.new("kvs_sampling *", {"struct_size": ffi.sizeof("kvs_sampling"), **OFF, **params})
    pointer = ffi.from_buffer("float[]", logits)
    status = lib.kvs_test_sample(
        isa.encode(),
        pointer,
        len(logits),
        ffi.new("int32_t[]", list(seen)),
        len(seen),
        sampling,
        seed,
        draws,
        ffi.from_buffer("int32_t[]", ids),
        last,
    )
    n_top = 0 if status else last.n_top
    return Drawn(status, ids, last.logprob, [(last.top_ids[i], last.top_logprobs[i]) for i in range(n_top)], (last.id, last.n_top))


Draw: TypeAlias = Callable[..., Drawn]


ISAS = [name for name in ("base", "cuda") if lib.kvs_test_isa(name.encode())]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def draw(isa: str) -> Draw:
    return partial(draw_on, isa)


def scores(logits: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    out = np.array(logits, np.float32)
    ids = [i for i in set(seen) if 0 <= i < len(out)]
    out[ids] = np.where(out[ids] > 0, out[ids] / np.float32(penalty), out[ids] * np.float32(penalty))
    return out


def distribution(
    logits: np.ndarray, seen: Sequence[int], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> np.ndarray:
    """Probabilities of all ids, 0 where they are cut: penalty, temperature, top-k, top-p, min-p."""
    x = scores(logits, seen, penalty).astype(np.float64) / np.float32(temperature)
    order = np.lexsort((np.arange(len(x)), -x))[: top_k or len(x)]
    p = np.exp(x[order] - x.max())
    p /= p.sum()
    kept = np.concatenate([[True], np.cumsum(p)[:-1] < np.float32(top_p)]) & (p >= np.float32(min_p) * p[0])
    out = np.zeros(len(x))
    out[order[kept]] = p[kept] / p[kept].sum()
    return out


def check_counts(ids: np.ndarray, p: np.ndarray) -> None:
    """Chi-square far beyond chance: a fair sampler fails once in some ten million runs."""
    counts, n = np.bincount(ids, minlength=len(p)), len(ids)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(p)), "an id that was cut came up"
    assert (counts[p * n > 40] > 0).all(), "an id that was not cut never came up"
    big = p * n >= 10
    observed = np.append(counts[big], counts[~big].sum())
    expected = np.append(p[big], p[~big].sum()) * n
    observed, expected = observed[expected > 1], expected[expected > 1]
    chi2, dof = ((observed - expected) ** 2 / expected).sum(), max(len(expected) - 1, 1)
    assert chi2 < dof + 8 * np.sqrt(2 * dof) + 25


class Xoroshiro:
    """xoroshiro128++ seeded through splitmix64, from its published definition."""

    def __init__(self, seed: int) -> None:
        self.state = [self.mix((seed + i * 0x9E3779B97F4A7C15) & MASK) for i in (1, 2)]

    @staticmethod
    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
        return z ^ (z >> 31)

    def uniform(self) -> float:
        def rotate(x: int, n: int) -> int:
            return (x << n | x >> (64 - n)) & MASK

        a, b = self.state
        result = (rotate((a + b) & MASK, 17) + a) & MASK
        b ^= a
        self.state = [rotate(a, 49) ^ b ^ (b << 21 & MASK), rotate(b, 28)]
        return (result >> 11) / (1 << 53)


def test_splitmix_published_values() -> None:
    assert Xoroshiro(0).state == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@pytest.mark.parametrize("seed", [0, 1, 2**63, MASK])
def test_random_numbers_bit_for_bit(isa: str, draw: Draw, rng: np.random.Generator, seed: int) -> None:
    logits = rng.uniform(-3, 3, 50).astype(np.float32)
    edges = np.cumsum(distribution(logits, [], 1.0, 0, 1.0, 0.0, 1.0))
    reference = Xoroshiro(seed)
    got = draw(logits, 1000, seed).ids
    uniforms = np.array([reference.uniform() for _ in got])
    sure = np.abs(uniforms[:, None] - edges).min(axis=1) > (1e-12 if isa == "base" else 1e-6)  # else the last bit of exp decides
    want = np.searchsorted(edges, uniforms, side="right")
    np.testing.assert_array_equal(got[sure], want[sure])


def test_distributions_and_cuts(isa: str, draw: Draw, rng: np.random.Generator) -> None:
    for _ in range(40 if isa == "base" else 6):
        n = int(rng.integers(1, 30))
        logits = rng.uniform(-2, 2, n).astype(np.float32)
        if rng.random() < 0.3:
            logits = np.round(logits)  # ties
        temperature = float(np.float32(rng.uniform(0.8, 2)))
        top_k = int(rng.choice([0, 1, rng.integers(1, 40)]))
        top_p, min_p = float(rng.choice([1.0, rng.uniform(0.05, 1)])), float(rng.choice([0.0, rng.uniform(0, 0.9)]))
        penalty, seen = float(rng.choice([1.0, rng.uniform(0.5, 2)])), rng.integers(-3, n + 5, int(rng.integers(0, 40))).tolist()
        p = distribution(logits, seen, temperature, top_k, top_p, min_p, penalty)
        drawn = draw(
            logits,
            20000,
            int(rng.integers(2**62)),
            seen,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=penalty,
        )
        assert drawn.status == lib.KVS_OK
        check_counts(drawn.ids, p)


def test_top_p_is_the_smallest_set(draw: Draw) -> None:
    logits = np.log([0.5, 0.25, 0.125, 0.0625, 0.0625])
    for top_p, size in [(0.0, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.9, 4), (0.95, 5), (1.0, 5)]:
        assert set(draw(logits, 5000, top_p=top_p).ids) == set(range(size)), top_p


def test_top_p_counts_what_top_k_left(draw: Draw) -> None:
    logits = np.log([0.4, 0.2, 0.2, 0.2])
    assert set(draw(logits, 2000, top_k=2, top_p=0.6).ids) == {0}  # 0.4 of 0.6 is two thirds
    assert set(draw(logits, 2000, top_p=0.5).ids) == {0, 1}
    assert set(draw(logits, 2000, top_p=0.7).ids) == {0, 1, 2}


def test_min_p_is_relative_to_the_best(draw: Draw) -> None:
    logits = np.log([0.6, 0.25, 0.1, 0.05])
    assert set(draw(logits, 5000, min_p=0.4).ids) == {0, 1}
    assert set(draw(logits, 5000, min_p=0.15).ids) == {0, 1, 2}
    assert set(draw(logits, 500, min_p=1.0).ids) == {0}


def test_greedy(draw: Draw, rng: np.random.Generator) -> None:
    for _ in range(50):
        n = int(rng.integers(1, 2000))
        logits = rng.standard_normal(n).astype(np.float32)
        seen = rng.integers(0, n, int(rng.integers(0, 50))).tolist()
        penalty = float(rng.uniform(0.5, 3))
        got = draw(logits, seen=seen, temperature=0, repetition_penalty=penalty).ids[0]
        assert got == scores(logits, seen, penalty).argmax()
        assert draw(logits, temperature=0).ids[0] == draw(logits, temperature=1, top_k=1).ids[0] == logits.argmax()


def test_first_of_equal_maxima(draw: Draw) -> None:
    logits = np.array([1, 5, 2, 5, 5], np.float32)
    assert draw(logits, temperature=0).ids[0] == 1
    assert set(draw(logits, 100, top_k=1).ids) == {1}
    assert draw(logits, seen=[1, 1, -1, 7], temperature=0, repetition_penalty=1.5).ids[0] == 3


def test_logprobs_are_of_the_raw_logits(draw: Draw, rng: np.random.Generator) -> None:
    for n, n_top in [(1, 20), (7, 3), (7, 20), (5000, 20)]:
        logits = np.round(rng.standard_normal(n) * 4, 1).astype(np.float32) + 1000
        x = logits.astype(np.float64)
        logprobs = x - x.max() - np.log(np.exp(x - x.max()).sum())
        got = draw(logits, seen=range(n), temperature=0.3, top_k=5, repetition_penalty=1.7, n_top=n_top)
        order = np.lexsort((np.arange(n), -x))[:n_top]
        assert [i for i, _ in got.top] == order.tolist()
        np.testing.assert_allclose([v for _, v in got.top], logprobs[order], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got.logprob, logprobs[got.ids[0]], rtol=1e-6, atol=1e-6)


def test_seed_decides(draw: Draw, rng: np.random.Generator) -> None:
    logits = rng.standard_normal(300)
    first = draw(logits, 200, 7, top_p=0.9)
    np.testing.assert_array_equal(first.ids, draw(logits, 200, 7, top_p=0.9).ids)
    assert (first.ids != draw(logits, 200, 8, top_p=0.9).ids).any()


def test_logits_stay_untouched(draw: Draw, rng: np.random.Generator) -> None:
    logits = rng.standard_normal(100).astype(np.float32)
    before = logits.copy()
    draw(logits, 10, seen=range(50), top_k=10, top_p=0.5, repetition_penalty=2.0)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(draw: Draw, rng: np.random.Generator, bad: float) -> None:
    logits = rng.standard_normal(3000).astype(np.float32)
    places = rng.choice(3000, int(rng.integers(1, 40)), replace=False)
    logits[places] = bad
    for params in ({"temperature": 0}, {}, {"top_k": 5, "top_p": 0.5, "n_top": 3, "repetition_penalty": 1.5}):
        got = draw(logits, seen=range(50), **params)
        assert got.status == lib.KVS_E_NUMERIC and got.bad == (places.min(), len(places))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, np.nan, np.inf]),
        ("top_k", [-1]),
        ("top_p", [-0.1, 1.1, np.nan]),
        ("min_p", [-0.1, 1.1, np.nan]),
        ("repetition_penalty", [0.0, -1.0, np.nan, np.inf]),
        ("n_top", [-1, 21]),
    ],
)
def test_parameters_out_of_range(draw: Draw, name: str, values: list[float]) -> None:
    for value in values:
        assert draw(np.zeros(5), **{name: value}).status == lib.KVS_E_ARGUMENT, value


def test_extreme_values(draw: Draw) -> None:
    """No overflow on the way makes an id that should never come up."""
    logits = np.array([3e38, -3e38, 1, 3.3e38, -1e-45], np.float32)
    for temperature in (1e-45, 1e-10, 1.0, 3e38):
        for penalty in (1e-38, 1.0, 3e38):
            got = draw(logits, 50, seen=[0, 1, 2], temperature=temperature, repetition_penalty=penalty, n_top=5)
            assert got.status == lib.KVS_OK
            assert np.isfinite(got.logprob) and ((got.ids >= 0) & (got.ids < 5)).all()
    assert set(draw(logits, 50, temperature=1.0).ids) == {3}


def test_large_vocabulary(isa: str, draw: Draw, rng: np.random.Generator) -> None:
    logits = (rng.standard_normal(200_000) * 3).astype(np.float32)
    for params in ({"top_k": 50}, {"top_p": 0.3}, {"min_p": 0.2}, {"top_k": 1000, "top_p": 0.5, "min_p": 0.1}):
        p = distribution(logits, [], 1.0, params.get("top_k", 0), params.get("top_p", 1.0), params.get("min_p", 0.0), 1.0)
        ids = draw(logits, 50 if isa == "base" else 5, int(rng.integers(2**62)), **params).ids
        assert (p[ids] > 0).all(), params
