"""A run as a picture: time per token against depth, speed of prompts against rows, shares of the roofs, and how sessions scale. Needs
matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..drawing import figure_class, save
from .figures import Figure, spread
from .record import against_one, held_against

if TYPE_CHECKING:
    from .run import Bench

Lines = dict[int, tuple[str, str]]  # colour and name, by number of threads
COLOURS = ("#1f5fa8", "#d1611f", "#3b8f4a", "#8a4fa3")


def draw(bench: Bench, path: str) -> None:
    """.png, .pdf or .svg, with a panel for each kind of figure that there is. Raises KVSmoothError if it can't be written, ImportError
    without matplotlib."""
    measured = [f for f in bench.figures if f.values]
    panels = [panel for panel in (_depths, _rows, _shares, _sessions) if any(f.what in _WHAT[panel] for f in measured)] or [_depths]
    figure = figure_class()(figsize=(4.7 * len(panels), 4.6), layout="constrained")
    lines = {n: (COLOURS[i % len(COLOURS)], bench.place.text(n)) for i, n in enumerate(sorted({f.threads for f in measured}))}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes, [f for f in measured if f.what in _WHAT[panel]], lines)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, framealpha=0.7, loc="best")
    save(figure, path)


def _depths(axes: Any, figures: Sequence[Figure], lines: Lines) -> None:
    """With bars from the least to the greatest time; a peer's best setting is dashed."""
    for threads, (colour, name) in lines.items():
        mine = [f for f in figures if f.threads == threads]
        if mine:
            _depth_line(axes, mine, name, colour)
    axes.set(xlabel="rows in the cache", ylabel="ms per token", title="time per token", xlim=(0, None), ylim=(0, None))


def _depth_line(axes: Any, figures: Sequence[Figure], label: str, colour: str) -> None:
    at = [f.at["depth"] for f in figures]
    times = [sorted(1000 / value for value in f.values) for f in figures]
    middle = [1000 / spread(f.values).median for f in figures]
    bars = [[m - t[0] for m, t in zip(middle, times, strict=True)], [t[-1] - m for m, t in zip(middle, times, strict=True)]]
    axes.errorbar(at, middle, yerr=bars, marker="o", markersize=4, linewidth=1.2, capsize=3, color=colour, label=label)
    peers = [(f.at["depth"], 1000 / spread(f.peers[name].values).median) for f in figures if (name := f.best_peer())]
    if peers:
        axes.plot(*zip(*peers, strict=True), "s--", markersize=4, linewidth=1.2, color=colour, alpha=0.6, label=f"llama.cpp, {label}")


def _rows(axes: Any, figures: Sequence[Figure], lines: Lines) -> None:
    for threads, (colour, name) in lines.items():
        mine = [(f.at["rows"], spread(f.values).median) for f in figures if f.threads == threads]
        if mine:
            axes.plot(*zip(*mine, strict=True), marker="o", markersize=4, linewidth=1.2, color=colour, label=name)
    axes.set(xlabel="rows of a prompt", ylabel="rows per second", title="prompts", xlim=(0, None), ylim=(0, None))


def _shares(axes: Any, figures: Sequence[Figure], lines: Lines) -> None:
    """A bar for each figure and roof."""
    bars = [(f, kind, spread(f.shares[kind])) for f in figures for kind in held_against(f)]
    names = [f"{f.what} {next(iter(f.at.values()), '')}\n{kind}" for f, kind, _ in bars]
    seen = set[int]()
    for i, (figure, _, share) in enumerate(bars):
        colour, name = lines[figure.threads]
        label = name if figure.threads not in seen else None
        seen.add(figure.threads)
        ends = [[100 * (share.median - share.min)], [100 * (share.max - share.median)]]
        axes.barh(i, 100 * share.median, xerr=ends, color=colour, capsize=3, height=0.7, label=label)
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlim(0, max(105, axes.get_xlim()[1]))
    axes.set_yticks(range(len(bars)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="% of what was measured beside it", title="share of the roof")


def _sessions(axes: Any, figures: Sequence[Figure], lines: Lines) -> None:
    for threads, (colour, name) in lines.items():
        mine = [f for f in figures if f.threads == threads]
        pairs = [(f.at["sessions"], spread(ratios).median) for f in mine if (ratios := against_one(f, mine))]
        if pairs:
            axes.plot(*zip(*pairs, strict=True), marker="o", markersize=4, linewidth=1.2, color=colour, label=name)
            axes.set_xticks([n for n, _ in pairs])
    axes.set(xlabel="sessions that step together", ylabel="times the tokens of one", title="many sessions", ylim=(0, None))


_WHAT = {
    _depths: ("decode",),
    _rows: ("prefill",),
    _shares: ("encode", "prefill", "decode"),
    _sessions: ("sessions",),
}  # figures of a panel
