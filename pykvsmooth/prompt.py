"""Prompts as the cache knows them: runs of token ids and pictures, compared row by row with what a session holds already."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from .template import IMAGE_MARK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .images import ImageLike
    from .model import Model

ImageMode = Literal["pad", "crop", "stretch"]
MODES = get_args(ImageMode)


def digest_of(data: NDArray[np.float32], *context: object) -> bytes:
    """16 bytes that stand for these numbers in this context."""
    return hashlib.blake2b(np.ascontiguousarray(data).data, digest_size=16, person=repr(context).encode()[:16]).digest()


def key_of(digest: bytes) -> int:
    """The 64 bits that a session's timeline remembers of a picture; never 0, which stands for text."""
    return int.from_bytes(digest[:8], "little") or 1


@dataclass(frozen=True)
class Picture:
    """A picture ready for the tower: pixels (3, size, size) float32, the digest of them and of the mode, and where a policy asks for it
    the depth of each patch (n_image,) float32, NaN for padding."""

    pixels: NDArray[np.float32]
    digest: bytes
    depth: NDArray[np.float32] | None = None

    @property
    def key(self) -> int:
        if self.depth is None:
            return key_of(self.digest)
        return key_of(hashlib.blake2b(self.digest + self.depth.tobytes(), digest_size=16).digest())


def read_picture(model: Model, image: ImageLike, mode: str, depth: Callable[[Any], NDArray[np.float32] | None] | None = None) -> Picture:
    """depth: what gives the depth of its patches, from the PIL picture. ImageError for a bad picture or depth, UnsupportedModelError for
    a model without vision, ValueError for an unknown mode."""
    from .images import load_image, preprocess  # here, because Pillow is slow to import and text does without

    info = model._vision_info()
    loaded = load_image(image, limits=model.limits)
    pixels = preprocess(loaded, info.image_size, mode, tuple(info.image_mean), tuple(info.image_std))
    return Picture(pixels, digest_of(pixels, mode), depth(loaded) if depth else None)


@dataclass(frozen=True)
class Part:
    """Rows begin..end of a prompt: ids (n) int32, or a picture."""

    begin: int
    end: int
    ids: NDArray[np.int32] | None = None
    picture: Picture | None = None


class Prompt:
    """parts, and per row the id (-1 for a picture) and the picture's key (0 for text), as kvs_session_timeline gives them."""

    def __init__(self, pieces: Sequence[list[int] | Picture], n_image: int) -> None:
        self.parts: list[Part] = []
        ids: list[NDArray[np.int32]] = [np.zeros(0, np.int32)]
        keys: list[NDArray[np.uint64]] = [np.zeros(0, np.uint64)]
        at = 0
        for piece in pieces:
            n = n_image if isinstance(piece, Picture) else len(piece)
            if not n:
                continue
            if isinstance(piece, Picture):
                self.parts.append(Part(at, at + n, picture=piece))
                ids.append(np.full(n, -1, np.int32))
                keys.append(np.full(n, piece.key, np.uint64))
            else:
                run = np.asarray(piece, np.int32)
                self.parts.append(Part(at, at + n, ids=run))
                ids.append(run)
                keys.append(np.zeros(n, np.uint64))
            at += n
        self.ids, self.keys, self.n_rows = np.concatenate(ids), np.concatenate(keys), at

    @property
    def pictures(self) -> int:
        return sum(part.picture is not None for part in self.parts)

    def common(self, ids: NDArray[np.int32], keys: NDArray[np.uint64], limit: int) -> int:
        """Rows at the front that a timeline holds already, at most limit, at least one row less than the prompt, whole pictures only."""
        n = max(0, min(len(ids), self.n_rows - 1, limit))
        differ = np.flatnonzero((self.ids[:n] != ids[:n]) | (self.keys[:n] != keys[:n]))
        n = int(differ[0]) if len(differ) else n
        return next((part.begin for part in self.parts if part.picture and part.begin < n < part.end), n)

    def rest(self, begin: int) -> list[Part]:
        """The parts from row begin on, which is not inside a picture."""
        rest = [part for part in self.parts if part.end > begin]
        if rest and rest[0].ids is not None and rest[0].begin < begin:
            rest[0] = Part(begin, rest[0].end, ids=rest[0].ids[begin - rest[0].begin :])
        return rest


def build_prompt(model: Model, text: str, pictures: Sequence[Picture], begin: bool) -> Prompt:
    """Cuts text at its <image> marks. begin: a new timeline, which BOS opens if the model wants it and the template has none."""
    pieces = text.split(IMAGE_MARK)
    if len(pieces) - 1 != len(pictures):
        raise ValueError(f"the prompt has {len(pieces) - 1} {IMAGE_MARK} marks for {len(pictures)} pictures; give one picture per mark")
    runs = [model.tokenize(piece, special=True) for piece in pieces]
    if begin and model._info.add_bos and model._info.bos >= 0 and runs[0][:1] != [model._info.bos]:
        runs[0].insert(0, model._info.bos)
    mixed: list[list[int] | Picture] = [runs[0]]
    for picture, run in zip(pictures, runs[1:], strict=True):
        mixed += [picture, run]
    return Prompt(mixed, model._info.n_image)
