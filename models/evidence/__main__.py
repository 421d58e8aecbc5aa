"""python -m models.evidence [--out docs] [--count 500] [--model FILE]

Measures the checkpoint in the box (or another) on the test scenes and writes evidence.md and its plots. python -m models.evidence
search looks for the best setting on the development scenes, in two rounds, and prints what it finds; what is best goes into the file's
metadata. python -m models.evidence seed --seed N --model FILE keeps the captions of a model that was trained with another seed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import pykvsmooth as kvs

from . import page, seeds
from .rows import around, grid, siblings
from .runs import Asked, Found, Run, Searched, caption_scenes, finalists
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


def search(bench: Bench, count: int, final_count: int) -> Searched:
    """All settings of the grid on count development scenes, the plain model first; then the best of them on final_count. The other
    methods' settings on count scenes."""
    own = kvs.KVSmooth.for_model(bench.model)
    settings: dict[str, kvs.KVSmooth | None] = {"plain": None, **grid(), **around(own)}
    found: Found = {name: (policy, bench.run(name, policy, "development", count)) for name, policy in settings.items()}
    chosen = {name: found[name][0] for name in finalists(found)}
    if own not in chosen.values():
        chosen["the file's own"] = own
    finals: Found = {name: (policy, bench.run(f"{name} again", policy, "development", final_count)) for name, policy in chosen.items()}
    others: dict[str, Found] = {method: {"plain": found["plain"]} for method in siblings()}
    for method, tried in siblings().items():
        others[method].update(
            {name: (policy, bench.run(f"{method}, {name}", policy, "development", count)) for name, policy in tried.items()}
        )
    return Searched(found, finals, others)


def keep_seed(bench: Bench, seed: int, count: int) -> None:
    """Captions of the test scenes by a model of another seed: plain, under the box's own setting, and as published."""
    with kvs.Model(precision="exact") as box:
        policies = (None, kvs.KVSmooth.for_model(box), kvs.KVSmooth())
    runs = [(policy, bench.run("plain" if policy is None else repr(policy), policy, "test", count)) for policy in policies]
    seeds.keep(seeds.FOLDER / f"{seed}.jsonl.gz", runs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("page", "search", "seed"), default="page")
    parser.add_argument("--model", metavar="FILE", help="a text model with its mmproj beside it (default: the box)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the model's training, for what = seed")
    parser.add_argument("--count", type=int, default=500, help="test scenes (default: 500)")
    parser.add_argument("--search-count", type=int, default=100, help="development scenes of the search (default: 100)")
    parser.add_argument("--final-count", type=int, default=500, help="development scenes of its last round (default: 500)")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    if (args.what == "seed") != (args.seed is not None):
        parser.error("seed and --seed N belong together")
    with kvs.Model(args.model, precision="exact") as model:
        bench = Bench(model)
        if args.what == "seed":
            keep_seed(bench, args.seed, args.count)
            return 0
        searched = search(bench, args.search_count, args.final_count)
        if args.what == "search":
            print(page.search_tables(searched))
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        page.write(bench.run, bench.explain, model, searched, args.count, args.out)
    print(f"{args.out / 'evidence.md'} written in {time.monotonic() - bench.begin:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
