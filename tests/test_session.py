"""The timeline at its low level: fork, rewind, save and load, overflow, cancellation. Equal means equal bit for bit."""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import Pair
from devices import DEVICE
from twins import feed_with_flag, new_turn, picture, timeline, tokens

import pykvsmooth as kvs
from pykvsmooth import _native
from pykvsmooth.session import step

KV_TYPES = ["f32", "f16", "q8_0"]
POLICIES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "kvsmooth": {"layers": [1, 2, 3]},
    "relative": {"layers": [1, 2, 3], "rope_mode": "relative", "window": 6},
    "o": {"layers": [1, 2, 3], "target": "o"},
    "one_step": {"layers": [1, 2, 3], "ema": "one_step", "entropy_heads": "per_kv_group"},
    "smooth_prompt": {"layers": [1, 2, 3], "smooth_prompt": "last_token", "warm_start": ("prompt_rows", 3)},
}


@pytest.fixture(scope="module")
def model(tiny_pair: Pair) -> Iterator[kvs.Model]:
    with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, device=DEVICE) as model:
        yield model


def open_session(model: kvs.Model, policy: str, kv_type: str = "f16", n_ctx: int = 160) -> kvs.Session:
    arguments = POLICIES[policy]
    return model.session(n_ctx=n_ctx, kv_type=kv_type, policy=None if arguments is None else kvs.KVSmooth(**arguments))


def state(session: kvs.Session, n_layer: int = 4) -> dict[str, np.ndarray]:
    """Everything that can be seen of a session."""
    seen = {"logits": session.logits(), "entropies": session.entropies(), "strengths": session.strengths()}
    for layer in range(n_layer):
        seen[f"k{layer}"], seen[f"v{layer}"] = session.kv(layer)
        seen[f"positions{layer}"] = np.asarray(session.positions(layer))
    return seen


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Rows that ran in another company: a GPU has other kernels for few rows than for many, and rounds otherwise."""
    if DEVICE == "cpu":
        assert_equal(a, b)
        return
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-3, err_msg=name)


def begin(session: kvs.Session, rng: np.random.Generator, generated: int = 12) -> None:
    session.feed([1, *tokens(rng, 6)])
    session.feed_image(picture(rng))
    session.feed(tokens(rng, 5))
    session.feed(tokens(rng, generated), generated=True)


# ---- fork ----


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_fork_then_step_equals_step(policy: str, kv_type: str, model: kvs.Model, rng: np.random.Generator) -> None:
    more, other = tokens(rng, 9), tokens(rng, 9)
    with open_session(model, policy, kv_type) as session:
        begin(session, rng)
        with session.fork() as fork:
            assert_equal(state(session), state(fork))
            before = state(session)
            fork.feed(other, generated=True)  # what the fork does...
            assert_equal(before, state(session))  # ...nobody else sees
        with session.fork() as fork:
            fork.feed(more, generated=True)
            session.feed(more, generated=True)
            assert_equal(state(session), state(fork))


def test_fork_outlives_its_parent(model: kvs.Model, rng: np.random.Generator) -> None:
    session = open_session(model, "kvsmooth")
    begin(session, rng)
    fork, expected = session.fork(), state(session)
    session.close()
    assert_equal(expected, state(fork))
    fork.feed(tokens(rng, 3), generated=True)
    fork.close()


# ---- rewind ----


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n", [1, 2, 7, 11])
def test_rewind_then_replay_equals(n: int, policy: str, kv_type: str, model: kvs.Model, rng: np.random.Generator) -> None:
    last = tokens(rng, 12)
    with open_session(model, policy, kv_type) as session:
        begin(session, rng, 3)
        session.feed(last, generated=True)
        expected = state(session)
        session.rewind(n)
        assert session.n_past == len(expected["positions0"]) - n
        session.feed(tokens(rng, min(n, 4)), generated=True)  # somewhere else first
        session.rewind(min(n, 4))
        session.feed(last[-n:], generated=True)
        assert_equal(expected, state(session))


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_rewind_shows_the_logits_and_strengths_of_before(policy: str, kv_type: str, model: kvs.Model, rng: np.random.Generator) -> None:
    with open_session(model, policy, kv_type) as session:
        begin(session, rng, 6)
        expected = state(session)
        session.feed(tokens(rng, 5), generated=True)
        session.rewind(5)
        assert_equal(expected, state(session))


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n_question", [1, 6])
def test_rewind_into_the_prompt(n_question: int, policy: str, kv_type: str, model: kvs.Model, rng: np.random.Generator) -> None:
    """Back behind the picture, then another question: as if the first had never been asked, or an error if that can't be."""
    image, head, question, answer = picture(rng), [1, *tokens(rng, 4)], tokens(rng, n_question), tokens(rng, 8)
    with open_session(model, policy, kv_type) as session, open_session(model, policy, kv_type) as fresh:
        for one in (session, fresh):
            one.feed(head)
            one.feed_image(image)
        session.feed(tokens(rng, 7))
        session.feed(tokens(rng, 40), generated=True)  # more than the ring of exact rows holds
        session.rewind(47)
        fresh.feed(question)
        fresh.feed(answer, generated=True)
        session.feed(question)
        if policy == "smooth_prompt" and n_question == 1 and kv_type != "f32":  # the row before it is a picture's: gone
            with pytest.raises(kvs.PolicyError):
                session.feed(answer, generated=True)
            return
        session.feed(answer, generated=True)
        assert_equal(state(session), state(fresh))


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n", [50, 51])
def test_rewind_to_the_end_of_the_prompt(n: int, policy: str, kv_type: str, model: kvs.Model, rng: np.random.Generator) -> None:
    """The last prompt row is what the first token is mixed with: it is computed again if its exact values are gone. A row computed
    alone may differ from the same row in a block by rounding, so that equal here means equal up to one step of the store."""
    prompt, answer = tokens(rng, 30), tokens(rng, 50)
    with open_session(model, policy, kv_type) as session:
        session.feed(prompt)
        session.feed(answer, generated=True)
        expected = state(session)
        session.rewind(n)
        session.feed(prompt[80 - n :])
        session.feed(answer, generated=True)
        got = state(session)
    for name in expected:
        if name[0] in "kv":
            np.testing.assert_allclose(expected[name][:, :31], got[name][:, :31], rtol=0, atol=5e-2, err_msg=name)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "plain"])
