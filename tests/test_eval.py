"""Figures of a corpus against numbers counted by hand and direct computation; files, COCO, runs that go on, sweeps, the command line."""

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from PIL import Image

import pykvsmooth as kvs
from pykvsmooth import evaluate
from pykvsmooth.cli import evaluate as command
from pykvsmooth.cli import main as cli
from pykvsmooth.evaluate import Caption, EvaluationError, TokenFacts
from pykvsmooth.evaluate.score import _resampled

# Counted by hand. caption, objects that are there; mentions, invented mentions; true objects named, objects named; tokens
TEN = [
    ("A dog and a cat.", "dog, cat", 2, 0, 2, 2, 6),
    ("A dog sits on a couch.", "dog", 2, 1, 1, 2, 7),
    ("Two dogs, a dog and a car.", "car, person", 3, 2, 1, 2, 9),
    ("An empty street.", "car", 0, 0, 0, 0, 4),
    ("A hot dog on a table with a wine glass.", "hot dog, dining table, fork", 3, 1, 2, 3, 9),
    ("The home plate.", "", 0, 0, 0, 0, 3),
    ("A man's bike and a bicycle", "person, bicycle", 3, 0, 2, 2, 7),
    ("A zebra", "giraffe", 1, 1, 0, 1, 2),
    ("", "clock", 0, 0, 0, 0, 0),
    ("Birds. A bird!", "bird, boat, person", 2, 0, 1, 1, 5),
]
FIGURES = {"chair_s": 4 / 10, "chair_i": 5 / 16, "recall": 9 / 16, "precision": 9 / 13, "f1": 18 / 29, "length": 52 / 10}
OBJECTS = [[name for name in row[1].split(", ") if name] for row in TEN]
TRUTH = {str(i): frozenset(objects) for i, objects in enumerate(OBJECTS)}
CAPTIONS = [Caption(i, row[0]) for i, row in enumerate(TEN)]


def random_corpus(rng: np.random.Generator, n: int) -> tuple[list[Caption], dict[str, frozenset[str]]]:
    nodes = evaluate.node_words()
    captions, truth = [], {}
    for i in range(n):
        there = frozenset(rng.choice(nodes, 4, replace=False).tolist())
        named = [*rng.choice(sorted(there), 2), *rng.choice(nodes, rng.integers(0, 3))]
        captions.append(Caption(i, " ".join(f"There is a {node}." for node in named)))
        truth[str(i)] = there
    return captions, truth


# ---- figures ----


def test_ten_captions_counted_by_hand():
    report = evaluate.score(CAPTIONS, TRUTH)
    for scored, (_, _, mentions, invented, correct, named, tokens) in zip(report.captions, TEN, strict=True):
        assert scored.counts == (1, int(invented > 0), invented, mentions, correct, named, len(scored.truth), tokens)
    assert report.figures() == pytest.approx(FIGURES, abs=0, rel=1e-15)
    assert report.captions[2].nodes == ["dog", "dog", "car"] and report.captions[2].hallucinated == ["dog", "dog"]


def test_nothing_to_divide_by():
    report = evaluate.score([Caption("x", "Nothing here")], {"x": frozenset()})
    assert report.figures() == {"chair_s": 0, "chair_i": 0, "recall": 0, "precision": 0, "f1": 0, "length": 2}
    assert all(math.isfinite(end) for ends in report.intervals().values() for end in ends)


def test_resampling_equals_drawing_captions(rng):
    counts = evaluate.score(*random_corpus(rng, 23)).counts
    drawn = np.random.default_rng(5).integers(0, 23, (40, 23), dtype=np.int32)
    assert np.array_equal(_resampled(counts, 40, 5), counts[drawn].sum(1))


def test_intervals_repeat_and_are_as_wide_as_they_should(rng):
    report = evaluate.score(*random_corpus(rng, 400))
    intervals = report.intervals()
    assert intervals == report.intervals() != report.intervals(seed=1)
    p, (low, high) = report.figures()["chair_s"], intervals["chair_s"]
    assert low < p < high and high - low == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / 400), rel=0.1)


