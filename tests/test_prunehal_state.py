"""PruneHal and the timeline: restore, rewind, fork, save and load, memory; alone and stacked with KVSmooth."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import SEED
from devices import DEVICE
from test_prunehal import SMOOTH, logits_of, prompt, start
from test_session import HEADER, PRIME, sealed
from twins import feed_with_flag, picture, tokens

import pykvsmooth as kvs
from pykvsmooth import _native

PRUNE: dict[str, Any] = {"keep": 0.5, "reference": "first", "vote_fraction": 0.3}
OFTEN: dict[str, Any] = {"reference": "running_mean_reset", "vote_fraction": 0.0, "vote_strict": False}  # behind every second step


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kvs.Model]:
    text, mmproj, _ = tiny.write_pair(tmp_path_factory.mktemp("gqa"), seed=SEED ^ 9, n_head_kv=2, gain=2.2, load=False)
    with kvs.Model(text, mmproj=mmproj, device=DEVICE) as model:
        model._end_ids = frozenset()
        yield model


def policies(reversible: bool = True, smooth: bool = False, **changes: Any) -> list[Any]:
    prune = kvs.PruneHal(**PRUNE | {"reversible": reversible} | changes)
    return [prune, kvs.KVSmooth(**SMOOTH)] if smooth else [prune]


def state(session: kvs.Session, but: tuple[str, ...] = ()) -> dict[str, Any]:
    seen: dict[str, Any] = {"n_past": session.n_past, "prunings": session.prunings, "bytes": session.nbytes}
    for layer in range(4):
        seen[f"positions{layer}"] = session.positions(layer)
        seen[f"k{layer}"], seen[f"v{layer}"] = session.kv(layer)
    seen |= {"entropies": session.entropies(), "strengths": session.strengths(), "masses": session.visual_masses()}
    seen["logits"] = session.logits()
    return {name: value for name, value in seen.items() if name not in but}


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], np.ndarray):
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        else:
            assert a[name] == b[name], name


# ---- restore ----


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("scope", ["layer", "kv_head"])
def test_restore_gives_every_bit_back(scope: str, kv_type: str, model: kvs.Model, rng: np.random.Generator) -> None:
    """The step that is followed by the first pruning saw every row: with the rows back nothing differs from never having pruned."""
    seed, ids = int(rng.integers(1 << 30)), tokens(rng, 20)
    with start(model, policies(index_scope=scope), seed, kv_type=kv_type) as session, start(model, None, seed, kv_type=kv_type) as plain:
        for one in (session, plain):
            one.feed(ids[:1], generated=True)
        assert session.prunings and session.positions(0).shape[-1] < session.n_past
        session.restore()
        np.testing.assert_array_equal(logits_of(session, ids[1:]), logits_of(plain, ids[1:]))
        assert session.prunings == [], "the answer under way is not pruned any more"
        for i in range(4):
            for ours, theirs in zip(session.kv(i), plain.kv(i), strict=True):
                np.testing.assert_array_equal(ours, theirs)
        prompt(session, rng, 1)
        session.feed(ids[:2], generated=True)
        assert [p.step for p in session.prunings][:1] == [len(ids) + 1], "one to a new picture is"


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("scope", ["layer", "kv_head"])
def test_restore_after_several_prunings(scope: str, kv_type: str, model: kvs.Model, rng: np.random.Generator) -> None:
    """Rows of the prompt come back as they were, generated rows stay as they are, in order; layers that lose nothing are left alone."""
    seed, ids = int(rng.integers(1 << 30)), tokens(rng, 12)
    stack = policies(index_scope=scope, layers=[0, 1, 3], **OFTEN)
    with start(model, stack, seed, kv_type=kv_type) as session, start(model, None, seed, kv_type=kv_type) as plain:
        n = plain.n_past
        session.feed(ids, generated=True)
        before = [session.kv(i) for i in range(4)]
        assert len(session.prunings) > 1 and session.positions(2).shape[-1] == n + 12
        session.restore()
        for i in range(4):
            np.testing.assert_array_equal(np.broadcast_to(session.positions(i), (2, n + 12)), np.arange(n + 12)[None].repeat(2, 0))
            for whole, part, untouched in zip(session.kv(i), before[i], plain.kv(i), strict=True):
                np.testing.assert_array_equal(whole[:, :n], untouched)
                np.testing.assert_array_equal(whole[:, n:], part[:, -12:])
        session.restore()


def test_restore_is_refused_where_nothing_was_kept(model: kvs.Model, rng: np.random.Generator) -> None:
    with start(model, policies(reversible=False), 3) as session:
        session.feed(tokens(rng, 4), generated=True)
        before = state(session)
        with pytest.raises(kvs.PolicyError, match=r"reversible=True"):
            session.restore()
        assert_equal(state(session), before)
    with start(model, None, 3) as session:
        session.restore()


# ---- rewind ----


@pytest.mark.parametrize("smooth", [False, True], ids=["alone", "stacked"])
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("scope", ["layer", "kv_head"])
def test_rewind_to_any_row_and_again(scope: str, kv_type: str, smooth: bool, model: kvs.Model, rng: np.random.Generator) -> None:
    """To before, onto and behind the rows at which prunings happened: the logits of that row once more, then the same answer again."""
    seed, ids = int(rng.integers(1 << 30)), tokens(rng, 12)
    with start(model, policies(smooth=smooth, index_scope=scope, **OFTEN), seed, kv_type=kv_type) as session:
        n = session.n_past
        states = [state(session)]
        for id in ids:
            session.feed([id], generated=True)
            states.append(state(session))
        assert len(states[-1]["prunings"]) > 1
        for there in sorted({0, *(p.step for p in states[-1]["prunings"]), *rng.integers(0, 12, 3).tolist()}):
            session.rewind(session.n_past - n - there)
            assert_equal(state(session), states[there])
            session.feed(ids[there:], generated=True)
            assert_equal(state(session), states[-1])
            session.rewind(12 - there)
            session.feed(ids[there:], generated=True)  # nobody asks for the logits of the row between
            assert_equal(state(session), states[-1])


@pytest.mark.parametrize("far", [False, True])
def test_rewind_onto_a_pruning_right_behind_a_picture(far: bool, model: kvs.Model, rng: np.random.Generator) -> None:
    """KVSmooth mixes the first token with the last row of the picture, which has left the cache; it must have come back by then."""
    for seed in range(6):
        with model.session(n_ctx=128, kv_type="f32", policy=policies(smooth=True, layers=[1, 3])) as session:
            session.feed([1, 300])
            session.feed_image(picture(np.random.default_rng(seed)))
            ids = tokens(rng, 45 if far else 4)  # far: beyond the exact rows that are kept
            session.feed(ids[:1], generated=True)
            expected = state(session)
            session.feed(ids[1:], generated=True)
            after = session.logits()
            session.rewind(len(ids) - 1)
            assert_equal(state(session), expected)
            session.feed(ids[1:], generated=True)
            np.testing.assert_array_equal(session.logits(), after)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_irreversible_rewinds(kv_type: str, model: kvs.Model, rng: np.random.Generator) -> None:
    """Behind the last pruning as ever; across one never, except to where no row of its pictures is left."""
    seed, ids = int(rng.integers(1 << 30)), tokens(rng, 6)
    with start(model, policies(reversible=False, times=1), seed, 1, kv_type=kv_type) as session:
        n = session.n_past
        logits = logits_of(session, ids)
        first = int(np.flatnonzero(np.diff(session.positions(0)) > 1)[0]) + 1
        session.rewind(4)
        np.testing.assert_array_equal(session.logits(), logits[2])
        for there in (n + 1, n, n - 1, 18):
            before = state(session)
            with pytest.raises(kvs.PolicyError, match=r"rewind by .* PruneHal\(reversible=True\)"):
                session.rewind(session.n_past - there)
            assert_equal(state(session), before)
        session.rewind(session.n_past - 2)
        assert first >= 2 and session.prunings == [] and session.positions(0).tolist() == [0, 1]
        session.feed_image(picture(rng))
        session.feed(ids, generated=True)
        assert session.prunings == [kvs.Pruning(1, "forced", 16, 8)]
        session.rewind(session.n_past)
        prompt(session, np.random.default_rng(seed), 1)
        np.testing.assert_array_equal(logits_of(session, ids), logits)


def test_rewind_to_a_later_picture(model: kvs.Model, rng: np.random.Generator) -> None:
    """Rows of the first picture stay out when a rewind ends between the two and only the second one's pruning is undone by it."""
    for seed in range(40):
        with start(model, policies(reversible=False, times=1, per_image_quota=True, keep=0.4), seed, 1) as session:
            session.feed(tokens(rng, 3), generated=True)
            between, before = session.n_past, session.positions(0)
            session.feed_image(picture(rng))
            session.feed(tokens(rng, 3), generated=True)
            rows = session.positions(0)
            assert len(session.prunings) == 2
            if (rows[: len(before)] != before).any():  # of the first picture, too: those are gone for good
                with pytest.raises(kvs.PolicyError):
                    session.rewind(session.n_past - between)
                return
    raise AssertionError("the first picture never lost rows")


