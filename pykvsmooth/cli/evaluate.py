"""pykvsmooth eval: how much captions invent, by CHAIR. eval chair scores a file, eval run captions and scores, eval sweep draws a curve."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..policies import kind
from . import options
from .pictures import STDIN, expand
from .records import dumps
from .terminal import Ui

if TYPE_CHECKING:
    from ..evaluate import Caption, Comparison, Point, Report, Scored, Sweep
    from ..evaluate.captioning import Picture
    from ..evaluate.score import Truth

OPERA500 = "opera500"
DESCRIPTION = """How much captions invent: CHAIR's figures (arXiv 1809.02156) for pictures whose objects are known."""
FILES_HELP = """captions: JSON lines {"image_id": 7, "caption": "..."}, or the lines of `pykvsmooth caption --out`, whose image_id is the
file's name without folder and ending (with --coco: the number at its end). truth: JSON lines {"image_id": 7, "objects": ["dog", "sofa"]};
any word of CHAIR's list names its class. --coco: the folder with COCO's instances_{train,val}2014.json and
captions_{train,val}2014.json; what is found in them is kept in the user's cache folder.

CHAIR_S: captions with an invented object; CHAIR_I: mentions that are invented. Intervals: 95 %, bootstrap over captions."""
RUN_HELP = """--out F.jsonl keeps the captions, and the same command goes on where it was stopped. --limit N takes the N pictures whose
SHA-256 of the image_id is smallest (the same on every machine), with --ids the first N of that list. --ids opera500: the 500 pictures
of OPERA's published captions; so it is with --coco where nothing else is said and --images has all of them.

"""
SWEEP_HELP = """The paper's Table 1 and figure 4 with LLaVA-1.5-7B and COCO (the centre crop and --parity are what its scripts use):

  pykvsmooth eval sweep lambda_ref=0.5:0.95:0.05 --model llava-v1.5-7b-f16.gguf --mmproj mmproj-f16.gguf --images val2014 \\
    --coco annotations --limit 500 --image-mode crop --parity --parallel 8 --out table1.jsonl --plot table1.png

The paper's own 500 pictures are unknown. These are OPERA's, whose protocol it follows; --ids FILE takes another list, or a published
file of captions with its image_ids.

"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("eval", help="measure what captions invent", description=DESCRIPTION)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="chair | run | sweep")
    _add_chair(kinds)
    _add_run(kinds)
    _add_sweep(kinds)


def _add_chair(kinds: Any) -> None:
    parser = _parser(kinds, "chair", "score a file of captions", FILES_HELP)
    parser.add_argument("--captions", required=True, metavar="F.jsonl", help="the captions to score")
    _add_truth(parser)
    _add_against(parser)
    options.add_output(parser)
    parser.set_defaults(run=run_chair)


def _add_run(kinds: Any) -> None:
    parser = _parser(kinds, "run", "caption pictures and score the captions", RUN_HELP + FILES_HELP)
    _add_pictures(parser)
    _add_truth(parser)
    _add_against(parser)
    parser.add_argument("--tokens", action="store_true", help="keep each token's text, entropy and strength in --out, too")
    _add_captioning(parser)
    parser.set_defaults(run=run_run)


def _add_sweep(kinds: Any) -> None:
    parser = _parser(
        kinds, "sweep", "caption and score at many values of a parameter, beside the baseline", SWEEP_HELP + RUN_HELP + FILES_HELP
    )
    parser.add_argument(
        "grid", nargs="+", metavar="NAME=VALUES", help="lambda_ref=0.5:0.95:0.05 or prunehal.keep=0.5,0.9; several: all combinations"
    )
    _add_pictures(parser)
    _add_truth(parser)
    parser.add_argument("--plot", metavar="F.png", help="draw the curves (.png, .pdf or .svg; needs matplotlib)")
    _add_captioning(parser)
    parser.set_defaults(run=run_sweep)


def _parser(kinds: Any, name: str, text: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(
        name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(command=f"eval {name}")  # whose --help a usage error names
    return parser


def _add_truth(parser: argparse.ArgumentParser) -> None:
    truth = parser.add_mutually_exclusive_group(required=True)
    truth.add_argument("--truth", metavar="F.jsonl", help="the objects in each picture")
    truth.add_argument("--coco", metavar="FOLDER", help="COCO's annotations of 2014 instead")
    parser.add_argument("--parity", action="store_true", help="repeat the reference scorer where it is plainly wrong, too")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def _add_against(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", metavar="F.jsonl", help="captions of another run, to compare with")


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", nargs="+", required=True, metavar="IMAGE", help="files, folders, globs")
    parser.add_argument("--ids", metavar="FILE", help=f"only these image ids, one a line, or {OPERA500}")
    parser.add_argument("--limit", type=options._positive, metavar="N", help="so many of the pictures")
    parser.add_argument("--prompt", default=options.PROMPT, metavar="TEXT", help=f'default: "{options.PROMPT}"')


def _add_captioning(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="F.jsonl", help="append captions to this file; resumes where it stopped")
    parser.add_argument("--parallel", type=options._positive, default=4, metavar="N", help="pictures that step together (default: 4)")
    options.add_model(parser)
    options.add_policy(parser)
    options.add_answer(parser)
    options.add_output(parser)


# ---- the three commands ----


def run_chair(args: argparse.Namespace, ui: Ui) -> int:
    from .. import evaluate

    id_of = evaluate.coco_id if args.coco else evaluate.stem
    captions = _with_coco_ids(args, evaluate.read_captions(args.captions, id_of=id_of))
    return _show_report(args, ui, captions, _truth(args, ui))


def run_run(args: argparse.Namespace, ui: Ui) -> int:
    options.check_captioning(args)
    pictures, truth = _pictures(args), _truth(args, ui)
    _check_pictures(args, pictures, truth)
    if args.against:
        _against(args, [image_id for image_id, _ in pictures])  # before the hours, not after
    changes, answer = options.policy_changes(args, len(pictures)), options.answer_options(args)
    model = options.load_model(args, ui)
    policy = options.make_policy(args, model, changes)
    captions = _captioned(args, ui, model, pictures, policy, answer)
    return _show_report(args, ui, captions, truth)


def run_sweep(args: argparse.Namespace, ui: Ui) -> int:
    from .. import drawing, evaluate
    from ..evaluate import plot

    options.check_captioning(args)
    changes = options.policy_changes(args, pictures=2)  # a sweep has many; a depth map is one picture's
    settings = _settings(args, changes)
    if args.plot:
        drawing.check(args.plot)
    pictures, truth = _pictures(args), _truth(args, ui)
    _check_pictures(args, pictures, truth)
    answer = options.answer_options(args)
    model = options.load_model(args, ui)
    progress = _progress(args, ui)
    found = evaluate.sweep(
        model, pictures, truth, settings, policies=changes, parity=args.parity, progress=progress, **_common(args), **answer
    )
    ui.clear()
    _show_sweep(args, ui, found)
    if args.plot:
        plot.draw(found, args.plot)
    return 0


def _captioned(args: argparse.Namespace, ui: Ui, model: Any, pictures: list[Picture], policy: Any, answer: dict[str, Any]) -> list[Caption]:
    from .. import evaluate

    progress = partial(_progress(args, ui), "captions")
    captions = evaluate.run(model, pictures, policy=policy, tokens=args.tokens, progress=progress, **_common(args), **answer)
    ui.clear()
    return captions


def _common(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("prompt", "out", "parallel", "n_ctx", "kv_type")}


def _progress(args: argparse.Namespace, ui: Ui) -> Callable[[str, int, int], None]:
    """A bar for each setting; what is in --out already is said once."""
    begun = set()

    def progress(name: str, done: int, total: int) -> None:
        if name not in begun and done:
            ui.note(f"{name}: {done} of {total} are in {args.out} already")
        begun.add(name)
        ui.status(name, done, total)

    return progress


def _settings(args: argparse.Namespace, changes: options.Changes) -> list[dict[str, Any]]:
    """The points of the grid; what a policy does not take is known at once."""
    from .. import evaluate
    from ..evaluate.sweep import changed

    if not changes:
        raise options.UsageError("a sweep needs a --policy; the baseline without one is in it anyway")
    try:
        settings = evaluate.grid(args.grid, list(changes))
        for values in settings:
            for policy, given in changed(values, changes).items():
                kind(policy)(**given)
    except (TypeError, ValueError) as error:
        raise options.UsageError(str(error)) from error
    return settings


# ---- pictures and truth ----


def _pictures(args: argparse.Namespace) -> list[Picture]:
    """(image id, file) of the pictures that are asked for."""
    from .. import evaluate
    from ..evaluate.captioning import check_ids

    if STDIN in args.images:
        raise options.UsageError("--images takes files and folders; standard input has no image_id")
    names, wrong = expand(args.images)
    if wrong:
        raise evaluate.EvaluationError(wrong[0])
    pictures = [(evaluate.coco_id(name) if args.coco else evaluate.stem(name), name) for name in names]
    check_ids(pictures)
    if args.ids:
        return _listed(args, pictures, evaluate.opera500() if args.ids == OPERA500 else evaluate.read_ids(args.ids))
    if args.coco and set(evaluate.opera500()) <= {str(image_id) for image_id, _ in pictures}:
        return _listed(args, pictures, evaluate.opera500())
    if args.limit is None or args.limit >= len(pictures):
        return pictures
    chosen = {image_id for image_id, _ in sorted(pictures, key=_draw)[: args.limit]}
    return [picture for picture in pictures if picture[0] in chosen]


def _draw(picture: Picture) -> bytes:
    """A place in an order that is random and the same everywhere."""
    return hashlib.sha256(str(picture[0]).encode("utf-8", "surrogateescape")).digest()


def _listed(args: argparse.Namespace, pictures: list[Picture], wanted: list[str]) -> list[Picture]:
    from .. import evaluate

    by_id = {str(image_id): (image_id, name) for image_id, name in pictures}
    ids = [str(evaluate.coco_id(text)) if args.coco else text for text in wanted][: args.limit]
    if missing := [image_id for image_id in ids if image_id not in by_id]:
        raise evaluate.EvaluationError(f"{len(missing)} of its ids have no picture in --images, the first is {missing[0]}", args.ids)
    return [by_id[image_id] for image_id in ids]


def _truth(args: argparse.Namespace, ui: Ui) -> Truth:
    from .. import evaluate
    from ..evaluate.coco import has_captions

    if args.truth:
        return evaluate.read_truth(args.truth)
    truth = evaluate.coco_truth(args.coco, args.parity, lambda name: ui.status(f"reading {name} (large; only this once)"))
    ui.clear()
    if not has_captions(args.coco):
        ui.note(f"{args.coco}: no captions_*2014.json, so objects that only people's captions name count as invented")
    return truth


def _check_pictures(args: argparse.Namespace, pictures: list[Picture], truth: Truth) -> None:
    """All are there, and their objects are known: before the hours, not after."""
    from .. import evaluate

    if absent := [name for _, name in pictures if not os.path.exists(name)]:
        raise evaluate.EvaluationError("no such file; check the path", absent[0])
    if missing := [image_id for image_id, _ in pictures if str(image_id) not in truth]:
        raise evaluate.EvaluationError(f"{len(missing)} pictures are not in it, the first is image {missing[0]}", args.truth or args.coco)


def _with_coco_ids(args: argparse.Namespace, captions: list[Caption]) -> list[Caption]:
    """COCO's numbers, also where a file has 000000391895 or the whole name."""
    from .. import evaluate

    if not args.coco:
        return captions
    return [
        evaluate.Caption(evaluate.coco_id(c.image_id) if isinstance(c.image_id, str) else c.image_id, c.text, c.tokens) for c in captions
    ]