def test_the_order_of_captions_changes_no_digit(rng):
    """A run's file has them as they ended, and ids may be numbers in one file and text in another."""
    captions, truth = random_corpus(rng, 60)
    named = [Caption(str(c.image_id), c.text, (TokenFacts(c.text, c.image_id, None),)) for c in captions]
    mixed = [named[i] for i in rng.permutation(60)]
    a, b = evaluate.score(captions, truth), evaluate.score(mixed, truth)
    other = evaluate.score([Caption(c.image_id, "A zebra") for c in captions], truth)
    assert a.intervals() == b.intervals() and evaluate.compare(a, other) == evaluate.compare(b, other)
    assert evaluate.compare(other, a) == evaluate.compare(other, b)
    dropped = (evaluate.drop_last(one, 0.2 * one.figures()["recall"]) for one in (a, b))
    first, second = ({str(scored.image_id): scored.nodes for scored in one.captions} for one in dropped)
    assert first == second
    ordered, shuffled = evaluate.entropy_separation(named, a), evaluate.entropy_separation(mixed, b)
    assert ordered == shuffled


def test_comparison_is_paired(rng):
    captions, truth = random_corpus(rng, 60)
    truth = {key: nodes - {"zebra"} for key, nodes in truth.items()}
    other = [Caption(c.image_id, c.text + " A zebra." if i % 3 == 0 else c.text) for i, c in enumerate(captions)]
    a, b = evaluate.score(captions, truth), evaluate.score(reversed(other), truth)
    change = evaluate.compare(a, b)
    assert change.difference == pytest.approx({name: a.figures()[name] - b.figures()[name] for name in FIGURES})
    assert change.interval["recall"][1] <= 0 and change.interval["chair_i"][1] <= 0  # each resample has both runs of a picture
    wrong = [{str(s.image_id) for s in report.captions if s.hallucinated} for report in (a, b)]
    assert (change.mended, change.new) == (len(wrong[1] - wrong[0]), len(wrong[0] - wrong[1]))
    assert evaluate.compare(a, a).interval == dict.fromkeys(FIGURES, (0, 0))
    with pytest.raises(EvaluationError, match="differ in 1 picture"):
        evaluate.compare(a, evaluate.score(other[1:], truth))


def test_mcnemar_against_the_binomial():
    for b, c in itertools.product(range(12), range(12)):
        n = b + c
        tail = sum(math.comb(n, k) for k in range(min(b, c) + 1)) / 2**n
        assert evaluate.mcnemar(b, c) == pytest.approx(min(1, 2 * tail))
    assert evaluate.mcnemar(122, 11) < 1e-20 and evaluate.mcnemar(5000, 5000) == 1


def test_auc_against_all_pairs(rng):
    true, invented = rng.integers(0, 9, 40).tolist(), rng.integers(2, 12, 30).tolist()
    pairs = [(b > a) + (b == a) / 2 for a in true for b in invented]
    assert evaluate.auc(true, invented) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(evaluate.auc([], [1.0]))


# ---- controls ----


def test_captions_cut_by_sentences():
    text = 'A dog. "A cat!" Two cars... and e.g. a bus'
    tokens = tuple(TokenFacts(part, 1.0, None) for part in ("A dog", ". ", '"A cat!" Two', " cars... and e.g. a bus"))
    cut = [evaluate.truncated([Caption(1, text, tokens)], n)[0] for n in range(7)]
    assert [c.text for c in cut[:4]] == ["", "A dog.", 'A dog. "A cat!"', 'A dog. "A cat!" Two cars...']
    assert [c.text for c in cut[5:]] == [text, text] and cut[6].tokens == tokens
    assert all("".join(token.text for token in c.tokens) == c.text for c in cut)


def test_dropping_last_objects(rng):
    captions, truth = random_corpus(rng, 50)
    report = evaluate.score(captions, truth)
    for share in (1.0, 0.8, 0.3, 0.0):
        goal = share * report.figures()["recall"]
        dropped = evaluate.drop_last(report, goal)
        step = 1 / report.counts[:, 6].sum()
        assert goal - step < dropped.figures()["recall"] <= goal + 1e-12
        for before, after in zip(report.captions, dropped.captions, strict=True):
            kept = list(dict.fromkeys(after.nodes))
            assert kept == list(dict.fromkeys(before.nodes))[: len(kept)] and after.nodes == [n for n in before.nodes if n in kept]
    assert evaluate.drop_last(report, goal).counts[:, 3].sum() == 0
    goals = [share * report.figures()["recall"] for share in (0.9, 0.8, 0.7, 0.6)]
    drops = [[evaluate.drop_last(report, goal, seed) for goal in goals] for seed in (0, 0, 1)]
    assert drops[0] == drops[1] != drops[2]  # at several goals: where one is the end of a round, the order makes no difference


