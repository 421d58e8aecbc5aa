"""The CLIP vision tower of LLaVA-1.5 and its two-layer projector: picture -> rows of the text model's embedding space."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .gguf_file import GGUFFile
from .llama import softmax

Array = np.ndarray


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * weight + bias


def quick_gelu(x: Array) -> Array:
    return x / (1 + np.exp(-1.702 * x))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@dataclass
class Clip:
    image_size: int
    patch_size: int
    n_head: int
    n_run: int  # blocks that run: LLaVA takes the output of the last but one
    eps: float
    act: str
    patch_embd: Array  # (E, 3, P, P)
    patch_bias: Array | float
    class_embd: Array
    position_embd: Array
    pre_ln: tuple[Array, Array]
    layers: list[dict[str, tuple[Array, Array]]]
    mm0: tuple[Array, Array]
    mm2: tuple[Array, Array]

    def encode(self, pixels: Array) -> Array:
        """pixels (3, S, S), normalised -> (patches, n_embd of the text model)"""
        side, p = self.image_size // self.patch_size, self.patch_size
        patches = pixels.astype(np.float64).reshape(3, side, p, side, p).transpose(1, 3, 0, 2, 4).reshape(side * side, -1)
        x = patches @ self.patch_embd.reshape(len(self.patch_embd), -1).T + self.patch_bias
        x = np.concatenate([self.class_embd.reshape(1, -1), x]) + self.position_embd  # the class row is first
        x = layer_norm(x, *self.pre_ln, self.eps)
        for w in self.layers[: self.n_run]:
            x = self._block(x, w)
        h = gelu(x[1:] @ self.mm0[0].T + self.mm0[1])  # the class row is dropped; no post-norm
        return h @ self.mm2[0].T + self.mm2[1]

    def _block(self, x: Array, w: dict[str, tuple[Array, Array]]) -> Array:
        def dense(h: Array, name: str) -> Array:
            return h @ w[name][0].T + w[name][1]

        h = layer_norm(x, *w["ln1"], self.eps)
        q, k, v = (dense(h, name).reshape(len(x), self.n_head, -1) for name in ("attn_q", "attn_k", "attn_v"))
        p = softmax(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1]))
        x = x + dense(np.einsum("hqk,khd->qhd", p, v).reshape(x.shape), "attn_out")
        h = dense(layer_norm(x, *w["ln2"], self.eps), "up")
        return x + dense(gelu(h) if self.act == "gelu" else quick_gelu(h), "down")


def load_clip(path: str | Path) -> Clip:
    f = GGUFFile(path)
    blocks = f.get("clip.vision.block_count")
    feature = f.get("clip.vision.feature_layer")
    width = f.get("clip.vision.embedding_length")

    def pair(name: str) -> tuple[Array, Array]:
        return f.tensor(name + ".weight"), f.maybe(name + ".bias")

    def layer(i: int) -> dict[str, tuple[Array, Array]]:
        w = {name: pair(f"v.blk.{i}.{name}") for name in ("attn_q", "attn_k", "attn_v", "attn_out", "ln1", "ln2")}
        up, down = pair(f"v.blk.{i}.ffn_up"), pair(f"v.blk.{i}.ffn_down")
        # files of 2023 name them the other way round; where the shape cannot tell (square), the bias of neither can, and the names hold
        swapped = up[0].shape[0] == width and up[0].shape[1] != width
        w["up"], w["down"] = (down, up) if swapped else (up, down)
        return w

    patch = f.tensor("v.patch_embd.weight")
    return Clip(
        image_size=f.get("clip.vision.image_size"),
        patch_size=f.get("clip.vision.patch_size"),
        n_head=f.get("clip.vision.attention.head_count"),
        n_run=feature[0] if feature else 23 if blocks == 24 else blocks,
        eps=f.get("clip.vision.attention.layer_norm_epsilon"),
        act="gelu" if f.get("clip.use_gelu", False) else "quick",
        patch_embd=patch,
        patch_bias=f.maybe("v.patch_embd.bias"),
        class_embd=f.tensor("v.class_embd"),
        position_embd=f.tensor("v.position_embd.weight"),
        pre_ln=pair("v.pre_ln"),
        layers=[layer(i) for i in range(blocks)],
        mm0=pair("mm.0"),
        mm2=pair("mm.2"),
    )
