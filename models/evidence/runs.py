"""Captions of a split under one policy, and what is read off them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

import pykvsmooth as kvs
from models.scenes import PROMPT, SIZE, SPLITS, Scene, scene
from pykvsmooth import evaluate
from pykvsmooth.evaluate import Caption, Report, Scored
from pykvsmooth.policies.stack import Policy

MAX_TOKENS = 256  # nearly twice the longest caption of the training data
PARALLEL = 16
LOOP = 3  # times that a sentence comes in a caption that is in a loop


@cache
def scenes(split: str, count: int) -> tuple[Scene, ...]:
    return tuple(scene(SPLITS[split] + i) for i in range(count))


@dataclass(frozen=True)
class Run:
    """Captions of the first scenes of a split, in their order; image_id is the number of the scene."""

    split: str
    captions: tuple[Caption, ...]

    @property
    def scenes(self) -> tuple[Scene, ...]:
        return scenes(self.split, len(self.captions))

    @cached_property
    def truth(self) -> dict[str, frozenset[str]]:
        return {str(i): frozenset(thing.node for thing in s.objects) for i, s in enumerate(self.scenes)}

    @cached_property
    def report(self) -> Report:
        return evaluate.score(self.captions, self.truth)

    @property
    def tokens(self) -> float:
        """Mean number a caption."""
        return float(np.mean([len(one.tokens) for one in self.captions]))

    @property
    def degenerate(self) -> float:
        """Share of captions without an end, or with a sentence that keeps coming."""
        return float(np.mean([len(one.tokens) >= MAX_TOKENS or looping(one.text) for one in self.captions]))

    @property
    def mean_strength(self) -> float:
        """Over all smoothed tokens; NaN without a policy."""
        found = [t.strength for one in self.captions for t in one.tokens if t.strength is not None and np.isfinite(t.strength)]
        return float(np.mean(found)) if found else float("nan")

    @property
    def sides_right(self) -> float:
        """Of all that is said to be on the left or on the right, and is in the scene: the share that is on that half."""
        both = zip(self.captions, self.report.captions, self.scenes, strict=True)
        told = [right for caption, scored, s in both for right in _sides(caption.text, scored, s)]
        return float(np.mean(told)) if told else float("nan")

    def cut(self, sentences: int) -> Report:
        """The same captions after so many sentences."""
        return evaluate.score(evaluate.truncated(self.captions, sentences), self.truth)


Asked = Policy | Sequence[Policy] | None  # of a session
Found = dict[str, tuple[Any, Run]]  # of a search: setting and what it gave, by name; "plain" is among them
FINALISTS = 8
PRICE = 0.01  # of F1 that a setting may cost


class Searched(NamedTuple):
    """What the development split says."""

    found: Found  # KVSmooth's settings
    finals: Found  # the best of them again, on more scenes
    siblings: dict[str, Found]  # the other methods' settings, by method


def finalists(found: Found) -> list[str]:
    """The plain model, and the settings with the fewest inventions among those that cost no more than twice the price: the first round
    has few scenes."""
    floor = found["plain"][1].report.figures()["f1"] - 2 * PRICE
    able = [name for name, (_, run) in found.items() if name != "plain" and run.report.figures()["f1"] >= floor]
    return ["plain", *sorted(able, key=lambda name: found[name][1].report.figures()["chair_s"])[:FINALISTS]]


def winner(finals: Found) -> str:
    """Of the settings that cost no more than the price, those whose CHAIR_S is within one standard error of the lowest count as equal, and
    the best F1 decides. If all cost more, too."""
    figures = {name: run.report.figures() for name, (_, run) in finals.items() if name != "plain"}
    floor = finals["plain"][1].report.figures()["f1"] - PRICE
    able = [name for name, one in figures.items() if one["f1"] >= floor] or list(figures)
    lowest = min(figures[name]["chair_s"] for name in able)
    error = (lowest * (1 - lowest) / len(finals["plain"][1].captions)) ** 0.5
    return max((name for name in able if figures[name]["chair_s"] <= lowest + error), key=lambda name: figures[name]["f1"])


def looping(text: str) -> bool:
    sentences = re.split(r"(?<=\.) ", text)
    return max(map(sentences.count, sentences)) >= LOOP


def _sides(text: str, scored: Scored, s: Scene) -> list[bool]:
    right = []
    for mention in scored.mentions:
        sentence = (text[: mention.end].rpartition(". ")[2] + text[mention.end :].partition(".")[0]).lower()
        said = set(re.findall(r"\b(?:on|to|at) the (left|right)\b", sentence))  # not "has left there"
        things = [thing for thing in s.objects if thing.node == mention.node]
        if len(said) == 1 and things:
            right.append((things[0].centre[0] < SIZE / 2) == (said == {"left"}))
    return right


def caption_scenes(model: kvs.Model, policy: Asked, split: str, count: int, progress: Callable[[int, int], None] | None = None) -> Run:
    """Greedy captions; the runtime's batches give what single captions give, to the bit."""
    pictures = [(i, view.picture) for i, view in enumerate(scenes(split, count))]
    found = evaluate.run(
        model,
        pictures,
        policy=policy,
        prompt=PROMPT,
        tokens=True,
        parallel=PARALLEL,
        n_ctx=512,
        progress=progress,
        max_tokens=MAX_TOKENS,
    )
    return Run(split, tuple(found))


def dropped(plain: Run, recall: float, draws: int = 20) -> dict[str, float]:
    """The control at this recall: plain captions that blindly lose their last objects. Mean figures of so many draws."""
    figures = [evaluate.drop_last(plain.report, recall, seed).figures() for seed in range(draws)]
    return {name: float(np.mean([one[name] for one in figures])) for name in figures[0]}