def test_entropy_at_the_mention():
    tokens = [("A ", 9), ("d", 1), ("og", 7), (" and a", 8), (" ze", 5), ("bra.", 6)]
    caption = Caption("x", "A dog and a zebra.", tuple(TokenFacts(text, e, None) for text, e in tokens))
    report = evaluate.score([caption], {"x": frozenset(["dog"])})
    found = evaluate.entropy_separation([caption], report)
    assert (found.auc, found.interval, found.true, found.invented) == (1, (1, 1), 1, 1)
    low = Caption("x", caption.text, tuple(TokenFacts(t.text, -t.entropy, None) for t in caption.tokens))
    assert evaluate.entropy_separation([low], report).auc == 0
    with pytest.raises(EvaluationError, match="without tokens"):
        evaluate.entropy_separation([Caption("x", caption.text)], report)


def test_positions_along_the_caption():
    captions = [Caption("x", "A dog" + " " * 40 + "a cat"), Caption("y", "cat" + "." * 7)]
    report = evaluate.score(captions, {"x": frozenset(["dog"]), "y": frozenset(["cat"])})
    assert evaluate.positions(captions, report, 5).tolist() == [[2, 0], [0, 0], [0, 0], [0, 0], [0, 1]]


# ---- the command line ----


@pytest.fixture
def run(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Run]:
    """Runs pykvsmooth eval with a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return partial(run, "eval")


def write(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture
def ten(tmp_path: Path) -> tuple[Path, Path]:
    captions = write(tmp_path / "captions.jsonl", [{"image_id": i, "caption": row[0]} for i, row in enumerate(TEN)])
    return captions, write(tmp_path / "truth.jsonl", [{"image_id": str(i), "objects": objects} for i, objects in enumerate(OBJECTS)])


def test_chair_as_json(run, ten):
    got = run("chair", "--captions", ten[0], "--truth", ten[1], "--json")
    assert (got.code, got.err) == (0, "")
    assert {name: got.json[name] for name in FIGURES} == pytest.approx(FIGURES)
    assert got.json["captions"][2] == {"image_id": 2, "mentions": ["dog", "dog", "car"], "hallucinated": ["dog", "dog"]}
    assert set(got.json) == {*FIGURES, "captions", "intervals", "parity"}
    assert run("chair", "--captions", ten[0], "--truth", ten[1], "--json").out == got.out


def test_chair_as_a_table(run, ten, tmp_path):
    other = write(tmp_path / "other.jsonl", [{"image_id": i, "caption": "A zebra"} for i in range(11)])
    got = run("chair", "--captions", ten[0], "--truth", ten[1])
    assert got.code == 0 and "CHAIR_S %" in got.out and "40.0" in got.out and "56.2" in got.out
    got = run("chair", "--captions", ten[0], "--truth", ten[1], "--against", other)
    assert "100.0" in got.out and "-60.0" in got.out and "6 captions with an invented object were mended, 0 are new" in got.out
    got = run("chair", "--captions", ten[0], "--truth", ten[1], "--against", other, "--json").json
    assert got["against"]["chair_s"] == 1 and got["mcnemar"] == {"mended": 6, "new": 0, "p": 2 / 2**6}
    assert got["difference"]["chair_s"]["value"] == pytest.approx(-0.6)
    write(other, [{"image_id": 0, "caption": ""}])
    got = run("chair", "--captions", ten[0], "--truth", ten[1], "--against", other)
    assert got.code == 1 and "9 pictures have no caption in it" in got.err


def test_parity_is_an_option(run, tmp_path):
    captions = write(tmp_path / "c.jsonl", [{"image_id": "a", "caption": "Two men eat a cheesecake."}])
    truth = write(tmp_path / "t.jsonl", [{"image_id": "a", "objects": ["policeman", "CUPCAKE"]}])
    assert run("chair", "--captions", captions, "--truth", truth, "--json").json["recall"] == 1
    assert run("chair", "--captions", captions, "--truth", truth, "--json", "--parity").json["captions"][0]["mentions"] == []


GOOD = '{"image_id": 1, "caption": "A dog"}'


@pytest.mark.parametrize(
    "which, lines, says",
    [
        ("captions", [GOOD, "no json"], "captions.jsonl: line 2: is no JSON"),
        ("captions", [GOOD, "", "[1]"], "captions.jsonl: line 3: is no JSON object"),
        ("captions", ['{"image_id": 1}'], 'line 1: "caption" must be text'),
        ("captions", ['{"caption": "A dog"}'], 'line 1: "image_id" must be'),
        ("captions", ['{"image_id": true, "caption": ""}'], 'line 1: "image_id" must be'),
        ("captions", ['{"image_id": 1.5, "caption": ""}'], 'line 1: "image_id" must be'),
        ("captions", [GOOD, '{"image_id": "1", "caption": ""}'], "line 2: image 1 has a caption already"),
        ("captions", ["[" * 100_000], "line 1: is no JSON"),
        ("captions", [], "there are no captions"),
        ("captions", ['{"image_id": 7, "caption": ""}'], "image 7 has a caption, but no truth"),
        ("truth", ['{"image_id": 1, "objects": ["dog", "unicorn"]}'], "truth.jsonl: line 1: 'unicorn' is none"),
        ("truth", ['{"image_id": 1, "objects": "dog"}'], 'line 1: "objects" must be a list'),
        ("truth", ['{"image_id": 1, "objects": [1]}'], 'line 1: "objects" must be a list'),
        ("truth", ['{"image_id": 1, "objects": []}'] * 2, "line 2: image 1 is in the file already"),
        ("truth", ['{"image_id": 1, "objects": [], "x": ' + "9" * 5000 + "}"], "line 1: is no JSON"),
    ],
)
def test_bad_lines_are_named(run, tmp_path, which, lines, says):
    files = {"captions": [GOOD], "truth": ['{"image_id": 1, "objects": ["dog"]}'], which: lines}
    paths = {name: write(tmp_path / f"{name}.jsonl", content) for name, content in files.items()}
    got = run("chair", "--captions", paths["captions"], "--truth", paths["truth"])
    assert (got.code, got.out) == (1, "") and says in got.err and got.err.count("\n") == 1


def test_files_that_cannot_be_read(run, ten, tmp_path):
    (tmp_path / "latin").write_bytes(b'{"image_id": 1, "caption": "caf\xe9"}\n')
    for name, says in (("missing.jsonl", "No such file"), ("", "Is a directory"), ("latin", "line 1: is not UTF-8")):
        got = run("chair", "--captions", tmp_path / name, "--truth", ten[1])
        assert got.code == 1 and says in got.err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["chair"],
        ["chair", "--captions", "c"],
        ["chair", "--captions", "c", "--truth", "t", "--coco", "f"],
        ["run", "--images", "x.png"],
        ["run", "--images", "-", "--truth", "t"],
        ["sweep", "lambda_ref=0.5", "--truth", "t"],
        ["sweep", "lambda_ref", "--images", "x", "--truth", "t"],
        ["sweep", "lambda_ref=0.9:0.5:0.1", "--images", "x", "--truth", "t"],
        ["sweep", "lambda_ref=0:1:0", "--images", "x", "--truth", "t"],
        ["sweep", "lambda_ref=0:1:1e-9", "--images", "x", "--truth", "t"],
        ["sweep", "lambda_ref=0:inf:0.1", "--images", "x", "--truth", "t"],
        ["sweep", "lambda_ref=0.5,1.5", "--images", "x", "--truth", "t"],
        ["sweep", "lambda_ref=0.5,", "--images", "x", "--truth", "t"],
        ["sweep", "nothing=1", "--images", "x", "--truth", "t"],
        ["sweep", "window=3", "window=4", "--images", "x", "--truth", "t"],
        ["sweep", "window=3", "--images", "x", "--truth", "t", "--policy", "off"],
        ["sweep", "keep=0.5", "--images", "x", "--truth", "t", "--policy", "kvsmooth,prunehal"],
        ["sweep", "dscr.gamma=0.5", "--images", "x", "--truth", "t", "--policy", "kvsmooth,prunehal"],
        ["sweep", "prunehal.keep=2", "--images", "x", "--truth", "t", "--policy", "kvsmooth,prunehal"],
        ["sweep", "window=3", "--images", "x", "--truth", "t", "--out", "-"],
        ["run", "--images", "x", "--truth", "t", "--out", "-"],
        ["run", "--images", "x", "--truth", "t", "--prompt", "<image> and <image>"],
    ],
)
def test_usage_errors(run, argv):
    got = run(*argv)
    assert got.code == 2 and got.out == "" and "error: " in got.err


def test_usage_errors_name_the_help_that_lists_the_options(run):
    common = ["--images", "-", "--truth", "t"]
    assert "(pykvsmooth eval run --help)" in run("run", *common).err
    for policy, says in (
        ("kvsmooth", "prunehal.keep: the policy 'prunehal' is not on; on are kvsmooth (pykvsmooth eval sweep --help)"),
        ("kvsmooth,dscr", "prunehal.keep: the policy 'prunehal' is not on; on are kvsmooth, dscr (pykvsmooth eval sweep --help)"),
    ):
        assert says in run("sweep", "prunehal.keep=0.5", *common, "--policy", policy).err
    got = run("sweep", "keep=0.5", *common, "--policy", "prunehal,kvsmooth")
    assert "keep: say whose parameter it is, as in prunehal.NAME; on are prunehal, kvsmooth" in got.err


def test_the_grid_of_a_sweep():
    assert [one["lambda_ref"] for one in evaluate.grid(["lambda_ref=0.5:0.95:0.05"])] == [
        0.5,
        0.55,
        0.6,
        0.65,
        0.7,
        0.75,
        0.8,
        0.85,
        0.9,
        0.95,
    ]
    assert evaluate.grid(["kvsmooth.target=k,v", "window=1:3:2"]) == [{"target": t, "window": w} for t in "kv" for w in (1, 3)]
    assert evaluate.grid(["keep=0.5"], ["prunehal"]) == evaluate.grid(["prunehal.keep=0.5"], ["prunehal"]) == [{"keep": 0.5}]
    assert evaluate.grid(["prunehal.keep=0.5"], ["prunehal", "kvsmooth"]) == [{"prunehal.keep": 0.5}]
    assert evaluate.grid(["layers=1:4,3:8:2"]) == [{"layers": "1:4"}, {"layers": "3:8:2"}]
    assert evaluate.grid(["lambda_fixed=None,0.5"]) == [{"lambda_fixed": None}, {"lambda_fixed": 0.5}]


# ---- COCO ----


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    folder = tmp_path / "annotations"
    folder.mkdir()
    images = [{"id": i} for i in (9, 42, 391895)]
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    instances = [{"image_id": 9, "category_id": 1}, {"image_id": 391895, "category_id": 18}]
    (folder / "instances_val2014.json").write_text(json.dumps({"images": images, "categories": categories, "annotations": instances}))
    captions = [{"image_id": 391895, "caption": "Two men walk a dog."}, {"image_id": 391895, "caption": "A cheesecake"}]
    (folder / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return folder


def test_truth_from_coco_is_kept(run, coco, tmp_path, monkeypatch):
    captions = write(
        tmp_path / "c.jsonl",
        [
            {"image_id": "COCO_val2014_000000391895", "caption": "A man and a cake."},
            {"image": "val2014/COCO_val2014_000000000042.jpg", "caption": "A bus."},
            {"type": "token", "text": "A"},
        ],
    )
    got = run("chair", "--captions", captions, "--coco", coco, "--json")
    assert got.code == 0, got.err
    assert [(c["image_id"], c["hallucinated"]) for c in got.json["captions"]] == [(391895, []), (42, ["bus"])]
    assert got.json["recall"] == 2 / 3  # person, dog, cake
    assert run("chair", "--captions", captions, "--coco", coco, "--json", "--parity").json["recall"] == 0  # of one dog
    kept = sorted((tmp_path / "cache" / "pykvsmooth").iterdir())
    assert len(kept) == 2  # with and without parity
    monkeypatch.setattr(evaluate.coco, "_read", None)  # must not be called again
    assert run("chair", "--captions", captions, "--coco", coco, "--json").out == got.out
    monkeypatch.undo()


def test_a_changed_or_damaged_cache_is_not_used(coco, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = evaluate.coco_truth(str(coco))
    assert first == {"9": frozenset(["person"]), "42": frozenset(), "391895": frozenset(["dog", "person", "cake"])}
    for path in (tmp_path / "cache" / "pykvsmooth").iterdir():
        for content in (b"", b"[]", b"{}", path.read_bytes()[:-9], path.read_bytes().replace(b'"dog"', b'"god"'), b"[" * 100_000):
            path.write_bytes(content)
            assert evaluate.coco_truth(str(coco)) == first
    (coco / "captions_val2014.json").unlink()
    assert evaluate.coco_truth(str(coco))["391895"] == frozenset(["dog"])
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert evaluate.coco_truth(str(coco))["391895"] == frozenset(["dog"])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"images": 1, "categories": [], "annotations": []}',
        '{"images": [{"id": true}], "categories": [], "annotations": []}',
        '{"images": [], "categories": [{"id": 1, "name": "unicorn"}], "annotations": [{"image_id": 1, "category_id": 1}]}',
        '{"images": [], "categories": [{"id": 1, "name": 5}], "annotations": []}',
        '{"images": [], "categories": [{"id": [], "name": "dog"}], "annotations": []}',
        '{"images": [], "categories": [], "annotations": [{"image_id": 1, "category_id": 1}]}',
        "[" * 100_000,
    ],
)
def test_damaged_annotations(run, ten, coco, content):
    (coco / "instances_val2014.json").write_text(content)
    got = run("chair", "--captions", ten[0], "--coco", coco)
    assert got.code == 1 and "instances_val2014.json: is not as COCO's annotations are" in got.err
    (coco / "instances_val2014.json").unlink()
    got = run("chair", "--captions", ten[0], "--coco", coco)
    assert got.code == 1 and "has none of COCO's" in got.err


# ---- captions and scores in one go ----


@pytest.fixture
def scenes(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, Path]:
    """Five pictures and what is in them."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / f"s{i}.png")
    return folder, write(tmp_path / "truth.jsonl", [{"image_id": f"s{i}", "objects": ["dog", "car"]} for i in range(5)])


