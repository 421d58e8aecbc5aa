"""The stages in order. Each looks for its finished file first, so that a run goes on where it was interrupted."""

from __future__ import annotations

from pathlib import Path

import torch

from . import answers, curves, export, language, tower, vocabulary
from .pool import Pool
from .recipe import Recipe, TrainingError
from .work import Work

SIGHT = ("scenes", "vocabulary", "tower", "features")  # stages that all seeds of the language model share


def device_of(name: str) -> torch.device:
    """auto: a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"--device {name}: {str(error).splitlines()[0]}") from error


def run(folder: Path, shared: Path | None, recipe: Recipe, until: str, threads: int, device_name: str, every: float) -> None:
    """shared: the work folder that holds scenes, vocabulary, tower and features; folder itself if None."""
    torch.set_num_threads(threads)
    device = device_of(device_name)
    sight = Work(shared or folder)
    pool = Pool(sight, recipe)
    if shared is None:
        see(sight, pool, recipe, until, threads, device, every)
    missing = [name for name in ("tokenizer.model", "tower.safetensors", "features-train.npy") if not sight.path(name).exists()]
    if until in SIGHT:
        return
    if missing:
        raise TrainingError(f"{sight.folder}: has no {missing[0]}: run its stages first")
    work = Work(folder)
    if not work.path("language.safetensors").exists():
        language.make(work, sight, pool, recipe, device, every)
    if until == "export":
        tell(work, sight, recipe, device)


def tell(work: Work, sight: Work, recipe: Recipe, device: torch.device) -> None:
    """The folder, what the model says, and how it came to that."""
    if not work.path("llava").exists():
        export.make(work, sight, recipe.sizes)
    if not work.path("answers.jsonl").exists():
        answers.make(work, sight, recipe, device)
    curves.make(work, sight)
    work.console.print(f"{work.path('llava')} is ready", highlight=False, soft_wrap=True)


def see(work: Work, pool: Pool, recipe: Recipe, until: str, threads: int, device: torch.device, every: float) -> None:
    """What all seeds of the language model share: scenes, vocabulary, tower, features."""
    pool.make(threads)
    if until == "scenes":
        return
    if not work.path("tokenizer.model").exists():
        vocabulary.make(work.path("tokenizer.model"), pool, recipe.sizes.pieces, threads)
    if until == "vocabulary":
        return
    if not work.path("tower.safetensors").exists():
        tower.make(work, pool, recipe, device, every)
    if until == "tower":
        return
    tower.make_features(work, pool, recipe, device)
