"""The page of evidence: what is read off captions, and that the tables say what the runs say."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")
from conftest import Pair

import pykvsmooth as kvs
from models.evidence import page, rows, runs, seeds, why
from models.evidence.__main__ import Bench, search
from models.scenes import caption, side
from pykvsmooth.evaluate import Caption, EvaluationError, Mention, Scored, TokenFacts

COUNT = 12
SIBLINGS = ("PruneHal", "DSCR")
MOVED = why.Shifts(true=[[(0.5, False)], [(0.5, False)]], invented=[[(-1.0, False)], [(-3.0, True)]])


def told(text: str, image_id: int, strength: float | None = None) -> Caption:
    """A caption in tokens of four characters, whose entropies rise."""
    pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
    return Caption(image_id, text, tuple(TokenFacts(piece, 1 + 0.01 * i, strength) for i, piece in enumerate(pieces)))


def right(count: int = COUNT, strength: float | None = None) -> runs.Run:
    """What a perfect model would say."""
    return runs.Run("test", tuple(told(caption(s, 1), i, strength) for i, s in enumerate(runs.scenes("test", count))))


def test_a_perfect_run() -> None:
    run = right()
    figures = run.report.figures()
    assert figures["chair_s"] == 0 and figures["recall"] == figures["precision"] == 1
    assert run.sides_right == 1 and run.mean_strength != run.mean_strength and right(strength=0.25).mean_strength == 0.25


def test_sides_and_inventions() -> None:
    """Every left is a right and the other way round; the first object of each caption is a giraffe now."""
    swapped = []
    for i, s in enumerate(runs.scenes("test", COUNT)):
        text = caption(s, 1).replace("left", "\0").replace("right", "left").replace("\0", "right")
        swapped.append(told(text, i))
    assert runs.Run("test", tuple(swapped)).sides_right == 0
    nowhere = [told("On the left there is a giraffe.", i) for i in range(COUNT)]
    run = runs.Run("test", tuple(nowhere))
    there = [next((side(t) for t in s.objects if t.node == "giraffe"), None) for s in run.scenes]
    assert run.report.figures()["chair_s"] == there.count(None) / COUNT


def test_degenerate() -> None:
    loop = "There is a cat. " * 3
    assert runs.looping(loop) and not runs.looping("There is a cat. There is a dog. There is a cat.")
    endless = told("word " * 300, 0)
    assert len(endless.tokens) >= runs.MAX_TOKENS
    assert runs.Run("test", (endless, told("A cat.", 1), told(loop, 2), told("A dog.", 3))).degenerate == 0.5


def test_controls_end_at_the_recall() -> None:
    run = right()
    for recall in (0.3, 0.7):
        control = runs.dropped(run, recall, draws=3)
        assert recall - 1.5 / COUNT < control["recall"] <= recall and control["precision"] == 1
    assert run.cut(1).figures()["recall"] == 0 and run.cut(2).figures()["recall"] == COUNT / sum(len(s.objects) for s in run.scenes)


def test_rows_differ_from_the_best_in_one_thing() -> None:
    best = kvs.KVSmooth(lambda_ref=0.2, layers="1:4")
    table = rows.rows(best, 0.31, 8)
    assert len({repr(policy) for policy in table.values()}) == len(table) == 10
    fixed = next(policy for name, policy in table.items() if name.startswith("fixed"))
    assert (fixed.mode, fixed.lambda_fixed, fixed.layers) == ("fixed", 0.31, "1:4")
    assert table["last layer in"].resolve_layers(8) == [1, 2, 3, 7] and table["first layer in"].resolve_layers(8) == [0, 1, 2, 3]
    assert rows.rows(kvs.KVSmooth(layers="0:2"), 0.31, 8)["first layer out"].resolve_layers(8) == [1]


def test_kept_captions_of_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "FOLDER", tmp_path / "other")
    assert seeds.kept() == {}
    made = [(None, right()), (kvs.KVSmooth(), runs.Run("test", tuple(told("A cat.", i, 0.5) for i in range(COUNT))))]
    for seed in (3, 2):
        seeds.keep(seeds.FOLDER / f"{seed}.jsonl.gz", made)
    first, second = seeds.kept().items()
    assert (first[0], second[0]) == (2, 3) and first[1].read_bytes() == second[1].read_bytes()
    back = seeds.read(first[1], None, 5)
    assert back.report.figures() == right(5).report.figures() and back.tokens == right(5).tokens
    assert seeds.read(first[1], kvs.KVSmooth(), COUNT).captions[3].text == "A cat."
    for policy, count in ((None, COUNT + 1), (kvs.KVSmooth(lambda_ref=0.5), 1)):
        with pytest.raises(EvaluationError, match=r"2\.jsonl\.gz.*make it again"):
            seeds.read(first[1], policy, count)


def test_the_page(tmp_path: Path, tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run for each row is asked for; the plain one is right, the others name a giraffe more."""
    asked = []

    def run(name: str, policy: runs.Asked, split: str, count: int) -> runs.Run:
        asked.append(name)
        if policy is None:
            return right(count)
        return runs.Run("test", tuple(told(one.text + " There is a giraffe.", i, 0.5) for i, one in enumerate(right(count).captions)))

    found = {
        "plain": (None, right()),
        **{name: (policy, right()) for name, policy in {**rows.grid(), **rows.around(kvs.KVSmooth())}.items()},
    }
    finals = {name: found[name] for name in runs.finalists(found)}
    monkeypatch.setattr(seeds, "FOLDER", tmp_path)
    with kvs.Model(tiny_pair.text, device="cpu") as model:
        best = kvs.KVSmooth.for_model(model)
        seeds.keep(tmp_path / "7.jsonl.gz", [(policy, run("", policy, "test", COUNT)) for policy in (None, best, kvs.KVSmooth())])
        asked.clear()
        others = {
            method: {"plain": found["plain"], **{name: (p, right()) for name, p in rows.siblings()[method].items()}} for method in SIBLINGS
        }
        page.write(run, lambda policy, plain: MOVED, model, runs.Searched(found, finals, others), COUNT, tmp_path)
    text = (tmp_path / "evidence.md").read_text()
    plain = next(line for line in text.splitlines() if line.startswith("| plain |"))
    assert plain.startswith("| plain | 0.0 [0.0, 0.0] | 0.0 [0.0, 0.0] | 100.0 [100.0, 100.0] |")
    keys = next(line for line in text.splitlines() if line.startswith("| keys only |"))
    invented = 100 * sum("giraffe" not in {t.node for t in s.objects} for s in runs.scenes("test", COUNT)) / COUNT
    assert keys.startswith(f"| keys only | {invented:.1f} [") and f"| +{invented:.1f} [" in keys
    assert "| seed 7: plain | 0.0 [" in text and f"| seed 7: the same setting | {invented:.1f} [" in text
    assert f"other seeds, CHAIR_S: seed 7 +{invented:.1f} [" in text
    assert asked[:2] == ["plain", "best"] and len(asked) == 2 + 9 + 8  # the best one is a row already; the siblings
    assert "| best | -2.000 [-3.000, -1.000] | +0.500 [+0.500, +0.500] | 50.0 [0.0, 100.0] | 0.0 [0.0, 0.0] | 1.000 |" in text
    assert (tmp_path / "along.svg").stat().st_size > 1000 and (tmp_path / "trade.svg").stat().st_size > 1000


