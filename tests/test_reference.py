"""The reference itself: against golden data of Hugging Face transformers, and against identities of the formulas."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
from reference import KVSmooth, Session, greedy, load_clip, load_text
from reference.llama import STORES, rotate, row_entropy, softmax

GOLDEN = {
    "base": None,
    "kvs": {},
    "kvs_denom_max": {"lambda_den": "capacity"},
    "kvs_ref05": {"lambda_ref": 0.5},
    "fixed05": {"mode": "fixed", "lambda_fixed": 0.5},
}


def half_split(k: np.ndarray) -> np.ndarray:
    """K as GGUF files order it (pairs side by side) -> as transformers does (two halves)"""
    return np.concatenate([k[..., 0::2], k[..., 1::2]], -1)


@pytest.mark.parametrize("mmproj", ["mmproj-f32.gguf", "mmproj-legacy-f32.gguf"])
def test_clip_equals_transformers(shared_data: Path, mmproj: str) -> None:
    golden = np.load(shared_data / "golden-tiny" / "golden.npz")
    rows = load_clip(shared_data / "golden-tiny" / mmproj).encode(golden["pixel_values"][0])
    assert np.abs(rows - golden["image_embeds"]).max() < 1e-5


@pytest.mark.parametrize("run", GOLDEN)
def test_llama_and_kvsmooth_equal_transformers(shared_data: Path, run: str) -> None:
    folder = shared_data / "golden-tiny"
    golden, meta = np.load(folder / "golden.npz"), json.loads((folder / "meta.json").read_text())
    policy = None if GOLDEN[run] is None else KVSmooth(layers=meta["layers"], **GOLDEN[run])
    session = Session(load_text(folder / "text-f32.gguf"), policy)
    session.feed(meta["ids_before_image"])
    session.feed(golden["image_embeds"])
    session.feed(meta["ids_after_image"])
    tokens, logits = greedy(session, meta["n_new"])
    assert tokens == golden[f"{run}.tokens"].tolist()
    strengths = golden[f"{run}.lam"] if policy else np.full_like(golden[f"{run}.lam"], np.nan)
    np.testing.assert_allclose(session.strengths(), strengths, rtol=0, atol=1e-12)
    np.testing.assert_allclose(session.entropies(), golden[f"{run}.z"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits, golden[f"{run}.logits"], rtol=0, atol=1e-4)
    if f"{run}.K" in golden:
        k, v = (np.array(side) for side in zip(*(session.kv(i) for i in range(session.text.n_layer)), strict=True))
        np.testing.assert_allclose(half_split(k), golden[f"{run}.K"], rtol=0, atol=5e-5)
        np.testing.assert_allclose(v, golden[f"{run}.V"], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("lambda_ref", "expected"),
    [
        (0.9, [0.7] * 11 + [11 / 15, 12 / 15, 13 / 15, 14 / 15]),
        (0.5, [0.3] * 5 + [5 / 15, 6 / 15, 7 / 15, 8 / 15, 9 / 15, 10 / 15] + [0.7] * 4),
        (0.7, [0.5] * 8 + [8 / 15, 9 / 15, 10 / 15, 11 / 15, 12 / 15, 13 / 15] + [0.9]),
    ],
)
def test_strengths_of_a_full_queue(lambda_ref: float, expected: list[float], rng: np.random.Generator) -> None:
    """Every rank 0..14, whatever the order of the older entries"""
    for rank, lam in enumerate(expected):
        older = rng.permutation([*np.arange(rank), *np.arange(rank + 1, 15)])
        assert KVSmooth(lambda_ref=lambda_ref).strength([*older, rank], 0, 0) == pytest.approx(lam, abs=1e-12)


def test_strength_switches() -> None:
    assert KVSmooth(lambda_ref=0.5, half_width=0.5).strength([1.0, 3.0, 2.0], 0, 0) == pytest.approx(1 / 3)
    assert KVSmooth(lambda_ref=0.5, half_width=0.5, lambda_den="capacity").strength([1.0, 3.0, 2.0], 0, 0) == pytest.approx(1 / 15)
    assert KVSmooth(lambda_ref=0.5, half_width=0.5).strength([2.0, 3.0, 2.0], 0, 0) == 0.0
    assert KVSmooth(lambda_ref=0.5, half_width=0.5, rank_ties="midrank").strength([2.0, 3.0, 2.0], 0, 0) == pytest.approx(1 / 6)
    assert KVSmooth(mode="fixed", lambda_fixed=0.95, lambda_max=0.8).strength([1.0], 0, 0) == 0.95
    assert KVSmooth(lambda_ref=1.0, lambda_max=0.75).strength([1.0, 2.0], 0, 0) == 0.75
    assert KVSmooth(layers="3:-1").layer_set(32) == set(range(3, 31))
    assert KVSmooth(layers=[0, -1]).layer_set(4) == {0, 3}


def test_relative_mode_equals_smoothing_before_rope(rng: np.random.Generator, tmp_path: Path) -> None:
    """Turned back to no position, smoothed rows are what smoothing before RoPE gives."""
    _, _, weights = tiny.write_pair(tmp_path, seed=int(rng.integers(1 << 30)), vision=False)
    session = Session(weights.text, KVSmooth(layers=[1, 2, 3], rope_mode="relative"))
    session.feed(rng.integers(3, 259, 12))
    session.feed(rng.integers(3, 259, 20), generated=True)
    at, inv_freq = np.arange(session.n_past), weights.text.inv_freq
    for layer in (1, 2, 3):
        cache = session.layers[layer]
        before_rope = rotate(cache.raw_k, -at, inv_freq)
        for row, generated in enumerate(session.generated):
            if generated:
                lam = cache.strength[row][0]
                before_rope[row] = (1 - lam) * before_rope[row] + lam * before_rope[row - 1]
        np.testing.assert_allclose(cache.k, rotate(before_rope, at, inv_freq), atol=1e-5)


def test_entropy_leaves_the_own_key_out(rng: np.random.Generator) -> None:
    scores = rng.normal(size=(3, 9))
    np.testing.assert_allclose(row_entropy(softmax(scores), True), row_entropy(softmax(scores[:, :-1]), False), atol=1e-12)
    assert row_entropy(np.ones((1, 1)), True) == 0.0
    assert row_entropy(np.full((1, 8), 1 / 8), False) == pytest.approx(np.log(8))


def test_q8_0_rows_lose_less_than_those_of_the_gguf_package(rng: np.random.Generator) -> None:
    rows = rng.normal(size=(50, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
    ours = STORES["q8_0"](rows.astype(np.float64))
    assert np.abs(ours - packed).max() < np.abs(rows).max() / 100
    assert ((ours - rows) ** 2).mean() <= ((packed - rows) ** 2).mean()


@pytest.mark.parametrize(
    "kind", ["f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"]
)
def test_tiny_pairs_hold_the_type_they_are_asked_for(rng: np.random.Generator, tmp_path: Path, kind: str) -> None:
    text, _, _ = tiny.write_pair(
        tmp_path, seed=int(rng.integers(1 << 30)), n_embd=256, n_ff=256, n_layer=1, type=kind, vision=False, load=False
    )
    tensors = {t.name: t for t in gguf.GGUFReader(text).tensors}
    assert tensors["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType[kind.upper()]
    values = gguf.quants.dequantize(tensors["blk.0.ffn_down.weight"].data, tensors["blk.0.ffn_down.weight"].tensor_type)
    assert values.std() == pytest.approx(0.1, rel=0.05)
    assert abs(values.mean()) < 0.01
