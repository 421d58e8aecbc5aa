"""pykvsmooth caption --compare: the plain caption of a picture and the policy's, side by side, differences marked."""

from __future__ import annotations

import difflib
import itertools
import re
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from .. import errors
from .escape import escaped
from .options import policy_label
from .pictures import source_of
from .records import caption_record
from .render import stats_line
from .terminal import Ui

if TYPE_CHECKING:
    from ..session import Session
    from ..stats import Result
    from .caption import Job

SIDE_BY_SIDE = 68  # columns of the terminal
Marked = list[tuple[str, bool]]  # words, and whether the other caption lacks them


def compare_all(job: Job) -> None:
    from ..images import load_image

    sessions, titles = (job.session(None), job.session(job.policy)), ("plain", policy_label(job.args))
    for name in job.names:
        try:
            image = load_image(source_of(name))
            results = [_result(job, session, name, image, title) for session, title in zip(sessions, titles, strict=True)]
        except (errors.ImageError, errors.ContextOverflowError) as error:
            job.fail(name, error)
            continue
        _show_pair(job, name, results, titles)


def _result(job: Job, session: Session, name: str, image: Any, title: str) -> Result:
    job.ui.status(f"looking at {name}")
    stream = session.generate(job.args.prompt, image=image, **job.answer)
    for n, _ in enumerate(stream, 1):
        job.ui.status(f"{title}: {n} tokens")
    job.ui.clear()
    return stream.result()


def _show_pair(job: Job, name: str, results: list[Result], titles: tuple[str, str]) -> None:
    if job.json:
        for result, policy in zip(results, (None, job.policy), strict=True):
            job.line({"type": "result", **caption_record(name, result, job.settings(policy))})
    else:
        if len(job.names) > 1:
            job.header(name, end="\n")
        show(job.ui, results[0], results[1], titles)
    job.done += 1
    for title, result in zip(titles, results, strict=True):
        job.ui.note(f"{title}: {stats_line(result.stats, result.finish_reason)}")


def show(ui: Ui, plain: Result, other: Result, titles: tuple[str, str]) -> None:
    """Side by side where there is room, else one above the other; what differs is coloured, or bracketed as wdiff does."""
    left, right = marked_words(escaped(plain.text), escaped(other.text))
    sides = [_shown(left, "red", "[-", "-]", ui.out.colour), _shown(right, "green", "{+", "+}", ui.out.colour)]
    if ui.out.is_terminal and ui.out.width >= SIDE_BY_SIDE:
        columns = (Column(title, ratio=1) for title in titles)
        table = Table(*columns, box=box.MINIMAL, show_edge=False, pad_edge=False, expand=True)
        table.add_row(*sides)
        ui.out.print(table)
    else:
        for title, side in zip(titles, sides, strict=True):
            ui.out.print(Text(f"{title}:", "bold"))
            ui.out.print(side, soft_wrap=not ui.out.is_terminal)
    n_left, n_right = sum(m for _, m in left), sum(m for _, m in right)
    same = "no difference" if not n_left + n_right else f"{n_left} of {len(left)} words against {n_right} of {len(right)} differ"
    ui.note(same)


def marked_words(plain: str, other: str) -> tuple[Marked, Marked]:
    a, b = (re.findall(r"\n|[^\s]+", text) for text in (plain, other))
    left: Marked = []
    right: Marked = []
    for kind, i, i2, j, j2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        left += [(word, kind != "equal") for word in a[i:i2]]
        right += [(word, kind != "equal") for word in b[j:j2]]
    return left, right


def _shown(words: Marked, style: str, opening: str, closing: str, colour: bool) -> Text:
    text = Text()
    for marked, run in itertools.groupby(words, key=lambda word: word[1]):
        part = re.sub(" ?\n ?", "\n", " ".join(word for word, _ in run))
        if marked and not colour:
            part = opening + part + closing
        if text and not text.plain.endswith("\n") and not part.startswith("\n"):
            text.append(" ")
        text.append(part, style if marked else None)
    return text
