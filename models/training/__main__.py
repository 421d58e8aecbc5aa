"""python -m models.training WORK: from nothing to a Hugging Face folder of the small LLaVA, in stages that are done once each.

Interrupted, the same command goes on where it was. Seeds of the language model share a tower: give the first run's folder as --tower.
Needs the extra "train": pip install '.[train]'.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from .recipe import Recipe, TrainingError

STAGES = ("scenes", "vocabulary", "tower", "features", "language", "export")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.training", description=__doc__)
    parser.add_argument("work", type=Path, metavar="WORK", help="folder for all that the run makes")
    parser.add_argument(
        "--tower", type=Path, metavar="WORK", help="work folder of a finished run whose scenes, vocabulary and tower are used"
    )
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of weights and order (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=Recipe.scenes, help="pictures to render (default: %(default)s)")
    parser.add_argument("--tower-samples", type=int, default=Recipe.tower.samples, help="pictures the tower sees (default: %(default)s)")
    parser.add_argument("--tower-rate", type=float, default=Recipe.tower.rate, help="its learning rate (default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=Recipe.language.samples, help="captions the language model sees (default: %(default)s)"
    )
    parser.add_argument("--rate", type=float, default=Recipe.language.rate, help="its learning rate (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=Recipe.language.batch, help="captions a step (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="processor threads (default: as many as there are)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--every", type=float, default=180.0, help="seconds between checkpoints (default: %(default)s)")
    return parser.parse_args(argv)


def recipe_of(given: argparse.Namespace) -> Recipe:
    for name in ("scenes", "tower_samples", "samples", "batch"):
        if getattr(given, name) < 1:
            raise TrainingError(f"--{name.replace('_', '-')} must be at least 1")
    tower = replace(Recipe.tower, samples=given.tower_samples, rate=given.tower_rate)
    language = replace(Recipe.language, samples=given.samples, rate=given.rate, batch=given.batch)
    return replace(Recipe(), seed=given.seed, scenes=given.scenes, tower=tower, language=language)


def run(given: argparse.Namespace) -> None:
    """The stages, each of which looks for its result first."""
    from . import pool, stages  # here, because torch takes seconds to import

    threads = given.threads or pool.processors()
    stages.run(given.work, given.tower, recipe_of(given), given.until, threads, given.device, given.every)


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    try:
        run(given)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing: pip install '.[train]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command goes on from the last checkpoint in {given.work}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