def _against(args: argparse.Namespace, ids: list[Any]) -> list[Caption]:
    """The captions to compare with, of these pictures."""
    from .. import evaluate

    wanted = {str(image_id) for image_id in ids}
    others = _with_coco_ids(args, evaluate.read_captions(args.against, id_of=evaluate.coco_id if args.coco else evaluate.stem))
    others = [caption for caption in others if str(caption.image_id) in wanted]
    if missing := sorted(wanted - {str(caption.image_id) for caption in others}):
        raise evaluate.EvaluationError(f"{len(missing)} pictures have no caption in it, the first is image {missing[0]}", args.against)
    return others


# ---- what is shown ----


def _show_report(args: argparse.Namespace, ui: Ui, captions: list[Caption], truth: Truth) -> int:
    from .. import evaluate

    report = evaluate.score(captions, truth, args.parity)
    other = change = None
    if args.against:
        other = evaluate.score(_against(args, [caption.image_id for caption in captions]), truth, args.parity)
        change = evaluate.compare(report, other)
    if args.json:
        record = {**_record(report), "captions": [_caption_record(scored) for scored in report.captions], "parity": args.parity}
        if other is not None and change is not None:
            record |= {"against": other.figures(), **_change_record(change)}
        ui.put(dumps(record) + "\n")
        return 0
    ui.put(f"{_count(len(report.captions), 'caption')}\n\n")
    _table(ui, ["", "", "95 %", *(["against", "difference", "95 %"] if change else [])], _rows(report, other, change))
    if change:
        mended = f"\n{change.mended} captions with an invented object were mended, {change.new} are new"
        ui.put(f"{mended}; McNemar's exact test: p = {change.p:.2g}\n")
    return 0


