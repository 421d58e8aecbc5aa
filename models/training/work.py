"""The work folder: each stage leaves one finished file in it, so that a run goes on where it was interrupted."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .recipe import TrainingError


@contextmanager
def finished(path: Path) -> Iterator[Path]:
    """A temporary name beside path, renamed to it when the block ends well and removed when it does not."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def finished_folder(path: Path) -> Iterator[Path]:
    """The same for a folder, which must not be there yet."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    part.mkdir()
    try:
        yield part
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class Work:
    """Files of one run, its log (log.jsonl: one object a line, with stage, step, seconds) and its progress bars."""

    def __init__(self, folder: Path, console: Console | None = None) -> None:
        self.folder = folder
        self.console = console or Console(stderr=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{folder}: can't be made a work folder: {error.strerror}") from error

    def path(self, name: str) -> Path:
        return self.folder / name

    def log(self, stage: str, step: int, **figures: float) -> None:
        """Appends a line to the log, and shows it."""
        rounded = {name: round(float(value), 5) for name, value in figures.items()}
        line = {"stage": stage, "step": step, **rounded, "time": round(time.time(), 1)}
        with open(self.path("log.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.console.print(
            f"{stage} {step}: " + "  ".join(f"{name} {value:g}" for name, value in rounded.items()), highlight=False, soft_wrap=True
        )

    def bar(self, total: str = "") -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
