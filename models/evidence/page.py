"""docs/evidence.md: the tables, and what stands around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pykvsmooth as kvs
from pykvsmooth.evaluate import Comparison, compare, entropy_separation

from . import plots, seeds
from .rows import LAYERS, PUBLISHED, TARGETS, WINDOWS, label, methods, rows
from .runs import PRICE, Asked, Found, Run, Searched, dropped, winner
from .why import COUNT, Shifts

Runner = Callable[[str, Asked, str, int], Run]
Explainer = Callable[["kvs.KVSmooth", Run], Shifts]

HEAD = "| | CHAIR_S | CHAIR_I | recall | precision | F1 | tokens | degenerate | CHAIR_S less plain | F1 less plain | mended, new (p) |"
INTRO = """# What KVSmooth does to the small model in the box

Measured on {count} test scenes that no training and no choice of settings has seen, greedy decoding, the shipped pair, by

    python -m models.evidence

Figures in percent; in brackets 95 % intervals, by the bootstrap over captions. "Less plain" are differences to the plain model on
the same scenes, resampled together. Mended: captions with an invention under the plain model and none here; new: the other way
round; p: McNemar's exact test. Other seeds: language models that were trained with the same tower and recipe, of which the captions are
kept (models/evidence/other_seeds), not the weights; no setting was chosen on them, and each is compared with its own plain captions.
"""


def write(run: Runner, explain: Explainer, model: kvs.Model, searched: Searched, count: int, out: Path) -> None:
    """Runs all rows of the page on the test split and writes evidence.md, along.svg and trade.svg."""
    best = kvs.KVSmooth.for_model(model)
    plain = run("plain", None, "test", count)
    smoothed = run("best", best, "test", count)
    runs = {name: smoothed if policy == best else run(name, policy, "test", count) for name, policy in _rows(model, best, smoothed).items()}
    pruning, refining = (found[winner(found)][0] for found in searched.siblings.values())
    siblings = {name: run(name, policy, "test", count) for name, policy in methods(model, best, pruning, refining).items()}
    others = {seed: [seeds.read(path, policy, count) for policy in (None, best, kvs.KVSmooth())] for seed, path in seeds.kept().items()}
    plots.along({"plain": plain, "best": smoothed}, out / "along.svg")
    plots.trade(searched.found["plain"][1], {name: _lines(searched.found, target) for target, name in TARGETS.items()}, out / "trade.svg")
    parts = [
        INTRO.format(count=count),
        _verdict({"The best setting of the development split": smoothed, "The published one": runs[PUBLISHED]}, plain) + _on_seeds(others),
        "\n".join(
            [HEAD, "|---" * 11 + "|", _row("plain", plain), *(_row(name, one, plain) for name, one in runs.items()), *_seed_rows(others)]
        ),
        _controls(plain, runs),
        _signals(plain, smoothed),
        _why({"best": explain(best, plain), "published": explain(kvs.KVSmooth(), plain)}),
        '## The sibling methods\n"KVSmooth" is the best setting of the tables above; stacks are made of the best settings.\n\n'
        + "\n".join([HEAD, "|---" * 11 + "|", *(_row(name, one, plain) for name, one in siblings.items())]),
        _controls_table(plain, siblings),
        "## The search on the development split\nThe setting in the model's metadata, which the tables above call the best: "
        f"`{best!r}`.\n\n![precision over recall](trade.svg)\n\n{search_tables(searched)}",
    ]
    (out / "evidence.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _rows(model: kvs.Model, best: kvs.KVSmooth, smoothed: Run) -> dict[str, kvs.KVSmooth]:
    return rows(best, round(smoothed.mean_strength, 3), model.n_layer)


def _verdict(runs: dict[str, Run], plain: Run) -> str:
    """The page in two sentences."""
    lines = []
    for name, run in runs.items():
        c = compare(run.report, plain.report)
        low, high = c.interval["chair_s"]
        word = (
            "fewer captions with inventions"
            if high < 0
            else "more captions with inventions"
            if low > 0
            else "no difference that shows here"
        )
        lines.append(f"{name}: {word}; CHAIR_S {_difference(c, 'chair_s')} points, F1 {_difference(c, 'f1')}.")
    return "**In short.** " + " ".join(lines)


def _percent(value: float, places: int = 1) -> str:
    return f"{100 * value:.{places}f}"


def _figure(run: Run, name: str) -> str:
    low, high = run.report.intervals()[name]
    return f"{_percent(run.report.figures()[name])} [{_percent(low)}, {_percent(high)}]"


def _difference(comparison: Comparison, name: str) -> str:
    low, high = comparison.interval[name]
    return f"{100 * comparison.difference[name]:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _row(name: str, run: Run, plain: Run | None = None) -> str:
    cells = [name, *(_figure(run, figure) for figure in ("chair_s", "chair_i", "recall", "precision", "f1"))]
    cells += [f"{run.tokens:.0f}", _percent(run.degenerate)]
    if plain is None:
        cells += ["", "", ""]
    else:
        c = compare(run.report, plain.report)
        cells += [_difference(c, "chair_s"), _difference(c, "f1"), f"{c.mended}, {c.new} ({c.p:.2g})"]
    return "| " + " | ".join(cells) + " |"


def _on_seeds(others: dict[int, list[Run]]) -> str:
    if not others:
        return ""
    told = []
    for seed, (plain, *smoothed) in others.items():
        differences = [_difference(compare(run.report, plain.report), "chair_s") for run in smoothed]
        told.append(f"seed {seed} {' and '.join(differences)}")
    return f" The same two settings on models of other seeds, CHAIR_S: {'; '.join(told)}."


def _seed_rows(others: dict[int, list[Run]]) -> list[str]:
    rows = []
    for seed, (plain, best, published) in others.items():
        rows += [
            _row(f"seed {seed}: plain", plain),
            _row(f"seed {seed}: the same setting", best, plain),
            _row(f"seed {seed}: as published", published, plain),
        ]
    return rows


def _controls(plain: Run, runs: dict[str, Run]) -> str:
    """What cutting the plain captions does at the same recall: a method that only says less does no better."""
    lines = [
        "## Against captions that only say less",
        "The control takes from the plain captions, in random order, the object that they name last, until recall is the row's (means of "
        "20 draws). A row is worth something if its CHAIR_S is lower and its F1 higher than the control's.\n",
        _controls_table(plain, runs),
        "\nPlain captions cut after so many sentences:\n",
        "| sentences | recall | CHAIR_S | F1 |",
        "|---|---|---|---|",
    ]
    for n in range(3, 9):
        cut = plain.cut(n).figures()
        lines.append(f"| {n} | {_percent(cut['recall'])} | {_percent(cut['chair_s'])} | {_percent(cut['f1'])} |")
    return "\n".join(lines)


def _controls_table(plain: Run, runs: dict[str, Run]) -> str:
    lines = ["| | recall | CHAIR_S | control's CHAIR_S | F1 | control's F1 |", "|---|---|---|---|---|---|"]
    for name, run in runs.items():
        own = run.report.figures()
        if own["recall"] > plain.report.figures()["recall"]:
            lines.append(
                f"| {name} | {_percent(own['recall'])} | {_percent(own['chair_s'])} | recall is not lower | {_percent(own['f1'])} | |"
            )
            continue
        control = dropped(plain, own["recall"])
        cells = [
            _percent(own["recall"]),
            _percent(own["chair_s"]),
            _percent(control["chair_s"]),
            _percent(own["f1"]),
            _percent(control["f1"]),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _signals(plain: Run, smoothed: Run) -> str:
    lines = ["## What the captions are like", "Row entropy at the token that begins a mention, invented against true ones:\n"]
    for name, run in {"plain": plain, "best": smoothed}.items():
        found = entropy_separation(run.captions, run.report)
        low, high = found.interval
        lines.append(f"- {name}: AUC {found.auc:.3f} [{low:.3f}, {high:.3f}], {found.invented} invented and {found.true} true mentions")
    lines += [
        "",
        f"Left and right are told right in {_percent(plain.sides_right)} % of the plain model's claims about objects that are there, in "
        f"{_percent(smoothed.sides_right)} % of the best setting's.",
        "",
        "![share of invented mentions along the caption](along.svg)",
    ]
    return "\n".join(lines)


def _why(found: dict[str, Shifts]) -> str:
    """What smoothing does to words that the plain model chose: if it helps, it must strike the invented ones harder."""
    lines = [
        "## Why: what smoothing does to the plain model's words",
        f"The first {COUNT} plain captions, fed token by token to a smoothed session. At the tokens that begin a mention: what smoothing "
        "adds to their log-probability (nats), and the share of them for which it would have chosen another token. A method that mends "
        "captions must strike invented mentions harder than true ones; how well the shift alone tells them apart is the AUC (.5 is "
        "chance).\n",
        "| | nats, invented | nats, true | other choice, invented | other choice, true | AUC |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        cells = [f"{v:+.3f} [{low:+.3f}, {high:+.3f}]" for v, low, high in (one.mean(invented, 0) for invented in (True, False))]
        cells += [
            f"{_percent(v)} [{_percent(low)}, {_percent(high)}]" for v, low, high in (one.mean(invented, 1) for invented in (True, False))
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {one.auc:.3f} |")
    return "\n".join(lines)


def search_tables(searched: Searched) -> str:
    """Both rounds, and the siblings'. First CHAIR_S / F1 of every setting, layers by lambda_ref ± half_width, the other switches below."""
    tables = (_sibling_list(method, found) for method, found in searched.siblings.items())
    return "\n\n".join([_grid_table(searched.found), _final_table(searched.finals), *tables])


