"""Layers shared by a GPU and the CPU: equal numbers wherever the cut is, what fits is known beforehand, and KVS_CHECK, which compares both.

Without a GPU only the errors are looked at. Limits of memory are those of tests/shim, whose device has as much as KVS_SHIM_MEMORY says;
on a GPU a ballast leaves 3 GiB to a model that wants more.
"""

import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from device_memory import SHIM, ballast, free_bytes
from devices import revived  # noqa: F401
from test_numeric import PARTS, tensor
from test_together import draw, sampling
from twins import feed_with_flag, picture, step_together, tokens

import pykvsmooth as kvs
from pykvsmooth import _native
from pykvsmooth.machine import cuda_text

HAS_GPU = "; available" in cuda_text()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU")
needs_shim = pytest.mark.skipif(not SHIM, reason="the GPU's memory has no limit to set")
N_LAYER = 4
CUTS = [0, 1, 2, N_LAYER]
POLICIES = {
    "plain": None,
    "kvsmooth": kvs.KVSmooth(layers="1:", lambda_ref=0.6),
    "outputs": kvs.KVSmooth(layers="0:", lambda_ref=0.6, target="o", rope_mode="post"),
    "dscr": kvs.DSCR(layers="1:", kernel="product", coord_norm="patch", gamma=0.5, rope_mode="pre"),
    "prunehal": kvs.PruneHal(keep=0.5, times=2, reversible=True),
    "all": [
        kvs.DSCR(layers="0:", coord_norm="patch", phase="in_layer"),
        kvs.KVSmooth(layers="1:4", lambda_ref=0.6, smooth_prompt="last_token"),
        kvs.PruneHal(keep=0.5, index_scope="kv_head"),
    ],
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Layers large against what does not depend on their number, so that a limit can fall between two of them."""
    folder = tmp_path_factory.mktemp("offload")
    text, mmproj, _ = tiny.write_pair(
        folder, seed=7, load=False, n_layer=N_LAYER, n_embd=128, n_head=4, n_head_kv=2, n_ff=512, n_ctx_train=512
    )
    return text, str(mmproj)


def load(pair: tuple[str, str | None], layers: Any = "auto", device: str = "cuda", **options: Any) -> kvs.Model:
    model = kvs.Model(pair[0], mmproj=pair[1] or False, device=device, gpu_layers=layers, threads=2, **options)
    model._end_ids = frozenset()
    return model


@pytest.fixture(scope="module")
def cpu(pair: tuple[str, str]) -> Iterator[kvs.Model]:
    with load(pair, device="cpu") as model:
        yield model


@pytest.fixture(params=CUTS)
def cut(request: pytest.FixtureRequest, pair: tuple[str, str]) -> Iterator[kvs.Model]:
    with load(pair, request.param) as model:
        assert (model.n_gpu_layers, model.n_layer) == (request.param, N_LAYER)
        yield model


def near(a: np.ndarray, b: np.ndarray, bound: float) -> None:
    """Within a share of the largest value."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape and (np.isnan(a) == np.isnan(b)).all()
    assert np.nanmax(np.abs(a - b), initial=0) <= bound * np.nanmax(np.abs(b), initial=1e-6)


def state(session: kvs.Session) -> dict[str, np.ndarray]:
    seen = {"logits": session.logits(), "entropies": session.entropies(), "strengths": session.strengths()}
    for layer in range(N_LAYER):
        seen[f"k{layer}"], seen[f"v{layer}"] = session.kv(layer)
        seen[f"positions{layer}"] = np.asarray(session.positions(layer))
    return seen


def sample(session: kvs.Session, **options: Any) -> tuple[int, float]:
    """One id, and its log-probability; nothing is fed."""
    given = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "n_top": 0, **options}
    params = _native.ffi.new("kvs_sampling *", {"struct_size": _native.ffi.sizeof("kvs_sampling"), **given})
    drawn, err, flag = _native.ffi.new("kvs_sample *"), _native.new_error(), _native.Flag()
    with session._handle as pointer:
        _native.check(_native.lib.kvs_session_sample(pointer, params, drawn, flag.pointer, err), err)
    return drawn.id, drawn.logprob


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ---- equal numbers ----


