"""The pictures of docs/evidence.md."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from pykvsmooth import evaluate

from .runs import Run

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "pykvsmooth", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
from matplotlib import pyplot as plt  # noqa: E402  after the choice of the backend

BINS = 10


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def along(runs: dict[str, Run], path: Path) -> None:
    """Share of invented mentions in each tenth of the caption."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for name, run in runs.items():
        counts = evaluate.positions(run.captions, run.report, BINS)
        share = np.divide(counts[:, 1], counts.sum(1), out=np.full(BINS, np.nan), where=counts.sum(1) > 0)
        axes.plot((np.arange(BINS) + 0.5) / BINS, share, marker="o", label=name)
    axes.set(xlabel="place in the caption", ylabel="mentions that are invented", ylim=(0, None))
    axes.legend(frameon=False)
    _save(figure, path)


def trade(plain: Run, points: dict[str, dict[str, list[tuple[float, float]]]], path: Path) -> None:
    """Precision over recall: the settings of the search by layers, and the plain captions cut by sentences."""
    figure, both = plt.subplots(1, len(points), figsize=(9.6, 4.2), sharex=True, sharey=True)
    longest = max(caption.text.count(". ") for caption in plain.captions) + 1
    floor = min((recall for lines in points.values() for line in lines.values() for recall, _ in line), default=0.0)
    cuts = [cut for n in range(2, longest + 1) if (cut := plain.cut(n).figures())["recall"] > floor - 0.1]
    for axes, (title, lines) in zip(both, points.items(), strict=True):
        axes.plot([cut["recall"] for cut in cuts], [cut["precision"] for cut in cuts], "k.-", label="plain, cut by sentences")
        for name, line in lines.items():
            axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=name)
        axes.set(xlabel="recall", ylabel="precision", title=title)
        axes.legend(frameon=False, fontsize=8)
    _save(figure, path)
