"""python -m models.scaling RUN.json [RUN.json ...] --out docs/speed.svg

Draws what `pykvsmooth bench --json` measured of several models, one line for each: a token against depth, prompts against their rows,
sessions that step together, and a token against the bytes that it reads. SPEED.md's picture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "pykvsmooth", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
from matplotlib import pyplot as plt  # noqa: E402  after the choice of the backend

Run = dict[str, Any]  # bench/record.py says what is in it
SHALLOW = 128  # rows of depth of the panel of model sizes


def figures(run: Run, what: str) -> list[Run]:
    return [figure for figure in run["figures"] if figure["what"] == what and figure["value"]]


def label(run: Run) -> str:
    return f"{run['model']['row_operations'] / 2e9:.1f} G weights"  # a row multiplies and adds with each once


def median(figure: Run) -> float:
    return float(figure["value"]["median"])


def line(axes: plt.Axes, points: Iterable[tuple[float, float]], run: Run) -> None:
    axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.2, label=label(run))


def depths(axes: plt.Axes, runs: list[Run]) -> None:
    for run in runs:
        line(axes, ((f["at"]["depth"], 1000 / median(f)) for f in figures(run, "decode")), run)
    axes.set(xlabel="rows in the cache", ylabel="ms per token", title="a token")


def prompts(axes: plt.Axes, runs: list[Run]) -> None:
    for run in runs:
        line(axes, ((f["at"]["rows"], 100 * f["shares"]["int8"]["median"]) for f in figures(run, "prefill")), run)
    axes.set(xlabel="rows of the prompt", ylabel="% of the int8 roof", title="a prompt")


def sessions(axes: plt.Axes, runs: list[Run]) -> None:
    for run in runs:
        line(axes, ((f["at"]["sessions"], f["more"]["against_one"]["median"]) for f in figures(run, "sessions")), run)
    axes.set(xlabel="sessions that step together", ylabel="times the tokens of one", title="sessions")


def sizes(axes: plt.Axes, runs: list[Run]) -> None:
    """Reading is the roof: the time of the same bytes at the bandwidth of the moment, dashed."""
    points = []
    for run in runs:
        for figure in figures(run, "decode"):
            if figure["at"]["depth"] == SHALLOW:
                bytes_read, roof = figure["more"]["bytes_per_token"], max(kind["median"] for kind in figure["roofs"].values())
                points.append((bytes_read / 1e9, 1000 / median(figure), 1000 * bytes_read / roof))
    read, ours, roofs = zip(*sorted(points), strict=True)
    axes.plot(read, ours, "o-", markersize=4, linewidth=1.2, label="measured")
    axes.plot(read, roofs, "k--", linewidth=1, label="read alone")
    axes.set(xlabel="GB that a token reads", ylabel="ms per token", title=f"model size, depth {SHALLOW}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json")
    parser.add_argument("--out", type=Path, default=Path("docs/speed.svg"))
    args = parser.parse_args()
    runs: list[Run] = [json.loads(path.read_text(encoding="utf-8")) for path in args.runs]
    panels = (depths, prompts, sessions, sizes)
    figure, all_axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4))
    for axes, panel in zip(all_axes, panels, strict=True):
        panel(axes, runs)
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
