"""PruneHal: every option against the reference on fresh random pairs; what pruning must not change."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import SEED
from devices import DEVICE
from twins import Twins, picture, step_together, tokens

import pykvsmooth as kvs

Pairs = dict[str, tuple[kvs.Model, tiny.Weights]]
# Votes come often with a share like this, and three prunings of 16 rows fit into a few steps.
BASE: dict[str, Any] = {"keep": 0.75, "times": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {"keep": 0.4},
    "keep_all": {"keep": 1.0},
    "once": {"times": 1},
    "never": {"times": 0},
    "votes_only": {"force_step": 0},
    "force_later": {"force_step": 5, "vote_fraction": 1.0},
    "running_mean": {"reference": "running_mean"},
    "last_prune": {"reference": "last_prune"},
    "first": {"reference": "first"},
    "few_votes": {"vote_fraction": 0.25},
    "at_least": {"vote_fraction": 0.5, "vote_strict": False},
    "at_least_none": {"vote_fraction": 0.0, "vote_strict": False, "reference": "running_mean"},
    "global": {"index_scope": "global"},
    "kv_head": {"index_scope": "kv_head"},
    "max": {"reduction": "max"},
    "global_max": {"index_scope": "global", "reduction": "max"},
    "kv_head_max": {"index_scope": "kv_head", "reduction": "max"},
    "quota": {"per_image_quota": True},
    "kv_head_quota": {"index_scope": "kv_head", "per_image_quota": True},
    "layers": {"layers": "1:-1"},
    "layers_list": {"layers": [-1, 0], "index_scope": "global"},
    "layers_kv_head": {"layers": [2], "index_scope": "kv_head"},
    "top_k": {"top_k": 5},
    "top_k_list": {"top_k": [30, 9, 2], "reference": "first", "vote_fraction": 0.0},
    "top_k_quota": {"top_k": [12, 4], "per_image_quota": True, "index_scope": "kv_head"},
    "top_k_tiny": {"top_k": 1},
    "tiny_share": {"keep": 0.01},
    "many": {"keep": 0.9, "times": 50, "vote_fraction": 0.0, "reference": "first"},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    """As many KV heads as query heads, and two query heads to one. Weights of a size at which float32 keeps five digits of a logit."""
    made: Pairs = {}
    for name, n_head_kv in (("mha", 4), ("gqa", 2)):
        text, mmproj, weights = tiny.write_pair(tmp_path_factory.mktemp(name), seed=SEED ^ 5, n_head_kv=n_head_kv, gain=1.3)
        made[name] = kvs.Model(text, mmproj=mmproj, device=DEVICE), weights
        made[name][0]._end_ids = frozenset()
    yield made
    for model, _ in made.values():
        model.close()


def prompt(feed: Any, rng: np.random.Generator, n_pictures: int) -> None:
    """feed: a session or a pair of them."""
    feed.feed([1, *tokens(rng, int(rng.integers(1, 5)))])
    for _ in range(n_pictures):
        feed.feed_image(picture(rng))
        feed.feed(tokens(rng, int(rng.integers(1, 5))))


@pytest.mark.parametrize("n_pictures", [1, 2])
@pytest.mark.parametrize("pair", ["mha", "gqa"])
@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str, pair: str, n_pictures: int, pairs: Pairs, rng: np.random.Generator) -> None:
    """Rows kept, steps and reasons, masses, entropies, logits after every step; K and V at the end."""
    bounds = {"entropy": 1e-4, "mass": 1e-5, "logits": 1e-4, "kv": 1e-4}
    with Twins(*pairs[pair], prune=BASE | OPTIONS[option], bounds=bounds) as twins:
        prompt(twins, rng, n_pictures)
        twins.steps(tokens(rng, 12))
        twins.check_cache()


def test_options_do_something(pairs: Pairs, rng: np.random.Generator) -> None:
    """Over some prompts each option leaves other rows, or leaves them at other steps, than the settings it is held against."""
    model, _ = pairs["gqa"]
    seen: dict[str, list[Any]] = {}
    for name in ("base", *OPTIONS):
        same = np.random.default_rng(SEED)
        seen[name] = []
        for _ in range(6):
            with model.session(n_ctx=128, kv_type="f32", policy=kvs.PruneHal(**BASE | OPTIONS.get(name, {}))) as session:
                prompt(session, same, 2)
                session.feed(tokens(same, 12), generated=True)
                seen[name].append((session.prunings, [session.positions(i).tolist() for i in range(4)]))
    for name in OPTIONS:
        against = {"kv_head_max": "kv_head", "global_max": "global", "kv_head_quota": "kv_head", "layers_list": "global"}.get(name, "base")
        assert seen[name] != seen[against], name


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("option", ["paper", "kv_head", "quota", "layers"])
def test_option_with_rounded_cache(option: str, kv_type: str, pairs: Pairs, rng: np.random.Generator) -> None:
    with Twins(*pairs["gqa"], kv_type=kv_type, prune=BASE | OPTIONS[option]) as twins:
        prompt(twins, rng, 2)
        twins.steps(tokens(rng, 10))
        twins.check_cache()


@pytest.mark.parametrize("option", ["paper", "running_mean", "last_prune", "first", "kv_head", "quota", "top_k_list"])
def test_turns(option: str, pairs: Pairs, rng: np.random.Generator) -> None:
    """A turn of text goes on with the sequence; one with a picture begins another, over all rows that are left."""
    with Twins(*pairs["gqa"], prune=BASE | OPTIONS[option]) as twins:
        prompt(twins, rng, 1)
        twins.steps(tokens(rng, 5))
        twins.feed(tokens(rng, 3))
        twins.steps(tokens(rng, 5))
        prompt(twins, rng, 1)
        twins.steps(tokens(rng, 6))
        twins.feed_image(picture(rng))
        twins.steps(tokens(rng, 4))
        twins.check_cache()
        assert any(p.step > 10 for p in twins.ours.prunings)


SMOOTH: dict[str, Any] = {"layers": [1, 2, 3], "lambda_ref": 0.5, "half_width": 0.4, "window": 6}


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize(
    "switch", [{}, {"entropy_norm": "log_len"}, {"target": "o"}, {"rope_mode": "relative"}, {"smooth_prompt": "last_token"}]
)
def test_stack_with_kvsmooth(switch: dict[str, Any], kv_type: str, pairs: Pairs, rng: np.random.Generator) -> None:
    with Twins(*pairs["gqa"], policy=SMOOTH | switch, prune=BASE | {"layers": [0, 2, 3]}, kv_type=kv_type) as twins:
        prompt(twins, rng, 2)
        twins.steps(tokens(rng, 12))
        twins.check_cache()
        assert twins.ours.prunings


# ---- compaction equals masking ----


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("scope", ["layer", "global", "kv_head"])
def test_compaction_equals_masking(scope: str, kv_type: str, pairs: Pairs, rng: np.random.Generator) -> None:
    """The reference never moves a row: it hides it. 64 steps over the very rows that the session has stored, its own included: what is
    left of the difference is arithmetic in float32, not the rounding of stored rows."""
    model, weights = pairs["gqa"]
    policy = {"keep": 0.4, "index_scope": scope, "reference": "first"}
    bounds = {"entropy": 1e-4, "mass": 1e-4, "logits": 1e-4, "kv": 1.0}
    with Twins(model, weights, prune=policy, kv_type=kv_type, bounds=bounds) as twins:
        prompt(twins, rng, 2)
        twins.ours.logits()
        for token in tokens(rng, 64):
            step_over_stored_rows(twins, token)
        assert twins.ours.prunings and twins.ours.positions(0).shape[-1] < twins.ours.n_past


def step_over_stored_rows(twins: Twins, token: int) -> None:
    """The reference takes over the newest row, too, as soon as it has made it: an edge between two stored numbers is no matter here."""
    truth = twins.truth
    twins.take_over_cache()
    twins.ours.feed([token], generated=True)
    row, stored = truth.n_past, [twins.ours.kv(i) for i in range(4)]
    live = [twins.live(i) for i in range(4)]
    append = truth._append

    def append_stored(layer: int, k: np.ndarray, v: np.ndarray) -> None:
        append(layer, k, v)
        c = truth.layers[layer]
        for g in range(len(live[layer])):
            at = live[layer][g, :row].sum()
            c.k[row, g], c.v[row, g] = stored[layer][0][g][at], stored[layer][1][g][at]

    truth._append, truth.observed = append_stored, twins.observe()
    truth.feed([token], generated=True)
    truth._append = append
    twins.compare("logits", twins.ours.logits(), truth.logits())
    twins.check_pruned()


# ---- what pruning leaves alone ----


def start(model: kvs.Model, policy: Any, seed: int, n_pictures: int = 2, kv_type: str = "f32", n_ctx: int = 128) -> kvs.Session:
    session = model.session(n_ctx=n_ctx, kv_type=kv_type, policy=policy)
    prompt(session, np.random.default_rng(seed), n_pictures)
    return session


def logits_of(session: kvs.Session, ids: list[int]) -> np.ndarray:
    """Before the first and after each."""
    rows = [session.logits()]
    for id in ids:
        session.feed([id], generated=True)
        rows.append(session.logits())
    return np.array(rows)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_before_the_first_pruning_no_bit_changes(kv_type: str, pairs: Pairs, rng: np.random.Generator) -> None:
    """Step 2 still sees all rows: the first two tokens are those without the policy, the third is not."""
    model, _ = pairs["gqa"]
    seed, ids = int(rng.integers(1 << 30)), tokens(rng, 5)
    with start(model, None, seed, kv_type=kv_type) as plain, start(model, kvs.PruneHal(), seed, kv_type=kv_type) as pruned:
        a, b = logits_of(plain, ids), logits_of(pruned, ids)
        np.testing.assert_array_equal(a[:2], b[:2])
        assert (a[2] != b[2]).any()
        np.testing.assert_array_equal(plain.entropies()[0], pruned.entropies()[0])
        np.testing.assert_array_equal(plain.visual_masses()[0], pruned.visual_masses()[0])


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("policy", [kvs.PruneHal(keep=1.0), kvs.PruneHal(times=0), kvs.PruneHal(force_step=0, vote_fraction=1.0)], ids=str)
def test_what_drops_nothing_changes_no_bit(policy: kvs.PruneHal, kv_type: str, pairs: Pairs, rng: np.random.Generator) -> None:
    model, _ = pairs["mha"]
    seed, ids = int(rng.integers(1 << 30)), tokens(rng, 8)
    with start(model, None, seed, kv_type=kv_type) as plain, start(model, policy, seed, kv_type=kv_type) as pruned:
        np.testing.assert_array_equal(logits_of(plain, ids), logits_of(pruned, ids))
        assert pruned.n_past == pruned.positions(0).shape[-1]


def test_positions_of_what_stays(pairs: Pairs, rng: np.random.Generator) -> None:
    model, _ = pairs["gqa"]
    with start(model, kvs.PruneHal(layers=[1, 3]), int(rng.integers(1 << 30)), 1) as session:
        before = session.kv(1)
        n = session.n_past
        session.feed(tokens(rng, 2), generated=True)
        assert session.n_past == n + 2
        assert [len(session.positions(i)) for i in range(4)] == [n + 2, n + 2 - 10, n + 2, n + 2 - 10]
        there = session.positions(1)
        assert there[-2:].tolist() == [n, n + 1] and (np.diff(there) > 0).all()
        for old, new in zip(before, session.kv(1), strict=True):
            np.testing.assert_array_equal(new[:, :-2], old[:, there[:-2]])
        assert session.prunings == [kvs.Pruning(1, "forced", 16, 6)]


def test_several_sessions_in_one_pass(pairs: Pairs, rng: np.random.Generator) -> None:
    """Sessions that prune, and ones that do not, step together as they do alone."""
    model, _ = pairs["gqa"]
    policies = [None, kvs.PruneHal(), kvs.PruneHal(index_scope="kv_head", keep=0.7), [kvs.PruneHal(), kvs.KVSmooth(**SMOOTH)]]
    seeds, forced = rng.integers(1 << 30, size=4).tolist(), np.array([tokens(rng, 7) for _ in range(4)])
    alone = []
    for policy, seed, ids in zip(policies, seeds, forced, strict=True):
        with start(model, policy, seed) as session:
            alone.append((logits_of(session, ids.tolist()), session.prunings))
    sessions = [start(model, policy, seed) for policy, seed in zip(policies, seeds, strict=True)]
    for column in forced.T:
        step_together(sessions, column.tolist())
    for session, (logits, prunings) in zip(sessions, alone, strict=True):
        np.testing.assert_allclose(session.logits(), logits[-1], rtol=0, atol=1e-4)
        assert session.prunings == prunings
        session.close()


def test_a_session_without_pictures(pairs: Pairs, rng: np.random.Generator, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing to prune is no error; the log says so."""
    model, _ = pairs["gqa"]
    with model.session(policy=kvs.PruneHal()) as session, caplog.at_level(logging.INFO, "pykvsmooth"):
        result = session.generate("describe", max_tokens=4).result()
        assert result.stats.pruned == [] and session.prunings == [] and all(t.visual_mass is None for t in result.tokens)
        assert (session.visual_masses() == 0).all()
    assert "no picture" in caplog.text


