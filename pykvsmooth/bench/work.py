"""How much work a figure stands for, counted from the shapes of the weights: bytes read, operations done (a multiply-add is two)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .. import gguf_in
from .._native import lib
from ..gguf_in import Tensor
from ..model import Model
from ..session import KV_TYPES, KVType


@dataclass(frozen=True)
class Work:
    """token_bytes: of the weights, read for one generated token; output_bytes: of them, the output matrix's. row_operations: of the
    layers' matrices, for one row of a prompt. picture_operations: of the tower and the projector, attention among them; 0 without a
    tower."""

    token_bytes: int
    row_operations: int
    picture_operations: int
    output_bytes: int = 0


def of_model(model: Model) -> Work:
    """From the files' tables. Raises what reading them raises."""
    text = gguf_in.read(model.path).tensors
    tower = gguf_in.read(model.mmproj).tensors if model.mmproj else ()
    blocks, rows = int(model._info.n_vision_layer), model.n_image
    picture = picture_operations(tower, blocks, rows) if tower else 0
    return Work(token_bytes(text), row_operations(text), picture, output_bytes(text))


def token_bytes(tensors: Iterable[Tensor]) -> int:
    """All weights but the token embedding, of which one row is read; where it is the output, too, it is read whole."""
    sizes = {tensor.name: tensor.n_bytes for tensor in tensors}
    embedding = sizes.pop("token_embd.weight", 0)
    return sum(sizes.values()) + (0 if "output.weight" in sizes else embedding)


def output_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the output matrix, which is the embedding where there is no other."""
    sizes = {tensor.name: tensor.n_bytes for tensor in tensors}
    return sizes.get("output.weight", sizes.get("token_embd.weight", 0))


def row_operations(tensors: Iterable[Tensor]) -> int:
    """Of the matrices of the layers: a row of a prompt needs neither the output nor, here, attention, whose work grows with depth."""
    return sum(2 * math.prod(tensor.shape) for tensor in tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2)


def picture_operations(tensors: Iterable[Tensor], blocks: int, n_image: int) -> int:
    """Of the first so many blocks, with their attention, of the patches' embedding and of the projector. n_image: patches."""
    rows, total = n_image + 1, 0  # the class row
    for tensor in tensors:
        elements, block = math.prod(tensor.shape), re.match(r"v\.blk\.(\d+)\.", tensor.name)
        if block and len(tensor.shape) == 2 and int(block[1]) < blocks:
            total += 2 * rows * elements
        elif tensor.name in ("v.patch_embd.weight", "mm.0.weight", "mm.2.weight"):
            total += 2 * n_image * elements
        if tensor.name == "v.patch_embd.weight":
            total += blocks * 4 * rows * rows * tensor.shape[0]  # Q K and P V
    return total


def cache_bytes(model: Model, kv_type: KVType, depth: float) -> float:
    """Keys and values of so many rows, which a token at this depth reads."""
    row = lib.kvs_row_bytes(KV_TYPES[kv_type], model.head_dim)
    return float(2 * model.n_layer * model.n_kv_head * row * depth)
