"""The scenes that the demo checkpoint is trained and judged on: pictures, truth and captions must say the same."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.scenes import CLASSES, CONTEXTS, KINDS, SIZE, SPLITS, Scene, caption, scene, side
from models.scenes.__main__ import write
from models.scenes.scene import FEWEST, MOST
from models.scenes.sprites import CELL, sprites


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene(SPLITS["development"] + i) for i in range(200)]


def test_a_seed_is_a_scene(scenes: list[Scene]) -> None:
    again = scene(SPLITS["development"] + 7)
    assert np.array_equal(again.picture, scenes[7].picture) and again.objects == scenes[7].objects
    assert not np.array_equal(scenes[7].picture, scenes[8].picture)


def test_splits_never_meet() -> None:
    firsts = sorted(SPLITS.values())
    assert len(SPLITS) == 3 and min(np.diff(firsts)) >= 10**8  # no training run draws that many


def test_objects_are_where_the_truth_says(scenes: list[Scene]) -> None:
    for s in scenes:
        assert s.picture.shape == (SIZE, SIZE, 3) and s.picture.dtype == np.uint8
        assert 2 <= len(s.objects) <= MOST and len({thing.node for thing in s.objects}) == len(s.objects)
        assert [thing.area for thing in s.objects] == sorted((thing.area for thing in s.objects), reverse=True)
        for i, thing in enumerate(s.objects):
            rows, columns = np.nonzero(s.visible == i + 1)
            x0, y0, x1, y1 = thing.box
            assert len(rows) == thing.area > 0
            assert x0 <= columns.min() and columns.max() < x1 <= SIZE and y0 <= rows.min() and rows.max() < y1 <= SIZE
    counts = [len(s.objects) for s in scenes]
    assert np.mean([count >= FEWEST for count in counts]) > 0.98 and max(counts) == MOST


def test_the_world_is_varied_but_not_random(scenes: list[Scene]) -> None:
    assert len({kind.node for kind in KINDS}) >= 40 and len(CONTEXTS) == 14 and len(sprites()) == len(CLASSES)
    assert {s.context for s in scenes} == set(range(len(CONTEXTS)))
    typical = np.mean([thing.kind in CONTEXTS[s.context].typical for s in scenes for thing in s.objects])
    assert 0.75 < typical < 0.95
    assert max(max(sprite.size) for sprite in sprites()) <= CELL


def test_captions_name_each_object_once_from_left_to_right_and_on_its_side(scenes: list[Scene]) -> None:
    for s in scenes:
        _, *sentences, end = caption(s, 3).split(". ")
        assert len(sentences) == len(s.objects) and ("calm" in end or "quiet" in end) == (len(s.objects) < 6)
        for thing, sentence in zip(sorted(s.objects, key=lambda thing: thing.centre[0]), sentences, strict=True):
            named = max(sentence.find(f" {word} ") for word in KINDS[thing.kind].words)
            told = re.findall(r" the (left|right) ", sentence[named:])
            assert named > 0 and told == ([] if side(thing) == "middle" else [side(thing)])
        assert 50 < len(caption(s, 3).split()) < 140


def test_variants_differ_in_words_only(scenes: list[Scene]) -> None:
    texts = [caption(scenes[0], variant) for variant in range(8)]
    assert len(set(texts)) > 1 and caption(scenes[0], 0) == texts[0]
    assert len({text.count(". ") for text in texts}) == 1


def test_write(tmp_path: Path) -> None:
    write("test", [5, 6, 7], tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in lines] == ["test-00005", "test-00006", "test-00007"]
    s = scene(SPLITS["test"] + 6)
    assert lines[1]["objects"] == [thing.node for thing in s.objects] and lines[1]["caption"] == caption(s, 0)
    with Image.open(tmp_path / "test-00006.png") as picture:
        assert hashlib.sha256(np.asarray(picture).tobytes()).digest() == hashlib.sha256(s.picture.tobytes()).digest()
