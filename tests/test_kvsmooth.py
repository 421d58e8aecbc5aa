"""KVSmooth: every switch against the reference on fresh random pairs, and invariants."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import Pair
from devices import DEVICE
from reference import KVSmooth, Session
from twins import Twins, new_turn, picture, step_together, tokens

import pykvsmooth as kvs

# A window wide enough to show every rank, and a queue short enough to turn over within the test.
BASE: dict[str, Any] = {"layers": [1, 2, 3], "lambda_ref": 0.5, "half_width": 0.4, "window": 6}
SWITCHES: dict[str, dict[str, Any]] = {
    "lambda_ref": {"lambda_ref": 0.7, "half_width": 0.2},
    "window_1": {"window": 1},
    "window_40": {"window": 40},
    "half_width": {"half_width": 0.1},
    "layers_slice": {"layers": "1:-1"},
    "layers_negative": {"layers": [0, -1]},
    "fixed": {"mode": "fixed", "lambda_fixed": 0.35},
    "fixed_is_not_clipped": {"mode": "fixed", "lambda_fixed": 0.95, "lambda_max": 0.5, "half_width": 0.1},
    "capacity": {"lambda_den": "capacity"},
    "lambda_max": {"lambda_max": 0.4},
    "relative": {"rope_mode": "relative"},
    "k": {"target": "k"},
    "v": {"target": "v"},
    "o": {"target": "o"},
    "skip_first": {"first_token": "skip"},
    "warm_last_row": {"warm_start": "last_prompt_row"},
    "warm_4": {"warm_start": ("prompt_rows", 4)},
    "smooth_prompt": {"smooth_prompt": "last_token"},
    "log_len": {"entropy_norm": "log_len"},
    "per_kv_group": {"entropy_heads": "per_kv_group"},
    "exclude_self": {"entropy_include_self": False},
    "one_step": {"ema": "one_step"},
    "damp": {"mix": "damp"},
    "skip_ids": {"skip_token_ids": [301, 303]},
    "relative_one_step": {"rope_mode": "relative", "ema": "one_step"},
    "relative_k_damp": {"rope_mode": "relative", "target": "k", "mix": "damp"},
    "o_one_step": {"target": "o", "ema": "one_step"},
    "o_damp": {"target": "o", "mix": "damp"},
    "o_skip_first": {"target": "o", "first_token": "skip"},
    "damp_skip_first": {"mix": "damp", "first_token": "skip"},
    "relative_per_group": {"rope_mode": "relative", "entropy_heads": "per_kv_group", "entropy_include_self": False},
    "warm_and_smooth_prompt": {"warm_start": ("prompt_rows", 3), "smooth_prompt": "last_token", "ema": "one_step"},
    "smooth_prompt_skip_first": {"smooth_prompt": "last_token", "first_token": "skip", "rope_mode": "relative"},
    "everything": {
        "lambda_den": "capacity",
        "rope_mode": "relative",
        "target": "k",
        "warm_start": ("prompt_rows", 2),
        "smooth_prompt": "last_token",
        "entropy_norm": "log_len",
        "entropy_include_self": False,
        "rank_ties": "midrank",
        "queue_scope": "session",
        "skip_token_ids": [300],
    },
}


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[kvs.Model, tiny.Weights]]:
    """Four query heads on two KV heads, partly turning heads: groups and relative rotation both matter."""
    from conftest import SEED

    text, mmproj, weights = tiny.write_pair(tmp_path_factory.mktemp("gqa"), seed=SEED ^ 1, n_head_kv=2, n_rot=12)
    with kvs.Model(text, mmproj=mmproj, device=DEVICE) as model:
        yield model, weights


def story(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """A prompt and forced tokens; 301 and 303 are among them."""
    return [1, *tokens(rng, 9)], [*tokens(rng, 5), 301, 302, 303, *tokens(rng, 14)]


def run_reference(weights: tiny.Weights, policy: dict[str, Any], prompt: list[int], tokens: list[int]) -> Session:
    session = Session(weights.text, KVSmooth(**policy))
    session.feed(prompt)
    session.feed(tokens, generated=True)
    return session


@pytest.mark.parametrize("switch", SWITCHES)
def test_switch(switch: str, gqa: tuple[kvs.Model, tiny.Weights], rng: np.random.Generator) -> None:
    model, weights = gqa
    prompt, tokens = story(rng)
    policy = BASE | SWITCHES[switch]
    with Twins(model, weights, policy) as twins:
        twins.feed(prompt)
        twins.steps(tokens)
        twins.check_cache()
    plain = run_reference(weights, BASE, prompt, tokens)
    assert any(np.abs(a - b).max() > 1e-3 for i in range(4) for a, b in zip(plain.kv(i), twins.truth.kv(i), strict=True)), "no effect"


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("switch", ["relative", "o", "one_step", "smooth_prompt", "damp", "skip_ids"])
def test_switch_with_rounded_cache(kv_type: str, switch: str, gqa: tuple[kvs.Model, tiny.Weights], rng: np.random.Generator) -> None:
    """Rows are mixed exactly and rounded once, whatever the cache holds."""
    model, weights = gqa
    prompt, tokens = story(rng)
    with Twins(model, weights, BASE | SWITCHES[switch], kv_type) as twins:
        twins.feed(prompt)
        twins.steps(tokens)
        twins.check_cache()


@pytest.mark.parametrize("rank_ties", ["strict", "midrank"])
def test_ties(rank_ties: str, gqa: tuple[kvs.Model, tiny.Weights], rng: np.random.Generator) -> None:
    """Without their own keys, rows 0 and 1 both have entropy 0: an exact tie when row 1 ends the prompt and is smoothed."""
    model, weights = gqa
    policy = BASE | {"entropy_include_self": False, "warm_start": ("prompt_rows", 2), "smooth_prompt": "last_token", "rank_ties": rank_ties}
    with Twins(model, weights, policy) as twins:
        twins.feed(tokens(rng, 2))
        twins.steps(tokens(rng, 6))
        twins.check_cache()
        assert twins.truth.layers[1].strength[1] == pytest.approx(0.25 if rank_ties == "midrank" else 0.1)


@pytest.mark.parametrize("scope", ["turn", "session"])
@pytest.mark.parametrize("extra", [{}, {"warm_start": ("prompt_rows", 3)}, {"smooth_prompt": "last_token"}, {"first_token": "skip"}])
def test_turns(scope: str, extra: dict[str, Any], gqa: tuple[kvs.Model, tiny.Weights], rng: np.random.Generator) -> None:
    """Two turns; the second prompt comes in two pieces that are looked at in between, the second shorter than the warm start."""
    model, weights = gqa
    with Twins(model, weights, BASE | {"queue_scope": scope} | extra) as twins:
        twins.feed(story(rng)[0])
        twins.steps(tokens(rng, 5))
        new_turn(twins.ours)
        twins.truth.new_turn()
        twins.feed(tokens(rng, 6))
        twins.compare("logits", twins.ours.logits(), twins.truth.logits())
        twins.feed(tokens(rng, 2))
        twins.steps(tokens(rng, 6))
        twins.check_cache()


def test_forced_text_counts_as_prompt(gqa: tuple[kvs.Model, tiny.Weights], rng: np.random.Generator) -> None:
    """Prompt rows between generated ones, no new turn: never smoothed, the queue goes on, the next token is mixed with the last of them."""
    model, weights = gqa
    with Twins(model, weights, BASE) as twins:
        for _ in range(3):
            twins.feed(tokens(rng, 3))
            twins.steps(tokens(rng, 4))
        twins.check_cache()


def test_generated_without_prompt(gqa: tuple[kvs.Model, tiny.Weights], rng: np.random.Generator) -> None:
    model, weights = gqa
    with Twins(model, weights, BASE) as twins:
        twins.steps(tokens(rng, 5))
        twins.check_cache()
        assert np.isnan(twins.ours.strengths()[0]).all()


@pytest.mark.parametrize("switch", ["o", "relative", "per_kv_group"])
def test_heads_of_one_group(switch: str, tiny_pair: Pair, rng: np.random.Generator) -> None:
    """The same on a model with as many KV heads as query heads, with a picture in the prompt."""
    with (
        kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, device=DEVICE) as model,
        Twins(model, tiny_pair.weights, BASE | SWITCHES[switch]) as twins,
    ):
        twins.feed([1, 300])
        twins.feed_image(picture(rng))
        twins.feed(tokens(rng, 4))
        twins.greedy(14)
        twins.check_cache()


# ---- invariants ----


def run(model: kvs.Model, policy: kvs.KVSmooth | None, prompt: list[int], tokens: list[int], kv_type: str = "f16") -> dict[str, np.ndarray]:
    with model.session(n_ctx=128, kv_type=kv_type, policy=policy) as session:
        session.feed(prompt)
        logits = [session.logits()]
        for token in tokens:
            session.feed([token], generated=True)
            logits.append(session.logits())
        kv = [session.kv(i) for i in range(model.n_layer)]
        k, v = (np.array(side) for side in zip(*kv, strict=True))
        return {"logits": np.array(logits), "k": k, "v": v, "entropies": session.entropies(), "strengths": session.strengths()}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray], but: tuple[str, ...] = ()) -> None:
    for name in a.keys() - set(but):
        np.testing.assert_array_equal(a[name].view(np.uint32), b[name].view(np.uint32), err_msg=name)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("switch", [{}, {"rope_mode": "relative"}, {"target": "o"}, {"ema": "one_step"}, {"mix": "damp"}])
def test_strength_zero_changes_no_bit(
    kv_type: str, switch: dict[str, Any], gqa: tuple[kvs.Model, tiny.Weights], rng: np.random.Generator
) -> None:
    prompt, tokens = story(rng)
    zero = kvs.KVSmooth(layers=[0, 1, 2, 3], mode="fixed", lambda_fixed=0.0, **switch)
    smoothed = run(gqa[0], zero, prompt, tokens, kv_type)
    assert (smoothed["strengths"] == 0).all()
    assert_same_bits(run(gqa[0], None, prompt, tokens, kv_type), smoothed, but=("strengths",))


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_skipping_every_token_changes_no_bit(kv_type: str, gqa: tuple[kvs.Model, tiny.Weights], rng: np.random.Generator) -> None:
    prompt, tokens = story(rng)
    nothing = kvs.KVSmooth(**BASE | {"skip_token_ids": sorted(set(tokens))})
    assert_same_bits(run(gqa[0], None, prompt, tokens, kv_type), run(gqa[0], nothing, prompt, tokens, kv_type))


def test_the_same_twice(gqa: tuple[kvs.Model, tiny.Weights], rng: np.random.Generator) -> None:
    prompt, tokens = story(rng)
    assert_same_bits(run(gqa[0], kvs.KVSmooth(**BASE), prompt, tokens), run(gqa[0], kvs.KVSmooth(**BASE), prompt, tokens))


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_strength_one_repeats_the_last_prompt_row(kv_type: str, gqa: tuple[kvs.Model, tiny.Weights], rng: np.random.Generator) -> None:
    prompt, tokens = story(rng)
    result = run(gqa[0], kvs.KVSmooth(layers=[1, 2], mode="fixed", lambda_fixed=1.0), prompt, tokens, kv_type)
    at = len(prompt) - 1
    for side in ("k", "v"):
        for layer in (1, 2):
            rows = result[side][layer]
            np.testing.assert_array_equal(rows[:, at + 1 :], np.repeat(rows[:, at : at + 1], len(tokens), axis=1))
        assert (np.abs(np.diff(result[side][3][:, at:], axis=1)).max(axis=(0, 2)) > 1e-3).all(), "a layer that is not smoothed moves on"


def test_the_first_token_sees_nothing_of_it(gqa: tuple[kvs.Model, tiny.Weights], rng: np.random.Generator) -> None:
    """The logits that choose the first two tokens are those without a policy, bit by bit; the third differs."""
    prompt, tokens = story(rng)
    plain, smoothed = run(gqa[0], None, prompt, tokens), run(gqa[0], kvs.KVSmooth(layers=[0, 1, 2, 3]), prompt, tokens)
    np.testing.assert_array_equal(plain["logits"][:2], smoothed["logits"][:2])
    assert (plain["logits"][2] != smoothed["logits"][2]).any()


def test_strengths_are_nan_where_not_smoothed(gqa: tuple[kvs.Model, tiny.Weights], rng: np.random.Generator) -> None:
    prompt, tokens = story(rng)
    result = run(gqa[0], kvs.KVSmooth(**BASE | {"layers": [1, 3], "skip_token_ids": [302], "first_token": "skip"}), prompt, tokens)
    assert np.isnan(result["strengths"][:, [0, 2]]).all()
    assert np.isnan(result["strengths"]).all(axis=1).tolist() == [i == 0 or token == 302 for i, token in enumerate(tokens)]
    assert (np.isfinite(result["entropies"]) & (result["entropies"] > 0)).all()
    plain = run(gqa[0], None, prompt, tokens)
    assert np.isnan(plain["strengths"]).all() and np.isfinite(plain["entropies"]).all()


def test_several_sessions_in_one_pass(gqa: tuple[kvs.Model, tiny.Weights], rng: np.random.Generator) -> None:
    """Sessions with different policies, lengths and cache types step together as they do alone."""
    model, _ = gqa
    policies = [None, kvs.KVSmooth(**BASE), kvs.KVSmooth(**BASE | {"target": "o"}), kvs.KVSmooth(**BASE | {"rope_mode": "relative"})]
    kv_types = ["f16", "f16", "f32", "q8_0"]
    prompts, forced = [tokens(rng, n) for n in (3, 17, 8, 11)], np.array([tokens(rng, 10) for _ in range(4)])
    alone = [run(model, p, prompt, t.tolist(), kv) for p, prompt, t, kv in zip(policies, prompts, forced, kv_types, strict=True)]
    sessions = [model.session(n_ctx=128, kv_type=kv, policy=p) for p, kv in zip(policies, kv_types, strict=True)]
    try:
        for session, prompt in zip(sessions, prompts, strict=True):
            session.feed(prompt)
        logits = [[s.logits() for s in sessions]]
        for column in forced.T:
            step_together(sessions, column.tolist())
            logits.append([s.logits() for s in sessions])
        for i, session in enumerate(sessions):
            np.testing.assert_allclose(session.strengths(), alone[i]["strengths"], rtol=0, atol=1e-6)
            np.testing.assert_allclose(session.entropies(), alone[i]["entropies"], rtol=0, atol=1e-5)
            np.testing.assert_allclose([row[i] for row in logits], alone[i]["logits"], rtol=0, atol=1e-4)
    finally:
        for session in sessions:
            session.close()


# ---- what is refused ----


@pytest.mark.parametrize(
    "arguments",
    [
        {"layers": "3:-1"},  # empty on a model of four layers
        {"layers": []},
        {"layers": [4]},
        {"layers": [-5]},
        {"layers": [1], "target": "o", "smooth_prompt": "last_token"},
        {"layers": [1], "warm_start": ("prompt_rows", 16)},
    ],
)
def test_refused_for_this_model(arguments: dict[str, Any], gqa: tuple[kvs.Model, tiny.Weights]) -> None:
    with pytest.raises((kvs.PolicyError, ValueError)):
        gqa[0].session(policy=kvs.KVSmooth(**arguments))


def test_an_empty_selection_names_the_depth(gqa: tuple[kvs.Model, tiny.Weights]) -> None:
    with pytest.raises(kvs.PolicyError, match="4"):
        gqa[0].session(policy=kvs.KVSmooth())


@pytest.mark.parametrize(
    "arguments",
    [
        {"lambda_ref": -0.1},
        {"lambda_ref": float("nan")},
        {"half_width": 2.0},
        {"window": 0},
        {"window": 1025},
        {"mode": "fixed"},
        {"mode": "fixed", "lambda_fixed": 1.5},
        {"mode": "sometimes"},
        {"lambda_den": "full"},
        {"rope_mode": "pre"},
        {"target": "q"},
        {"target": ""},
        {"first_token": "drop"},
        {"warm_start": -1},
        {"smooth_prompt": "all"},
        {"entropy_norm": "len"},
        {"entropy_heads": "some"},
        {"rank_ties": "loose"},
        {"queue_scope": "forever"},
        {"ema": "two_step"},
        {"mix": "stir"},
        {"layers": "one:two"},
        {"lambda_max": 1.5},
    ],
)
def test_bad_arguments(arguments: dict[str, Any], gqa: tuple[kvs.Model, tiny.Weights]) -> None:
    with pytest.raises((ValueError, kvs.PolicyError)):
        gqa[0].session(policy=kvs.KVSmooth(**{"layers": [1]} | arguments))


@pytest.mark.parametrize("path", ["relative", "o", "one_step", "smooth_prompt"])
def test_policy_survives_fork(path: str, gqa: tuple[kvs.Model, tiny.Weights], rng: np.random.Generator, tmp_path: Path) -> None:
    model, _ = gqa
    prompt, tokens = story(rng)
    with model.session(n_ctx=128, policy=kvs.KVSmooth(**BASE | SWITCHES[path])) as session:
        session.feed(prompt)
        session.feed(tokens[:10], generated=True)
        with session.fork() as fork:
            for one in (session, fork):
                one.feed(tokens[10:], generated=True)
            np.testing.assert_array_equal(session.strengths(), fork.strengths())
            np.testing.assert_array_equal(session.logits(), fork.logits())
