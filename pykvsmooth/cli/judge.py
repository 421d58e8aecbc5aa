"""Captions of scenes whose objects are known: what is invented in them, and how often. Used with rich and without."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CAUTION = "A few scenes prove nothing; on 500, smoothing makes no fewer captions with inventions (docs/evidence.md in the sources)."


@dataclass
class Tally:
    """Of one way to caption, over all scenes."""

    named: int = 0
    invented: int = 0
    captions: int = 0
    wrong: int = 0  # captions with an invention
    found: set[tuple[str, str]] = field(default_factory=set)  # scene, object

    def add(self, scene: dict[str, Any], nodes: list[str]) -> None:
        missing = [node for node in nodes if node not in scene["objects"]]
        self.named += len(nodes)
        self.invented += len(missing)
        self.captions += 1
        self.wrong += bool(missing)
        self.found |= {(scene["image_id"], node) for node in nodes if node in scene["objects"]}

    def line(self, there: int) -> str:
        share = f"{self.invented / self.named:.0%}" if self.named else "0%"
        return (
            f"{self.named} objects named, {self.invented} invented ({share}) in {self.wrong} of {self.captions} captions; "
            f"{len(self.found)} of {there} that are there"
        )


def judge(text: str, objects: list[str]) -> tuple[list[str], list[tuple[int, int]]]:
    """The objects that a caption names, in its order, and where in it (begin, end) those stand that are not in the scene."""
    from ..evaluate.chair import find

    mentions = find(text)[0]
    spans = [(mention.begin, mention.end) for mention in mentions if mention.node not in objects]
    return [mention.node for mention in mentions], spans


def headline(scene: dict[str, Any]) -> tuple[str, str]:
    """The name of a scene, and what is known of it."""
    return scene["image_id"], f": {scene['context']}; there are {', '.join(scene['objects'])}"
