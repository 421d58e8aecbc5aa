"""The pool: rendered scenes with the labels that the tower learns from and the captions that the language model learns from.

Shards of a few hundred scenes, each a .npz, are made by several processes; a shard that is there is not made again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.scenes import CLASSES, SPLITS, Scene, caption, scene

from .recipe import Recipe, TrainingError
from .work import Work, finished

SHARD = 500


@dataclass(frozen=True)
class Labels:
    """Of n scenes: kinds (n, patches) uint8, 0 background, else 1 + the class seen most there; shares (n, patches) float16, how much of
    the patch it fills; objects (n, classes) bool, what the scene holds."""

    kinds: NDArray[np.uint8]
    shares: NDArray[np.float16]
    objects: NDArray[np.bool_]


def patch_labels(view: Scene, patch: int) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """kinds and shares of one scene, each (patches,), rows first."""
    kind_of = np.array([0] + [1 + thing.kind for thing in view.objects])
    grid = view.visible.shape[0] // patch
    seen = kind_of[view.visible].reshape(grid, patch, grid, patch).transpose(0, 2, 1, 3).reshape(grid * grid, patch * patch)
    counts = np.stack([np.bincount(row, minlength=1 + len(CLASSES)) for row in seen])
    counts[:, 0] = 0
    most = counts.argmax(1)
    return most.astype(np.uint8), (counts.max(1) / patch**2).astype(np.float16)


def render(path: Path, first: int, count: int, patch: int, variants: int) -> None:
    """One shard: scenes of the seeds first..first+count, into a file."""
    views = [scene(seed) for seed in range(first, first + count)]
    kinds, shares = zip(*(patch_labels(view, patch) for view in views), strict=True)
    objects = np.zeros((count, len(CLASSES)), bool)
    for row, view in zip(objects, views, strict=True):
        row[[thing.kind for thing in view.objects]] = True
    texts = "\n".join(caption(view, variant) for view in views for variant in range(variants))
    with finished(path) as part, open(part, "wb") as file:
        np.savez(
            file,
            pictures=np.stack([view.picture for view in views]),
            kinds=np.stack(kinds),
            shares=np.stack(shares),
            objects=objects,
            captions=np.frombuffer(texts.encode(), np.uint8),
        )


def look(variants: int, probes: int = 8) -> str:
    """A digest of a few pictures and captions as today's code makes them."""
    seen = hashlib.sha256()
    for seed in range(probes):
        view = scene(seed)
        seen.update(view.picture.tobytes())
        seen.update("\n".join(caption(view, variant) for variant in range(variants)).encode())
    return seen.hexdigest()


def _render(job: tuple[Path, int, int], patch: int, variants: int) -> int:
    render(*job, patch, variants)
    return job[2]


def _quiet() -> None:
    """Ctrl-C is the parent's: it ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Pool:
    """The scenes of a work folder. split: "train" or "development"."""

    def __init__(self, work: Work, recipe: Recipe) -> None:
        self.work, self.recipe = work, recipe
        self.folder = work.path("pool")

    def size(self, split: str) -> int:
        return self.recipe.scenes if split == "train" else self.recipe.development

    def shards(self, split: str) -> list[tuple[Path, int, int]]:
        """File, first seed, number of scenes."""
        n = self.size(split)
        return [(self.folder / f"{split}-{i:09d}.npz", SPLITS[split] + i, min(SHARD, n - i)) for i in range(0, n, SHARD)]

    def make(self, processes: int) -> None:
        """Renders what is missing."""
        self.folder.mkdir(exist_ok=True)
        self._check()
        jobs = [job for split in ("development", "train") for job in self.shards(split) if not job[0].exists()]
        if not jobs:
            return
        task = partial(_render, patch=self.recipe.sizes.patch, variants=self.recipe.variants)
        try:
            with self.work.bar() as bar, multiprocessing.get_context("spawn").Pool(processes, _quiet) as workers:
                row = bar.add_task("scenes", total=sum(job[2] for job in jobs), note="")
                for done in workers.imap_unordered(task, jobs):
                    bar.advance(row, done)
        finally:
            for part in self.folder.glob("*.part*"):  # of workers that were ended amid a shard
                part.unlink()
        self.work.log("scenes", sum(job[2] for job in jobs))

    def _check(self) -> None:
        """A pool is made for one set of classes, patch size and number of captions, by one renderer and grammar."""
        path = self.folder / "pool.json"
        made_for = {
            "classes": list(CLASSES),
            "patch": self.recipe.sizes.patch,
            "variants": self.recipe.variants,
            "shard": SHARD,
            "look": look(self.recipe.variants),
        }
        if not path.exists():
            with finished(path) as part:
                part.write_text(json.dumps(made_for), encoding="utf-8")
        elif path.read_text(encoding="utf-8") != json.dumps(made_for):
            raise TrainingError(f"{self.folder}: made from other scenes or for other sizes: remove it, or choose another work folder")

    def _rows(self, split: str, name: str, n: int | None) -> Iterator[NDArray]:
        """Of one array, shard by shard, the first n scenes' rows; of all scenes if n is None."""
        left = self.size(split) if n is None else n
        for path, _, count in self.shards(split):
            if left <= 0:
                return
            try:
                with np.load(path) as shard:
                    rows = shard[name]
                    held = len(shard["kinds"])
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                raise TrainingError(f"{path}: not a shard of scenes: {error}") from error
            if held != count:
                raise TrainingError(f"{path}: holds {held} scenes, not {count}: give --scenes as before, or remove it")
            yield rows if name == "captions" else rows[:left]
            left -= count

    def pictures(self, split: str, n: int | None = None) -> NDArray[np.uint8]:
        """(n, size, size, 3), filled shard by shard, because the whole is gigabytes."""
        n = self.size(split) if n is None else n
        out = np.empty((n, self.recipe.sizes.image, self.recipe.sizes.image, 3), np.uint8)
        done = 0
        for rows in self._rows(split, "pictures", n):
            out[done : done + len(rows)] = rows
            done += len(rows)
        return out

    def labels(self, split: str, n: int | None = None) -> Labels:
        return Labels(*(np.concatenate(list(self._rows(split, name, n))) for name in ("kinds", "shares", "objects")))

    def captions(self, split: str, n: int | None = None) -> list[list[str]]:
        """Of each scene its variants."""
        texts = [text for shard in self._rows(split, "captions", n) for text in shard.tobytes().decode().split("\n")]
        v = self.recipe.variants
        return [texts[i : i + v] for i in range(0, len(texts), v)][:n]


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
