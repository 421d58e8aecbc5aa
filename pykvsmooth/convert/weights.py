"""Which tensor of a checkpoint becomes which tensor of the two GGUF files: names, shapes, and the order of rotary rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .config import Config, Llama3Scaling, TextConfig, VisionConfig, how_to_name_the_tower
from .folder import Folder, broken, clean
from .shards import Tensor, tensors_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Where the parts of the model begin: as published by llava-hf, as transformers >= 4.52 calls its modules, as the original LLaVA does.
TEXT = ("language_model.model.", "model.language_model.", "model.")
OUTPUT = ("language_model.lm_head.weight", "lm_head.weight")
TOWER = tuple(
    front + back
    for front in ("vision_tower.", "model.vision_tower.", "model.vision_tower.vision_tower.")
    for back in ("vision_model.", "")  # transformers 5 has left this level out
)
CLIP = ("vision_model.", "")
PROJECTOR = (  # and the names of its layers
    ("multi_modal_projector.", "linear_1", "linear_2"),
    ("model.multi_modal_projector.", "linear_1", "linear_2"),
    ("model.mm_projector.", "0", "2"),
)
# Of no use to LLaVA's features: tables that old versions saved, the norm behind the tower's last layer, CLIP's other half.
IDLE = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|position_ids|post_layernorm\.(weight|bias)|logit_scale|(text|visual)_projection\.weight)$|(^|\.)text_model\."
)

ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
TOWER_ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "out_proj": "attn_out"}


@dataclass(frozen=True)
class Weight:
    """A tensor of a GGUF file. source: a tensor of the checkpoint, or values. heads: rows are those of so many rotary heads, and
    become pairs of neighbours (the checkpoint has the second half of a pair half a head further on); 0 leaves them as they are."""

    name: str
    shape: tuple[int, ...]
    source: Tensor | NDArray[np.float32]
    heads: int = 0

    @property
    def place(self) -> tuple[str, str]:
        """File and name of the source, for a message."""
        return (self.source.path, self.source.name) if isinstance(self.source, Tensor) else ("", self.name)

    def read(self) -> NDArray[np.float32]:
        """The values, of this shape. Raises what Tensor.read does."""
        values = self.source.read() if isinstance(self.source, Tensor) else self.source
        if self.heads:
            halves = values.reshape(self.heads, 2, self.shape[0] // self.heads // 2, *self.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2))
        return values.reshape(self.shape)


class _Checkpoint:
    """Tensors by name, and which of them were taken."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self._tensors = folder, tensors_of(folder)
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def begins(self, fronts: Iterable[str], back: str) -> str | None:
        return next((front for front in fronts if front + back in self), None)

    def take(self, name: str, target: str, shape: tuple[int, ...], heads: int = 0) -> Weight:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise broken(self.folder.path, name, "this tensor is missing")
        if tensor.shape != shape:
            raise broken(tensor.path, name, f"has the shape {list(tensor.shape)}, the config asks for {list(shape)}")
        self._taken.add(name)
        return Weight(target, shape, tensor, heads)

    def refuse_rest(self) -> None:
        rest = [t for name, t in self._tensors.items() if name not in self._taken and not IDLE.search(name)]
        if rest:
            more = f" (and {len(rest) - 1} more)" if len(rest) > 1 else ""
            reason = f"this tensor{more} has no place in LLaVA-1.5; without it the result would be quietly another model"
            raise broken(rest[0].path, rest[0].name, reason)


def plan(folder: Folder, tower: Folder | None, config: Config) -> tuple[list[Weight], list[Weight]]:
    """The tensors of the text model and of the mmproj. ModelFormatError names the tensor: missing, of another shape, or left over;
    and what tensors_of raises."""
    main = _Checkpoint(folder)
    text = list(_text(main, config.text))
    own = main.begins(TOWER, "embeddings.class_embedding")
    if own is None:
        other = _tower_folder(main, tower, config)
        vision = list(_vision(other, other.begins(CLIP, "embeddings.class_embedding") or CLIP[0], config.vision))
        other.refuse_rest()
    else:
        vision = list(_vision(main, own, config.vision))
    projector = list(_projector(main, config))
    main.refuse_rest()
    return text, [*vision, *projector]


def _tower_folder(main: _Checkpoint, tower: Folder | None, config: Config) -> _Checkpoint:
    if tower is not None:
        return _Checkpoint(tower)
    name = config.top.get("mm_vision_tower")
    advice = how_to_name_the_tower(clean(name)) if name else "name the folder of its CLIP model, too (vision=..., --vision FOLDER)"
    raise broken(main.folder.path, "vision_tower", f"the checkpoint holds no tensors of a vision tower; {advice}")