def test_rewind_beyond_the_exact_rows(policy: str, kv_type: str, model: kvs.Model, rng: np.random.Generator) -> None:
    more = tokens(rng, 4)
    with open_session(model, policy, kv_type) as session:
        begin(session, rng, 60)
        expected = state(session)
        with pytest.raises(kvs.PolicyError, match="exact"):
            session.rewind(40)
        assert_equal(expected, state(session))
        with session.fork() as fork:
            for one in (session, fork):
                one.feed(more, generated=True)
            assert_equal(state(session), state(fork))


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "plain"])
def test_every_rewind_that_is_allowed_is_exact(policy: str, kv_type: str, model: kvs.Model, rng: np.random.Generator) -> None:
    """Also at the edge of the ring: what rewind grants, logits and further steps must be able to keep."""
    with open_session(model, policy, kv_type) as session:
        begin(session, rng, 45)
        history = session.fork()
        allowed = []
        for n in range(1, 46):
            with history.fork() as fork:
                try:
                    fork.rewind(n)
                except kvs.PolicyError:
                    continue
                allowed.append(n)
                fork.logits()
                fork.feed(tokens(rng, 1), generated=True)
        history.close()
        assert allowed[:16] == list(range(1, 17)), allowed
        last = allowed[-2] if allowed[-1] == 45 else allowed[-1]  # 45: back to the prompt
        ids = timeline(session)[-last:]
        expected = state(session)
        session.rewind(last)
        session.feed(ids, generated=True)
        assert_equal(expected, state(session))


