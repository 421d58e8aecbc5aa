"""Numbers that are not finite: an error that says where they began, and a session that is as it was."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from answers import SMOOTH, ids
from devices import KERNEL_SETS

import pykvsmooth as kvs
from pykvsmooth._native import ffi, lib
from pykvsmooth.generation import Generation
from pykvsmooth.session import step

BAD = 300  # the token that spoils everything
CHANNEL = 5  # of the residual stream: other tokens have nothing there
N_LAYER = 4
PROMPT = [1, 265, 270, 290, 310]


def tensor(path: str, name: str, kind: Any = np.float32) -> np.ndarray:
    """The data of a tensor in its file, to write into; blocks of a quantized one as (rows, blocks, bytes)."""
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    if kind is np.float32:
        return np.memmap(path, np.float32, "r+", found.data_offset, tuple(found.shape[::-1]))
    size, n_bytes = gguf.GGML_QUANT_SIZES[found.tensor_type]
    return np.memmap(path, np.uint8, "r+", found.data_offset, (int(found.shape[1]), int(found.shape[0]) // size, n_bytes))


def feed_fails(path: str, where: str, kv_type: str = "f16") -> kvs.NumericError:
    with kvs.Model(path, mmproj=False) as model, model.session(n_ctx=64, kv_type=kv_type) as session:
        with pytest.raises(kvs.NumericError) as caught:
            session.feed(PROMPT)
        assert session.n_past == 0 and caught.value.what == where and str(caught.value).startswith(where + ": ")
        return caught.value


# ---- the op ----


@pytest.mark.parametrize("cols", [1, 2, 7, 8, 15, 16, 17, 31, 33, 100, 255, 4096])
def test_the_first_bad_row_is_found(isas: list[str], rng: np.random.Generator, cols: int) -> None:
    limit = 65504.0
    for isa in isas:
        for n in (1, 2, 37):
            x = rng.standard_normal((n, cols)).astype(np.float32)
            x.flat[rng.integers(x.size)] = -limit  # what may just be
            row, value = ffi.new("int32_t *", -1), ffi.new("float *")
            test = [isa.encode(), int(rng.integers(1, 4)), ffi.from_buffer("float[]", x), n, cols, limit, row, value]
            assert lib.kvs_test_finite(*test) == 0
            for bad in (np.nan, np.inf, -np.inf, 65505.0, -1e30):
                spoilt = np.unique(rng.integers(0, x.size, 3))
                kept, x.flat[spoilt] = x.flat[spoilt].copy(), bad
                beyond = ~(np.abs(x) <= limit)
                assert lib.kvs_test_finite(*test) == lib.KVS_E_NUMERIC
                assert row[0] == np.flatnonzero(beyond.any(axis=1))[0]
                np.testing.assert_equal(np.float32(value[0]), np.float32(bad))
                x.flat[spoilt] = kept


# ---- weights ----

PARTS = {"attn_q": "", "attn_k": ", its keys", "attn_v": ", its values", "attn_output": "", "ffn_gate": "", "ffn_up": "", "ffn_down": ""}


@pytest.mark.parametrize("isa", KERNEL_SETS)
@pytest.mark.parametrize("layer", range(N_LAYER))
def test_weights_of_a_layer(layer: int, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVS_CPU", isa)
    path, _, _ = tiny.write_pair(tmp_path, seed=layer, vision=False, load=False)
    for (part, where), bad in zip(PARTS.items(), itertools.cycle((np.nan, np.inf, 3e38)), strict=False):
        weights = tensor(path, f"blk.{layer}.{part}.weight")
        kept, weights[3:5] = weights[3:5].copy(), bad
        error = feed_fails(path, f"layer {layer + 1} of {N_LAYER} (blk.{layer}){where}", "f32")
        assert "weights there are not finite" in str(error)
        weights[3:5] = kept


@pytest.mark.parametrize("isa", KERNEL_SETS)
@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q4_k", "q6_k", "iq4_nl"])
def test_a_scale_of_a_quantized_tensor(kind: str, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVS_CPU", isa)
    shape = {"n_embd": 256, "n_ff": 512, "n_layer": 2}
    path, _, _ = tiny.write_pair(tmp_path, seed=3, vision=False, load=False, type=kind, **shape)
    at = 208 if kind == "q6_k" else 0
    for name, where in (
        ("blk.1.attn_v", "layer 2 of 2 (blk.1), its values"),
        ("blk.0.ffn_down", "layer 1 of 2 (blk.0)"),
        ("output", "the output"),
        ("token_embd", "the embedding of token 270"),
    ):
        blocks = tensor(path, name + ".weight", np.uint8)
        scale = blocks[270 if name == "token_embd" else 7, -1, at : at + 2]
        kept, scale[:] = scale.copy(), np.array([np.inf if name == "output" else np.nan], np.float16).view(np.uint8)
        feed_fails(path, where)
        scale[:] = kept


def test_norms_and_rows_that_overflow(tmp_path: Path) -> None:
    """Finite numbers, but too large: also those whose squares are not, which a norm would turn into a row of zeros and id 0."""
    path, _, _ = tiny.write_pair(tmp_path, seed=5, vision=False, load=False)
    for name, where, value in (
        ("blk.2.attn_norm", "layer 3 of 4 (blk.2), its keys", 3e38),
        ("blk.1.ffn_norm", "layer 2 of 4 (blk.1)", 1e20),
        ("output_norm", "the output", 3e38),
        ("output", "the output", 3e38),
        ("token_embd", "the embedding of token 1", 1e18),
    ):
        weights = tensor(path, name + ".weight")
        kept, weights[:] = weights.copy(), value
        feed_fails(path, where, "f32")
        weights[:] = kept


def test_the_vision_tower(tmp_path: Path, rng: np.random.Generator) -> None:
    text, mmproj, _ = tiny.write_pair(tmp_path, seed=6, load=False)
    picture = rng.integers(0, 256, (56, 56, 3), np.uint8)
    for name, where in (
        ("v.patch_embd.weight", "the embedding of the vision tower"),
        ("v.position_embd.weight", "the embedding of the vision tower"),
        ("v.blk.0.attn_q.weight", "block 1 of 2 of the vision tower (v.blk.0)"),
        ("v.blk.1.ffn_down.weight", "block 2 of 2 of the vision tower (v.blk.1)"),
        ("mm.0.weight", "the picture's rows behind the projector (mm)"),
        ("mm.2.weight", "the picture's rows behind the projector (mm)"),
    ):
        weights = tensor(mmproj, name)
        kept, weights[-1] = weights[-1].copy(), np.nan
        with kvs.Model(text, mmproj=mmproj) as model, model.session(n_ctx=64) as session:
            for call in (lambda m=model: m.encode_image(picture), lambda s=session: s.feed_image(picture)):
                with pytest.raises(kvs.NumericError) as caught:
                    call()
                assert caught.value.what == where and session.n_past == 0
        weights[-1] = kept


def test_embeddings_of_the_caller(model: kvs.Model) -> None:
    """Finite, as feed_embeddings() asks, but beyond what a norm can square; and what C callers may give."""
    rows = np.ones((3, model.n_embd), np.float32)
    with model.session(n_ctx=64) as session:
        session.feed([1, 270])
        rows[2, 1] = 1e30
        with pytest.raises(kvs.NumericError, match=r"embeddings given for row 4: 1e[+]30"):
            session.feed_embeddings(rows)
        rows[2, 1] = np.nan
        chunk = ffi.new("kvs_chunk *", {"embd": ffi.from_buffer("float[]", rows), "n": 3, "hash": 1})
        with session._handle as pointer:
            assert lib.kvs_session_feed(pointer, chunk, 1, ffi.NULL, ffi.NULL) == lib.KVS_E_NUMERIC
        assert session.n_past == 2 and np.isfinite(session.logits()).all()


# ---- a session goes on ----

SPOILERS = {
    "embedding": ("token_embd.weight", np.nan, "f16", f"the embedding of token {BAD}"),
    "keys in F16": ("blk.1.attn_k.weight", 1e6, "f16", "layer 2 of 4 (blk.1), its keys"),
    "values in F16": ("blk.3.attn_v.weight", 1e6, "f16", "layer 4 of 4 (blk.3), its values"),
    "values in Q8_0": ("blk.2.attn_v.weight", 1e8, "q8_0", "layer 3 of 4 (blk.2), its values"),
    "keys in F32": ("blk.0.attn_k.weight", 3e38, "f32", "layer 1 of 4 (blk.0), its keys"),
    "queries": ("blk.2.attn_q.weight", 3e38, "f16", "layer 3 of 4 (blk.2)"),
    "feed-forward": ("blk.3.ffn_up.weight", 3e38, "f32", "layer 4 of 4 (blk.3)"),
    "output": ("output.weight", 3e38, "q8_0", "the output"),
}


def spoil(path: str, name: str, value: float) -> None:
    """A channel that only BAD has: weights as large as value do nothing to other tokens."""
    embedding = tensor(path, "token_embd.weight")
    embedding[:, CHANNEL] = 0
    embedding[BAD, CHANNEL] = value if name.startswith("token_embd") else 1e4
    if name.startswith("token_embd"):
        return
    for layer in range(N_LAYER):
        for part in ("attn_output", "ffn_down"):
            tensor(path, f"blk.{layer}.{part}.weight")[CHANNEL] = 0
    tensor(path, name)[:, CHANNEL] = value


@pytest.fixture(scope="module", params=SPOILERS)
def spoilt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[kvs.Model, str, str]]:
    name, value, kv_type, where = SPOILERS[request.param]
    path, _, _ = tiny.write_pair(tmp_path_factory.mktemp("spoilt"), seed=9, vision=False, load=False)
    spoil(path, name, value)
    with kvs.Model(path, mmproj=False) as model:
        model._end_ids = frozenset()
        yield model, kv_type, where


def state(session: kvs.Session) -> list[np.ndarray]:
    rows = [side for layer in range(session.model.n_layer) for side in session.kv(layer)]
    return [session.logits(), session.entropies(), session.strengths(), *rows]


def test_the_session_is_as_it_was(spoilt: tuple[kvs.Model, str, str], policy: kvs.KVSmooth | None) -> None:
    model, kv_type, where = spoilt
    with model.session(n_ctx=64, kv_type=kv_type, policy=policy) as session:
        session.feed(PROMPT)
        session.feed([280, 285], generated=True)
        with session.fork() as untouched:
            for run, generated in (([BAD], True), ([270, 280, BAD], False), ([BAD], True)):
                with pytest.raises(kvs.NumericError) as caught:
                    session.feed(run, generated=generated)
                assert caught.value.what == where
                assert session.n_past == untouched.n_past
            for one in (session, untouched):
                one.feed([290, 295, 299], generated=True)
                one.feed([301, 302])
                one.feed([303], generated=True)
            for ours, theirs in zip(state(session), state(untouched), strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_a_larger_cache_helps(tmp_path: Path) -> None:
    """As the error says."""
    path, _, _ = tiny.write_pair(tmp_path, seed=9, vision=False, load=False)
    spoil(path, "blk.1.attn_k.weight", 1e6)
    with kvs.Model(path, mmproj=False) as model:
        with model.session(n_ctx=64) as session, pytest.raises(kvs.NumericError, match=r"more than this cache can hold; .*f32"):
            session.feed([BAD])
        with model.session(n_ctx=64, kv_type="f32") as session:
            session.feed([BAD])
            assert np.isfinite(session.logits()).all()


def test_one_of_a_joint_step(spoilt: tuple[kvs.Model, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The step changes no session; a batch lets the others go on, each with the ids that it has alone."""
    model, kv_type, where = spoilt
    sessions = [model.session(n_ctx=64, kv_type=kv_type, policy=SMOOTH) for _ in range(3)]
    for session in sessions:
        session.feed(PROMPT)
    with pytest.raises(kvs.NumericError) as caught:
        step([session._handle.cell[0] for session in sessions], [280, BAD, 290], kvs._native.Flag())
    assert caught.value.what == where and [session.n_past for session in sessions] == [len(PROMPT)] * 3
    for session in sessions:
        session.close()

    real, calls = Generation.after_sample, dict[Generation, int]()
    prompts = ["the dog", "a cat", "on the table"]

    def after_sample(self: Generation, pointer: Any, seconds: float) -> int | None:
        calls[self] = calls.get(self, 0) + 1
        return BAD if list(calls).index(self) == 1 and calls[self] == 2 else real(self, pointer, seconds)

    options: dict[str, Any] = {"n_ctx": 64, "kv_type": kv_type, "max_tokens": 5, "template": None}
    alone = [model.generate_batch([prompt], **options) for prompt in prompts]
    expected = [next(ids(item) for _, item in batch if isinstance(item, kvs.Result)) for batch in alone]
    monkeypatch.setattr(Generation, "after_sample", after_sample)
    ends = {
        i: item for i, item in model.generate_batch(prompts, parallel=3, on_error="yield", **options) if not isinstance(item, kvs.Token)
    }
    assert isinstance(ends[1], kvs.NumericError) and ends[1].what == where
    assert [ids(ends[0]), ids(ends[2])] == [expected[0], expected[2]]
