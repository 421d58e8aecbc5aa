"""native/cuda/fuse.cu: steps of few rows in fewer launches give the same bits as op by op, whatever the types, the cache, the policies
and the number of sessions are. Needs a GPU or tests/shim; how many launches a token takes is counted by the shim."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_cuda import SHIM, counted
from test_offload import equal, sample
from twins import picture, step_together, tokens

import pykvsmooth as kvs

N_LAYER = 3
SHAPES: dict[str, dict[str, Any]] = {
    "q4_k": {"type": "q4_k", "types": {"attn_v": "q6_k", "ffn_down": "q6_k"}},
    "q8_0": {"type": "q8_0"},
    "f16": {"type": "f16"},
    "f32": {"type": "f32"},
    "mixed": {"type": "q5_k", "types": {"attn_k": "f16", "ffn_up": "q3_k", "attn_output": "f32"}},  # integers and floats of the same rows
    "biases": {"type": "q4_0", "biases": True, "n_rot": 32},
    "wide": {"type": "q8_0", "n_embd": 1056, "n_head": 11, "n_head_kv": 11, "n_ff": 1088},  # several warps a row, rests of tiles
    "odd": {"type": "f16", "n_embd": 90, "n_head": 3, "n_head_kv": 1, "n_ff": 101, "head_dim": 34},
}
WIDE = {"n_embd": 256, "n_head": 4, "n_head_kv": 2, "n_ff": 512}
POLICIES: dict[str, Any] = {
    "plain": None,
    "kvsmooth": kvs.KVSmooth(layers="1:", lambda_ref=0.6),
    "outputs": kvs.KVSmooth(layers="0:", lambda_ref=0.6, target="o", rope_mode="post"),
    "all": [
        kvs.DSCR(layers="0:", coord_norm="patch", phase="in_layer"),
        kvs.KVSmooth(layers="1:2", lambda_ref=0.6, smooth_prompt="last_token"),
        kvs.PruneHal(keep=0.5, index_scope="kv_head"),
    ],
}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp(request.param)
    text, mmproj, _ = tiny.write_pair(folder, seed=11, load=False, n_layer=N_LAYER, **{**WIDE, **SHAPES[request.param]})
    return text, str(mmproj)


def load(pair: tuple[str, str]) -> kvs.Model:
    model = kvs.Model(pair[0], mmproj=pair[1], device="cuda")
    model._end_ids = frozenset()
    return model


@pytest.fixture
def models(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """run(f): what f(model) gives op by op, and fused. Each has a model, and so graphs, of its own."""

    def run(work: Any) -> tuple[Any, Any]:
        found = []
        for fuse in ("0", "1"):
            monkeypatch.setenv("KVS_CUDA_FUSE", fuse)
            with load(pair) as model:
                found.append(work(model))
        return found[0], found[1]

    return run


def state(session: kvs.Session, n_layer: int = N_LAYER) -> dict[str, np.ndarray]:
    seen = {"logits": session.logits(), "entropies": session.entropies(), "strengths": session.strengths()}
    for layer in range(n_layer):
        seen[f"k{layer}"], seen[f"v{layer}"] = session.kv(layer)
    return seen


@pytest.mark.parametrize(("name", "kv_type"), [("plain", "f16"), ("kvsmooth", "q8_0"), ("outputs", "f32"), ("all", "f16")])
def test_an_answer(models: Any, name: str, kv_type: kvs.session.KVType, rng: np.random.Generator, request: pytest.FixtureRequest) -> None:
    """A picture, a short question (a step of few rows, too), an answer."""
    if request.node.callspec.params["pair"] == "wide" and name in ("outputs", "all"):
        pytest.skip("large")
    image, ids, answer = picture(rng), tokens(rng, 40), tokens(rng, 4 if request.node.callspec.params["pair"] == "wide" else 12)

    def work(model: kvs.Model) -> list[dict[str, np.ndarray]]:
        with model.session(n_ctx=128, kv_type=kv_type, policy=POLICIES[name]) as session:
            session.feed(ids[:30])
            session.feed_image(image)
            session.feed(ids[30:])
            states = [state(session)]
            for id in answer:
                session.feed([id], generated=True)
            return [*states, state(session)]

    for plain, fused in zip(*models(work), strict=True):
        equal(plain, fused)


@pytest.mark.parametrize("n", [2, 3, 7, 16])
def test_sessions_that_step_together(models: Any, n: int, rng: np.random.Generator, request: pytest.FixtureRequest) -> None:
    """Of different lengths, types of cache and policies."""
    if n not in {"wide": [3], "f32": [3, 16], "f16": [3, 16]}.get(request.node.callspec.params["pair"], [n]):
        pytest.skip("large")
    prompts = [tokens(rng, int(rng.integers(2, 20))) for _ in range(n)]
    kinds = [("f16", "f32", "q8_0")[i % 3] for i in range(n)]
    policies = [("plain", "kvsmooth", "outputs")[i // 2 % 3] for i in range(n)]
    steps = [tokens(rng, n) for _ in range(4)]

    def work(model: kvs.Model) -> list[Any]:
        with ExitStack() as held:
            sessions = [
                held.enter_context(model.session(n_ctx=64, kv_type=kind, policy=POLICIES[policy]))
                for kind, policy in zip(kinds, policies, strict=True)
            ]
            for session, prompt in zip(sessions, prompts, strict=True):
                session.feed(prompt)
            for ids in steps:
                step_together(sessions, ids)
            return [*map(state, sessions), {"drawn": np.array([sample(session) for session in sessions])}]

    for plain, fused in zip(*models(work), strict=True):
        equal(plain, fused)


@pytest.mark.parametrize("where", ["blk.1.attn_k.weight", "blk.1.attn_v.weight", "blk.2.ffn_down.weight"])
def test_what_is_not_finite_is_found_at_the_same_place(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng) -> None:
    """Keys and values beyond what the cache holds, and sums: the error names layer and row."""
    prompt, messages = tokens(rng, 3), []
    text, mmproj, _ = tiny.write_pair(tmp_path, seed=5, load=False, n_layer=N_LAYER, **WIDE)
    _scale(Path(text), where, 1e30 if "down" in where else 1e8)
    for fuse in ("0", "1"):
        monkeypatch.setenv("KVS_CUDA_FUSE", fuse)
        with load((text, str(mmproj))) as model, model.session(n_ctx=64) as session:
            with pytest.raises(kvs.NumericError) as caught:
                session.feed(prompt)
            messages.append(str(caught.value))
    assert messages[0] == messages[1] and "layer" in messages[0]


def _scale(path: Path, name: str, factor: float) -> None:
    import gguf

    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    values = np.memmap(path, np.float32, "r+", offset=tensor.data_offset, shape=(int(tensor.n_elements),))
    values *= np.float32(factor)
    values.flush()


@pytest.mark.parametrize("policy", ["plain", "kvsmooth"])
def test_how_many_launches_a_token_takes(
    pair: tuple[str, str], policy: str, request: pytest.FixtureRequest, rng: np.random.Generator
) -> None:
    """Ten for a layer of integers, eleven where q, k and v have two types; op by op they are twenty-two and twenty-three. Smoothing is one
    more for all layers together."""
    if not SHIM:
        pytest.skip("the shim counts them")
    shape = request.node.callspec.params["pair"]
    with load(pair) as model, model.session(n_ctx=64, policy=POLICIES[policy]) as session:
        session.feed(tokens(rng, 20))
        counts = []
        for id in tokens(rng, 4):
            before = counted("kernels")
            session.feed([id], generated=True)
            counts.append(counted("kernels") - before)
    assert len(set(counts)) == 1
    most = {"q4_k": 11, "q8_0": 10, "f16": 13, "f32": 13, "mixed": 16, "biases": 10, "wide": 10, "odd": 21}[shape]
    assert counts[0] <= N_LAYER * most + 9 + (policy == "kvsmooth"), counts


@pytest.mark.parametrize("overlap", ["0", "1"])
def test_kernels_begin_early(
    pair: tuple[str, str], overlap: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """All of a layer, if it is not of an odd shape, unless that is switched off."""
    if not SHIM:
        pytest.skip("the shim counts them")
    monkeypatch.setenv("KVS_CUDA_OVERLAP", overlap)
    with load(pair) as model, model.session(n_ctx=64, policy=POLICIES["kvsmooth"]) as session:
        session.feed(tokens(rng, 20))
        before = counted("kernels"), counted("early")
        session.feed(tokens(rng, 1), generated=True)
        kernels, early = counted("kernels") - before[0], counted("early") - before[1]
    behind = {"0": kernels, "1": 29 if request.node.callspec.params["pair"] == "odd" else 6}[overlap]
    assert kernels > 30 and kernels - early == behind


SMALL = {"n_embd": 64, "n_head": 2, "n_head_kv": 1, "n_ff": 64, "type": "q8_0"}


@pytest.mark.parametrize(("n", "n_layer", "layers"), [(16, 9, "0:"), (64, 5, "::2"), (3, 50, "0:")])
def test_what_is_put_off_is_done_in_time(
    n: int, n_layer: int, layers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Of sessions with two windows, on products of both kinds; more runs of layers than one launch of smoothing takes (128), too."""
    text, mmproj, _ = tiny.write_pair(tmp_path, seed=7, load=False, n_layer=n_layer, **SMALL)
    prompts, steps, found, launches = [tokens(rng, 3 + i % 3) for i in range(n)], [tokens(rng, n) for _ in range(2)], [], []
    for fuse in ("0", "1"):
        monkeypatch.setenv("KVS_CUDA_FUSE", fuse)
        with load((text, str(mmproj))) as model, ExitStack() as held:
            policies = [kvs.KVSmooth(layers=layers, lambda_ref=0.6, window=3 + i % 2 * 40) for i in range(n)]
            sessions = [held.enter_context(model.session(n_ctx=64, policy=policy)) for policy in policies]
            for session, prompt in zip(sessions, prompts, strict=True):
                session.feed(prompt)
            for ids in steps:
                before = counted("kernels") if SHIM else 0
                step_together(sessions, ids)
                launches.append(counted("kernels") - before if SHIM else 0)
            found.append([state(session, n_layer) for session in sessions])
    assert any(np.nan_to_num(one["strengths"]).any() for one in found[0])
    for plain, fused in zip(*found, strict=True):
        equal(plain, fused)
    smoothed = len(range(n_layer)[slice(0, None, 2 if layers == "::2" else 1)])
    # a record of each layer and its n smoothings have become a launch each, two where there are too many runs
    assert not SHIM or launches[1] - launches[3] >= n_layer + n * smoothed - (3 if layers == "::2" else 2), launches