@pytest.mark.parametrize("policy", ["kvsmooth", "o", "smooth_prompt"])
def test_rows_that_run_again_stay_in_the_timeline(policy: str, model: kvs.Model, rng: np.random.Generator) -> None:
    """Behind a rewind beyond the ring the prompt's last rows run again; if that is cancelled, nothing has changed."""
    prompt, answer = tokens(rng, 20), tokens(rng, 40)
    with open_session(model, policy, "f32") as session, open_session(model, policy, "f32") as fresh:
        session.feed(prompt)
        session.feed(answer, generated=True)
        session.rewind(40)
        flag = _native.Flag()
        flag.set()
        with session._handle as pointer, pytest.raises(kvs.CancelledError):
            step([pointer], [answer[0]], flag)
        assert timeline(session) == prompt
        fresh.feed(prompt)
        for one in (session, fresh):
            one.feed(answer[:6], generated=True)
        assert_same(state(session), state(fresh))


@pytest.mark.parametrize("policy", ["kvsmooth", "smooth_prompt"])
def test_rows_that_run_again_keep_the_turns(policy: str, model: kvs.Model, rng: np.random.Generator) -> None:
    first, answer, second, more = tokens(rng, 10), tokens(rng, 10), tokens(rng, 10), tokens(rng, 4)

    def strengths(detour: bool) -> np.ndarray:
        with open_session(model, policy) as session:
            session.feed(first)
            session.feed(answer, generated=True)
            session.feed(second)
            if detour:
                session.feed(tokens(rng, 40), generated=True)
                session.rewind(40)
            new_turn(session)
            session.feed(more, generated=True)
            return session.strengths()[-4:]

    np.testing.assert_array_equal(strengths(True), strengths(False))


def test_every_rewind_that_is_allowed_can_go_on(model: kvs.Model, rng: np.random.Generator) -> None:
    """A smoothed prompt row right behind a picture can't be had again: rewind says so, not the call after it."""
    with open_session(model, "smooth_prompt") as session:
        session.feed_image(picture(rng))
        session.feed(tokens(rng, 1))
        session.feed(tokens(rng, 36), generated=True)
        n_past = session.n_past
        for n in range(1, 37):
            try:
                session.rewind(n)
            except kvs.PolicyError:
                assert session.n_past == n_past
                continue
            session.logits()
            session.feed(tokens(rng, n), generated=True)
        with pytest.raises(kvs.PolicyError):
            session.rewind(36)


def test_plain_sessions_rewind_to_any_row(model: kvs.Model, rng: np.random.Generator) -> None:
    prompt, answer = tokens(rng, 20), tokens(rng, 60)
    with open_session(model, "plain") as session:
        session.feed(prompt)
        session.feed(answer, generated=True)
        expected = state(session)
        session.rewind(55)
        session.feed(answer[5:], generated=True)
        assert_equal(expected, state(session))
        session.rewind(80)
        assert session.n_past == 0
        session.feed(prompt)
        session.feed(answer, generated=True)
        assert_equal(expected, state(session))


def test_telemetry_of_a_row_that_took_anothers_place(model: kvs.Model, rng: np.random.Generator) -> None:
    prompt, answer, other = tokens(rng, 8), tokens(rng, 20), tokens(rng, 4)
    seen = []
    for detour in (True, False):
        with open_session(model, "kvsmooth") as session:
            session.feed(prompt)
            session.feed(answer[:16], generated=True)
            if detour:
                for token in answer[16:]:
                    with session._handle as pointer:
                        step([pointer], [token], _native.Flag())
                session.rewind(4)
            session.feed(other, generated=True)
            seen.append((session.entropies(), session.strengths()))
    for mine, expected in zip(*seen, strict=True):
        np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize("n", [-1, 200])
def test_rewind_out_of_range(n: int, model: kvs.Model, rng: np.random.Generator) -> None:
    with open_session(model, "kvsmooth") as session:
        begin(session, rng)
        expected = state(session)
        with pytest.raises(ValueError):
            session.rewind(n)
        assert_equal(expected, state(session))


def test_longer_history_rewinds_further(model: kvs.Model, rng: np.random.Generator) -> None:
    with kvs.Session(model, n_ctx=160, policy=kvs.KVSmooth(layers=[1, 2, 3]), exact_rows=64) as session:
        begin(session, rng, 70)
        expected, ids = state(session), timeline(session)[-50:]
        session.rewind(50)
        session.feed(ids, generated=True)
        assert_equal(expected, state(session))


# ---- save and load ----

