"""Captions of scenes: an opening for the context, one sentence for each object from left to right, one kind of ending.

The plan follows from the scene alone; the words vary. A model that decodes greedily learns such captions well, and loops on
captions whose plan is free. From left to right, because a small model that may name objects in any other order learns what is there and
not where: its lefts and rights are little better than chance. Left and right are said where they are clearly so.
"""

from __future__ import annotations

import numpy as np

from .catalogue import CONTEXTS, KINDS
from .scene import SIZE, Object, Scene

PROMPT = "Please describe the image in detail."
SIDE = 0.42  # left of this share of the width is left; right of 1 - it is right
LARGE, SMALL = 0.055, 0.018  # share of the picture that is seen of a large, of a small object

_OPENINGS = ("The image shows {}.", "The picture shows {}.", "This is a picture of {}.", "In this image we see {}.")
_PLACES = {
    "left": ("on the left", "to the left", "at the left"),
    "right": ("on the right", "to the right", "at the right"),
    "middle": ("in the middle", "in the center", "near the middle"),
}
_THERE = ("There is {}", "We see {}", "I can see {}", "I notice {}")
_SIZES = {"large": ("large", "big"), "small": ("small", "little"), "": ("",)}
_MANNERS = {
    "person": ("who is out for a while", "who seems to enjoy the day", "who is looking around"),
    "parked": ("that is standing still", "that is ready to go", "that has just come to a stop"),
    "flying": ("that is high in the air", "that moves with the wind", "that is far above the ground"),
    "afloat": ("that moves along slowly", "that rocks a little", "that is kept in good order"),
    "fixed": ("that belongs to this place", "that has been here for long", "that is hard to miss"),
    "animal": ("that is looking around", "that keeps quite still", "that seems to feel at home"),
    "lying": ("that somebody has left there", "that is lying around", "that has been used today"),
    "standing": ("that is standing upright", "that was put there with care", "that looks almost new"),
    "food": ("that looks fresh", "that is ready to eat", "that smells good"),
}
_ENDINGS = (
    (
        "Overall the scene looks calm and tidy, with room to spare.",
        "Overall the scene feels quiet, with little going on.",
        "All in all it is a calm scene with much free space.",
    ),
    (
        "Overall the scene looks lively, with many things to see.",
        "Overall the scene feels busy, with a lot going on.",
        "All in all it is a busy scene with little free space.",
    ),
)
CROWD = 6  # objects that make a busy scene


def side(thing: Object) -> str:
    """left, middle or right"""
    x = thing.centre[0] / SIZE
    return "left" if x < SIDE else "right" if x > 1 - SIDE else "middle"


def size(thing: Object) -> str:
    share = thing.area / SIZE**2
    return "large" if share > LARGE else "small" if share < SMALL else ""


def caption(scene: Scene, variant: int) -> str:
    """Several sentences; another variant says the same in other words."""
    rng = np.random.default_rng([scene.seed, variant])

    def one_of(choices: tuple[str, ...]) -> str:
        return choices[int(rng.integers(len(choices)))]

    sentences = [one_of(_OPENINGS).format(CONTEXTS[scene.context].phrase)]
    for thing in sorted(scene.objects, key=lambda thing: thing.centre[0]):
        kind = KINDS[thing.kind]
        named = " ".join(filter(None, (one_of(_SIZES[size(thing)]), one_of(kind.words))))
        there, place = one_of(_THERE).format(_article(named)), one_of(_PLACES[side(thing)])
        sentences.append(f"{there} {place} {one_of(_MANNERS[kind.manner])}.")
    sentences.append(one_of(_ENDINGS[len(scene.objects) >= CROWD]))
    return " ".join(sentences)


def _article(named: str) -> str:
    if named.split()[-1] == "skis":
        return f"a pair of {named}"
    return f"{'an' if named[0] in 'aeio' or named.startswith('umb') else 'a'} {named}"