def _sibling_list(method: str, found: Found) -> str:
    best = winner(found)
    lines = [f"{method}, by the same rule, on {len(found['plain'][1].captions)} scenes: **{best}**, `{found[best][0]!r}`.\n"]
    return "\n".join([*lines, *(f"- {name}: {_short(run)}" for name, (_, run) in found.items())])


def _final_table(finals: Found) -> str:
    count, best = len(finals["plain"][1].captions), winner(finals)
    lines = [
        f"The settings with the fewest inventions once more, on {count} development scenes. Of those that cost no more than "
        f"{100 * PRICE:g} point of F1, settings within one standard error of the lowest CHAIR_S count as equal, and F1 decides: "
        f"**{best}**, `{finals[best][0]!r}`.\n",
        HEAD,
        "|---" * 11 + "|",
    ]
    plain = finals["plain"][1]
    return "\n".join([*lines, *(_row(name, run, None if name == "plain" else plain) for name, (_, run) in finals.items())])


def _grid_table(found: Found) -> str:
    plain = found["plain"][1].report.figures()
    count = len(found["plain"][1].captions)
    lines = [f"CHAIR_S / F1 on {count} scenes, plain: {_percent(plain['chair_s'])} / {_percent(plain['f1'])}\n"]
    lines += ["| | layers | " + " | ".join(f"{ref:g} ± {width:g}" for ref, width in WINDOWS) + " |", "|---" * (len(WINDOWS) + 2) + "|"]
    for target, name in TARGETS.items():
        for layers in LAYERS:
            cells = (_short(found[label(target, layers, *window)][1]) for window in WINDOWS)
            lines.append(f"| {name} | {layers} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {key}: {_short(run)}" for key, (_, run) in found.items() if key.startswith("best, "))]
    return "\n".join(lines)


def _short(run: Run) -> str:
    own = run.report.figures()
    return f"{_percent(own['chair_s'], 0)} / {_percent(own['f1'])}"


def _lines(found: Found, target: str) -> dict[str, list[tuple[float, float]]]:
    """Recall and precision along the windows, by layers; settings that break the model lie far away and are left out."""
    lines: dict[str, list[tuple[float, float]]] = {}
    worst = found["plain"][1].report.figures()["f1"] - 0.05
    for layers in LAYERS:
        figures = [found[label(target, layers, *window)][1].report.figures() for window in WINDOWS]
        lines[f"layers {layers}"] = [(one["recall"], one["precision"]) for one in figures if one["f1"] > worst]
    return {key: line for key, line in lines.items() if line}