def test_run_equals_caption_then_chair(run, scenes, tmp_path, capsys):
    folder, truth = scenes
    out = tmp_path / "out.jsonl"
    got = run("run", "--images", folder, "--truth", truth, "--out", out, "--max-tokens", 8, "--json")
    assert got.code == 0 and [c["image_id"] for c in got.json["captions"]] == [f"s{i}" for i in range(5)]
    chair = run("chair", "--captions", out, "--truth", truth, "--json").json
    chair["captions"].sort(key=lambda caption: caption["image_id"])  # the file has them in the order in which they ended
    assert chair == got.json
    before = out.read_bytes()
    again = run("run", "--images", folder, "--truth", truth, "--out", out, "--max-tokens", 8, "--parallel", 2, "--json")
    assert again.out == got.out and "5 of 5 are in" in again.err and out.read_bytes() == before
    assert cli.main(["caption", str(folder), "--out", str(out), "--max-tokens", "8"]) == 0  # the same settings in the same words
    assert "5 of 5 pictures are in" in capsys.readouterr().err and out.read_bytes() == before


def test_the_pictures_of_opera(run, coco, tmp_path, monkeypatch):
    """Without another word they are taken where they are all there, in the list's order; --limit takes the first of them."""
    ids = evaluate.opera500()
    assert len(set(ids)) == 500 and all(i.isdigit() and i[0] != "0" for i in ids)
    Image.new("RGB", (8, 8)).save(tmp_path / f"COCO_val2014_{int(ids[7]):012}.jpg")
    got = run("run", "--images", tmp_path / "*.jpg", "--coco", coco, "--ids", "opera500", "--max-tokens", 1)
    assert got.code == 1 and "499 of its ids have no picture in --images" in got.err and "opera500" in got.err
    names = [f"COCO_val2014_{int(i):012}.jpg" for i in [*reversed(ids), "7"]]
    monkeypatch.setattr(command, "expand", lambda _: (names, []))
    args = argparse.Namespace(images=[], coco="c", ids=None, limit=3)
    assert [str(image_id) for image_id, _ in command._pictures(args)] == ids[:3]
    names.pop(0)
    assert [str(image_id) for image_id, _ in command._pictures(args)] != ids[:3]


