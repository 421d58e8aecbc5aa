"""DSCR: every switch against the reference on random pairs, weights, invariants, and life with rewind, fork and save."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import SEED
from devices import DEVICE
from reference import DSCR, KVSmooth, Session
from twins import feed_with_flag, picture, pixels, tokens

import pykvsmooth as kvs
from pykvsmooth import _native
from pykvsmooth._native import ffi, lib

GRID = (4, 4)  # of the tiny tower
BOUND = 1e-4  # logits, K and V in float32, as promised
BASE: dict[str, Any] = {"layers": [1, 2, 3]}
SWITCHES: dict[str, dict[str, Any]] = {
    "paper": {},
    "sigma_d": {"sigma_d": 0.2},
    "sigma_s": {"sigma_s": 0.15},
    "alpha": {"alpha": 2.0},
    "beta": {"beta": 3.0},
    "product": {"kernel": "product"},
    "product_patch": {"kernel": "product", "coord_norm": "patch"},
    "product_pixel": {"kernel": "product", "coord_norm": "pixel", "sigma_s": 8.0},
    "sum_signed": {"coord_norm": "signed"},
    "sum_patch": {"coord_norm": "patch"},
    "gamma": {"gamma": 0.3},
    "pre": {"rope_mode": "pre"},
    "pre_gamma": {"rope_mode": "pre", "gamma": 0.6},
    "k": {"target": "k"},
    "v": {"target": "v"},
    "layers_slice": {"layers": "2:"},
    "layers_negative": {"layers": [0, -1]},
    "bilateral": {"kernel": "product", "coord_norm": "patch", "gamma": 0.3, "rope_mode": "pre"},
}
PHASES = ["before_question", "after_prefill", "in_layer"]
Case = tuple[kvs.Model, tiny.Weights]


@pytest.fixture(scope="module", params=["mha", "gqa"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    heads = {"mha": {}, "gqa": {"n_head_kv": 2, "n_rot": 12}}[request.param]
    text, mmproj, weights = tiny.write_pair(tmp_path_factory.mktemp(request.param), seed=SEED ^ 7, gain=1.3, **heads)
    with kvs.Model(text, mmproj=mmproj, device=DEVICE) as model:
        model._end_ids = frozenset()
        yield model, weights


def depth_map(rng: np.random.Generator, size: int = 56) -> np.ndarray:
    return (rng.random((4, 4)).repeat(size // 4, 0).repeat(size // 4, 1) + 0.2 * rng.random((size, size))).astype(np.float32)


def by_hand(values: np.ndarray) -> np.ndarray:
    """minmax, mean of each patch of 14 x 14"""
    d = values.astype(np.float64)
    d = (d - d.min()) / (d.max() - d.min())
    return d.reshape(4, 14, 4, 14).mean((1, 3)).reshape(-1)


def run_both(
    case: Case, rng: np.random.Generator, options: dict[str, Any], n_pictures: int = 1, smooth: bool = False, kv_type: str = "f32"
) -> None:
    model, weights = case
    maps, images = [depth_map(rng) for _ in range(n_pictures)], [picture(rng) for _ in range(n_pictures)]
    reference = DSCR([by_hand(m) for m in maps], GRID, **options)
    mild = {"layers": [1, 2, 3], "mode": "fixed", "lambda_fixed": 0.6}
    truth = Session(weights.text, KVSmooth(**mild) if smooth else None, kv_type, reference)
    policy = [kvs.DSCR(depth=maps, **options), *([kvs.KVSmooth(**mild)] if smooth else [])]
    with model.session(n_ctx=128, kv_type=kv_type, policy=policy) as ours:
        for i, image in enumerate(images):
            words = tokens(rng, 5 - i)
            ours.feed(words)
            truth.feed(words)
            ours.feed_image(image)
            truth.feed(weights.clip.encode(pixels(image)))
        question = [] if smooth else tokens(rng, 7)
        if question:
            ours.feed(question)
            truth.feed(question)
        compare(ours, truth, logits=bool(question))
        for token in tokens(rng, 5):
            ours.feed([token], generated=True)
            truth.feed([token], generated=True)
        compare(ours, truth)


def compare(ours: kvs.Session, truth: Session, logits: bool = True) -> None:
    if logits:
        np.testing.assert_allclose(ours.logits(), truth.logits(), rtol=0, atol=BOUND)
    for layer in range(ours.model.n_layer):
        for got, wanted in zip(ours.kv(layer), truth.kv(layer), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=BOUND, err_msg=f"layer {layer}")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("switch", SWITCHES)
def test_switch(switch: str, phase: str, case: Case, rng: np.random.Generator) -> None:
    run_both(case, rng, BASE | SWITCHES[switch] | {"phase": phase})


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("switch", ["paper", "bilateral"])
def test_two_pictures(switch: str, phase: str, case: Case, rng: np.random.Generator) -> None:
    """Each has its own depth and its own weights."""
    run_both(case, rng, BASE | SWITCHES[switch] | {"phase": phase}, n_pictures=2)


@pytest.mark.parametrize("phase", PHASES)
def test_a_first_token_is_smoothed_with_the_refined_row(phase: str, case: Case, rng: np.random.Generator) -> None:
    """The picture is the last of the prompt."""
    run_both(case, rng, BASE | {"phase": phase}, smooth=True)


def test_every_switch_has_an_effect(case: Case, rng: np.random.Generator) -> None:
    model, _ = case
    image, values, words = picture(rng), depth_map(rng), tokens(rng, 6)

    def caches(options: dict[str, Any]) -> np.ndarray:
        with model.session(n_ctx=64, kv_type="f32", policy=kvs.DSCR(**{"depth": values} | BASE | options)) as session:
            session.feed([1])
            session.feed_image(image)
            session.feed(words)
            return np.array([session.kv(i) for i in range(model.n_layer)])

    plain = caches({})
    others = [*SWITCHES.values(), {"phase": "after_prefill"}, {"phase": "in_layer"}, {"depth_norm": "zscore"}, {"depth_norm": "metric"}]
    others += [{"depth_norm": "percentile"}, {"depth_pool": "median"}, {"depth_pool": "center"}, {"invert": True}, {"depth": None}]
    for options in others:
        if options:
            assert np.abs(caches(options) - plain).max() > 1e-5, options


def test_shapes_that_cross_passes(rng: np.random.Generator, tmp_path: Path) -> None:
    """576 patches, more than a pass of 512 rows: in one pass or over two, whatever the phase, between text on both sides."""
    text, mmproj, weights = tiny.write_pair(
        tmp_path,
        seed=SEED,
        gain=1.0,
        n_layer=2,
        n_embd=32,
        n_head=2,
        n_head_kv=2,
        n_ff=48,
        image=96,
        patch=4,
        v_layer=2,
        v_embd=32,
        v_head=2,
        v_ff=32,
    )
    rows = rng.standard_normal((576, 32)).astype(np.float32)
    values = rng.random((24, 24)).astype(np.float32)
    patches = (values - values.min()) / (values.max() - values.min())
    with kvs.Model(text, mmproj=mmproj, device=DEVICE) as model:
        for phase in PHASES:
            options = {"layers": [0, 1], "phase": phase, "rope_mode": "pre"}
            truth = Session(weights.text, None, "f32", DSCR([patches.reshape(-1)], (24, 24), patch_size=4, **options))
            with model.session(n_ctx=700, kv_type="f32", policy=kvs.DSCR(depth=values, **options)) as ours:
                before, behind = tokens(rng, 40), tokens(rng, 30)
                ours.feed(before)
                ours.feed_embeddings(rows)
                ours.feed(behind)
                truth.feed(before)
                truth.feed(rows)
                truth.feed(behind)
                compare(ours, truth)


# ---- weights ----


def weights_of(depth: np.ndarray | None, grid: tuple[int, int], **options: Any) -> np.ndarray:
    steps = {"unit": [1 / max(n - 1, 1) for n in grid], "patch": [1.0, 1.0]}[options.pop("coord_norm", "unit")]
    layers = ffi.new("int32_t[]", [0])
    fields = {"sigma_d": 0.6, "sigma_s": 0.6, "alpha": 0.6, "beta": 0.8, "gamma": 1.0, "cut": 1e-6} | options
    params = ffi.new("kvs_dscr_params *", {"struct_size": ffi.sizeof("kvs_dscr_params"), "target": 3, "n_layers": 1, **fields})
    params.grid_w, params.grid_h, params.step_x, params.step_y, params.layers = *grid, *steps, layers
    n = grid[0] * grid[1]
    w = np.full((n, n), np.nan, np.float32)
    given = ffi.NULL if depth is None else ffi.from_buffer("float[]", np.ascontiguousarray(depth, np.float32))
    assert lib.kvs_test_dscr_weights(params, given, ffi.from_buffer("float[]", w)) == 0
    return w


KERNELS = {"sum": lib.KVS_DSCR_SUM, "product": lib.KVS_DSCR_PRODUCT}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("coord_norm", ["unit", "patch"])
@pytest.mark.parametrize("grid", [(1, 2), (5, 3), (24, 24)])
def test_weights(kernel: str, coord_norm: str, grid: tuple[int, int], rng: np.random.Generator) -> None:
    n = grid[0] * grid[1]
    depth = rng.random(n).astype(np.float32)
    if n > 2:
        depth[rng.random(n) < 0.3] = np.nan
        depth[:2] = 0.5
    w = weights_of(depth, grid, kernel=KERNELS[kernel], coord_norm=coord_norm)
    truth = DSCR([depth], grid, kernel=kernel, coord_norm=coord_norm).weights(depth)
    seen = ~np.isnan(depth)
    assert (np.diag(w) == 0).all() and (w >= 0).all()
    assert (w[~seen] == 0).all() and (w[:, ~seen] == 0).all(), "padding gives nothing and takes nothing"
    np.testing.assert_allclose(w.astype(np.float64).sum(0)[seen], 1, rtol=0, atol=n * 2.0**-24)
    assert np.abs(w - truth).sum(0).max() <= 2e-6 + n * 2.0**-24, "the cut leaves out 1e-6 of a column, and as much is spread over the rest"


def test_the_cut(rng: np.random.Generator) -> None:
    """What is left out of a column of the product kernel is at most the cut; how much is left of it."""
    depth = rng.random(576).astype(np.float32)
    options = {"kernel": KERNELS["product"], "coord_norm": "patch"}
    whole = weights_of(depth, (24, 24), cut=0.0, **options)
    for cut, sources in ((1e-6, 50), (1e-3, 25)):
        w = weights_of(depth, (24, 24), cut=cut, **options)
        left_out = np.where(w == 0, whole, 0).astype(np.float64).sum(0)
        assert left_out.max() <= cut and (w > 0).sum(0).max() <= sources
    assert (whole > 0).sum(0).mean() > 150, "what float32 holds of it without a cut"
    assert (weights_of(depth, (24, 24), kernel=KERNELS["sum"]) > 0).sum() == 576 * 575, "nothing vanishes in the sum"


@pytest.mark.parametrize("kernel", KERNELS)
def test_constant_depth_is_no_depth(kernel: str) -> None:
    for value in (0.0, 0.7, -3.0):
        w = weights_of(np.full(30, value), (6, 5), kernel=KERNELS[kernel])
        assert w.tobytes() == weights_of(None, (6, 5), kernel=KERNELS[kernel]).tobytes()


def test_narrow_kernels_leave_the_nearest(rng: np.random.Generator) -> None:
    """Weights that all underflow would leave 0 / 0."""
    w = weights_of(None, (8, 8), kernel=KERNELS["product"], coord_norm="patch", sigma_s=0.001)
    assert np.isfinite(w).all()
    assert ((w > 0).sum(0) <= 4).all() and np.allclose(w.sum(0), 1)
    one = np.full(9, np.nan, np.float32)
    one[4] = 1
    assert not weights_of(one, (3, 3)).any(), "a single patch has nobody to learn from"


# ---- invariants ----


def cache_bits(session: kvs.Session) -> bytes:
    return b"".join(side.tobytes() for layer in range(session.model.n_layer) for side in session.kv(layer))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_gamma_zero_changes_no_bit(kv_type: str, phase: str, case: Case, rng: np.random.Generator) -> None:
    model, _ = case
    image, words = picture(rng), tokens(rng, 6)
    seen = []
    for policy in (None, kvs.DSCR(depth=depth_map(rng), gamma=0.0, phase=phase, **BASE)):
        with model.session(n_ctx=64, kv_type=kv_type, policy=policy) as session:
            session.feed(words)
            session.feed_image(image)
            session.feed(words)
            logits = session.logits()
            session.feed([300, 301], generated=True)
            seen.append((logits.tobytes(), session.logits().tobytes(), cache_bits(session)))
    assert seen[0] == seen[1]


def story(session: kvs.Session, rng: np.random.Generator) -> None:
    session.feed([1, *tokens(rng, 3)])
    session.feed_image(picture(rng))
    session.feed(tokens(rng, 6))


def answer(session: kvs.Session, words: list[int]) -> tuple[bytes, bytes]:
    session.feed(words, generated=True)
    return session.logits().tobytes(), cache_bits(session)


STACKS = {
    "alone": lambda options: kvs.DSCR(**options),
    "smoothed": lambda options: [kvs.KVSmooth(layers=[1, 2, 3], lambda_ref=0.5, half_width=0.4), kvs.DSCR(**options)],
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_fork_save_and_rewind_go_on_alike(
    kv_type: str, phase: str, stack: str, case: Case, rng: np.random.Generator, tmp_path: Path
) -> None:
    model, _ = case
    policy = STACKS[stack]({"depth": depth_map(rng), "phase": phase} | BASE)
    words, more = tokens(rng, 4), tokens(rng, 4)
    with model.session(n_ctx=96, kv_type=kv_type, policy=policy) as session:
        story(session, rng)
        session.save(tmp_path / "before")
        with session.fork() as fork, kvs.Session.load(model, tmp_path / "before", policy=policy) as loaded:
            expected = answer(session, words + more)
            assert answer(fork, words + more) == expected
            assert answer(loaded, words + more) == expected
        session.save(tmp_path / "behind")
        with kvs.Session.load(model, tmp_path / "behind", policy=policy) as loaded:
            assert answer(loaded, more) == answer(session, more)
            for one in (loaded, session):
                one.rewind(len(more))
        session.rewind(len(more))
        assert answer(session, more) == expected


@pytest.mark.parametrize("phase", PHASES)
def test_rewind_never_leaves_half_of_it(phase: str, case: Case, rng: np.random.Generator) -> None:
    """Into a refined picture, and after the prefill into the prompt that saw it unrefined: PolicyError, and nothing has changed."""
    model, _ = case
    policy = kvs.DSCR(depth=[depth_map(rng), depth_map(rng)], phase=phase, **BASE)
    image, words = picture(rng), tokens(rng, 6)
    with model.session(n_ctx=96, kv_type="f32", policy=policy) as session, model.session(n_ctx=96, kv_type="f32", policy=policy) as fresh:
        session.feed([1, 5, 6])
        session.feed_image(image)
        session.feed(words)
        session.feed([300], generated=True)
        bits = cache_bits(session)
        behind = session.n_past - 19
        refused = {"after_prefill": range(4, 26)}.get(phase, range(4, 19))
        for n in range(session.n_past):
            if n in refused:
                with pytest.raises(kvs.PolicyError, match="picture"):
                    session.rewind(session.n_past - n)
        assert cache_bits(session) == bits and session.n_past == 26 and behind == 7
        if phase != "after_prefill":
            session.rewind(7)  # to the end of the picture, and the question again
            session.feed(words)
            fresh.feed([1, 5, 6])
            fresh.feed_image(image)
            fresh.feed(words)
            assert cache_bits(session) == cache_bits(fresh)
        session.rewind(session.n_past - 3)
        session.feed_image(image)  # its map is the first again
        assert session.n_past == 19
        fresh.rewind(fresh.n_past)
        fresh.feed([1, 5, 6])
        fresh.feed_image(image)
        assert cache_bits(session) == cache_bits(fresh)


def test_rewind_into_a_picture_before_the_prefill_ends(case: Case, rng: np.random.Generator) -> None:
    """What is left of it is no picture any more, and is not refined."""
    model, _ = case
    with (
        model.session(n_ctx=64, kv_type="f32", policy=kvs.DSCR(phase="after_prefill", **BASE)) as session,
        model.session(n_ctx=64, kv_type="f32") as plain,
    ):
        image, words = picture(rng), tokens(rng, 3)
        for one in (session, plain):
            one.feed_image(image)
            one.rewind(5)
            one.feed(words)
        assert cache_bits(session) == cache_bits(plain)


@pytest.mark.parametrize("phase", PHASES)
def test_cancelled_feed_leaves_the_session_as_it_was(phase: str, case: Case, rng: np.random.Generator) -> None:
    model, _ = case
    with model.session(n_ctx=128, kv_type="f16", policy=STACKS["smoothed"]({"phase": phase} | BASE)) as session:
        story(session, rng)
        session.feed(tokens(rng, 3), generated=True)
        with session.fork() as fork:
            flag = _native.Flag()
            flag.set()
            with pytest.raises(kvs.CancelledError):
                feed_with_flag(session, tokens(rng, 5), flag)
            rows = rng.standard_normal((16, model.n_embd)).astype(np.float32)
            chunk = ffi.new("kvs_chunk *", {"embd": ffi.from_buffer("float[]", rows), "n": 16, "hash": 1})
            err = _native.new_error()
            with session._handle as pointer:
                assert lib.kvs_session_feed(pointer, chunk, 1, flag.pointer, err) == lib.KVS_E_CANCELLED
                assert lib.kvs_session_n_pictures(pointer) == 1
            words = tokens(rng, 4)
            assert answer(session, words) == answer(fork, words)


def feed_rows(session: kvs.Session, rows: np.ndarray, flag: _native.Flag) -> None:
    chunk, err = ffi.new("kvs_chunk *", {"embd": ffi.from_buffer("float[]", rows), "n": len(rows), "hash": 1}), _native.new_error()
    with session._handle as pointer:
        _native.check(lib.kvs_session_feed(pointer, chunk, 1, flag.pointer, err), err)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kvs.Model]:
    """3136 patches: the weights of a sum kernel take 39 MB, more than the C library ever keeps of what was freed."""
    sizes = {
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 2,
        "n_head_kv": 2,
        "n_ff": 48,
        "image": 112,
        "patch": 2,
        "v_layer": 2,
        "v_embd": 32,
        "v_head": 2,
    }
    text, mmproj, _ = tiny.write_pair(tmp_path_factory.mktemp("wide"), seed=SEED, load=False, v_ff=32, **sizes)
    with kvs.Model(text, mmproj=mmproj, device=DEVICE) as model:
        yield model


def test_cancelled_in_the_middle(wide: kvs.Model, rng: np.random.Generator) -> None:
    """Sooner or later, in a pass, between two, or in the refinement."""
    import threading
    import time

    rows = rng.standard_normal((3136, 32)).astype(np.float32)
    policy = [kvs.DSCR(layers=[0, 1], kernel="product", coord_norm="patch"), kvs.KVSmooth(layers=[1], lambda_ref=0.5)]
    with wide.session(n_ctx=3200, kv_type="f16", policy=policy) as session:
        session.feed(tokens(rng, 4))
        session.feed(tokens(rng, 3), generated=True)
        words, cancelled = tokens(rng, 4), 0
        with session.fork() as fork:
            expected = answer(fork, words)
        with session.fork() as fork:
            began = time.monotonic()
            feed_rows(fork, rows, _native.Flag())
            whole = time.monotonic() - began
        for part in (0.05, 0.3, 0.6, 0.8, 0.9):
            flag = _native.Flag()
            timer = threading.Timer(part * whole, flag.set)
            with session.fork() as fork:
                timer.start()
                try:
                    feed_rows(fork, rows, flag)
                except kvs.CancelledError:
                    cancelled += 1
                    assert fork.n_past == 7 and answer(fork, words) == expected
                timer.join()
        assert cancelled, "not one of five"


@pytest.mark.skipif("san" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer ends the process where malloc fails")
@pytest.mark.parametrize("phase", PHASES)
def test_no_memory_for_the_weights(phase: str, wide: kvs.Model, rng: np.random.Generator, request: pytest.FixtureRequest) -> None:
    """OutOfMemoryError, nothing has changed, and with memory it goes on. In a process of its own: other tests leave room in the heap."""
    import resource

    if "KVS_ALONE" not in os.environ:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{request.node.name}"]
        done = subprocess.run(command, env={**os.environ, "KVS_ALONE": "1"}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        return
    rows, words = rng.standard_normal((3136, 32)).astype(np.float32), tokens(rng, 3)
    policy = kvs.DSCR(layers=[1], phase=phase)
    with wide.session(n_ctx=3200, kv_type="f32", policy=policy) as session, wide.session(n_ctx=3200, kv_type="f32", policy=policy) as fresh:
        fresh.feed_embeddings(rows)  # with it come the buffers of such a pass
        expected = answer(fresh, words)
        if phase == "after_prefill":
            session.feed_embeddings(rows)
        limit = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + (8 << 20), limit[1]))
        try:
            with pytest.raises(kvs.OutOfMemoryError):
                session.feed(words, generated=True) if phase == "after_prefill" else session.feed_embeddings(rows)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limit)
        if phase != "after_prefill":
            assert session.n_past == 0
            session.feed_embeddings(rows)
        assert answer(session, words) == expected


@pytest.mark.parametrize("phase", PHASES)
def test_a_prefix_is_reused_as_far_as_it_is_the_same(phase: str, case: Case, rng: np.random.Generator) -> None:
    """Refined pictures come out the same again, unless the prompt behind them saw them as they were; another depth is another picture."""
    model, _ = case
    image, maps = picture(rng), {"now": depth_map(rng)}
    policy = kvs.DSCR(depth=lambda _: maps["now"], phase=phase, **BASE)

    def ask(session: kvs.Session, prompt: str) -> tuple[int, list[int]]:
        result = session.generate(prompt, image=image, max_tokens=4).result()
        return result.stats.reused_tokens, [t.id for t in result.tokens]

    with model.session(n_ctx=128, policy=policy) as session, model.session(n_ctx=128, policy=policy) as fresh:
        ask(session, "a dog")
        reused, ids = ask(session, "a cat")
        assert (reused > 16) == (phase != "after_prefill")
        assert ids == ask(fresh, "a cat")[1]
        maps["now"] = depth_map(rng)
        reused, ids = ask(session, "a cat")
        assert 0 < reused < 16
        with model.session(n_ctx=128, policy=policy) as other:
            assert ids == ask(other, "a cat")[1]


def test_the_question_sees_the_refined_picture(case: Case, rng: np.random.Generator) -> None:
    """Logits of the first token: changed by before_question and in_layer, not by after_prefill; and only in_layer changes deeper layers."""
    model, _ = case
    image, values, words = picture(rng), depth_map(rng), tokens(rng, 6)
    logits, deep = {}, {}
    for phase in [None, *PHASES]:
        policy = kvs.DSCR(depth=values, layers=[1], phase=phase) if phase else None
        with model.session(n_ctx=64, kv_type="f32", policy=policy) as session:
            session.feed([1])
            session.feed_image(image)
            session.feed(words)
            logits[phase], deep[phase] = session.logits(), session.kv(2)[0][:, 1:17]
    assert np.array_equal(logits[None], logits["after_prefill"]) or np.abs(logits[None] - logits["after_prefill"]).max() < 1e-5
    assert np.abs(logits[None] - logits["before_question"]).max() > 1e-3
    np.testing.assert_allclose(deep[None], deep["before_question"], rtol=0, atol=1e-5)
    assert np.abs(deep[None] - deep["in_layer"]).max() > 1e-3


def test_chat_counts_pictures(case: Case, rng: np.random.Generator) -> None:
    model, _ = case
    maps = [depth_map(rng), depth_map(rng)]
    with model.session(n_ctx=256, policy=kvs.DSCR(depth=maps, **BASE)) as session:
        session.chat("a dog", image=picture(rng), max_tokens=2).result()
        session.chat("and now", max_tokens=2).result()
        session.chat("a cat", image=picture(rng), max_tokens=2).result()
        with pytest.raises(kvs.PolicyError, match="2 maps"):
            session.chat("a man", image=picture(rng), max_tokens=2)
        session.generate("two", images=[picture(rng), picture(rng)], max_tokens=2).result()
        with pytest.raises(kvs.PolicyError, match="2 maps"):
            session.generate("three", images=[picture(rng)] * 3)
    with model.session(n_ctx=256, policy=kvs.DSCR(depth=maps[0], **BASE)) as session:
        with pytest.raises(kvs.PolicyError, match="one map"):
            session.generate("two", images=[picture(rng), picture(rng)])
        session.generate("text", max_tokens=2).result()


def test_a_saved_session_names_what_differs(case: Case, rng: np.random.Generator, tmp_path: Path) -> None:
    model, _ = case
    with model.session(n_ctx=64, policy=kvs.DSCR(**BASE)) as session:
        story(session, rng)
        session.save(tmp_path / "s")
    with pytest.raises(kvs.SessionFileError, match="sigma_s"):
        kvs.Session.load(model, tmp_path / "s", policy=kvs.DSCR(sigma_s=0.5, **BASE))
    with pytest.raises(kvs.SessionFileError, match="saved with DSCR"):
        kvs.Session.load(model, tmp_path / "s", policy=kvs.KVSmooth(layers=[1]))


def test_layers_of_a_shallow_model(case: Case) -> None:
    """The paper's layers are none of a small model's: the error names what chooses by depth."""
    model = case[0]
    with pytest.raises(
        kvs.PolicyError, match=r"selects none of the model's \d+ layers; give another slice or a list, or take DSCR.for_model"
    ):
        model.session(policy=kvs.DSCR())
    with model.session(n_ctx=64, policy=kvs.DSCR.for_model(model)):
        pass