# ---- fork, save, load ----


def go_on(session: kvs.Session, ids: list[int], seed: int) -> dict[str, Any]:
    """More tokens, another picture, more tokens, a rewind over a pruning."""
    session.feed(ids, generated=True)
    prompt(session, np.random.default_rng(seed), 1)
    session.feed(ids, generated=True)
    if session.policy[-1].reversible if isinstance(session.policy, tuple) else session.policy.reversible:
        session.rewind(len(ids))
        session.logits()
        session.feed(ids, generated=True)
    return state(session)


@pytest.mark.parametrize("smooth", [False, True], ids=["alone", "stacked"])
@pytest.mark.parametrize("reversible", [False, True], ids=["lost", "kept"])
@pytest.mark.parametrize("scope", ["layer", "kv_head"])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_fork_save_and_load_go_on_alike(
    kv_type: str, scope: str, reversible: bool, smooth: bool, model: kvs.Model, rng: np.random.Generator, tmp_path: Path
) -> None:
    stack, seed, ids = policies(reversible, smooth, index_scope=scope, layers=[1, 2]), int(rng.integers(1 << 30)), tokens(rng, 5)
    with start(model, stack, seed, kv_type=kv_type) as session:
        session.feed(ids, generated=True)
        assert session.prunings
        now = state(session)
        session.save(tmp_path / "s")
        with session.fork() as fork, kvs.Session.load(model, tmp_path / "s", stack) as loaded:
            assert_equal(state(fork), now)
            assert_equal(state(loaded), now)
            expected = go_on(session, ids, seed + 1)
            assert_equal(state(fork), now)
            assert_equal(go_on(fork, ids, seed + 1), expected)
            assert_equal(go_on(loaded, ids, seed + 1), expected)


