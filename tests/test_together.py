"""Sessions that draw their ids at once: each as if alone, bit for bit, and an error of one changes nothing for any."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from devices import DEVICE
from test_sampler import OFF, draw_on
from twins import call, step_together, timeline, tokens

import pykvsmooth as kvs
from pykvsmooth._native import Flag, ffi, lib

ISA = "base" if DEVICE == "cpu" else "cuda"
HOWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_k": 5, "n_top": 3},
    {"temperature": 1.5, "top_p": 0.9},
    {"min_p": 0.05, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 2.0, "n_top": 20},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 0.8, "n_top": 1},
]


def sampling(how: dict[str, Any]) -> Any:
    return ffi.new("kvs_sampling *", {"struct_size": ffi.sizeof("kvs_sampling"), **OFF, **how})


def draw(sessions: list[kvs.Session], hows: list[Any], flag: Flag | None = None) -> list[Any]:
    """From all of them at once."""
    drawn = [ffi.new("kvs_sample *") for _ in sessions]
    with ExitStack() as held:
        pointers = ffi.new("kvs_session *[]", [held.enter_context(session._handle) for session in sessions])
        params, out = ffi.new("kvs_sampling *[]", hows), ffi.new("kvs_sample *[]", drawn)
        call(lib.kvs_sessions_sample, pointers, params, len(sessions), out, flag.pointer if flag else ffi.NULL)
    return drawn


def draw_alone(session: kvs.Session, how: Any) -> Any:
    drawn = ffi.new("kvs_sample *")
    with session._handle as pointer:
        call(lib.kvs_session_sample, pointer, how, drawn, ffi.NULL)
    return drawn


def told(sample: Any) -> bytes:
    return bytes(ffi.buffer(sample))


@contextmanager
def sessions_of(model: kvs.Model, n: int, rng: np.random.Generator) -> Iterator[list[kvs.Session]]:
    """Of different lengths, logits and random numbers."""
    with ExitStack() as stack:
        root = stack.enter_context(model.session(n_ctx=64, kv_type="f32"))
        root.feed([1, 5, 6])
        sessions: list[kvs.Session] = []
        for i in range(n):
            if i % 16 == 1:
                root.feed(tokens(rng, 2))
            sessions.append(stack.enter_context(root.fork()))
            reseed(sessions[-1], int(rng.integers(2**62)))
        step_together(sessions, tokens(rng, n))
        yield sessions


def reseed(session: kvs.Session, seed: int) -> None:
    with session._handle as pointer:
        call(lib.kvs_session_reseed, pointer, seed)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 32, 33, 64])
def test_each_as_alone(model: kvs.Model, rng: np.random.Generator, n: int) -> None:
    rounds = 3
    hows = [HOWS[i] for i in rng.integers(0, len(HOWS), n)] if n > 1 else [HOWS[-1]]
    params, seeds = [sampling(how) for how in hows], rng.integers(0, 2**62, n).tolist()
    with sessions_of(model, n, rng) as sessions, ExitStack() as stack:
        for session, seed in zip(sessions, seeds, strict=True):
            reseed(session, seed)
        alone = [stack.enter_context(session.fork()) for session in sessions]
        for _ in range(rounds):
            together = draw(sessions, params)
            assert [told(one) for one in together] == [told(draw_alone(*each)) for each in zip(alone, params, strict=True)]
        for i, got in enumerate(together):
            want = draw_on(ISA, sessions[i].logits(), rounds, seeds[i], timeline(sessions[i]), **hows[i])
            top = [(got.top_ids[j], got.top_logprobs[j]) for j in range(got.n_top)]
            assert (got.id, got.logprob, top) == (want.ids[-1], want.logprob, want.top)


def test_as_many_as_there_may_be(model: kvs.Model, rng: np.random.Generator) -> None:
    """More reports than one chunk of pinned memory has room for."""
    params = [sampling(HOWS[i % len(HOWS)]) for i in range(256)]
    with sessions_of(model, 256, rng) as sessions, ExitStack() as stack:
        alone = [stack.enter_context(session.fork()) for session in sessions[::17]]
        got = [told(one) for one in draw(sessions, params)]
        assert got[::17] == [told(draw_alone(*each)) for each in zip(alone, params[::17], strict=True)]
        with model.session(n_ctx=8) as one_more, pytest.raises(ValueError, match="256"):
            draw([*sessions, one_more], [*params, params[0]])
    with pytest.raises(ValueError, match="256"):
        draw([], [])


def test_all_or_nothing(model: kvs.Model, tiny_pair: Pair, rng: np.random.Generator) -> None:
    """A second try draws what the first would have drawn."""
    cancelled, wrong = Flag(), sampling({})
    cancelled.set()
    wrong.struct_size -= 1
    with sessions_of(model, 4, rng) as sessions, model.session(n_ctx=8) as empty:
        with ExitStack() as stack:
            twins = [stack.enter_context(session.fork()) for session in sessions]
            params = [sampling({}) for _ in sessions]
            failures: list[tuple[Any, list[kvs.Session], list[Any]]] = [
                (ValueError, [*sessions[:3], empty], params),
                (ValueError, sessions, [*params[:3], sampling({"top_p": 2.0})]),
                (ValueError, sessions, [*params[:3], wrong]),
            ]
            for error, those, hows in failures:
                with pytest.raises(error):
                    draw(those, hows)
            with pytest.raises(kvs.CancelledError):
                draw(sessions, params, cancelled)
            with kvs.Model(tiny_pair.text, mmproj=False, device=DEVICE) as other, other.session(n_ctx=8) as stranger:
                stranger.feed([1])
                with pytest.raises(kvs.ModelMismatchError):
                    draw([*sessions[:3], stranger], params)
            assert [told(one) for one in draw(sessions, params)] == [told(one) for one in draw(twins, params)]
        single = ffi.new("kvs_sample *")
        twice = ffi.new("kvs_session *[]", [sessions[0]._handle.cell[0]] * 2)
        out = ffi.new("kvs_sample *[]", [single] * 2)
        with pytest.raises(kvs.BusyError):
            call(lib.kvs_sessions_sample, twice, ffi.new("kvs_sampling *[]", params[:2]), 2, out, ffi.NULL)
        draw(sessions, params)


def test_behind_a_rewind(model: kvs.Model, rng: np.random.Generator) -> None:
    """Some of them have no logits: their last rows run again first."""
    with sessions_of(model, 3, rng) as sessions, ExitStack() as stack:
        sessions[1].rewind(1)
        alone = [stack.enter_context(session.fork()) for session in sessions]
        params = [sampling(HOWS[1])] * 3
        assert [told(one) for one in draw(sessions, params)] == [told(draw_alone(*each)) for each in zip(alone, params, strict=True)]
