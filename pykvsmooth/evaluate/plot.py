"""A sweep as a picture: precision against recall, and F1 against CHAIR_S (figures 4 and 5 of arXiv 2602.04268). Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..drawing import BLUE, ORANGE, figure_class, save

if TYPE_CHECKING:
    from .score import Report
    from .sweep import Sweep

MOST_NAMES = 6  # so many points of a curve carry their names: more would hide one another


def draw(sweep: Sweep, path: str) -> None:
    figure = figure_class()(figsize=(11, 4.6), layout="constrained")
    trade, chair = figure.subplots(1, 2)
    cuts = [(f"{n}", report) for n, report in sweep.cuts]
    values = list(sweep.points[0].values) if sweep.points else []
    points = [(point.name if len(values) > 1 else str(point.values[values[0]]), point.report) for point in sweep.points]
    policy = f"KVSmooth, by {', '.join(values)}"
    for axes, x, y in ((trade, "recall", "precision"), (chair, "chair_s", "f1")):
        _curve(axes, cuts, x, y, BLUE, "o", "baseline, first n sentences")
        _curve(axes, points, x, y, ORANGE, "s", policy)
        at = sweep.baseline.figures()
        axes.plot(100 * at[x], 100 * at[y], "*", color=BLUE, markersize=15, label="baseline, whole")
        axes.grid(alpha=0.3)
        axes.margins(0.08)
        axes.legend(fontsize=8, framealpha=0.7)
    trade.set(xlabel="recall of objects, %", ylabel="precision, %", title="up and right is better")
    chair.set(xlabel="captions with an invented object (CHAIR$_S$), %", ylabel="F$_1$, %", title="up and left is better")
    save(figure, path)


def _curve(axes: Any, named: list[tuple[str, Report]], x: str, y: str, colour: str, marker: str, label: str) -> None:
    at = [(100 * report.figures()[x], 100 * report.figures()[y]) for _, report in named]
    axes.plot([a for a, _ in at], [b for _, b in at], marker=marker, color=colour, markersize=4, linewidth=1.2, label=label)
    side = {"xytext": (4, 4), "ha": "left"} if marker == "o" else {"xytext": (-5, -9), "ha": "right"}
    every = -(-len(named) // MOST_NAMES)
    for (name, _), place in list(zip(named, at, strict=True))[:: -every or None]:  # the last one in any case
        axes.annotate(name, place, textcoords="offset points", fontsize=7, color=colour, **side)
