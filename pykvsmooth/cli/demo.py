"""pykvsmooth demo: the scenes in the box, plain against smoothed, with the objects marked that are not in them."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from rich.text import Text

from .. import box
from ..errors import ModelFileNotFoundError
from . import options
from .escape import escaped
from .judge import CAUTION, Tally, headline, judge
from .render import Painted
from .terminal import Ui

if TYPE_CHECKING:
    from ..session import Session
    from ..stats import Token

INVENTED = "bold underline color(16) on color(51)"  # no shade of the heat


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="caption the scenes in the box, plain against smoothed",
        description="Captions the scenes that come with the checkpoint in the box, without and with the policy. Words are shaded by their "
        "row entropy; objects that the scene does not hold are marked.",
    )
    parser.add_argument("--scene", type=options._positive, action="append", metavar="N", help="only this one; may be repeated")
    options.add_model(parser)
    options.add_policy(parser)
    options.add_answer(parser)
    options.add_output(parser)
    parser.set_defaults(run=run)


class Judged(Painted):
    """A caption with its inventions marked. It comes sentence by sentence: "hot dog" is not a dog before both words are there."""

    def __init__(self, ui: Ui, objects: list[str]) -> None:
        super().__init__(ui, heat=True, strengths=None)
        self._objects = objects
        self._text, self._held = "", list[Any]()
        self._spans: list[tuple[int, int]] = []
        self.nodes: list[str] = []

    def token(self, token: Token) -> None:
        self._held.append(token)
        self._text += escaped(token.text)
        if token.text.rstrip().endswith((".", "!", "?")):
            self._release()

    def end(self) -> None:
        self._release()
        super().end()

    def _release(self) -> None:
        self.nodes, self._spans = judge(self._text, self._objects)
        held, self._held = self._held, []
        for token in held:
            super().token(token)
        self._flush()

    def _style(self, begin: int, word: str, entropy: float | None) -> str:
        shade = super()._style(begin, word, entropy)
        return INVENTED if any(a < begin + len(word) and begin < b for a, b in self._spans) else shade

    def _put(self, text: str, style: str, strength: float | None) -> None:
        super()._put(f"[{text}]" if style == INVENTED and not self.ui.out.colour else text, style, strength)


def run(args: argparse.Namespace, ui: Ui) -> int:
    scenes = box.scenes()
    if not scenes:
        raise ModelFileNotFoundError("this installation has no box; pykvsmooth caption takes your own pictures and model")
    for number in args.scene or ():
        if number > len(scenes):
            raise options.UsageError(f"--scene {number}: there are {len(scenes)}")
    if not args.policy:
        raise options.UsageError("the demo compares a policy with none: --policy kvsmooth")
    chosen = [scenes[number - 1] for number in args.scene] if args.scene else scenes
    changes, answer = options.policy_changes(args, len(chosen)), options.answer_options(args)
    boxed = args.model is None and not os.environ.get("PYKVSMOOTH_MODEL")
    if boxed:
        args.model = box.text_model()  # by its name, for without one the library warns that it is the one in the box
    model = options.load_model(args, ui)
    policy = options.make_policy(args, model, changes)
    label = options.policy_label(args)
    ways = {"plain": None, label: policy}
    ui.note(f"{'the model in the box; ' if boxed else ''}{label}: {policy!r}")
    sessions = {way: model.session(n_ctx=args.n_ctx, kv_type=args.kv_type, policy=policy) for way, policy in ways.items()}
    tallies = {way: Tally() for way in ways}
    for scene in chosen:
        _caption(ui, scene, sessions, tallies, answer)
    _close(ui, chosen, tallies)
    return 0


def _caption(ui: Ui, scene: dict[str, Any], sessions: dict[str, Session], tallies: dict[str, Tally], answer: dict[str, Any]) -> None:
    name, facts = headline(scene)
    ui.put(name, "bold")
    ui.put(f"{facts}\n")
    for way, session in sessions.items():
        ui.put(f"{way}:", "bold")
        ui.put("\n")
        painter = Judged(ui, scene["objects"])
        try:
            for token in session.generate(options.PROMPT, image=scene["picture"], **answer):
                painter.token(token)
        finally:
            painter.end()
        tallies[way].add(scene, painter.nodes)
    ui.put("\n")


def _close(ui: Ui, scenes: list[dict[str, Any]], tallies: dict[str, Tally]) -> None:
    there = sum(len(scene["objects"]) for scene in scenes)
    width = max(map(len, tallies)) + 1
    for way, tally in tallies.items():
        ui.put(f"{way:{width}}", "bold")
        ui.put(f"{tally.line(there)}\n")
    mark = Text("invented", INVENTED) if ui.out.colour else Text("[invented]")
    said = f": not in the scene; shades: row entropy, from low to high. {CAUTION}"
    ui.note(Text.assemble(mark, said), "")