def test_answers_tell(pairs: Pairs, rng: np.random.Generator) -> None:
    """Token.visual_mass and Stats.pruned, whose steps count from the first token of each answer; a second prompt reuses no row that
    pruning touched."""
    model, _ = pairs["gqa"]
    image = picture(rng)
    with model.session(policy=kvs.PruneHal(), n_ctx=256) as session:
        for _ in range(2):
            result = session.generate("<image> describe the man", image=image, max_tokens=6).result()
            assert result.stats.pruned[0] == kvs.Pruning(1, "forced", 16, 6)
            assert np.allclose([t.visual_mass for t in result.tokens], session.visual_masses().mean(1)[-6:])
            assert all(0 < t.visual_mass < 1 for t in result.tokens)
        first = [t.id for t in result.tokens]
        assert result.stats.reused_tokens < 30
        with model.session(policy=kvs.PruneHal(), n_ctx=256) as fresh:
            again = fresh.generate("<image> describe the man", image=image, max_tokens=6).result()
        assert [t.id for t in again.tokens] == first
    with model.session(policy=kvs.PruneHal(reversible=True), n_ctx=256) as session:
        session.generate("<image> describe the man", image=image, max_tokens=6).result()
        reused = session.generate("<image> describe the man", image=image, max_tokens=6).result()
        assert reused.stats.reused_tokens > 16 and [t.id for t in reused.tokens] == first
