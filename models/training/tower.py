"""The tower, trained alone: what and where each patch is, read off the features that the language model will see; what the picture holds.

Features are hidden_states[-2] without the class row, as LLaVA-1.5 takes them; the last block only serves the class row's loss.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from models.scenes import CLASSES

from .blocks import compute_type, layer_norm, linear, tower_block
from .loop import Figures, Loop, fill, keep, order
from .pool import Labels, Pool
from .recipe import Recipe, Sizes
from .work import Work, finished

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's pictures, as in preprocessor_config.json of LLaVA-1.5
STD = (0.26862954, 0.26130258, 0.27577711)
SEEN = 1 / 8  # of a patch an object must fill to be the patch's class
BACKGROUND = 0.1  # weight of a patch that is none's
PLACE, HOLDS = 0.1, 4.0  # weights of the losses beside the patch's class


def config(sizes: Sizes) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=sizes.tower_width,
        intermediate_size=sizes.tower_ffn,
        num_hidden_layers=sizes.tower_layers,
        num_attention_heads=sizes.tower_heads,
        image_size=sizes.image,
        patch_size=sizes.patch,
        projection_dim=sizes.tower_width,
        hidden_act="quick_gelu",
    )


def parts(clip: nn.Module) -> nn.Module:
    """The module that holds embeddings and encoder: older versions of transformers wrap it once more."""
    return getattr(clip, "vision_model", clip)


def pixels(pictures: Tensor) -> Tensor:
    """(n, size, size, 3) uint8 to (n, 3, size, size) float32, as CLIP's processor makes them."""
    mean, std = (torch.tensor(values, device=pictures.device) for values in (MEAN, STD))
    return ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def embed(clip: nn.Module, pictures: Tensor) -> Tensor:
    """Rows before the first block, (n, 1 + patches, width) float32. The convolution is a product of matrices, patch by patch."""
    own = parts(clip)
    kernel = own.embeddings.patch_embedding.weight
    patches = F.unfold(pixels(pictures), kernel.shape[-1], stride=kernel.shape[-1]).transpose(1, 2)
    rows = patches @ kernel.flatten(1).t()
    first = own.embeddings.class_embedding.expand(len(rows), 1, -1)
    return layer_norm(torch.cat([first, rows], 1) + own.embeddings.position_embedding.weight, own.pre_layrnorm)


