"""Everything that decides what comes out: sizes of the model, amounts of data, rates. The defaults are those of the shipped model."""

from __future__ import annotations

from dataclasses import dataclass


class TrainingError(ValueError):
    """The work folder or an argument does not fit; the message says which file, and what helps."""


@dataclass(frozen=True)
class Sizes:
    """LLaVA-1.5's architecture: CLIP tower, two-layer projector, LLaMA."""

    image: int = 112
    patch: int = 14
    tower_width: int = 256
    tower_heads: int = 4
    tower_ffn: int = 1024
    tower_layers: int = 7
    width: int = 256
    heads: int = 4
    ffn: int = 768
    layers: int = 8
    positions: int = 2048
    pieces: int = 1000

    @property
    def grid(self) -> int:
        return self.image // self.patch


@dataclass(frozen=True)
class Pace:
    """One training stage: samples in all, samples a step, the peak of the learning rate (cosine, with warm-up), weight decay.

    muon: the matrices inside layers take Muon's steps instead of AdamW's."""

    samples: int
    batch: int
    rate: float
    decay: float
    warm: float = 0.04
    floor: float = 0.02
    muon: bool = False

    @property
    def steps(self) -> int:
        return max(1, self.samples // self.batch)


@dataclass(frozen=True)
class Recipe:
    """scenes: pictures in the pool; variants: captions of each; development: scenes that are only looked at."""

    seed: int = 1
    scenes: int = 120_000
    variants: int = 2
    development: int = 1000
    sizes: Sizes = Sizes()
    tower: Pace = Pace(samples=120_000, batch=128, rate=1e-3, decay=0.05)
    language: Pace = Pace(samples=36_000, batch=32, rate=2e-3, decay=0.05, muon=True)
