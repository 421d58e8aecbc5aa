"""python -m models.evidence [--out docs] [--count 500] [--model FILE]

Measures the checkpoint in the box (or another) on the test scenes and writes evidence.md and its plots. python -m models.evidence
search looks for the best setting on the development scenes, in two rounds, and prints what it finds; what is best goes into the file's
metadata.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import pykvsmooth as kvs

from . import page
from .rows import around, grid
from .runs import Asked, Found, Run, caption_scenes, finalists
from .why import Shifts, shifts


class Bench:
    """Runs policies one after the other and shows how far they are."""

    def __init__(self, model: kvs.Model) -> None:
        self.model, self.begin = model, time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)

    def run(self, name: str, policy: Asked, split: str, count: int) -> Run:
        with self._progress:
            task = self._progress.add_task(name, total=count)
            found = caption_scenes(self.model, policy, split, count, lambda done, _: self._progress.update(task, completed=done))
            self._progress.remove_task(task)
        return found

    def explain(self, policy: kvs.KVSmooth, plain: Run) -> Shifts:
        return shifts(self.model, policy, plain)


def search(bench: Bench, count: int, final_count: int) -> tuple[Found, Found]:
    """All settings of the grid on count development scenes, the plain model first; then the best of them on final_count."""
    own = kvs.KVSmooth.for_model(bench.model)
    settings: dict[str, kvs.KVSmooth | None] = {"plain": None, **grid(), **around(own)}
    found: Found = {name: (policy, bench.run(name, policy, "development", count)) for name, policy in settings.items()}
    chosen = {name: found[name][0] for name in finalists(found)}
    if own not in chosen.values():
        chosen["the file's own"] = own
    finals: Found = {name: (policy, bench.run(f"{name} again", policy, "development", final_count)) for name, policy in chosen.items()}
    return found, finals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("page", "search"), default="page")
    parser.add_argument("--model", metavar="FILE", help="a text model with its mmproj beside it (default: the box)")
    parser.add_argument("--seeds", nargs="*", default=[], metavar="FILE", help="text models of other seeds")
    parser.add_argument("--count", type=int, default=500, help="test scenes (default: 500)")
    parser.add_argument("--search-count", type=int, default=100, help="development scenes of the search (default: 100)")
    parser.add_argument("--final-count", type=int, default=500, help="development scenes of its last round (default: 500)")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    with kvs.Model(args.model) as model:
        bench = Bench(model)
        found, finals = search(bench, args.search_count, args.final_count)
        if args.what == "search":
            print(page.search_tables(found, finals))
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        page.write(bench.run, bench.explain, model, found, finals, args.seeds, args.count, args.out)
    print(f"{args.out / 'evidence.md'} written in {time.monotonic() - bench.begin:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
