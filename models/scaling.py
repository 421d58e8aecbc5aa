"""python -m models.scaling RUN.json [RUN.json ...] --out docs/speed.svg

Draws what `pykvsmooth bench --json` measured of several models, one line for each: a token against depth, prompts against their rows,
sessions that step together, and a token against the bytes that it reads. SPEED.md's picture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import Any

from pykvsmooth import KVSmoothError, drawing

Run = dict[str, Any]  # bench/record.py says what is in it
SHALLOW = 128  # rows of depth of the panel of model sizes


def figures(run: Run, what: str) -> list[Run]:
    return [figure for figure in run["figures"] if figure["what"] == what and figure["value"]]


def label(run: Run) -> str:
    return f"{run['model']['row_operations'] / 2e9:.1f} G weights"  # a row multiplies and adds with each once


def line(axes: Any, points: Iterable[tuple[float, float]], run: Run) -> None:
    if found := list(points):
        axes.plot(*zip(*found, strict=True), marker="o", markersize=4, linewidth=1.2, label=label(run))


def reach(figure: Run) -> float:
    """GB that the memory would have given in the time of a token, by its bandwidth right before and after: that changes by the minute on
    some machines, and a time alone would show it rather than us."""
    return float(figure["more"]["bytes_per_token"] / max(share["median"] for share in figure["shares"].values()) / 1e9)


def share_of_int8(figure: Run) -> float:
    """Of the tiles', where the kernels have them."""
    shares = figure["shares"]
    return float(shares.get("amx_int8", shares["int8"])["median"])


def depths(axes: Any, runs: list[Run]) -> None:
    for run in runs:
        tokens = figures(run, "decode")
        line(axes, ((f["at"]["depth"], reach(f)) for f in tokens), run)
        axes.plot([f["at"]["depth"] for f in tokens], [f["more"]["bytes_per_token"] / 1e9 for f in tokens], "k--", linewidth=1)
    axes.set(xlabel="rows in the cache", ylabel="GB of bandwidth in its time", title="a token (dashed: what it reads)")


def prompts(axes: Any, runs: list[Run]) -> None:
    for run in runs:
        line(axes, ((f["at"]["rows"], 100 * share_of_int8(f)) for f in figures(run, "prefill")), run)
    axes.set(xlabel="rows of the prompt", ylabel="% of the int8 roof", title="a prompt")


def sessions(axes: Any, runs: list[Run]) -> None:
    for run in runs:
        alone = [f for f in figures(run, "sessions") if f["more"]["against_one"]]
        line(axes, ((f["at"]["sessions"], f["more"]["against_one"]["median"]) for f in alone), run)
    axes.set(xlabel="sessions that step together", ylabel="times the tokens of one", title="sessions")


def sizes(axes: Any, runs: list[Run]) -> None:
    shallow = [f for run in runs for f in figures(run, "decode") if f["at"]["depth"] == SHALLOW]
    if points := sorted((f["more"]["bytes_per_token"] / 1e9, reach(f)) for f in shallow):
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, linewidth=1.2, label="measured")
        axes.plot([0, points[-1][0]], [0, points[-1][0]], "k--", linewidth=1, label="reading alone")
    axes.set(xlabel="GB that a token reads", ylabel="GB of bandwidth in its time", title=f"model size, depth {SHALLOW}")


def draw(runs: list[Run], path: str) -> None:
    panels = (depths, prompts, sessions, sizes)
    figure = drawing.figure_class()(figsize=(3.6 * len(panels), 3.4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        panel(axes, runs)
        axes.set(xlim=(0, None), ylim=(0, 1.25 * axes.get_ylim()[1] if panel is depths else None))  # room for the legend
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    drawing.save(figure, path)


def read(path: str) -> Run:
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    if not isinstance(found, dict) or "figures" not in found:
        raise ValueError("not a record of pykvsmooth bench")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN.json")
    parser.add_argument("--out", default="docs/speed.svg")
    args = parser.parse_args()
    runs = []
    for path in args.runs:
        try:
            runs.append(read(path))
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error.strerror if isinstance(error, OSError) else error}")
    try:
        drawing.check(args.out)
        draw(runs, args.out)
    except (KVSmoothError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
