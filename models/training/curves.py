"""The log as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .recipe import TrainingError
from .work import Work, finished

# title, log's stage, its figures
PANELS = (
    ("tower: loss", "tower", ("loss", "kind", "place", "objects")),
    ("tower: shares told right, development", "tower", ("patches", "rows", "columns", "recall", "precision")),
    ("language: nats a token", "language", ("loss", "development")),
    ("language: learning rate", "language", ("rate",)),
)


def read(paths: Iterable[Path]) -> dict[str, dict[int, dict[str, float]]]:
    """Stage, step, figures; the last line of a step counts: a run that went on may have written it twice."""
    stages: dict[str, dict[int, dict[str, float]]] = {}
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
            try:
                entry = json.loads(line)
                stages.setdefault(entry["stage"], {})[entry["step"]] = entry
            except (ValueError, TypeError, KeyError) as error:
                raise TrainingError(f"{path}:{number}: not a line of the log: remove it") from error
    return stages


def make(work: Work, sight: Work) -> None:
    """Leaves curves.png; sight: where the tower's log is."""
    from matplotlib.figure import Figure

    stages = read(dict.fromkeys([sight.path("log.jsonl"), work.path("log.jsonl")]))
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (title, stage, names) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        steps = sorted(stages.get(stage, {}).items())
        for name in names:
            axes.plot([step for step, _ in steps], [entry[name] for _, entry in steps], label=name, marker=".")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
        if title.endswith("loss"):
            axes.set_yscale("log")
    with finished(work.path("curves.png")) as part:
        figure.savefig(part, format="png", dpi=110)
