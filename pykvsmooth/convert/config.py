"""What a checkpoint's config files say about the model: sizes of the text model and of the tower, and how pictures are prepared.

Two families name the same things differently: llava-hf's (sections text_config and vision_config) and the original LLaVA's (flat,
mm_* for the tower, whose own sizes stand in the folder of the CLIP model that it came from). Absent keys have the value that
transformers gives them. Whatever would make another model of it than LLaVA-1.5 is an UnsupportedModelError that names the key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .folder import Folder, Section, clean

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, the default of its processor
WHAT_CONVERTS = "what converts is LLaVA-1.5: a CLIP tower, a two-layer projector and a LLaMA text model"
# The tower of the published LLaVA-1.5 checkpoints, which their config only names; transformers' default for a LLaVA without vision_config.
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
KNOWN_TOWERS = {"openai/clip-vit-large-patch14-336": CLIP_L_336}
BICUBIC = 3  # Pillow's number


@dataclass(frozen=True)
class Llama3Scaling:
    factor: float
    low: float
    high: float
    original_context: int

    def factors(self, theta: float, head_dim: int) -> list[float]:
        """What each of the head_dim / 2 frequencies is divided by: long waves by factor, short ones not at all, between them smoothly."""
        found = []
        for i in range(0, head_dim, 2):
            turns = self.original_context / (2 * math.pi * theta ** (i / head_dim))  # of this pair over the original context
            share = min(max((turns - self.low) / (self.high - self.low), 0.0), 1.0)
            found.append(1 / ((1 - share) / self.factor + share))
        return found


@dataclass(frozen=True)
class TextConfig:
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx: int
    eps: float
    rope_theta: float
    rope_scaling: float | Llama3Scaling | None  # a float: linear, by this factor
    attention_bias: bool
    mlp_bias: bool
    tied: bool  # the output may be the token embedding


@dataclass(frozen=True)
class VisionConfig:
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    image_size: int
    patch_size: int
    projection_dim: int
    eps: float
    gelu: bool  # by erf; CLIP's own is quick-GELU
    feature_layer: int  # blocks that run for LLaVA's features


@dataclass(frozen=True)
class Pixels:
    mean: list[float]
    std: list[float]
    aspect: Literal["pad", "crop"] | None  # how a picture becomes a square, if the folder says so


@dataclass(frozen=True)
class Config:
    text: TextConfig
    vision: VisionConfig
    pixels: Pixels
    top: Section  # config.json


def read_config(folder: Folder, tower: Folder | None) -> Config:
    """tower: the folder of a CLIP model, for checkpoints of the original LLaVA. ModelFormatError, ModelFileNotFoundError,
    UnsupportedModelError."""
    top = folder.needed_json("config.json")
    top.only("model_type", ("llava", "llava_llama"), WHAT_CONVERTS)
    top.only("quantization_config", (), "this checkpoint is quantized already; convert the one that it was made from")
    original = "text_config" not in top
    if original and "mm_vision_tower" not in top and "vision_config" not in top:
        raise top.unsupported("model_type", f"no text_config and no mm_vision_tower beside it: {WHAT_CONVERTS}")
    _check_original(top) if original else _check_hf(top)
    vision, layer = _vision_section(top, tower), _feature_layer(top, original)
    return Config(
        text=_text(top if original else top.section("text_config") or top, top),
        vision=_vision(vision, top, *layer),
        pixels=_pixels(top, [folder] if tower is None else [folder, tower], vision),
        top=top,
    )


def _check_hf(top: Section) -> None:
    top.only("vision_feature_select_strategy", ("default",), "LLaVA-1.5 leaves the class row out")
    top.only("projector_hidden_act", ("gelu",), "LLaVA-1.5's projector has GELU by erf")
    top.only("multimodal_projector_bias", (True,), "LLaVA-1.5's projector has biases")


def _check_original(top: Section) -> None:
    top.only("mm_vision_select_feature", ("patch",), "LLaVA-1.5 leaves the class row out")
    top.only("mm_patch_merge_type", ("flat",), "LLaVA-1.5 does not cut pictures into tiles")
    top.only("mm_use_im_start_end", (False,), "LLaVA-1.5 has no tokens around a picture")
    top.only("mm_use_im_patch_token", (False,), "LLaVA-1.5 has no tokens for patches")
    top.only("s2", (False,), "LLaVA-1.5 sees a picture at one scale")
    projector = top.text("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise top.unsupported("mm_projector_type", f'"{clean(projector)}" is not LLaVA-1.5\'s "mlp2x_gelu": {WHAT_CONVERTS}')


def _feature_layer(top: Section, original: bool) -> tuple[str, int]:
    """The key, and hidden_states' index of the features; negative from the end."""
    key = "mm_vision_select_layer" if original and "mm_vision_select_layer" in top else "vision_feature_layer"
    value = top.get(key)
    if isinstance(value, list):
        if len(value) != 1:
            raise top.unsupported(key, "features joined from several layers are not LLaVA-1.5's")
        top = Section({key: value[0]}, top.path)
    return key, int(top.integer(key, -1024, 1024, -2))