def test_precision_is_a_setting_of_a_run(run, scenes, tmp_path):
    """The tower's words may differ: captions of one precision are none of the other's, here and in `caption`."""
    (folder, truth), out = scenes, tmp_path / "captions.jsonl"
    for precision in ("auto", "exact", "exact", "auto"):
        options = ("--out", out, "--max-tokens", 2, "--limit", 1, "--precision", precision)
        assert run("run", "--images", folder, "--truth", truth, *options).code == 0
    assert [json.loads(line)["settings"].get("precision") for line in out.read_text().splitlines()] == [None, "exact"]


def test_run_goes_on_and_keeps_tokens(run, scenes, tmp_path):
    folder, truth = scenes
    out = tmp_path / "out.jsonl"
    first = run("run", "--images", folder, "--truth", truth, "--out", out, "--max-tokens", 6, "--limit", 2, "--tokens", "--json")
    assert first.code == 0 and len(out.read_text().splitlines()) == 2
    got = run("run", "--images", folder, "--truth", truth, "--out", out, "--max-tokens", 6, "--tokens", "--json")
    assert len(out.read_text().splitlines()) == 5 and "2 of 5 are in" in got.err
    chosen = {c["image_id"] for c in first.json["captions"]}
    assert [c for c in got.json["captions"] if c["image_id"] in chosen] == first.json["captions"]
    captions = evaluate.read_captions(str(out))
    assert all("".join(t.text for t in c.tokens) == c.text for c in captions)
    fed = [[t for t in c.tokens if t.entropy is not None] for c in captions]  # text held back at the end comes as a token that was not fed
    assert all(len(one) >= len(c.tokens) - 1 and all(t.entropy > 0 for t in one) for one, c in zip(fed, captions, strict=True))
    other = run("run", "--images", folder, "--truth", truth, "--max-tokens", 6, "--policy", "off", "--against", out, "--json")
    assert other.code == 0 and other.json["mcnemar"]["p"] <= 1