def test_saved_with_other_parameters(model: kvs.Model, rng: np.random.Generator, tmp_path: Path) -> None:
    with start(model, policies(), 1) as session:
        session.feed(tokens(rng, 3), generated=True)
        session.save(tmp_path / "s")
    for other, what in (
        (None, "saved with PruneHal, to be loaded with no policy"),
        (policies(smooth=True), "saved with PruneHal, to be loaded with KVSmooth, PruneHal"),
        (policies(keep=0.6), "keep"),
        (policies(index_scope="kv_head"), "index_scope"),
        (policies(layers=[1]), "layers"),
        (policies(top_k=3), "top_k"),
        (policies(reversible=False), "reversible"),
    ):
        with pytest.raises(kvs.SessionFileError, match=what):
            kvs.Session.load(model, tmp_path / "s", other)


@pytest.mark.parametrize("scope", ["layer", "kv_head"])
def test_damaged_and_crafted_files(scope: str, model: kvs.Model, rng: np.random.Generator, tmp_path: Path) -> None:
    """Wild numbers of events: refused before anything is reserved or read by them; and a flipped bit anywhere."""
    stack = policies(index_scope=scope)
    with start(model, stack, 1, kv_type="f16") as session:
        session.feed(tokens(rng, 5), generated=True)
        n_events = len(session.prunings)
        session.save(tmp_path / "s")
    saved = (tmp_path / "s").read_bytes()
    assert sealed(saved) == saved and struct.unpack_from("<i", saved, 60)[0] == n_events > 0

    def refused(data: bytes) -> None:
        (tmp_path / "t").write_bytes(data)
        with pytest.raises(kvs.SessionFileError, match=r"damaged|cut off"):
            kvs.Session.load(model, tmp_path / "t", stack)

    for at in range(HEADER, HEADER + 16 * n_events, 4):
        for value in (-1, 0, 7, 1 << 20, 0x7FFFFFFF, -0x80000000):
            if struct.unpack_from("<i", saved, at)[0] != value:
                refused(saved[:at] + struct.pack("<i", value) + saved[at + 4 :])
    for value in (-1, 0, n_events + 1, 65535, 1 << 20):
        refused(sealed(saved[:60] + struct.pack("<i", value) + saved[64:]))
    for at in rng.integers(HEADER, len(saved), 60):
        data = bytearray(saved)
        data[at] ^= 1 << int(rng.integers(8))
        refused(bytes(data))
    for n in rng.integers(HEADER, len(saved), 20):
        refused(saved[:n])


def hashed(seed: int, data: bytes) -> int:
    """kvs_hash"""
    mask, h = (1 << 64) - 1, seed ^ len(data) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    for word in struct.unpack(f"<{-(-len(data) // 8)}Q", data + bytes(-len(data) % 8)) + ((0,) if len(data) % 8 == 0 else ()):
        h = (h ^ word) * PRIME & mask
        h ^= h >> 32
    h = h * PRIME & mask
    return h ^ h >> 32