def _text(main: _Checkpoint, c: TextConfig) -> Iterator[Weight]:
    front = main.begins(TEXT, "layers.0.input_layernorm.weight")
    if front is None:
        raise broken(
            main.folder.path, TEXT[0] + "layers.0.input_layernorm.weight", "there is no tensor of this name, by any naming of LLaVA-1.5"
        )
    output = main.begins(OUTPUT, "")
    embedding = front + "embed_tokens.weight"
    if c.tied and embedding not in main and output is not None:
        embedding, output = output, None
    yield main.take(embedding, "token_embd.weight", (c.n_vocab, c.n_embd))
    for i in range(c.n_layer):
        yield from _text_layer(main, f"{front}layers.{i}.", f"blk.{i}.", c)
    yield main.take(front + "norm.weight", "output_norm.weight", (c.n_embd,))
    if output is not None or not c.tied:
        yield main.take(output or OUTPUT[-1], "output.weight", (c.n_vocab, c.n_embd))
    if isinstance(c.rope_scaling, Llama3Scaling):
        factors = np.array(c.rope_scaling.factors(c.rope_theta, c.head_dim), np.float32)
        yield Weight("rope_freqs.weight", factors.shape, factors)


def _text_layer(main: _Checkpoint, front: str, target: str, c: TextConfig) -> Iterator[Weight]:
    rows = {"q_proj": c.n_head * c.head_dim, "k_proj": c.n_head_kv * c.head_dim, "v_proj": c.n_head_kv * c.head_dim, "o_proj": c.n_embd}
    heads = {"q_proj": c.n_head, "k_proj": c.n_head_kv}
    yield main.take(front + "input_layernorm.weight", target + "attn_norm.weight", (c.n_embd,))
    for name, short in ATTENTION.items():
        source, width = f"{front}self_attn.{name}.", c.n_head * c.head_dim if name == "o_proj" else c.n_embd
        yield main.take(source + "weight", f"{target}{short}.weight", (rows[name], width), heads.get(name, 0))
        if c.attention_bias:
            yield main.take(source + "bias", f"{target}{short}.bias", (rows[name],), heads.get(name, 0))
    yield main.take(front + "post_attention_layernorm.weight", target + "ffn_norm.weight", (c.n_embd,))
    for name, out, width in (("gate", c.n_ff, c.n_embd), ("up", c.n_ff, c.n_embd), ("down", c.n_embd, c.n_ff)):
        source = f"{front}mlp.{name}_proj."
        yield main.take(source + "weight", f"{target}ffn_{name}.weight", (out, width))
        if c.mlp_bias:
            yield main.take(source + "bias", f"{target}ffn_{name}.bias", (out,))


def _vision(clip: _Checkpoint, front: str, c: VisionConfig) -> Iterator[Weight]:
    side, embeddings = c.image_size // c.patch_size, front + "embeddings."
    yield clip.take(embeddings + "class_embedding", "v.class_embd", (c.n_embd,))
    yield clip.take(embeddings + "patch_embedding.weight", "v.patch_embd.weight", (c.n_embd, 3, c.patch_size, c.patch_size))
    yield clip.take(embeddings + "position_embedding.weight", "v.position_embd.weight", (side * side + 1, c.n_embd))
    yield from _pair(clip, front + "pre_layrnorm", "v.pre_ln", (c.n_embd,))
    for i in range(c.n_layer):
        layer, target = f"{front}encoder.layers.{i}.", f"v.blk.{i}."
        yield from _pair(clip, layer + "layer_norm1", target + "ln1", (c.n_embd,))
        for name, short in TOWER_ATTENTION.items():
            yield from _pair(clip, f"{layer}self_attn.{name}", target + short, (c.n_embd, c.n_embd))
        yield from _pair(clip, layer + "layer_norm2", target + "ln2", (c.n_embd,))
        yield from _pair(clip, layer + "mlp.fc1", target + "ffn_up", (c.n_ff, c.n_embd))
        yield from _pair(clip, layer + "mlp.fc2", target + "ffn_down", (c.n_embd, c.n_ff))


def _projector(main: _Checkpoint, config: Config) -> Iterator[Weight]:
    width, embd = config.vision.n_embd, config.text.n_embd
    found = next((names for names in PROJECTOR if f"{names[0]}{names[1]}.weight" in main), PROJECTOR[0])
    front, first, second = found
    yield from _pair(main, front + first, "mm.0", (embd, width))
    yield from _pair(main, front + second, "mm.2", (embd, embd))


def _pair(main: _Checkpoint, source: str, target: str, shape: tuple[int, ...]) -> Iterator[Weight]:
    yield main.take(source + ".weight", target + ".weight", shape)
    yield main.take(source + ".bias", target + ".bias", shape[:1])