def test_which_pictures(run, scenes, tmp_path):
    folder, truth = scenes
    ids = tmp_path / "ids"

    def chosen(*argv: object) -> list[str]:
        got = run("run", "--images", folder, "--truth", truth, "--max-tokens", 1, "--json", *argv)
        assert got.code == 0, got.err
        return [c["image_id"] for c in got.json["captions"]]

    three = chosen("--limit", 3)
    assert three == sorted(three) and set(chosen("--limit", 2)) < set(three) and chosen("--limit", 3) == three
    write(ids, ["s3", {"image_id": "s1", "caption": "x"}, "", "s0"])
    assert chosen("--ids", ids) == ["s3", "s1", "s0"] and chosen("--ids", ids, "--limit", 1) == ["s3"]
    for lines, says in ((["s3", "s9"], "1 of its ids have no picture"), (["s3", "s3"], "line 2: image s3"), (["{}"], '"image_id" must be')):
        got = run("run", "--images", folder, "--truth", truth, "--ids", write(ids, lines))
        assert got.code == 1 and says in got.err


def test_what_stops_a_run_before_it_begins(run, scenes, tmp_path):
    folder, truth = scenes
    short = write(tmp_path / "short.jsonl", [{"image_id": "s0", "objects": []}])
    (folder / "s0.jpg").write_bytes(b"")
    for argv, says in (
        (["--truth", truth], "two pictures have the image id s0"),
        (["--truth", short, "--limit", 2], "two pictures have"),
    ):
        got = run("run", "--images", folder, *argv)
        assert got.code == 1 and says in got.err, got.err
    (folder / "s0.jpg").unlink()
    assert "none: can't be read" in run("run", "--images", folder, "--truth", tmp_path / "none").err
    assert "4 pictures are not in it, the first is image s1" in run("run", "--images", folder, "--truth", short).err
    assert "have no caption in it" in run("run", "--images", folder, "--truth", truth, "--against", write(tmp_path / "a", [GOOD])).err
    got = run("run", "--images", folder, folder / "s9.png", "--truth", truth)
    assert got.code == 1 and "s9.png: no such file" in got.err and "truth" not in got.err
    (folder / "s1.png").write_text("no picture")
    got = run("run", "--images", folder, "--truth", truth, "--max-tokens", 2)
    assert got.code == 1 and got.out == "" and "s1.png" in got.err