@needs_gpu
@pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_same_numbers_wherever_the_cut_is(name: str, kv_type: str, cut: kvs.Model, cpu: kvs.Model, rng: np.random.Generator) -> None:
    image, ids, answer = picture(rng), tokens(rng, 40), tokens(rng, 8)
    rounded = {"f32": 2e-3, "f16": 1e-2, "q8_0": 5e-2}[kv_type]
    near(cut.encode_image(image), cpu.encode_image(image), 1e-3)
    states = []
    for model in (cut, cpu):
        with model.session(n_ctx=128, kv_type=kv_type, policy=POLICIES[name]) as session:
            session.feed(ids[:5])
            session.feed_image(image)
            session.feed(ids[5:])
            session.feed(answer, generated=True)
            states.append(state(session))
    if name in ("prunehal", "all") and not all(np.array_equal(states[0][key], states[1][key]) for key in states[0] if "positions" in key):
        assert kv_type != "f32"  # votes may fall to either side where rounded numbers are a last bit apart
        return
    for key in states[0]:
        if key == "strengths":
            continue  # so may ranks
        near(states[0][key], states[1][key], rounded if name in ("plain", "dscr") else 0.2)


@needs_gpu
def test_files_of_every_kind(rng: np.random.Generator, tmp_path: Path) -> None:
    """Tied output, norms that are not F32 and are widened, biases, blocks of int8 kernels: all of it on either side."""
    kinds: list[dict[str, Any]] = [
        {"tied": True},
        {"types": {"norm": "f16"}},
        {"biases": True, "types": {"bias": "bf16"}},
        {"type": "q8_0", "tied": True},
        {"type": "q4_k", "n_embd": 256, "n_ff": 512},
        {"rope_theta": 5e5, "n_head_kv": 1, "type": "f16"},
    ]
    for number, options in enumerate(kinds):
        text, _, _ = tiny.write_pair(tmp_path / str(number), seed=number, vision=False, load=False, **options)
        ids, logits = tokens(rng, 30), []
        for layers, device in [("auto", "cpu"), *((n, "cuda") for n in CUTS)]:
            with load((text, None), layers, device) as model, model.session(n_ctx=64) as session:
                session.feed(ids)
                session.feed(ids[:3], generated=True)
                logits.append(session.logits())
        for other in logits[1:]:
            near(
                other, logits[0], {"q8_0": 0.1, "q4_k": 0.15, "f16": 1e-2}.get(options.get("type", ""), 1e-3)
            )  # each side rounds x in its own way


@needs_gpu
@pytest.mark.parametrize(
    "cuts", [{}, {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}], ids=["greedy", "random"]
)
def test_answers_tell_all_layers(cuts: dict[str, Any], cut: kvs.Model, rng: np.random.Generator, tmp_path: Path) -> None:
    """Telemetry of a step comes from both sides, ids from where the output is; after loading logits are on the host."""
    with cut.session(n_ctx=256, policy=kvs.KVSmooth(layers="0:", lambda_ref=0.6), seed=1) as session:
        stream = session.generate("a", image=picture(rng), max_tokens=8, logprobs=2, **cuts)
        tokens = [next(stream) for _ in range(4)]
        np.testing.assert_allclose([np.mean(row) for row in session.entropies()], [token.entropy for token in tokens], rtol=1e-6)
        np.testing.assert_allclose([np.nanmean(row) for row in session.strengths()[1:]], [t.strength for t in tokens[1:]], rtol=1e-6)
        stream.close()
        session.save(tmp_path / "s")
        with kvs.Session.load(cut, tmp_path / "s", session.policy) as loaded:
            for sampling in ({}, {"temperature": 1.0, **cuts}):
                drawn = [sample(one, **sampling) for one in (session, loaded)]
                assert drawn[0][0] == drawn[1][0] and drawn[0][1] == pytest.approx(drawn[1][1], rel=1e-6)