CONTINUE = """
import sys, json, numpy as np
import pykvsmooth as kvs
text, mmproj, device, path, policy, ids, out = json.loads(sys.argv[1])
with kvs.Model(text, mmproj=mmproj, device=device) as model:
    session = kvs.Session.load(model, path, policy=None if policy is None else kvs.KVSmooth(**policy))
    before = session.logits()
    session.feed(ids, generated=True)
    kv = [side for layer in range(model.n_layer) for side in session.kv(layer)]
    np.savez(out, before=before, logits=session.logits(), entropies=session.entropies(), strengths=session.strengths(), kv=np.array(kv))
"""


@pytest.mark.parametrize(
    ("policy", "kv_type"),
    [("plain", "f16"), ("kvsmooth", "f16"), ("relative", "q8_0"), ("o", "f32"), ("one_step", "q8_0"), ("smooth_prompt", "f16")],
)
def test_save_then_load_in_another_process(
    policy: str, kv_type: str, model: kvs.Model, tiny_pair: Pair, rng: np.random.Generator, tmp_path: Path
) -> None:
    import json

    more, path, out = tokens(rng, 10), tmp_path / "here.kvs", tmp_path / "there.npz"
    with open_session(model, policy, kv_type) as session:
        begin(session, rng)
        session.save(path)
        assert [p.name for p in tmp_path.iterdir()] == ["here.kvs"]
        before = session.logits()
        session.feed(more, generated=True)
        arguments = json.dumps([tiny_pair.text, tiny_pair.mmproj, DEVICE, str(path), POLICIES[policy], more, str(out)])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", CONTINUE, arguments], check=True, env=environment, timeout=120)
        there = np.load(out)
        np.testing.assert_array_equal(before, there["before"])
        np.testing.assert_array_equal(session.logits(), there["logits"])
        np.testing.assert_array_equal(session.entropies(), there["entropies"])
        np.testing.assert_array_equal(session.strengths(), there["strengths"])
        np.testing.assert_array_equal([side for layer in range(model.n_layer) for side in session.kv(layer)], there["kv"])


def load(model: kvs.Model, path: Path, policy: str) -> kvs.Session:
    arguments = POLICIES[policy]
    return kvs.Session.load(model, path, policy=None if arguments is None else kvs.KVSmooth(**arguments))


def test_rewind_after_load(model: kvs.Model, rng: np.random.Generator, tmp_path: Path) -> None:
    with open_session(model, "kvsmooth") as session:
        begin(session, rng, 20)
        session.save(tmp_path / "s")
        expected, ids = state(session), timeline(session)[-9:]
        with load(model, tmp_path / "s", "kvsmooth") as loaded:
            assert_equal(expected, state(loaded))
            loaded.rewind(9)
            loaded.feed(ids, generated=True)
            assert_equal(expected, state(loaded))