def pieces(session: kvs.Session, n_events: int, n_turns: int, n_sets: int) -> list[int]:
    """Lengths of the first pieces of a file, which are hashed one by one: header, events, timeline, pictures, lists of marks."""
    n = session.n_past
    return [HEADER, *[16] * n_events, 4 * n, 8 * n, n, *([4 * n_turns] if n_turns else []), *[16] * 2, *[2 * n] * (4 * n_sets)]


@pytest.mark.parametrize("scope", ["layer", "kv_head"])
def test_crafted_marks(scope: str, model: kvs.Model, rng: np.random.Generator, tmp_path: Path) -> None:
    """Files whose checksums are right, with marks that no pruning makes: another number, a row of text, a row too many or too few,
    a whole picture, a layer that is not pruned."""
    stack, n_sets = policies(reversible=False, index_scope=scope, layers=[0, 2], times=1), 2 if scope == "kv_head" else 1
    with start(model, stack, 1, kv_type="f16") as session:
        session.feed(tokens(rng, 2), generated=True)
        session.save(tmp_path / "s")
        lengths, n, there = pieces(session, 1, 0, n_sets), session.n_past, np.atleast_2d(session.positions(0))[0]
        with session._handle as pointer:
            ids = session._timeline(pointer)[0]
        n_layer_rows = [session.positions(i).shape[-1] for i in range(4)]
    saved = (tmp_path / "s").read_bytes()
    lists_at = sum(lengths[: -4 * n_sets])
    for rows in n_layer_rows:
        lengths += [32 * rows] * 4 + [4 * n] * 3
    lengths += [4 * model.n_vocab]
    assert sum(lengths) + 8 == len(saved)

    def seal(data: bytes) -> bytes:
        h, at = 0, 0
        for length in lengths:
            h, at = hashed(h, data[at : at + length]), at + length
        return data[:at] + struct.pack("<Q", h)

    assert seal(saved) == saved
    marks = np.frombuffer(saved, np.uint16, 4 * n_sets * n, lists_at).reshape(4, n_sets, n)
    image, gone = np.flatnonzero(ids < 0), np.flatnonzero(marks[0, 0])
    assert set(gone) == set(range(n)) - set(there) and not marks[1].any()

    def refused(change: Any) -> None:
        changed = marks.copy()
        change(changed)
        (tmp_path / "t").write_bytes(seal(saved[:lists_at] + changed.tobytes() + saved[lists_at + changed.nbytes :]))
        with pytest.raises(kvs.SessionFileError, match="damaged"):
            kvs.Session.load(model, tmp_path / "t", stack)

    def move(to: int) -> Any:
        def change(m: np.ndarray) -> None:
            m[0, 0, gone[0]], m[0, 0, to] = 0, 1

        return change

    refused(lambda m: m.__setitem__((0, 0, gone[0]), 2))
    refused(lambda m: m.__setitem__((0, 0, gone[0]), 0))
    refused(lambda m: m.__setitem__((0, 0, next(i for i in image if i in there)), 1))
    refused(lambda m: m.__setitem__((1, 0, gone[0]), 1))
    refused(move(0))
    refused(move(n - 1))

    def whole_picture(m: np.ndarray) -> None:
        first = image[:16]
        m[0, 0], taken = 0, [*first, *image[16:]][: len(gone)]
        m[0, 0, taken] = 1

    if len(gone) >= 16:
        refused(whole_picture)


# ---- memory, and calls that fail ----


@pytest.mark.parametrize("reversible", [False, True])
def test_memory_falls_by_the_rows(reversible: bool, model: kvs.Model, rng: np.random.Generator) -> None:
    with start(model, policies(reversible, times=1), 1, kv_type="f16") as session:
        before = session.nbytes
        session.feed(tokens(rng, 2), generated=True)
        dropped = 4 * 2 * 2 * 16 * (16 * 2)  # layers, KV heads, K and V, rows, bytes of a row
        assert session.prunings[0].rows_before - session.prunings[0].rows_after == 16
        assert before - session.nbytes == (0 if reversible else dropped)


def test_a_cancelled_feed_leaves_it_as_it_was(model: kvs.Model, rng: np.random.Generator) -> None:
    with start(model, policies(), 1) as session:
        session.feed(tokens(rng, 4), generated=True)
        before = state(session)
        flag = _native.Flag()
        flag.set()
        with pytest.raises(kvs.CancelledError):
            feed_with_flag(session, tokens(rng, 9), flag)
        assert_equal(state(session), before)


def test_a_picture_that_does_not_fit(model: kvs.Model, rng: np.random.Generator) -> None:
    with start(model, policies(reversible=False), 1, 1, n_ctx=40) as session:
        session.feed(tokens(rng, 6), generated=True)
        before = state(session)
        with pytest.raises(kvs.ContextOverflowError):
            session.feed_image(picture(rng))
        assert_equal(state(session), before)