def _rows(report: Report, other: Report | None, change: Comparison | None) -> list[list[str]]:
    rows = []
    intervals = report.intervals()
    for name, value in report.figures().items():
        row = [_TITLES[name], _shown(name, value), _interval(name, intervals[name])]
        if other is not None and change is not None:
            row += [_shown(name, other.figures()[name]), *_change_texts(name, change)]
        rows.append(row)
    return rows


def _show_sweep(args: argparse.Namespace, ui: Ui, found: Sweep) -> None:
    if args.json:
        cuts = [{"sentences": n, **_record(report)} for n, report in found.cuts]
        points = [{"set": point.values, **_record(point.report), **_change_record(point.change)} for point in found.points]
        record = {"baseline": _record(found.baseline), "cut": cuts, "points": points, "images": len(found.baseline.captions)}
        ui.put(dumps({**record, "parity": args.parity}) + "\n")
        return
    ui.put(f"{_count(len(found.baseline.captions), 'picture')}\n\n")
    named = [("baseline", found.baseline), *((f"  first {_count(n, 'sentence')}", report) for n, report in found.cuts)]
    named += [(point.name, point.report) for point in found.points]
    rows = [[name, *(_shown(figure, value) for figure, value in report.figures().items())] for name, report in named]
    _table(ui, ["", *_TITLES.values()], rows)
    changes = [_change_row(point) for point in found.points]
    ui.put("\nless the baseline\n\n")
    _table(ui, ["", _TITLES["chair_s"], "95 %", _TITLES["f1"], "95 %", "mended", "new", "p"], changes)