def test_the_function_takes_arrays(model, rng):
    pictures = [(i, rng.integers(0, 256, (20, 20, 3), np.uint8)) for i in range(3)]
    captions = evaluate.run(model, pictures, policy=kvs.KVSmooth.for_model(model), max_tokens=5, tokens=True)
    with model.session(policy=kvs.KVSmooth.for_model(model)) as session:
        for caption, (image_id, image) in zip(captions, pictures, strict=True):
            result = session.generate(evaluate.PROMPT, image=image, max_tokens=5).result()
            assert (caption.image_id, caption.text) == (image_id, result.text)
            assert [t.entropy for t in caption.tokens] == [t.entropy for t in result.tokens]
    with pytest.raises(EvaluationError, match="no pictures"):
        evaluate.run(model, [])


# ---- sweeps ----


def test_sweep(run, scenes, tmp_path):
    folder, truth = scenes
    argv = [
        "sweep",
        "lambda_ref=0.2,0.9",
        "target=k",
        "--images",
        folder,
        "--truth",
        truth,
        "--max-tokens",
        7,
        "--out",
        tmp_path / "s.jsonl",
    ]
    got = run(*argv, "--json")
    assert got.code == 0 and [point["set"] for point in got.json["points"]] == [{"lambda_ref": v, "target": "k"} for v in (0.2, 0.9)]
    for values, policy in ((got.json["baseline"], ["--policy", "off"]), (got.json["points"][1], ["--set", "kvsmooth.target=k"])):
        alone = run("run", "--images", folder, "--truth", truth, "--max-tokens", 7, "--json", *policy).json
        assert {name: values[name] for name in FIGURES} == {name: alone[name] for name in FIGURES}
    cuts = got.json["cut"]
    assert [cut["sentences"] for cut in cuts] == list(range(1, len(cuts) + 1))
    assert {name: cuts[-1][name] for name in FIGURES} == {name: got.json["baseline"][name] for name in FIGURES}
    assert (tmp_path / "s.jsonl").read_text().count("\n") == 15
    table = run(*argv)
    assert table.code == 0 and "lambda_ref=0.9, target=k" in table.out and "baseline: 5 of 5 are in" in table.err
    assert run(*argv, "--json").out == got.out


