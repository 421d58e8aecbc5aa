"""The metadata of the two files: the keys that llama.cpp's tools write, so that other runtimes can read the pair, too."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import KVSmoothError
from ..mixes import MIXES
from ..policies.kvsmooth import KVSmooth
from ..quantize import QUANTIZATION_VERSION
from .config import Config, Pixels, TextConfig, VisionConfig
from .folder import Folder, Section
from .vocabulary import Vocabulary, chat_template
from .weights import Weight

MAX_README = 4 << 20
_FIELD = re.compile(r"^(license|license_name|license_link):[ \t]*[\"']?([^\"'\n]{1,200})", re.MULTILINE)


@dataclass(frozen=True)
class General:
    """name: of the checkpoint. licence: the fields license, license_name and license_link of its model card, as far as it has them.
    template: of chats."""

    name: str
    licence: dict[str, str]
    template: str | None


def read_general(folder: Folder, name: str | None, config: Config) -> General:
    data = folder.read("README.md", MAX_README)
    front = re.match(r"---[ \t]*\r?\n(.*?)^---", data.decode("utf-8", "replace"), re.DOTALL | re.MULTILINE) if data else None
    fields = ((key, value.strip()) for key, value in _FIELD.findall(front[1])) if front else ()
    licence = {key: value for key, value in fields if value.isprintable()}
    own = config.top.get("license")
    if isinstance(own, str) and own.isprintable():
        licence.setdefault("license", own[:200])
    name = (name or folder.name or "llava").encode("utf-8", "replace").decode()  # a folder may be called what is no text
    return General(name, licence, chat_template(folder))


def write_general(keys: Any, general: General, kind: str, weights: Sequence[Weight], mix: str) -> None:
    """keys: a gguf.GGUFWriter. kind: "model" or "mmproj". mix: a key of MIXES."""
    from gguf import Metadata, size_label

    count = sum(math.prod(weight.shape) for weight in weights)
    basename = Metadata.get_model_id_components(general.name, count)[2]
    keys.add_string("general.type", kind)
    keys.add_name(general.name)
    keys.add_string("general.basename", basename or general.name)
    keys.add_size_label(size_label(count, 0, 0, 0))
    for key, value in general.licence.items():
        keys.add_string("general." + key.replace("license_", "license."), value)
    keys.add_file_type(MIXES[mix].file_type)
    keys.add_quantization_version(QUANTIZATION_VERSION)


def write_text_keys(keys: Any, c: TextConfig, vocabulary: Vocabulary, template: str | None) -> None:
    keys.add_vocab_size(c.n_vocab)
    keys.add_context_length(c.n_ctx)
    keys.add_embedding_length(c.n_embd)
    keys.add_block_count(c.n_layer)
    keys.add_feed_forward_length(c.n_ff)
    keys.add_head_count(c.n_head)
    keys.add_head_count_kv(c.n_head_kv)
    if c.head_dim * c.n_head != c.n_embd:
        keys.add_key_length(c.head_dim)
        keys.add_value_length(c.head_dim)
    keys.add_rope_dimension_count(c.head_dim)
    keys.add_rope_freq_base(c.rope_theta)
    if isinstance(c.rope_scaling, float):
        from gguf import RopeScalingType

        keys.add_rope_scaling_type(RopeScalingType.LINEAR)
        keys.add_rope_scaling_factor(c.rope_scaling)
    keys.add_layer_norm_rms_eps(c.eps)
    _write_vocabulary(keys, vocabulary)
    if template:
        keys.add_chat_template(template)


def write_policy_keys(keys: Any, top: Section, n_layer: int) -> None:
    """What KVSmooth.for_model reads: the section "kvsmooth" of config.json, where the checkpoint's maker knows what suits it."""
    section = top.section("kvsmooth")
    if section is None:
        return
    known: dict[str, Any] = {key: section.number(key, 0.0, 1.0) for key in ("lambda_ref", "half_width") if key in section}
    known |= {"window": section.integer("window", 1, 1 << 20)} if "window" in section else {}
    known |= {key: section.text(key) for key in ("layers", "target") if key in section}
    try:
        KVSmooth(**known).resolve_layers(n_layer)
    except (ValueError, KVSmoothError) as error:
        raise top.broken("kvsmooth", str(error)) from error
    for key, value in known.items():
        add = {float: keys.add_float64, int: keys.add_uint32, str: keys.add_string}[type(value)]
        add(f"kvsmooth.{key}", value)


def write_mmproj_keys(keys: Any, c: VisionConfig, pixels: Pixels) -> None:
    keys.add_description("image encoder for LLaVA")
    keys.add_bool("clip.has_text_encoder", False)
    keys.add_bool("clip.has_vision_encoder", True)
    keys.add_bool("clip.has_llava_projector", True)
    keys.add_string("clip.projector_type", "mlp")
    keys.add_bool("clip.use_gelu", c.gelu)
    sizes = {
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "embedding_length": c.n_embd,
        "feed_forward_length": c.n_ff,
        "projection_dim": c.projection_dim,
        "block_count": c.n_layer,
        "attention.head_count": c.n_head,
    }
    for key, value in sizes.items():
        keys.add_uint32("clip.vision." + key, value)
    keys.add_float32("clip.vision.attention.layer_norm_epsilon", c.eps)
    keys.add_array("clip.vision.feature_layer", [c.feature_layer])
    keys.add_array("clip.vision.image_mean", pixels.mean)
    keys.add_array("clip.vision.image_std", pixels.std)
    if pixels.aspect:
        keys.add_string("clip.vision.image_aspect_ratio", pixels.aspect)


def _write_vocabulary(keys: Any, vocabulary: Vocabulary) -> None:
    keys.add_tokenizer_model("llama")
    keys.add_tokenizer_pre("default")
    keys.add_token_list([piece.text for piece in vocabulary.pieces])
    keys.add_token_scores([piece.score for piece in vocabulary.pieces])
    keys.add_token_types([piece.type for piece in vocabulary.pieces])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, id in vocabulary.ids.items():
        if id is not None:
            keys.add_uint32(f"tokenizer.ggml.{names[name]}_token_id", id)
    keys.add_add_bos_token(vocabulary.add_bos)
    keys.add_add_eos_token(vocabulary.add_eos)
    keys.add_add_space_prefix(vocabulary.add_space_prefix)