# ---- text ----


def _text(text: Section, top: Section) -> TextConfig:
    if text is not top:
        text.only("model_type", ("llama",), WHAT_CONVERTS)
        text.only("quantization_config", (), "this checkpoint is quantized already; convert the one that it was made from")
    text.only("hidden_act", ("silu",), "LLaMA's feed-forward network has SiLU")
    text.only("sliding_window", (), "LLaMA's attention sees all rows")
    n_embd = text.integer("hidden_size", 1, 1 << 16, 4096)
    n_head = text.integer("num_attention_heads", 1, 1024, 32)
    n_head_kv = text.integer("num_key_value_heads", 1, 1024, n_head)
    if n_head % n_head_kv:
        raise text.broken("num_key_value_heads", f"{n_head_kv} does not divide num_attention_heads, {n_head}")
    if "head_dim" not in text and n_embd % n_head:
        raise text.broken("num_attention_heads", f"{n_head} does not divide hidden_size, {n_embd}")
    head_dim = text.integer("head_dim", 2, 512, n_embd // n_head)
    if head_dim % 2 or not 2 <= head_dim <= 512:
        raise text.broken("num_attention_heads" if "head_dim" not in text else "head_dim", f"heads of {head_dim} values can't be rotated")
    theta, scaling = _rope(text)
    return TextConfig(
        n_layer=text.integer("num_hidden_layers", 1, 1024, 32),
        n_embd=n_embd,
        n_ff=text.integer("intermediate_size", 1, 1 << 20, 11008),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_vocab=text.integer("vocab_size", 1, 1 << 24, 32000),
        n_ctx=text.integer("max_position_embeddings", 1, 1 << 30, 2048),
        eps=text.number("rms_norm_eps", 1e-30, 1.0, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=bool(text.flag("attention_bias", False)),
        mlp_bias=bool(text.flag("mlp_bias", False)),
        tied=bool(text.flag("tie_word_embeddings", False)) or bool(top.flag("tie_word_embeddings", False)),
    )


def _rope(text: Section) -> tuple[float, float | Llama3Scaling | None]:
    """rope_parameters since transformers 5, rope_theta and rope_scaling before; the kind was called type before it was rope_type."""
    rope = text.section("rope_parameters") or text.section("rope_scaling") or Section({}, text.path)
    theta = (rope if "rope_theta" in rope else text).number("rope_theta", 1.0, 1e30, 10000.0)
    rope.only("partial_rotary_factor", (1, 1.0), "LLaMA rotates whole heads")
    key = "rope_type" if "rope_type" in rope else "type"
    kind = rope.text(key, "default")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, rope.number("factor", 1e-4, 1e4)
    if kind != "llama3":
        raise rope.unsupported(key, f'"{clean(kind)}": of the ways to scale RoPE, linear and llama3 can be converted')
    low, high = rope.number("low_freq_factor", 1e-6, 1e6), rope.number("high_freq_factor", 1e-6, 1e6)
    if not low < high:
        raise rope.broken("high_freq_factor", f"must be over low_freq_factor, {low:g}, not {high:g}")
    context = rope.integer("original_max_position_embeddings", 1, 1 << 30)
    return theta, Llama3Scaling(rope.number("factor", 1e-4, 1e4), low, high, context)


# ---- tower ----


def _vision_section(top: Section, tower: Folder | None) -> Section:
    """The tower's sizes: of the folder that was named, of the checkpoint's own config, or of the published tower."""
    if tower is not None:
        clip = tower.needed_json("config.json")
        clip.only("model_type", ("clip", "clip_vision_model"), "the tower of LLaVA-1.5 is CLIP's")
        return clip.section("vision_config") or clip
    if "vision_config" in top:
        return top.section("vision_config") or top
    if "mm_vision_tower" not in top:
        return Section(CLIP_L_336, top.path, "vision_config.")
    name = top.text("mm_vision_tower")
    if name not in KNOWN_TOWERS:
        raise top.unsupported("mm_vision_tower", f"{clean(name)} is not in this folder; {how_to_name_the_tower(name)}")
    return Section(KNOWN_TOWERS[name], top.path, "mm_vision_tower: ")


def how_to_name_the_tower(name: object) -> str:
    return f"fetch the model {clean(name)} and name its folder, too (vision=..., on the command line --vision FOLDER)"


def _vision(vision: Section, top: Section, key: str, layer: int) -> VisionConfig:
    vision.only("model_type", ("clip", "clip_vision_model"), "the tower of LLaVA-1.5 is CLIP's")
    vision.only("num_channels", (3,), "pictures have three")
    vision.only("hidden_act", ("quick_gelu", "gelu"), "CLIP's towers have quick-GELU, or GELU")
    n_embd, n_head = vision.integer("hidden_size", 1, 1 << 14, 768), vision.integer("num_attention_heads", 1, 256, 12)
    if n_embd % n_head:
        raise vision.broken("num_attention_heads", f"{n_head} does not divide hidden_size, {n_embd}")
    image, patch = vision.integer("image_size", 1, 2048, 224), vision.integer("patch_size", 1, 2048, 32)
    if image % patch:
        raise vision.broken("image_size", f"{image} is no multiple of patch_size, {patch}")
    n_layer = vision.integer("num_hidden_layers", 1, 1024, 12)
    run = layer if layer >= 0 else n_layer + 1 + layer
    if not 1 <= run <= n_layer:
        raise top.broken(key, f"{layer} is no layer of a tower of {n_layer}")
    return VisionConfig(
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=vision.integer("intermediate_size", 1, 1 << 16, 3072),
        n_head=n_head,
        image_size=image,
        patch_size=patch,
        projection_dim=vision.integer("projection_dim", 1, 1 << 20, 512),
        eps=vision.number("layer_norm_eps", 1e-30, 1.0, 1e-5),
        gelu=vision.get("hidden_act") == "gelu",
        feature_layer=run,
    )


# ---- pictures ----


def _pixels(top: Section, folders: Sequence[Folder], vision: Section) -> Pixels:
    processor = next((found for folder in folders for found in _processors(folder)), Section({}, top.path))
    for key in ("do_resize", "do_rescale", "do_normalize"):
        processor.only(key, (True,), "the tower wants pixels of its size, between 0 and 1, normalised")
    processor.only("resample", (BICUBIC,), "pictures are resized bicubically, as CLIP's are")
    _check_size(processor, vision)
    scale = processor.number("rescale_factor", 0.0, 1.0, 1 / 255)
    if abs(scale * 255 - 1) > 1e-6:
        raise processor.unsupported("rescale_factor", f"{scale:g} is not 1/255, which makes 0..1 of 0..255")
    return Pixels(
        mean=processor.numbers("image_mean", 3, -1e4, 1e4, MEAN),
        std=processor.numbers("image_std", 3, 1e-6, 1e4, STD),
        aspect=_aspect(top, processor),
    )


def _processors(folder: Folder) -> list[Section]:
    """processor_config.json holds the processors of all kinds of input, since transformers 5."""
    whole = folder.json("processor_config.json")
    found = [folder.json("preprocessor_config.json"), whole.section("image_processor") if whole else None]
    return [section for section in found if section is not None]


def _check_size(processor: Section, vision: Section) -> None:
    """The crop, or else the size, is the tower's."""
    image = vision.integer("image_size", 1, 2048, 224)
    for key in ("crop_size", "size"):
        value = processor.get(key)
        sizes = [value] if isinstance(value, int) else list(value.values()) if isinstance(value, dict) else []
        if sizes and any(size != image for size in sizes):
            raise processor.broken(key, f"makes pictures of {' x '.join(map(str, sizes))[:60]}, but the tower's image_size is {image}")


def _aspect(top: Section, processor: Section) -> Literal["pad", "crop"] | None:
    ratio = top.get("image_aspect_ratio")
    if isinstance(ratio, str) and ratio.startswith("anyres"):
        raise top.unsupported("image_aspect_ratio", f'"{clean(ratio)}" cuts pictures into tiles, as LLaVA-1.6 does: {WHAT_CONVERTS}')
    if ratio == "pad" or processor.flag("do_pad", False):
        return "pad"
    return "crop" if processor.flag("do_center_crop", False) else None
