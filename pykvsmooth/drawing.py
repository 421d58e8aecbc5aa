"""Plots, with matplotlib: where one may go, and how it gets there."""

from __future__ import annotations

import os
from typing import Any

from .errors import KVSmoothError

FORMATS = (".png", ".pdf", ".svg")
BLUE, ORANGE = "#1f5fa8", "#d1611f"


def check(path: str) -> None:
    """Can it be drawn there? Before hours of work, not after. Raises KVSmoothError, and ImportError without matplotlib."""
    if os.path.splitext(path)[1].lower() not in FORMATS:
        raise KVSmoothError(f"{path}: a plot is {', '.join(FORMATS)}")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise KVSmoothError(f"{path}: there is no such folder")
    figure_class()


def save(figure: Any, path: str) -> None:
    """Whole or not at all. KVSmoothError if it can't be written."""
    part = f"{path}.part"
    try:
        figure.savefig(part, dpi=150, format=os.path.splitext(path)[1][1:].lower())
        os.replace(part, path)
    except OSError as error:
        raise KVSmoothError(f"{path}: can't be written: {error.strerror}") from error
    finally:
        if os.path.exists(part):
            os.unlink(part)


def figure_class() -> Any:
    """Without pyplot: no display, no global state. ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("plots need the package matplotlib: pip install 'pykvsmooth[plot]'") from error
    return Figure
