"""pykvsmooth demo where rich is not installed: the captions as text, inventions in brackets."""

from __future__ import annotations

import sys
import textwrap

from .. import box
from ..errors import KVSmoothError
from ..model import Model
from ..policies.kvsmooth import KVSmooth
from .escape import escaped, one_line
from .judge import CAUTION, Tally, headline, judge

PROMPT = "Please describe the image in detail."


def run() -> int:
    scenes = box.scenes()
    if not scenes:
        print("error: this installation has no box", file=sys.stderr)
        return 1
    try:
        return _demo(scenes)
    except KVSmoothError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 1


def _demo(scenes: list[dict]) -> int:  # type: ignore[type-arg]
    with Model(box.text_model()) as model:
        policy = KVSmooth.for_model(model)
        ways = {"plain": None, "smoothed": policy}
        tallies = {way: Tally() for way in ways}
        for scene in scenes:
            print("".join(headline(scene)))
            for way, chosen in ways.items():
                with model.session(policy=chosen) as session:
                    text = escaped(session.generate(PROMPT, image=scene["picture"]).result().text)
                nodes, spans = judge(text, scene["objects"])
                tallies[way].add(scene, nodes)
                print(f"{way}:\n{textwrap.fill(bracketed(text, spans), 79)}", flush=True)
            print()
    there = sum(len(scene["objects"]) for scene in scenes)
    for way, tally in tallies.items():
        print(f"{way:9}{tally.line(there)}")
    print(f"[in brackets]: not in the scene. smoothed: {policy!r}\n{CAUTION}", file=sys.stderr)
    print("For shades of row entropy, and for the other commands: pip install 'pykvsmooth[cli]'", file=sys.stderr)
    return 0


def bracketed(text: str, spans: list[tuple[int, int]]) -> str:
    for begin, end in reversed(spans):
        text = f"{text[:begin]}[{text[begin:end]}]{text[end:]}"
    return text
