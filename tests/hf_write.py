"""Small random LLaVA checkpoints as Hugging Face folders, in all the ways in which they are named, and what they compute.

The logits are computed here as transformers does it, from the checkpoint's own tensors and in its order of rotary rows, so that
nothing of the converter is in them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from reference import Clip
from reference.llama import rms_norm, silu, softmax
from safetensors.numpy import save

from pykvsmooth.convert import convert

TEMPLATE = "{% for m in messages %}{{ m['role'].upper() }}: {{ m['content'] }} {% endfor %}ASSISTANT:"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NAMINGS = ("hf", "new", "transformers5", "original", "apart")  # apart: original, the tower in a folder of its own
Arrays = dict[str, np.ndarray]


@dataclass
class Checkpoint:
    """folder; vision: what convert wants to be told; arrays by llava-hf's names, float64 of the values as stored."""

    folder: Path
    vision: Path | None
    config: dict[str, Any]
    arrays: Arrays = field(repr=False)

    @property
    def text(self) -> dict[str, Any]:
        return self.config["text_config"]

    def logits(self, before: list[int], pixels: np.ndarray, after: list[int]) -> np.ndarray:
        """Of the rows of after: (len(after), V) float64. A row sees itself and all before it."""
        embed = self.arrays["language_model.model.embed_tokens.weight"]
        x = np.concatenate([embed[before], self._clip().encode(pixels), embed[after]])
        for i in range(self.text["num_hidden_layers"]):
            x = self._layer(x, f"language_model.model.layers.{i}.")
        x = rms_norm(x[-len(after) :], self.arrays["language_model.model.norm.weight"], self.text["rms_norm_eps"])
        return x @ self.arrays.get("language_model.lm_head.weight", embed).T

    def _dense(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.arrays[name + ".weight"].T + self.arrays.get(name + ".bias", 0.0)

    def _layer(self, x: np.ndarray, front: str) -> np.ndarray:
        c, n = self.text, len(x)
        h = rms_norm(x, self.arrays[front + "input_layernorm.weight"], c["rms_norm_eps"])
        q, k, v = (self._dense(h, f"{front}self_attn.{p}_proj").reshape(n, -1, c["head_dim"]) for p in "qkv")
        angles = np.arange(n)[:, None] * self._frequencies()
        repeat = c["num_attention_heads"] // c["num_key_value_heads"]
        q, k, v = _rotated(q, angles), _rotated(k, angles).repeat(repeat, axis=1), v.repeat(repeat, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(c["head_dim"]) + np.triu(np.full((n, n), -np.inf), 1)
        x = x + self._dense(np.einsum("hqk,khd->qhd", softmax(scores), v).reshape(n, -1), front + "self_attn.o_proj")
        h = rms_norm(x, self.arrays[front + "post_attention_layernorm.weight"], c["rms_norm_eps"])
        return x + self._dense(
            silu(self._dense(h, front + "mlp.gate_proj")) * self._dense(h, front + "mlp.up_proj"), front + "mlp.down_proj"
        )

    def _frequencies(self) -> np.ndarray:
        """methods of transformers' modeling_rope_utils: default, linear, llama3."""
        rope, d = self.text["rope_parameters"], self.text["head_dim"]
        inv = rope["rope_theta"] ** (-np.arange(0, d, 2) / d)
        if rope["rope_type"] == "linear":
            return inv / rope["factor"]
        if rope["rope_type"] == "default":
            return inv
        wave, old = 2 * math.pi / inv, rope["original_max_position_embeddings"]
        smooth = (old / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        between = (1 - smooth) * inv / rope["factor"] + smooth * inv
        scaled = np.where(wave > old / rope["low_freq_factor"], inv / rope["factor"], between)
        return np.where(wave < old / rope["high_freq_factor"], inv, scaled)

    def _clip(self) -> Clip:
        c, a = self.config["vision_config"], self.arrays

        def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
            return a[name + ".weight"], a[name + ".bias"]

        names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_out": "self_attn.out_proj"}
        names |= {"ln1": "layer_norm1", "ln2": "layer_norm2", "up": "mlp.fc1", "down": "mlp.fc2"}
        front, layer = "vision_tower.vision_model.", self.config["vision_feature_layer"]
        return Clip(
            image_size=c["image_size"],
            patch_size=c["patch_size"],
            n_head=c["num_attention_heads"],
            n_run=layer if layer >= 0 else c["num_hidden_layers"] + 1 + layer,
            eps=c["layer_norm_eps"],
            act="gelu" if c["hidden_act"] == "gelu" else "quick",
            patch_embd=a[front + "embeddings.patch_embedding.weight"],
            patch_bias=0.0,
            class_embd=a[front + "embeddings.class_embedding"],
            position_embd=a[front + "embeddings.position_embedding.weight"],
            pre_ln=pair(front + "pre_layrnorm"),
            layers=[
                {short: pair(f"{front}encoder.layers.{i}.{long}") for short, long in names.items()} for i in range(c["num_hidden_layers"])
            ],
            mm0=pair("multi_modal_projector.linear_1"),
            mm2=pair("multi_modal_projector.linear_2"),
        )


def _rotated(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """x (n, heads, D): the pairs are (i, i + D / 2), as in transformers."""
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


# ---- weights ----


def make_config(**changes: Any) -> dict[str, Any]:
    """changes: keys of text_config, of vision_config (with the prefix v_), tied, vision_feature_layer."""
    text = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "vocab_size": len(tiny.vocabulary()[0]) + 7,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 48,
    }
    top = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
    }
    top |= {
        "vision_feature_select_strategy": "default",
        "image_token_index": text["vocab_size"] - 7,
        "pad_token_id": text["vocab_size"] - 6,
    }
    for key, value in changes.items():
        (vision if key.startswith("v_") else top if key == "vision_feature_layer" else text)[key.removeprefix("v_")] = value
    return {**top, "text_config": text, "vision_config": vision}


def make_arrays(config: dict[str, Any], rng: np.random.Generator) -> Arrays:
    """Random float32 by llava-hf's names: wide, so that attention is not uniform."""
    t, v = config["text_config"], config["vision_config"]
    arrays: Arrays = {}

    def put(name: str, *shape: int, std: float | None = None, mean: float = 0.0) -> None:
        std = std or (0.1 if len(shape) == 1 else 1.6 / math.sqrt(np.prod(shape[1:])))
        arrays[name] = (rng.standard_normal(shape) * std + mean).astype(np.float32)

    def dense(name: str, rows: int, cols: int, bias: bool) -> None:
        put(name + ".weight", rows, cols)
        if bias:
            put(name + ".bias", rows)

    def norm(name: str, n: int, bias: bool) -> None:
        put(name + ".weight", n, mean=1.0)
        if bias:
            put(name + ".bias", n)

    e, q, kv = t["hidden_size"], t["num_attention_heads"] * t["head_dim"], t["num_key_value_heads"] * t["head_dim"]
    put("language_model.model.embed_tokens.weight", t["vocab_size"], e, std=0.5)
    for i in range(t["num_hidden_layers"]):
        front = f"language_model.model.layers.{i}."
        norm(front + "input_layernorm", e, False)
        norm(front + "post_attention_layernorm", e, False)
        for name, rows, cols in (("q", q, e), ("k", kv, e), ("v", kv, e), ("o", e, q)):
            dense(f"{front}self_attn.{name}_proj", rows, cols, t.get("attention_bias", False))
        for name, rows, cols in (
            ("gate", t["intermediate_size"], e),
            ("up", t["intermediate_size"], e),
            ("down", e, t["intermediate_size"]),
        ):
            dense(f"{front}mlp.{name}_proj", rows, cols, t.get("mlp_bias", False))
    norm("language_model.model.norm", e, False)
    if not t.get("tie_word_embeddings"):
        put("language_model.lm_head.weight", t["vocab_size"], e)
    front, w, side = "vision_tower.vision_model.", v["hidden_size"], v["image_size"] // v["patch_size"]
    put(front + "embeddings.class_embedding", w, std=0.5)
    put(front + "embeddings.patch_embedding.weight", w, 3, v["patch_size"], v["patch_size"])
    put(front + "embeddings.position_embedding.weight", side * side + 1, w, std=0.5)
    norm(front + "pre_layrnorm", w, True)
    for i in range(v["num_hidden_layers"]):
        layer = f"{front}encoder.layers.{i}."
        norm(layer + "layer_norm1", w, True)
        norm(layer + "layer_norm2", w, True)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            dense(f"{layer}self_attn.{name}", w, w, True)
        dense(layer + "mlp.fc1", v["intermediate_size"], w, True)
        dense(layer + "mlp.fc2", w, v["intermediate_size"], True)
    norm(front + "post_layernorm", w, True)
    dense("multi_modal_projector.linear_1", e, w, True)
    dense("multi_modal_projector.linear_2", e, e, True)
    return arrays


# ---- names ----

RENAMED = {
    "hf": (),
    "new": (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ),
    "transformers5": (("vision_tower.vision_model.", "vision_tower."),),
    "original": (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower.vision_tower."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ),
}


def renamed(name: str, naming: str) -> str:
    for old, new in RENAMED["original" if naming == "apart" else naming]:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def original_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as the original LLaVA writes it: flat, the tower named only."""
    tower = {"mm_vision_tower": "someone/some-clip", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch"}
    tower |= {"mm_vision_select_layer": config["vision_feature_layer"], "image_aspect_ratio": "pad", "mm_use_im_start_end": False}
    return {**config["text_config"], **tower, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "pad_token_id": 0}


# ---- files ----


def as_stored(array: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes as the file holds them, and the float64 of these."""
    if dtype == "bfloat16":
        bits = array.view(np.uint32)
        half = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return half, (half.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    stored = array.astype(dtype)
    return stored, stored.astype(np.float64)


def write_safetensors(path: Path, arrays: Arrays, dtype: str) -> None:
    """By the safetensors package; NumPy has no bfloat16, so the header is told afterwards."""
    stored = {name: as_stored(array, dtype)[0] if array.dtype == np.float32 else array for name, array in arrays.items()}
    data = save({name: np.ascontiguousarray(array) for name, array in stored.items()}, {"format": "pt"})
    header, content = split_safetensors(data)
    for entry in header.values():
        if entry.get("dtype") == "U16":
            entry["dtype"] = "BF16"
    path.unlink(missing_ok=True)
    path.write_bytes(join_safetensors(header, content))


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors."""
    length = struct.unpack_from("<Q", data)[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(header: Any, content: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def write_weights(folder: Path, arrays: Arrays, dtype: str, shards: int) -> None:
    if shards == 1:
        return write_safetensors(folder / "model.safetensors", arrays, dtype)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: names[i * shards // len(arrays)] for i, name in enumerate(arrays)}
    for file in names:
        write_safetensors(folder / file, {name: array for name, array in arrays.items() if where[name] == file}, dtype)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": where})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_checkpoint(
    folder: Path,
    rng: np.random.Generator,
    naming: str = "hf",
    dtype: str = "float32",
    shards: int = 1,
    tokenizer: str = "model",
    **changes: Any,
) -> Checkpoint:
    """tokenizer: "model" (tokenizer.model) or "json". changes: see make_config."""
    folder.mkdir(parents=True)
    config = make_config(**changes)
    arrays = make_arrays(config, rng)
    values = {name: as_stored(array, dtype)[1] for name, array in arrays.items()}
    stored = {renamed(name, naming): array for name, array in arrays.items()}
    vision = None
    if naming in ("original", "apart"):
        vision = folder.with_name(folder.name + "-clip")
        write_tower(vision, stored, config, dtype)
        if naming == "apart":
            stored = {name: array for name, array in stored.items() if "vision_tower" not in name}
    write_weights(folder, stored, dtype, shards)
    write_json(folder / "config.json", original_config(config) if vision else config)
    write_tokenizer(folder, tokenizer)
    return Checkpoint(folder, vision, config, values)


def write_tower(folder: Path, stored: Arrays, config: dict[str, Any], dtype: str) -> None:
    """A CLIP model, its text half included."""
    folder.mkdir()
    front = "model.vision_tower.vision_tower."
    clip = {name.removeprefix(front): array for name, array in stored.items() if name.startswith(front)}
    clip |= {"logit_scale": np.ones(1, np.float32), "text_model.final_layer_norm.weight": np.ones(8, np.float32)}
    clip |= {"vision_model.embeddings.position_ids": np.arange(5)[None]}
    write_safetensors(folder / "model.safetensors", clip, dtype)
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": config["vision_config"], "text_config": {}})
    size = config["vision_config"]["image_size"]
    write_json(
        folder / "preprocessor_config.json", {"image_mean": [0.5, 0.4, 0.3], "size": size, "crop_size": {"height": size, "width": size}}
    )


# ---- tokenizers: tiny's vocabulary, then <image> and <pad> ----


def write_tokenizer(folder: Path, kind: str) -> None:
    tokens, scores, types = tiny.vocabulary()
    added = {len(tokens): "<image>", len(tokens) + 1: "<pad>"}
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    decoder = {str(id): {"content": text, "special": True} for id, text in {0: "<unk>", 1: "<s>", 2: "</s>", **added}.items()}
    if kind == "model":
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(tokens, scores, [int(t) for t in types]))
        write_json(folder / "tokenizer_config.json", {**specials, "added_tokens_decoder": decoder, "chat_template": TEMPLATE})
    else:
        write_json(folder / "tokenizer.json", tokenizer_json(tokens, scores, decoder))
        write_json(folder / "tokenizer_config.json", {**specials, "add_prefix_space": None})
        (folder / "chat_template.jinja").write_text(TEMPLATE)


def sentencepiece_model(tokens: list[str], scores: list[float], types: list[int], **changes: int) -> bytes:
    """A ModelProto. changes: trainer_N and normalizer_N, the numbers of fields."""
    pieces = [
        _message(1, _message(1, token.encode()) + b"\x15" + struct.pack("<f", score) + (b"" if kind == 1 else _number(3, kind)))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    ]
    trainer = {3: 2, 35: 1, 40: 0, 41: 1, 42: 2, 43: -1}
    normalizer = {3: 1, 4: 0, 5: 1}
    for key, value in changes.items():
        part, number = key.split("_")
        (trainer if part == "trainer" else normalizer)[int(number)] = value
    parts = (b"".join(_number(key, value) for key, value in part.items()) for part in (trainer, normalizer))
    return b"".join(pieces) + b"".join(_message(i, part) for i, part in enumerate(parts, 2))


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def tokenizer_json(tokens: list[str], scores: list[float], decoder: dict[str, Any]) -> dict[str, Any]:
    """As transformers makes it of a SentencePiece model: all the pairs whose union is a piece, the best scores first."""
    known = {token: score for token, score in zip(tokens, scores, strict=True) if len(token) == 1 or token.startswith("▁")}
    pairs = [(token[:i], token[i:]) for token in known for i in range(1, len(token)) if token[:i] in known and token[i:] in known]
    merges = sorted(pairs, key=lambda pair: -known[pair[0] + pair[1]])
    return {
        "added_tokens": [{"id": int(id), **entry} for id, entry in decoder.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
        },
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }


# ---- copies of which something is changed ----

Edit = Callable[[dict[str, Any]], Any]


def copy_of(c: Checkpoint, folder: Path) -> Checkpoint:
    """Files are linked: whoever changes one replaces it."""
    shutil.copytree(c.folder, folder, copy_function=os.link)
    return Checkpoint(folder, c.vision, json.loads((c.folder / "config.json").read_text()), c.arrays)


def edited(c: Checkpoint, folder: Path, name: str, edit: Edit) -> Checkpoint:
    """A copy of which one JSON file is changed."""
    c = copy_of(c, folder)
    path = c.folder / name
    value = json.loads(path.read_text()) if path.exists() else {}
    edit(value)
    path.unlink(missing_ok=True)
    write_json(path, value)
    return c


def setter(section: str, key: str, value: Any) -> Edit:
    return lambda config: (config[section] if section else config).__setitem__(key, value)


def outputs(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir()) if out.exists() else []


def refused(c: Checkpoint, out: Path, error: type[Exception], *parts: str, vision: Path | None = None, **options: Any) -> Exception:
    """convert raises this error with these parts in one printable line, and leaves nothing of its own."""
    before = outputs(out)
    with pytest.raises(error) as caught:
        convert(c.folder, out, "f32", vision=vision or c.vision, **options)
    text = str(caught.value)
    assert all(part in text for part in parts), text
    assert text.isprintable() and len(text) < 2100
    assert outputs(out) == before and (before or not out.exists())
    return caught.value