def test_search_runs_the_grid(tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "WINDOWS", ((0.1, 0.1),))
    monkeypatch.setattr(rows, "LAYERS", ("1:2",))
    monkeypatch.setattr(runs, "MAX_TOKENS", 6)
    few = {"PruneHal": {"keep 0.9": kvs.PruneHal(keep=0.9)}, "DSCR": {"layers 1:": kvs.DSCR(layers="1:")}}
    monkeypatch.setattr("models.evidence.__main__.siblings", lambda: few)
    with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, device="cpu") as model:
        found, finals, others = search(Bench(model), 2, 3)
        assert kvs.KVSmooth.for_model(model) in [policy for policy, _ in finals.values()]
    assert {method: len(tried) for method, tried in others.items()} == {"PruneHal": 2, "DSCR": 2}
    assert list(found)[:2] == ["plain", "keys and values, layers 1:2, 0.1 ± 0.1"] and len(found) == 3 + len(rows.OTHERS)
    assert all(len(run.captions) == 2 for _, run in found.values()) and all(len(run.captions) == 3 for _, run in finals.values())


def test_finalists_and_winner() -> None:
    """inventing: one more object; short: the first sentence alone. Few inventions are worth nothing where F1 falls too far."""
    plain = runs.Run("test", tuple(told(one.text + " There is a giraffe.", i) for i, one in enumerate(right().captions)))
    short = runs.Run("test", tuple(told(one.text.partition(". ")[0], i) for i, one in enumerate(right().captions)))
    found: runs.Found = {"plain": (None, plain), "mended": (kvs.KVSmooth(), right()), "short": (kvs.KVSmooth(), short)}
    assert runs.finalists(found) == ["plain", "mended"] and runs.winner(found) == "mended"
    assert runs.winner({"plain": (None, right()), "short": (None, short)}) == "short"  # what else


def test_shifts_of_nothing_and_of_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a mention begins is made up here; a strength of 0 moves nothing, a strong one does."""
    monkeypatch.setattr(why, "MAX_TOKENS", 24)
    scored = [Scored(i, (Mention("dog", 4, 5), Mention("cat", 40, 41)), frozenset(["dog"]), 5) for i in range(2)]
    plain = SimpleNamespace(scenes=runs.scenes("test", 2), report=SimpleNamespace(captions=scored))
    with kvs.Model(device="cpu") as model:  # the one in the box: a random one may have nothing to say
        still, moved = (why.shifts(model, kvs.KVSmooth(mode="fixed", lambda_fixed=x, layers=":"), plain, 2) for x in (0.0, 0.9))
    for group in (still.true, still.invented):
        assert all(len(one) == 1 and abs(one[0][0]) < 1e-5 and not one[0][1] for one in group)
    assert all(abs(one[0][0]) > 1e-4 for one in moved.invented)