def _change_row(point: Point) -> list[str]:
    change = point.change
    figures = [*_change_texts("chair_s", change), *_change_texts("f1", change)]
    return [point.name, *figures, str(change.mended), str(change.new), f"{change.p:.2g}"]


_TITLES = {
    "chair_s": "CHAIR_S %",
    "chair_i": "CHAIR_I %",
    "recall": "recall %",
    "precision": "precision %",
    "f1": "F1 %",
    "length": "tokens",
}


def _shown(name: str, value: float, sign: str = "") -> str:
    return format(value if name == "length" else 100 * value, f"{sign}.1f")


def _interval(name: str, ends: tuple[float, float], sign: str = "") -> str:
    return " .. ".join(_shown(name, end, sign) for end in ends)


def _change_texts(name: str, change: Comparison) -> tuple[str, str]:
    return _shown(name, change.difference[name], "+"), _interval(name, change.interval[name], "+")


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _table(ui: Ui, titles: list[str], rows: list[list[str]]) -> None:
    """In columns, whatever the width: names to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for i, (name, *cells) in enumerate([titles, *rows]):
        columns = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        ui.put("  ".join([name.ljust(widths[0]), *columns]) + "\n", "" if i else "bold")


def _record(report: Report) -> dict[str, Any]:
    return {**report.figures(), "intervals": {name: list(ends) for name, ends in report.intervals().items()}}


def _caption_record(scored: Scored) -> dict[str, Any]:
    return {"image_id": scored.image_id, "mentions": scored.nodes, "hallucinated": scored.hallucinated}


def _change_record(change: Comparison) -> dict[str, Any]:
    difference = {name: {"value": value, "interval": list(change.interval[name])} for name, value in change.difference.items()}
    return {"difference": difference, "mcnemar": {"mended": change.mended, "new": change.new, "p": change.p}}
