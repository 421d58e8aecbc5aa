"""A scene from its seed: which objects, where, and the picture of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .catalogue import COMPANY, CONTEXTS, KINDS, Context
from .sprites import sprites

SIZE = 112
FEWEST, MOST = 3, 8
SMALLEST, LARGEST = 17.0, 44.0  # long side of a pictogram of scale 1, in pixels
ATYPICAL = 0.15  # share of objects drawn from all kinds alike
SEEN = 0.6  # share of an object that stays visible at least
SPLITS = {"train": 0, "development": 10**8, "test": 2 * 10**8}  # first seeds

Array = np.ndarray


@dataclass(frozen=True)
class Object:
    kind: int
    box: tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels
    area: int  # pixels of it that are seen

    @property
    def node(self) -> str:
        """The COCO class that CHAIR counts it as."""
        return KINDS[self.kind].node

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Scene:
    seed: int
    context: int
    objects: tuple[Object, ...]  # the largest first
    picture: Array  # uint8 (112, 112, 3)
    visible: Array  # uint8 (112, 112): 0 background, else 1 + index of the object seen there


def scene(seed: int) -> Scene:
    """The scene of a seed: the same on every machine with the same NumPy and Pillow."""
    rng = np.random.default_rng(seed)
    context = int(rng.integers(len(CONTEXTS)))
    picture = _background(rng, CONTEXTS[context])
    owner = np.zeros((SIZE, SIZE), np.int16)
    placed: list[tuple[int, tuple[int, int, int, int], int]] = []
    for kind in _choose(rng, CONTEXTS[context]):
        size = float(np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST)))) * KINDS[kind].scale
        put = _place(rng, _sprite(rng, kind, size), owner, [full for _, _, full in placed])
        if put is not None:
            x, y, pixels, alpha = put
            h, w = alpha.shape
            owner[y : y + h, x : x + w][alpha > 0.5] = len(placed) + 1
            cut = picture[y : y + h, x : x + w]
            cut *= 1 - alpha[:, :, None]
            cut += pixels
            placed.append((kind, (x, y, x + w, y + h), int((alpha > 0.5).sum())))
    return _finished(rng, seed, context, picture, owner, placed)


def _finished(rng: np.random.Generator, seed: int, context: int, picture: Array, owner: Array, placed: list) -> Scene:
    areas = np.bincount(owner.ravel(), minlength=len(placed) + 1)[1:]
    order = np.argsort(-areas, kind="stable")
    objects = tuple(Object(placed[i][0], placed[i][1], int(areas[i])) for i in order)
    rank = np.zeros(len(placed) + 1, np.uint8)
    rank[1 + order] = np.arange(1, len(placed) + 1)
    noise = rng.standard_normal(picture.shape, np.float32)
    noise *= np.float32(rng.uniform(2, 9))
    picture *= np.float32(rng.uniform(0.85, 1.1))
    picture += noise
    return Scene(seed, context, objects, np.clip(np.rint(picture, out=picture), 0, 255, out=picture).astype(np.uint8), rank[owner])


def _choose(rng: np.random.Generator, context: Context) -> list[int]:
    """Different nodes, FEWEST to MOST of them; typical ones, what keeps them company, and strangers."""
    count = int(rng.choice(np.arange(FEWEST, MOST + 1), p=[0.14, 0.22, 0.24, 0.2, 0.12, 0.08]))
    names, weights = np.array(list(context.typical)), np.array(list(context.typical.values()))
    chosen: list[int] = []
    nodes: set[str] = set()
    while len(chosen) < count:
        stranger = rng.random() < ATYPICAL
        kind = int(rng.integers(len(KINDS))) if stranger else int(rng.choice(names, p=weights / weights.sum()))
        company = [other for other, probability in COMPANY.get(kind, []) if rng.random() < probability]
        for one in [kind, *company]:
            if len(chosen) < count and KINDS[one].node not in nodes:
                chosen.append(one)
                nodes.add(KINDS[one].node)
    return chosen


def _sprite(rng: np.random.Generator, kind: int, size: float) -> tuple[Array, Array]:
    """float32 colours (h, w, 3), times coverage, and coverage (h, w) of a pictogram: mirrored or not, turned, lighter or darker."""
    image = sprites()[kind]
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    share = size / max(image.size)
    image = image.resize((max(4, round(image.width * share)), max(4, round(image.height * share))), Image.Resampling.BILINEAR)
    image = image.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BILINEAR, expand=True)
    box = image.getchannel("a").getbbox()
    pixels = np.asarray(image.crop(box), np.float32)
    tint = rng.uniform(0.85, 1.1) * rng.uniform(0.94, 1.06, 3)
    return pixels[:, :, :3] * tint.astype(np.float32), pixels[:, :, 3] / 255


def _place(rng: np.random.Generator, sprite: tuple[Array, Array], owner: Array, full: list[int]) -> tuple[int, int, Array, Array] | None:
    """A place where all that stand there already stay visible to SEEN; None where none of 30 tries finds one."""
    pixels, alpha = sprite
    h, w = alpha.shape
    sizes = np.array([0, *full])
    for _ in range(30):
        x, y = int(rng.integers(0, SIZE - w + 1)), int(SIZE * 0.12 + rng.random() * (SIZE * 0.88 - h))
        y = min(max(y, 0), SIZE - h)
        covered = owner[y : y + h, x : x + w][alpha > 0.5]
        if not len(full) or not covered.any():
            return x, y, pixels, alpha
        seen = np.bincount(owner.ravel(), minlength=len(sizes)) - np.bincount(covered, minlength=len(sizes))
        if (seen[1:] >= SEEN * sizes[1:]).all():
            return x, y, pixels, alpha
    return None


# ---- background ----


def _background(rng: np.random.Generator, context: Context) -> Array:
    """float32 (112, 112, 3): two areas with soft shading, and the texture of the ground."""
    horizon = int(SIZE * (context.horizon + rng.uniform(-0.06, 0.06)))
    picture = np.empty((SIZE, SIZE, 3), np.float32)
    picture[:horizon] = np.array(context.sky) + rng.normal(0, 6, 3)
    picture[horizon:] = np.array(context.ground) + rng.normal(0, 6, 3)
    picture[horizon:] += _texture(rng, context.texture, SIZE - horizon)[:, :, None]
    return picture + np.linspace(rng.uniform(-10, 10), rng.uniform(-10, 10), SIZE, dtype=np.float32)[None, :, None]


def _texture(rng: np.random.Generator, name: str, rows: int) -> Array:
    y, x = np.arange(rows, dtype=np.float32)[:, None], np.arange(SIZE, dtype=np.float32)
    shift = rng.integers(0, 16)
    match name:
        case "tiles":
            return np.where(((x + shift) % 14 < 1) | (y % 14 < 1), -22.0, 0.0)
        case "planks":
            return np.where(y % 9 < 1, -20.0, 0.0) + np.where((x + shift + y // 9 * 17) % 40 < 1, -14.0, 0.0)
        case "grass":
            return 11 * rng.standard_normal((rows, SIZE), np.float32)
        case "waves":
            return 8 * np.sin((y + 2 * np.sin((x + shift) / 7)) / 2.2)
        case "road":
            line = (abs(y - rows / 2) < 1.5) & ((x + shift) % 20 < 11)
            return np.where(line, 70.0, 0.0) + 4 * rng.standard_normal((rows, SIZE), np.float32)
    return np.zeros((rows, SIZE), np.float32)
