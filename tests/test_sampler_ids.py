"""Each id that is drawn, against the definition in float64: the same one, unless a sum comes within 1e-6 of where it decides."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from test_sampler import ISAS, Xoroshiro, draw_on

from pykvsmooth._native import lib

NEAR = 1e-6
MAX = np.finfo(np.float32).max
SIZES = [1, 2, 31, 1000, 32000, 32001]
KINDS = ["normal", "sharp", "flat", "ties", "equal", "zeros", "lowest", "subnormal", "huge", "outlier"]
CUTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.3, "top_p": 0.9},
    {"top_p": 0.0},
    {"min_p": 0.05},
    {"top_k": 1},
    {"temperature": 0.8, "top_k": 300, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3},
    {"top_k": 10**9, "top_p": 0.5, "repetition_penalty": 0.4},
    {"temperature": 1e-45},
    {"temperature": 1e-10, "top_p": 0.99},
    {"temperature": 3e38},
    {"temperature": 1e30, "top_k": 700, "repetition_penalty": 1e-38},
    {"temperature": 5.0, "top_p": 0.999, "repetition_penalty": 3e38},
    {"min_p": 1.0, "top_p": 0.7},
]


def make(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(n) * 3
    if kind == "sharp":
        x = x * 4
    elif kind == "flat":
        x = 7 + x * 1e-4
    elif kind == "ties":
        x = np.round(x)
    elif kind == "equal":
        x = np.full(n, rng.uniform(-50, 50))
    elif kind == "zeros":
        x = np.where(rng.random(n) < 0.5, 0.0, -0.0)
    elif kind == "lowest":
        x[rng.random(n) < 0.5] = -MAX
    elif kind == "subnormal":
        x = x * 1e-40
    elif kind == "huge":
        x = rng.uniform(-1, 1, n) * MAX
    elif kind == "outlier":
        x[rng.integers(n)] = 1000
    return x.astype(np.float32)


def penalised(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    out, p = logits.copy(), np.float32(penalty)
    ids = np.unique(seen[(seen >= 0) & (seen < len(out))])
    with np.errstate(over="ignore"):
        out[ids] = np.where(out[ids] > 0, out[ids] / p, out[ids] * p)
    return np.clip(out, -MAX, MAX)


def walks(x: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Candidates in the order in which the draw goes through them, and their weights; several where it is close what a cut leaves."""
    weights = np.exp((x.astype(np.float64) - x.max()) / np.float64(np.float32(temperature)))
    order = np.arange(len(x))
    ordered = 0 < top_k < len(x) or top_p < 1
    if ordered:
        order = np.lexsort((order, -x.astype(np.float64)))[: top_k or len(x)]
    lengths = [len(order)]
    if top_p < 1:
        sums, mass = np.cumsum(weights[order]), np.float64(np.float32(top_p)) * weights[order].sum()
        near = NEAR * sums[-1]
        lengths = sorted({min(int(np.searchsorted(sums, mass + d)) + 1, len(order)) for d in (-near, 0, near)})
    for length in lengths:
        left = order[:length][::-1] if ordered else order
        for least in sorted({np.float32(min_p) * (1 + d) for d in (-NEAR, 0, NEAR)}):
            kept = left[weights[left] >= min(least, 1)]
            yield kept, weights[kept]


def allowed(x: np.ndarray, uniform: float, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    if temperature == 0:
        return {int(x.argmax())}
    ids: set[int] = set()
    for kept, weights in walks(x, temperature, top_k, top_p, min_p):
        sums = np.cumsum(weights)
        first, last = (int(np.searchsorted(sums, (uniform + d) * sums[-1], side="right")) for d in (-NEAR, NEAR))
        ids |= set(kept[first : last + 1].tolist())
    return ids


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_ids(isa: str, kind: str, n: int, rng: np.random.Generator) -> None:
    draws = 4 if isa == "base" or n < 2000 else 2
    for cuts in CUTS:
        logits = make(kind, n, rng)
        seen = rng.integers(-3, n + 3, int(rng.integers(0, 60)))
        seed = int(rng.integers(2**62))
        params = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, **cuts}
        got = draw_on(isa, logits, draws, seed, seen.tolist(), n_top=int(rng.integers(21)), **params)
        assert got.status == lib.KVS_OK
        x, numbers = penalised(logits, seen, params.pop("repetition_penalty")), Xoroshiro(seed)
        for id in got.ids.tolist():
            assert id in allowed(x, numbers.uniform(), **params), cuts
        check_logprobs(logits, got)


def check_logprobs(logits: np.ndarray, got: Any) -> None:
    wide = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        logprobs = (wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())).astype(np.float32)
    order = np.lexsort((np.arange(len(logits)), -wide))[: len(got.top)]
    assert [id for id, _ in got.top] == order.tolist()
    near = {"rtol": 1e-6, "atol": 1e-6 + 1e-15 * np.abs(wide.max())}  # the CPU adds the logarithm to the best logit
    np.testing.assert_allclose([value for _, value in got.top], logprobs[order], **near)
    np.testing.assert_allclose(got.logprob, logprobs[got.ids[-1]], **near)


@pytest.mark.skipif("cuda" not in ISAS, reason="no device")
def test_a_device_draws_the_same_again(rng: np.random.Generator) -> None:
    """Not a bit depends on the order in which threads come."""
    logits = make("normal", 5000, rng)
    params = {"top_p": 0.95, "min_p": 0.001, "n_top": 20, "repetition_penalty": 1.2}
    first, again = (draw_on("cuda", logits, 20, 3, range(100), **params) for _ in range(2))
    assert first.ids.tolist() == again.ids.tolist() and first.top == again.top and first.logprob == again.logprob