def test_save_replaces_and_an_empty_session_loads(model: kvs.Model, rng: np.random.Generator, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with open_session(model, "plain") as session:
        session.save(path)
        with load(model, path, "plain") as loaded:
            assert loaded.n_past == 0
        session.feed([1, 300])
        session.save(path)
        with load(model, path, "plain") as loaded:
            assert_equal(state(session), state(loaded))
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_another_policy_is_refused(model: kvs.Model, rng: np.random.Generator, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with open_session(model, "kvsmooth") as session:
        begin(session, rng)
        session.save(path)
    for policy in ("plain", "relative", "o", "one_step", "smooth_prompt"):
        with pytest.raises(kvs.SessionFileError):
            load(model, path, policy)
    with pytest.raises(kvs.SessionFileError, match="lambda_ref"):
        kvs.Session.load(model, path, policy=kvs.KVSmooth(layers=[1, 2, 3], lambda_ref=0.8))
    with pytest.raises(kvs.SessionFileError, match="layers"):
        kvs.Session.load(model, path, policy=kvs.KVSmooth(layers=[0, 2, 3]))
    load(model, path, "kvsmooth").close()


def test_another_model_is_refused(model: kvs.Model, rng: np.random.Generator, tmp_path: Path) -> None:
    with open_session(model, "plain") as session:
        begin(session, rng)
        session.save(tmp_path / "s")
    text, mmproj, _ = tiny.write_pair(tmp_path / "other", seed=int(rng.integers(1 << 30)), load=False)
    with kvs.Model(text, mmproj=mmproj, device=DEVICE) as other, pytest.raises(kvs.SessionFileError, match="model"):
        load(other, tmp_path / "s", "plain")


@pytest.fixture(scope="module")
def saved(model: kvs.Model, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "s"
    with open_session(model, "kvsmooth") as session:
        begin(session, np.random.default_rng(5))
        session.save(path)
    return path.read_bytes()


HEADER = 944  # bytes, the last eight of them their own check
PRIME = 0xD6E8FEB86659FD93


def check_of(data: bytes) -> int:
    """kvs_hash of whole words."""
    h = len(data) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    for word in (*struct.unpack(f"<{len(data) // 8}Q", data), 0):
        h = (h ^ word) * PRIME & (1 << 64) - 1
        h ^= h >> 32
    h = h * PRIME & (1 << 64) - 1
    return h ^ h >> 32


def sealed(data: bytes) -> bytes:
    """A header that was changed, with the check that a liar would give it."""
    return data[: HEADER - 8] + struct.pack("<Q", check_of(data[: HEADER - 8])) + data[HEADER:]


def refuse(model: kvs.Model, path: Path, data: bytes, match: str | None = None) -> None:
    path.write_bytes(data)
    with pytest.raises(kvs.SessionFileError, match=match) as error:
        load(model, path, "kvsmooth")
    assert str(path) in str(error.value)


def test_damaged_files(model: kvs.Model, saved: bytes, rng: np.random.Generator, tmp_path: Path) -> None:
    """One flipped bit anywhere, header first; damage is called damage, not another model or policy."""
    for at in [*range(16, HEADER, 3), *rng.integers(HEADER, len(saved), 60)]:
        data = bytearray(saved)
        data[at] ^= 1 << int(rng.integers(8))
        refuse(model, tmp_path / "s", bytes(data), "damaged")


def test_truncated_and_longer_files(model: kvs.Model, saved: bytes, rng: np.random.Generator, tmp_path: Path) -> None:
    for n in [0, 1, 7, 8, 15, 16, 100, 200, *rng.integers(1, len(saved), 20), len(saved) - 1]:
        refuse(model, tmp_path / "s", saved[:n])
    refuse(model, tmp_path / "s", saved + b"\0")


def test_newer_version_and_foreign_files(model: kvs.Model, saved: bytes, tmp_path: Path) -> None:
    newer = saved[:8] + struct.pack("<I", 99) + saved[12:]
    (tmp_path / "s").write_bytes(newer)
    with pytest.raises(kvs.SessionFileError, match="version"):
        load(model, tmp_path / "s", "kvsmooth")
    refuse(model, tmp_path / "s", b"GGUF" + saved[4:])
    refuse(model, tmp_path / "s", b"a text file\n" * 50)


def test_wild_headers(model: kvs.Model, saved: bytes, tmp_path: Path) -> None:
    """Sizes that no file holds: refused, whatever they are, without a crash or an allocation of terabytes."""
    assert sealed(saved) == saved
    one_pruning = struct.pack("<i", 1)  # in a session that can't have any
    refuse(model, tmp_path / "s", sealed(saved[:60] + one_pruning + saved[64:]), "damaged")
    for at in range(16, 76, 4):
        for value in (-1, 0x7FFFFFFF, -0x80000000, 1 << 20):
            refuse(model, tmp_path / "s", sealed(saved[:at] + struct.pack("<i", value) + saved[at + 4 :]))


def test_only_regular_files_are_replaced(model: kvs.Model, tmp_path: Path) -> None:
    """Root could rename a session over a device; a link stays one."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with open_session(model, "plain") as session:
        session.feed([1, 2])
        for path in (tmp_path, tmp_path / "pipe"):
            with pytest.raises(kvs.SessionFileError, match=r"folder|not a regular file"):
                session.save(path)
        session.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "pipe", "real"]
    with load(model, tmp_path / "real", "plain") as session:
        assert session.n_past == 2


def test_no_such_file_and_no_such_folder(model: kvs.Model, tmp_path: Path) -> None:
    with pytest.raises((OSError, kvs.SessionFileError)):
        load(model, tmp_path / "none", "plain")
    with pytest.raises((OSError, kvs.SessionFileError)):
        load(model, tmp_path, "plain")
    with open_session(model, "plain") as session:
        session.feed([1])
        with pytest.raises((OSError, kvs.SessionFileError)):
            session.save(tmp_path / "none" / "s")
        session.save(tmp_path / "s")


# ---- overflow and cancellation ----


@pytest.mark.parametrize("policy", ["plain", "kvsmooth"])
def test_context_overflow_leaves_the_session_usable(policy: str, model: kvs.Model, rng: np.random.Generator) -> None:
    with open_session(model, policy, n_ctx=40) as session:
        session.feed(tokens(rng, 30))
        session.feed(tokens(rng, 3), generated=True)
        expected = state(session)
        for overflow in (
            lambda: session.feed(tokens(rng, 8)),
            lambda: session.feed_image(picture(rng)),
            lambda: session.feed(tokens(rng, 8), generated=True),
        ):
            with pytest.raises(kvs.ContextOverflowError) as error:
                overflow()
            assert (error.value.needed, error.value.n_ctx) in {(41, 40), (49, 40)}
            if session.n_past > 33:  # tokens one by one: those that fitted may be there
                session.rewind(session.n_past - 33)
            assert_equal(expected, state(session))
        session.feed(tokens(rng, 7), generated=True)
        assert session.n_past == 40
        with pytest.raises(kvs.ContextOverflowError):
            session.feed([300], generated=True)
        session.rewind(10)
        session.feed(tokens(rng, 10), generated=True)


def test_bad_ids_leave_the_session_as_it_was(model: kvs.Model, rng: np.random.Generator) -> None:
    with open_session(model, "kvsmooth") as session:
        begin(session, rng)
        expected = state(session)
        for bad in ([300, -1], [model.n_vocab], [300, 1 << 30]):
            for generated in (False, True):
                with pytest.raises(ValueError):
                    session.feed(bad, generated=generated)
                if session.n_past > len(expected["positions0"]):
                    session.rewind(session.n_past - len(expected["positions0"]))
                assert_equal(expected, state(session))


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n", [5, 100])
def test_cancelled_feed_leaves_the_session_as_it_was(n: int, policy: str, kv_type: str, model: kvs.Model, rng: np.random.Generator) -> None:
    """Also what is not seen at once: the row that the next token is mixed with."""
    more = tokens(rng, 6)
    with open_session(model, policy, kv_type) as session:
        begin(session, rng)
        with session.fork() as fork:
            flag = _native.Flag()
            flag.set()
            with pytest.raises(kvs.KVSmoothError, match="cancel"):
                feed_with_flag(session, tokens(rng, n), flag)
            assert session.n_past == fork.n_past
            for one in (session, fork):
                one.feed(more, generated=True)
            assert_equal(state(session), state(fork))


def test_feed_cancelled_in_the_middle(rng: np.random.Generator, tmp_path: Path) -> None:
    """A prompt of some seconds, given up after a moment by another thread."""
    import threading
    import time

    text, _, _ = tiny.write_pair(tmp_path, seed=1, vision=False, load=False, n_embd=512, n_head=8, n_head_kv=8, n_ff=2048, n_layer=8)
    with kvs.Model(text, device=DEVICE) as model, open_session(model, "kvsmooth", n_ctx=4096) as session:
        session.feed(tokens(rng, 10))
        session.feed(tokens(rng, 3), generated=True)
        expected = state(session, 8)
        flag = _native.Flag()
        timer = threading.Timer(0.05, flag.set)
        timer.start()
        began = time.monotonic()
        with pytest.raises(kvs.KVSmoothError, match="cancel"):
            feed_with_flag(session, tokens(rng, 4000), flag)
        assert time.monotonic() - began < 2.5  # the machine may be busy; alone it is some milliseconds
        timer.join()
        assert_equal(expected, state(session, 8))
        session.feed(tokens(rng, 3), generated=True)
