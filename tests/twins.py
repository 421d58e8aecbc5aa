"""A session of the runtime and one of the NumPy reference, fed alike and compared after each step."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from reference import KVSmooth, PruneHal, Session
from tiny import MEAN, STD, Weights

import pykvsmooth as kvs
from pykvsmooth import _native
from pykvsmooth._native import ffi, lib

Array = np.ndarray
# Entropies closer than this may be ranked either way (float32 sums against float64). With a rounded cache a value on the edge
# between two stored numbers falls to either side, and entropies differ by more.
TIE = {"f32": 3e-5, "f16": 1e-3, "q8_0": 1e-2}
BOUNDS = {
    "f32": {"entropy": 1e-4, "mass": 1e-4, "logits": 1e-3, "kv": 1e-3},
    "f16": {"entropy": 2e-3, "mass": 1e-3, "logits": 2e-2, "kv": 1e-2},
    "q8_0": {"entropy": 2e-2, "mass": 1e-2, "logits": 0.2, "kv": 0.1},
}


def tokens(rng: np.random.Generator, n: int) -> list[int]:
    """n ids, the three control tokens of the tiny vocabulary left out"""
    return rng.integers(3, 400, n).tolist()


def picture(rng: np.random.Generator, size: int = 56) -> Array:
    """A smooth random picture (size, size, 3) uint8: what a photograph scaled down looks like to the tower."""
    coarse = rng.integers(0, 256, (5, 5, 3)).repeat(size // 5 + 1, axis=0).repeat(size // 5 + 1, axis=1)[:size, :size]
    return np.clip(coarse + rng.normal(0, 20, coarse.shape), 0, 255).astype(np.uint8)


def pixels(image: Array) -> Array:
    """uint8 (S, S, 3) -> normalised (3, S, S)"""
    return ((image / 255.0 - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)


# ---- the native floor below pykvsmooth.Session, for what only generate() and generate_batch() reach in Python ----


def call(function: Callable[..., int], *arguments: Any) -> None:
    err = _native.new_error()
    _native.check(function(*arguments, err), err)


def new_turn(session: kvs.Session) -> None:
    with session._handle as pointer:
        call(lib.kvs_session_new_turn, pointer)


def step_together(sessions: Sequence[kvs.Session], ids: Sequence[int]) -> None:
    """One generated token for each session in one pass over the weights."""
    with ExitStack() as held:
        pointers = ffi.new("kvs_session *[]", [held.enter_context(session._handle) for session in sessions])
        call(lib.kvs_sessions_step, pointers, ffi.new("int32_t[]", list(ids)), len(ids), ffi.NULL)


def feed_with_flag(session: kvs.Session, ids: Sequence[int], flag: _native.Flag) -> None:
    array = ffi.new("int32_t[]", list(ids))
    with session._handle as pointer:
        call(lib.kvs_session_feed, pointer, ffi.new("kvs_chunk *", {"ids": array, "n": len(ids)}), 1, flag.pointer)


def timeline(session: kvs.Session) -> list[int]:
    """Ids of all rows, -1 for an image row."""
    n = session.n_past
    ids, generated, hashes = ffi.new("int32_t[]", n), ffi.new("int32_t[]", n), ffi.new("uint64_t[]", n)
    with session._handle as pointer:
        call(lib.kvs_session_timeline, pointer, n, ids, hashes, generated)
    return list(ids)


@dataclass
class Twins:
    model: kvs.Model
    weights: Weights
    policy: dict[str, Any] | None = None
    kv_type: str = "f32"
    n_ctx: int = 256
    bounds: dict[str, float] | None = None
    prune: dict[str, Any] | None = None
    worst: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bounds = self.bounds or BOUNDS[self.kv_type]
        policies = [kind(**given) for kind, given in ((kvs.KVSmooth, self.policy), (kvs.PruneHal, self.prune)) if given is not None]
        self.ours = self.model.session(n_ctx=self.n_ctx, kv_type=self.kv_type, policy=policies)
        followed = None if self.policy is None else KVSmooth(**self.policy, observed={}, tolerance=TIE[self.kv_type])
        prune = None if self.prune is None else PruneHal(**self.prune, tolerance=TIE[self.kv_type] / 10)
        self.truth = Session(self.weights.text, followed, self.kv_type, prune=prune)

    def close(self) -> None:
        self.ours.close()

    def __enter__(self) -> "Twins":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def feed(self, ids: Sequence[int]) -> None:
        self.ours.feed(list(ids))
        self.truth.feed(list(ids))

    def feed_image(self, image: Array) -> None:
        self.ours.feed_image(image)
        self.truth.feed(self.weights.clip.encode(pixels(image)))

    def step(self, token: int) -> None:
        """One generated token; strengths must agree before anything is compared that follows from them."""
        row = self.truth.n_past
        if self.kv_type != "f32":
            self.take_over_cache()
        self.ours.feed([token], generated=True)
        strengths = self.ours.strengths()[-1]
        if self.policy is not None and self.truth.n_group == 1:
            self.truth.policy.observed |= {(row, layer): float(lam) for layer, lam in enumerate(strengths)}
        if self.prune is not None:
            self.truth.observed = self.observe()
        self.truth.feed([token], generated=True)
        expected = self.truth.strengths()[-1]
        assert np.allclose(strengths, expected, rtol=0, atol=1e-5, equal_nan=True), (row, strengths, expected)
        self.compare("entropy", self.ours.entropies()[-1], self.truth.entropies()[-1])
        self.compare("logits", self.ours.logits(), self.truth.logits())
        if self.prune is not None:
            self.check_pruned()

    def live(self, layer: int) -> Array:
        """(G, n_past) bool: rows that a layer of ours has."""
        live = np.zeros((self.weights.text.n_head_kv, self.ours.n_past), bool)
        positions = self.ours.positions(layer)
        for rows, there in zip(live, np.broadcast_to(positions, (len(live), positions.shape[-1])), strict=True):
            rows[there] = True
        return live

    def observe(self) -> tuple[bool, list[Array]]:
        """Whether ours was pruned behind its newest row, and the rows that it has."""
        return len(self.ours.prunings) > len(self.truth.prunings), [self.live(i) for i in range(self.weights.text.n_layer)]

    def check_pruned(self) -> None:
        """The same rows at the same step for the same reason."""
        steps = np.cumsum(self.truth.generated)
        expected = [kvs.Pruning(int(steps[row]), reason, before, after) for row, reason, before, after in self.truth.prunings]
        assert self.ours.prunings == expected
        self.compare("mass", self.ours.visual_masses()[-1], self.truth.visual_masses()[-1])
        for layer, truth in enumerate(self.truth.layers):
            np.testing.assert_array_equal(self.live(layer), truth.live.T, err_msg=f"layer {layer}")

    def steps(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.step(int(token))

    def greedy(self, n: int) -> list[int]:
        """n tokens as the reference chooses them; ours must choose the same where the margin is not within the bound of logits."""
        tokens = []
        for _ in range(n):
            logits = self.truth.logits()
            tokens.append(int(logits.argmax()))
            top = np.sort(logits)[-2:]
            if top[1] - top[0] > 2 * self.bounds["logits"]:
                assert int(self.ours.logits().argmax()) == tokens[-1], f"token {len(tokens) - 1}: margin {top[1] - top[0]:.4g}"
            self.step(tokens[-1])
        return tokens

    def take_over_cache(self) -> None:
        """A value on the edge between two stored numbers falls to either side. That is one level in the cache, checked here;
        but kept, such levels would drift apart row by row. So the reference goes on from the rows that we stored."""
        self.check_cache()
        for layer, truth in enumerate(self.truth.layers):
            for side, stored in zip((truth.k, truth.v), self.ours.kv(layer), strict=True):
                for g, rows in enumerate(stored):
                    side[truth.live[:, g], g] = rows

    def check_cache(self) -> None:
        for layer in range(self.weights.text.n_layer):
            for ours, truth in zip(self.ours.kv(layer), self.truth.kv(layer), strict=True):
                self.compare("kv", ours, truth, f"layer {layer}")

    def compare(self, what: str, ours: Array, truth: Array, where: str = "") -> None:
        assert ours.shape == truth.shape, (what, where, ours.shape, truth.shape)
        assert np.isfinite(ours).all(), (what, where)
        error = float(np.abs(ours - truth).max(initial=0))
        self.worst[what] = max(self.worst.get(what, 0.0), error)
        assert error <= self.bounds[what], f"{what} {where} at row {self.truth.n_past - 1}: off by {error:.3g}"