@needs_gpu
def test_logits_of_either_side_draw_together(cut: kvs.Model, rng: np.random.Generator, tmp_path: Path) -> None:
    """Those of a session that was loaded are on the host."""
    with cut.session(n_ctx=64, seed=5) as session:
        session.feed(tokens(rng, 5))
        session.feed(tokens(rng, 2), generated=True)
        session.save(tmp_path / "s")
        with kvs.Session.load(cut, tmp_path / "s") as a, kvs.Session.load(cut, tmp_path / "s") as b, session.fork() as fork:
            for how in ({"temperature": 0.0}, {"repetition_penalty": 1.2}, {"top_k": 50}):
                drawn = draw([session, a, b, fork], [sampling(how)] * 4)
                assert len({one.id for one in drawn}) == 1
                np.testing.assert_allclose([one.logprob for one in drawn], drawn[0].logprob, rtol=1e-6, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("name", POLICIES)
def test_a_timeline_goes_on(name: str, cut: kvs.Model, rng: np.random.Generator, tmp_path: Path) -> None:
    """Fork, file, rewind and rows that run again, on the same cut: not a bit differs."""
    policy, answer = POLICIES[name], tokens(rng, 12)
    with cut.session(n_ctx=128, policy=policy) as session:
        session.feed_image(picture(rng))
        session.feed(tokens(rng, 9))
        session.feed(answer[:8], generated=True)
        session.save(tmp_path / "s")
        with session.fork() as twin, kvs.Session.load(cut, tmp_path / "s", policy) as loaded:
            equal(state(twin), state(session))
            equal(state(loaded), state(session))
            for one in (session, twin, loaded):
                one.feed(answer[8:], generated=True)
            equal(state(twin), state(session))
            equal(state(loaded), state(session))
        before = state(session)
        if name in ("plain", "kvsmooth", "outputs"):
            session.rewind(3)
            session.feed(answer[9:], generated=True)
            equal(state(session), before)
        if name == "prunehal":
            session.restore()
            assert session.positions(0).shape[-1] == session.n_past


@needs_gpu
def test_a_file_is_read_on_any_cut(pair: tuple[str, str], rng: np.random.Generator, tmp_path: Path) -> None:
    ids = tokens(rng, 20)
    with load(pair, 1) as model, model.session(n_ctx=64) as session:
        session.feed(ids)
        session.save(tmp_path / "s")
        rows = [session.kv(layer) for layer in range(N_LAYER)]
    for layers, device in ((3, "cuda"), ("auto", "cuda"), ("auto", "cpu")):
        with load(pair, layers, device) as model, kvs.Session.load(model, tmp_path / "s") as session:
            for layer in range(N_LAYER):
                np.testing.assert_array_equal(session.kv(layer), rows[layer])
            session.feed(ids[:2], generated=True)


@needs_gpu
def test_prompts_that_end_early_leave_it_as_it_was(cut: kvs.Model, rng: np.random.Generator) -> None:
    """What is put back, from both sides."""
    for name in ("kvsmooth", "all"):
        with cut.session(n_ctx=128, policy=POLICIES[name], exact_rows=4) as session:
            session.feed_image(picture(rng))
            session.feed(tokens(rng, 9))
            session.feed(tokens(rng, 3), generated=True)
            before, flag = state(session), _native.Flag()
            flag.set()
            with pytest.raises(kvs.CancelledError):
                feed_with_flag(session, tokens(rng, 9), flag)
            equal(state(session), before)


@needs_gpu
def test_sessions_step_together_and_threads_read(pair: tuple[str, str], rng: np.random.Generator) -> None:
    with load(pair, 2) as model:
        sessions = [model.session(n_ctx=64, policy=POLICIES["kvsmooth"]) for _ in range(3)]
        singles = [session.fork() for session in sessions]
        for one, other in zip(sessions, singles, strict=True):
            ids = tokens(rng, int(rng.integers(4, 20)))
            one.feed(ids)
            other.feed(ids)
        done = threading.Event()
        failures: list[BaseException] = []

        def read() -> None:  # another session's rows, while steps are under way
            with model.session(n_ctx=64) as own:
                own.feed([5, 6, 7])
                expected = state(own)
                while not done.is_set():
                    try:
                        equal(state(own), expected)
                        own.fork().close()
                    except BaseException as error:
                        failures.append(error)
                        return

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(6):
            ids = tokens(rng, 3)
            step_together(sessions, ids)
            for other, id in zip(singles, ids, strict=True):
                other.feed([id], generated=True)
        done.set()
        reader.join()
        assert not failures
        for one, other in zip(sessions, singles, strict=True):
            near(one.logits(), other.logits(), 1e-3)


@needs_gpu
@pytest.mark.parametrize("layer", [0, N_LAYER - 1])
def test_what_is_not_finite_is_named_on_either_side(layer: int, tmp_path: Path) -> None:
    path, _, _ = tiny.write_pair(tmp_path, seed=layer, vision=False, load=False)
    for part in ("attn_k", "ffn_up"):
        weights = tensor(path, f"blk.{layer}.{part}.weight")
        kept, weights[3, :] = weights[3, :].copy(), np.nan
        weights.flush()
        for layers in CUTS:
            with load((path, None), layers) as model, model.session(n_ctx=64) as session:
                with pytest.raises(kvs.NumericError) as caught:
                    session.feed([1, 265, 270])
                assert caught.value.what == f"layer {layer + 1} of {N_LAYER} (blk.{layer}){PARTS[part]}" and session.n_past == 0
        weights[3, :] = kept
        weights.flush()


# ---- what fits ----


def needed(error: kvs.OutOfMemoryError) -> int:
    """Both numbers are in the message, in MiB."""
    free, wanted = re.search(r"([0-9.]+) MiB are free: ([0-9.]+) MiB needed", str(error)).groups()  # type: ignore[union-attr]
    assert float(free) == pytest.approx(error.free / 2**20, abs=0.06) and float(wanted) == pytest.approx(error.needed / 2**20, abs=0.06)
    assert error.needed > error.free > 0
    if "layers and the output" in str(error):
        number = "([0-9.]+)"
        told = f": {number} for weights, {number} for a cache of [0-9]+ rows, {number} of working space, {number} for the device itself;"
        parts = re.search(told, str(error))
        assert parts and sum(map(float, parts.groups())) == pytest.approx(error.needed / 2**20, abs=0.21)
    return error.needed


def set_memory(monkeypatch: pytest.MonkeyPatch, n_bytes: float) -> None:
    monkeypatch.setenv("KVS_SHIM_MEMORY", str(int(n_bytes)))


@needs_shim
def test_a_limit_gives_a_split_that_fits(
    pair: tuple[str, str], cpu: kvs.Model, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, found = tokens(rng, 30), {}
    for mib in np.arange(4, 14, 0.5):
        set_memory(monkeypatch, mib * 2**20)
        try:
            with load(pair) as model, model.session(n_ctx=512) as session, cpu.session(n_ctx=512) as other:
                found[mib] = model.n_gpu_layers
                n = N_LAYER - model.n_gpu_layers
                assert model.device == "cuda:0" and f"{model.n_gpu_layers} of {N_LAYER} layers on cuda:0 (" in model.device_reason
                assert (f"{n} layer" in model.device_reason.split(")", 1)[1]) == (n > 0)
                assert re.search(r"; [0-9.]+ of [0-9.]+ MiB\)", model.device_reason)
                plan = model.memory_plan
                assert f"; {plan.needed / 2**20:.1f} of {plan.free / 2**20:.1f} MiB)" in model.device_reason
                assert plan.needed <= plan.free and plan.cache * N_LAYER == cpu.memory_plan.cache * model.n_gpu_layers
                for one in (session, other):
                    one.feed(ids)
                    one.feed_image(picture(np.random.default_rng(1)))
                near(session.logits(), other.logits(), 1e-2)
        except kvs.OutOfMemoryError as error:
            assert not found, "more memory, and it fits no more"
            needed(error)
    counts = list(found.values())
    assert counts == sorted(counts) and counts[0] >= 1 and set(counts) >= {1, 2, 3, N_LAYER}


@pytest.fixture(scope="module")
def too_much(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """A model of 14 layers, and what is left to it: about what ten of them take, and their cache."""
    wide: dict[str, Any] = {"n_embd": 128, "n_head": 4, "n_ff": 512, "n_ctx_train": 512}
    if not SHIM:
        wide = {"n_embd": 2048, "n_head": 16, "n_ff": 8192, "n_ctx_train": 4096}  # 3.5 GiB
    wide |= {"n_layer": 14, "n_head_kv": wide["n_head"]}
    text, _, _ = tiny.write_pair(tmp_path_factory.mktemp("too_much"), seed=3, vision=False, load=False, **wide)
    return text, 15 << 20 if SHIM else 3 << 30


@needs_gpu
def test_beside_a_ballast(too_much: tuple[str, int], rng: np.random.Generator) -> None:
    """What was reckoned with beforehand is what it takes, at most; what does not fit is told, and the numbers are those of the CPU."""
    text, leave = too_much
    load((text, None), 0).close()  # what the driver keeps of a process is its own
    before = free_bytes()
    with ballast(leave), load((text, None), device="cpu") as other:
        free = free_bytes()
        assert abs(free - leave) <= 4 << 20
        with load((text, None)) as model:
            plan = model.memory_plan
            assert 1 <= model.n_gpu_layers < model.n_layer and plan.needed <= plan.free and abs(plan.free - free) <= free // 8
            assert plan.needed + (plan.weights + plan.cache) / model.n_gpu_layers > plan.free - plan.reserve  # one more would not fit
            ids = tokens(rng, 200)
            with model.session(n_ctx=plan.n_ctx) as session, other.session(n_ctx=plan.n_ctx) as expected:
                for one in (session, expected):
                    one.feed(ids)
                    one.feed(ids[:3], generated=True)
                near(session.logits(), expected.logits(), 1e-2)
                assert 0.9 * (plan.weights + plan.cache) < free - free_bytes() <= plan.needed
                with pytest.raises(kvs.OutOfMemoryError, match="needed for the KV cache"):
                    model.session(n_ctx=64 * plan.n_ctx)
                session.feed([7], generated=True)  # and the rest goes on
        for layers in (model.n_layer, 1000):
            with pytest.raises(kvs.OutOfMemoryError, match=f"{model.n_layer} of {model.n_layer} layers") as caught:
                load((text, None), layers)
            assert needed(caught.value) > leave
    assert abs(free_bytes() - before) <= (0 if SHIM else 64 << 20)


@needs_shim
def test_nothing_fits(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    set_memory(monkeypatch, 2 << 20)
    with pytest.raises(kvs.OutOfMemoryError, match='use the device "cpu"') as caught:
        load(pair)
    least = needed(caught.value)
    with caplog.at_level(logging.INFO, "pykvsmooth"), load(pair, device="auto") as model:
        assert model.device == "cpu" and model.n_gpu_layers == 0
        assert re.match(r"cuda:0 is not used: out of memory on cuda:0, .* MiB are free: .* MiB needed .*; kernels: ", model.device_reason)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
    set_memory(monkeypatch, least + (1 << 16))  # and what the device itself takes
    with load(pair) as model:
        assert model.n_gpu_layers >= 1


@needs_shim
def test_a_number_of_layers_must_fit(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_memory(monkeypatch, 6 << 20)
    for device in ("cuda", "auto"):
        with pytest.raises(kvs.OutOfMemoryError, match=f"{N_LAYER} of {N_LAYER} layers.*fewer gpu_layers") as caught:
            load(pair, N_LAYER, device)
    set_memory(monkeypatch, needed(caught.value) + (1 << 16))
    with load(pair, N_LAYER) as model:
        assert model.n_gpu_layers == N_LAYER
    with load(pair, 1000) as model:
        assert model.n_gpu_layers == N_LAYER


@needs_shim
def test_the_tower_goes_where_there_is_room(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    text, mmproj, _ = tiny.write_pair(tmp_path, seed=1, load=False, n_layer=2, v_embd=256, v_ff=1024, v_layer=5)
    places = set()
    image = picture(rng)
    with load((text, mmproj), device="cpu") as model:
        expected = model.encode_image(image)
    for mib in np.arange(2.5, 30, 1.5):
        set_memory(monkeypatch, mib * 2**20)
        try:
            with load((text, mmproj)) as model:
                near(model.encode_image(image), expected, 1e-3)
                places.add("the vision tower on the CPU" in model.device_reason)
        except kvs.OutOfMemoryError as error:
            needed(error)
    assert places == {False, True}


@needs_shim
def test_sessions_that_do_not_fit(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for layers in ("auto", 2):
        set_memory(monkeypatch, 64 << 20)
        with load(pair, layers) as model:
            with pytest.raises(kvs.OutOfMemoryError, match=r"out of memory on cuda:0, .* needed for the KV cache") as caught:
                model.session(n_ctx=1 << 20)
            needed(caught.value)
            with model.session(n_ctx=64) as session:  # and the model goes on
                session.feed([1, 5, 6])
            set_memory(monkeypatch, 1 << 20)  # nothing more is to be had, also for a pass
            with pytest.raises(kvs.OutOfMemoryError):
                model.session(n_ctx=4096).feed(list(range(3, 300)))
            set_memory(monkeypatch, 64 << 20)
            with model.session(n_ctx=512) as session:
                session.feed(list(range(3, 300)))


@needs_shim
@pytest.mark.usefixtures("revived")
@pytest.mark.parametrize("layers", [2, N_LAYER])
def test_a_device_that_fails_ends_the_model(layers: int, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with load(pair, layers) as model, model.session(n_ctx=64) as session:
        session.feed([1, 5, 6])
        monkeypatch.setenv("KVS_SHIM_FAIL", "cudaStreamSynchronize:2")
        with pytest.raises(kvs.DeviceError, match="cudaErrorIllegalAddress"):
            for _ in range(4):
                session.feed([7], generated=True)
        monkeypatch.delenv("KVS_SHIM_FAIL")
        with pytest.raises(kvs.DeviceError, match=r"cuda:0 failed: .*; restart the process, or load the model with device=\"cpu\""):
            session.feed([7], generated=True)


@needs_gpu
def test_no_such_device(pair: tuple[str, str]) -> None:
    with pytest.raises(kvs.DeviceError, match="can't be had"):
        load(pair, 1, "cuda:99")


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_layers_without_a_gpu(pair: tuple[str, str]) -> None:
    for device in ("auto", "cuda"):
        with pytest.raises(kvs.DeviceError):
            load(pair, 1, device)
    for layers in ("auto", 0):
        with load(pair, layers, "auto") as model:
            assert model.device == "cpu" and model.n_gpu_layers == 0


def test_layers_of_the_cpu(pair: tuple[str, str]) -> None:
    with pytest.raises(kvs.DeviceError, match=r'gpu_layers: 1 layers .* the device "cpu"'):
        load(pair, 1, "cpu")
    with load(pair, 0, "cpu") as model:
        assert model.n_gpu_layers == 0


# ---- KVS_CHECK ----


@needs_gpu
@pytest.mark.parametrize("layers", [2, N_LAYER])
@pytest.mark.parametrize("name", POLICIES)
def test_ops_are_compared(name: str, layers: int, pair: tuple[str, str], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    image, ids = picture(rng), tokens(rng, 40)
    logits = []
    for check in ("0", "1"):
        monkeypatch.setenv("KVS_CHECK", check)
        with load(pair, layers) as model, model.session(n_ctx=128, policy=POLICIES[name]) as session:
            assert ("checked by the CPU" in model.device_reason) == (check == "1")
            session.feed_image(image)
            session.feed(ids[:30])
            session.feed(ids[30:], generated=True)
            if name == "prunehal":
                session.restore()
            with session.fork() as twin:
                equal(state(twin), state(session))
            logits.append(session.logits())
    np.testing.assert_array_equal(*logits)


@needs_gpu
@pytest.mark.parametrize("layers", [2, N_LAYER])
def test_answers_are_compared(layers: int, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for check in ("0", "1"):
        monkeypatch.setenv("KVS_CHECK", check)
        with load(pair, layers) as model, model.session(n_ctx=128, policy=POLICIES["kvsmooth"]) as session:
            hows: list[dict[str, Any]] = [
                {},
                {"temperature": 1.0},
                {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.3},
            ]
            for options in hows:
                answers.append((check, session.generate("a", max_tokens=8, logprobs=5, seed=3, **options).result().tokens))
            requests = [{"prompt": "a", "seed": i, **options} for i, options in enumerate(hows)]
            batch = model.generate_batch(requests, n_ctx=128, parallel=3, max_tokens=4, logprobs=5)
            answers.append((check, [(index, item) for index, item in batch if isinstance(item, kvs.Token)]))
    assert [repr(tokens) for check, tokens in answers if check == "0"] == [repr(tokens) for check, tokens in answers if check == "1"]


@needs_gpu
@pytest.mark.parametrize("layers", [2, N_LAYER])
def test_a_difference_is_told(layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that change in the file behind our back, when the device has its copy."""
    monkeypatch.setenv("KVS_CHECK", "1")
    path, _, _ = tiny.write_pair(tmp_path, seed=5, vision=False, load=False)
    stat = os.stat(path)
    with load((path, None), layers) as model, model.session(n_ctx=64) as session:
        session.feed([1, 5, 6])
        weights = tensor(path, f"blk.{N_LAYER - 1}.attn_output.weight")
        kept, weights[17, :] = weights[17, :].copy(), 3.0
        weights.flush()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        told = r"KVS_CHECK: matmul: value 17 of row \d \(3 x 64\) is \S+ on cuda:0, and \S+ on the CPU: more than \S+ apart"
        with pytest.raises(kvs.DeviceError, match=told):
            session.feed([7, 8, 9])
        assert session.n_past == 3
        weights[17, :] = kept
        weights.flush()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        session.feed([7, 8, 9])


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_there_is_nothing_to_compare(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("KVS_CHECK", "1")
    with load(pair, device="auto"):
        assert "KVS_CHECK" in caplog.records[-1].getMessage()