@pytest.mark.parametrize(("n", "names"), [(17, ("plain", "kvsmooth", "outputs")), (32, ("plain", "kvsmooth")), (64, ("plain", "kvsmooth"))])
def test_many_sessions(n: int, names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """As a few of them: a step is one graph that was met before, and one wait. A prompt of as many rows is none."""
    text, mmproj, _ = tiny.write_pair(tmp_path, seed=9, load=False, n_layer=2, **SMALL)
    prompts, steps, found = [tokens(rng, 17 if i == 1 else 2 + i % 3) for i in range(n)], [tokens(rng, n) for _ in range(3)], []
    words, counts = ("graphs", "captures", "waits", "kernels", "early"), []
    for fuse in ("0", "1"):
        monkeypatch.setenv("KVS_CUDA_FUSE", fuse)
        with load((text, str(mmproj))) as model, ExitStack() as held:
            sessions = [
                held.enter_context(model.session(n_ctx=48, kv_type=("f16", "f32", "q8_0")[i % 3], policy=POLICIES[names[i % len(names)]]))
                for i in range(n)
            ]
            for session, prompt in zip(sessions, prompts, strict=True):
                before = counted("graphs") if SHIM else 0
                session.feed(prompt)
                assert not SHIM or counted("graphs") - before == (len(prompt) <= 16)
            for ids in steps:
                seen = [counted(word) if SHIM else 0 for word in words]
                step_together(sessions, ids)
                counts.append([counted(word) - so_far if SHIM else 0 for word, so_far in zip(words, seen, strict=True)])
            found.append([state(session, 2) for session in sessions])
    assert any(np.nan_to_num(one["strengths"]).any() for one in found[0])
    for plain, fused in zip(*found, strict=True):
        equal(plain, fused)
    if SHIM:
        assert counts[2][:3] == counts[5][:3] == [1, 0, 1], counts  # those before them grow working space, which moves then
        assert "outputs" in names or counts[5][3:] == [39, 33], counts


@pytest.mark.parametrize("n", [1, 3, 12])
def test_kernels_that_begin_early_give_the_same_bits(
    pair: tuple[str, str], n: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """A small model, whose launches are all short, is the hardest: several are there at once on a GPU."""
    if SHIM and request.node.callspec.params["pair"] not in ("q4_k", "odd"):
        pytest.skip("none of them begins early there")
    prompts, steps, found = [tokens(rng, 3 + i % 3) for i in range(n)], [tokens(rng, n) for _ in range(3 if SHIM else 200)], []
    for overlap in ("0", "1"):
        monkeypatch.setenv("KVS_CUDA_OVERLAP", overlap)
        with load(pair) as model, ExitStack() as held:
            sessions = [held.enter_context(model.session(n_ctx=256, policy=POLICIES["kvsmooth"])) for _ in range(n)]
            for session, prompt in zip(sessions, prompts, strict=True):
                session.feed(prompt)
            for ids in steps:
                step_together(sessions, ids)
            found.append([state(session) for session in sessions])
    for behind, early in zip(*found, strict=True):
        equal(behind, early)