def feature_rows(clip: nn.Module, pictures: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden_states[-2], class row and all: (n, 1 + patches, width) float32."""
    x = embed(clip, pictures)
    for layer in parts(clip).encoder.layers[:-1]:
        x = tower_block(x, layer, dtype)
    return x


class Teacher(nn.Module):
    """The tower with the linear heads that it is trained through."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.grid = sizes.grid
        self.clip = CLIPVisionModel(config(sizes))
        self.patch = nn.Linear(sizes.tower_width, 1 + len(CLASSES) + 2 * sizes.grid)
        self.holds = nn.Linear(sizes.tower_width, len(CLASSES))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of each patch's class, row and column, (n, patches, ...), and of the picture's objects, (n, classes)."""
        dtype = compute_type(pictures.device)
        x = feature_rows(self.clip, pictures, dtype)
        of_patch = linear(x[:, 1:].to(dtype), self.patch).float()
        last = tower_block(x, parts(self.clip).encoder.layers[-1], dtype)[:, 0]
        kinds, row, column = of_patch.split([1 + len(CLASSES), self.grid, self.grid], -1)
        return kinds, row, column, self.holds(layer_norm(last, parts(self.clip).post_layernorm))


class Lesson:
    """Pictures and labels of a split, and what the teacher's answers to them are worth."""

    def __init__(self, pool: Pool, split: str, n: int, device: torch.device) -> None:
        self.pictures, self.labels, self.device = pool.pictures(split, n), pool.labels(split, n), device

    def batch(self, which: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures, classes of patches, objects."""
        labels: Labels = self.labels
        kinds = np.where(labels.shares[which] >= SEEN, labels.kinds[which], 0)
        held = torch.from_numpy(labels.objects[which]).float()
        return tuple(t.to(self.device) for t in (torch.from_numpy(self.pictures[which]), torch.from_numpy(kinds).long(), held))


def losses(teacher: Teacher, pictures: Tensor, kinds: Tensor, held: Tensor) -> dict[str, Tensor]:
    of_kind, row, column, holds = teacher(pictures)
    weight = torch.where(kinds > 0, 1.0, BACKGROUND)
    kind = (F.cross_entropy(of_kind.flatten(0, 1), kinds.flatten(), reduction="none") * weight.flatten()).sum() / weight.sum()
    places = torch.arange(kinds.shape[1], device=kinds.device).expand_as(kinds).flatten()
    place = F.cross_entropy(row.flatten(0, 1), places // teacher.grid) + F.cross_entropy(column.flatten(0, 1), places % teacher.grid)
    objects = F.binary_cross_entropy_with_logits(holds, held)
    return {"loss": kind + PLACE * place + HOLDS * objects, "kind": kind.detach(), "place": place.detach(), "objects": objects.detach()}


def look(teacher: Teacher, lesson: Lesson, batch: int) -> Figures:
    """Shares of development patches whose class, row and column are told right, and recall and precision of the picture's objects."""
    n, right = len(lesson.pictures), np.zeros(7)
    for i in range(0, n, batch):
        pictures, kinds, held = lesson.batch(np.arange(i, min(n, i + batch)))
        of_kind, row, column, holds = teacher(pictures)
        things, said = kinds > 0, holds > 0
        place = torch.arange(kinds.shape[1], device=kinds.device)
        told = (of_kind.argmax(-1) == kinds) & things
        rows, columns = row.argmax(-1) == place // teacher.grid, column.argmax(-1) == place % teacher.grid
        hits = said & (held > 0)
        right += [x.sum().item() for x in (told, things, rows, columns, hits, held > 0, said)]
    told, things, rows, columns, hits, held_all, said_all = right
    patches = n * teacher.grid**2
    return {
        "patches": told / max(1, things),
        "rows": rows / patches,
        "columns": columns / patches,
        "recall": hits / max(1, held_all),
        "precision": hits / max(1, said_all),
    }


def make(work: Work, pool: Pool, recipe: Recipe, device: torch.device, every: float) -> None:
    """Trains the tower; leaves tower.safetensors: CLIPVisionModel's tensors."""
    torch.manual_seed(recipe.seed)
    teacher, pace = Teacher(recipe.sizes).to(device), recipe.tower
    lesson = Lesson(pool, "train", min(pace.samples, recipe.scenes), device)
    unseen = Lesson(pool, "development", recipe.development, device)
    per_epoch = max(1, len(lesson.pictures) // pace.batch)

    def loss(step: int) -> dict[str, Tensor]:
        epoch, at = divmod(step, per_epoch)
        which = order(recipe.seed, epoch, len(lesson.pictures))[at * pace.batch : (at + 1) * pace.batch]
        return losses(teacher, *lesson.batch(which))

    loop = Loop(work, "tower", teacher, pace, loss, lambda: look(teacher, unseen, pace.batch), {"seed": recipe.seed}, every)
    loop.run()
    keep(teacher.clip, work.path("tower.safetensors"))
    loop.forget()


def load(path: Path, sizes: Sizes) -> CLIPVisionModel:
    clip = CLIPVisionModel(config(sizes))
    fill(clip, path)
    return clip.eval()


@torch.no_grad()
def features(clip: CLIPVisionModel, pictures: NDArray[np.uint8], device: torch.device, work: Work, batch: int = 64) -> NDArray[np.float16]:
    """(n, patches, width): what the projector gets for each picture."""
    clip, dtype = clip.to(device), compute_type(device)
    out = np.empty((len(pictures), clip.config.image_size**2 // clip.config.patch_size**2, clip.config.hidden_size), np.float16)
    with work.bar() as bar:
        row = bar.add_task("features", total=len(pictures), note="")
        for i in range(0, len(pictures), batch):
            rows = feature_rows(clip, torch.from_numpy(pictures[i : i + batch]).to(device), dtype)[:, 1:]
            out[i : i + batch] = rows.cpu().numpy()
            bar.update(row, completed=min(len(pictures), i + batch))
    return out


def make_features(work: Work, pool: Pool, recipe: Recipe, device: torch.device) -> None:
    """Leaves features-train.npy and features-development.npy."""
    clip = load(work.path("tower.safetensors"), recipe.sizes)
    for split in ("development", "train"):
        path = work.path(f"features-{split}.npy")
        if not path.exists():
            rows = features(clip, pool.pictures(split), device, work)
            with finished(path) as part, open(part, "wb") as file:
                np.save(file, rows)