def test_sweep_of_a_stack(run, scenes):
    folder, truth = scenes
    common = ["--images", folder, "--truth", truth, "--max-tokens", 7, "--json", "--policy", "prunehal,kvsmooth"]
    got = run("sweep", "prunehal.keep=0.3,0.9", "kvsmooth.lambda_ref=0.5", *common, "--set", "prunehal.times=1")
    assert [point["set"] for point in got.json["points"]] == [{"prunehal.keep": v, "kvsmooth.lambda_ref": 0.5} for v in (0.3, 0.9)]
    alone = run("run", *common, "--set", "prunehal.times=1", "--set", "prunehal.keep=0.3", "--set", "kvsmooth.lambda_ref=0.5").json
    assert {name: got.json["points"][0][name] for name in FIGURES} == {name: alone[name] for name in FIGURES}


def test_plot_of_a_sweep(run, scenes, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    folder, truth = scenes
    plot = tmp_path / "s.png"
    argv = ["sweep", "lambda_ref=0.2,0.9", "--images", folder, "--truth", truth, "--max-tokens", 3]
    assert run(*argv, "--plot", plot).code == 0
    with Image.open(plot) as image:
        assert image.size == (1650, 690) and len(image.convert("RGB").getcolors(1 << 20)) > 100
    for path, says in ((tmp_path / "s.gif", "a plot is .png"), (tmp_path / "none" / "s.png", "no such folder")):
        got = run(*argv, "--plot", path)
        assert got.code == 1 and says in got.err
    assert not list(tmp_path.glob("*.part"))


def test_plot_without_matplotlib(run, scenes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    got = run("sweep", "lambda_ref=0.2", "--images", scenes[0], "--truth", scenes[1], "--plot", tmp_path / "s.png")
    assert got.code == 1 and "pip install 'pykvsmooth[plot]'" in got.err


# ---- speed ----


@pytest.mark.slow
def test_ten_thousand_captions_in_ten_seconds(run, tmp_path):
    choose = random.Random(1)
    words = [*evaluate.node_words(), *"the a in on of near large red with standing people, men buses wine glasses it's there.".split()]
    captions = [{"image_id": i, "caption": " ".join(choose.choices(words, k=90))} for i in range(10_000)]
    truth = [{"image_id": i, "objects": choose.sample(evaluate.node_words(), 5)} for i in range(10_000)]
    begin = time.process_time()
    got = run("chair", "--captions", write(tmp_path / "c", captions), "--truth", write(tmp_path / "t", truth), "--json")
    assert got.code == 0 and time.process_time() - begin < 10
