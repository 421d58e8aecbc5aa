"""Folders that are no LLaVA-1.5, or are damaged: convert names the file and what is wrong with it, and leaves nothing behind."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

pytest.importorskip("safetensors", reason="safetensors writes the folders that are converted")
import hf_write as hf

from pykvsmooth import errors
from pykvsmooth.convert import convert
from pykvsmooth.convert.folder import Folder
from pykvsmooth.convert.shards import tensors_of

TEXT_INTEGERS = (
    "hidden_size num_attention_heads num_key_value_heads num_hidden_layers intermediate_size vocab_size max_position_embeddings head_dim"
)
VISION_INTEGERS = "hidden_size num_attention_heads num_hidden_layers intermediate_size image_size patch_size projection_dim"
BAD_INTEGERS = (0, -1, 1 << 40, 1.5, "64", True, [64], {}, math.inf)
BAD_NUMBERS = (0, -1, math.nan, math.inf, "1", True, [1.0], 10**400)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> hf.Checkpoint:
    return hf.write_checkpoint(tmp_path_factory.mktemp("sound") / "llava", np.random.default_rng(3), shards=2, rope_parameters=hf.LLAMA3)


@pytest.fixture(scope="module")
def sound_original(tmp_path_factory: pytest.TempPathFactory) -> hf.Checkpoint:
    return hf.write_checkpoint(tmp_path_factory.mktemp("sound") / "llava", np.random.default_rng(3), "original", tokenizer="json")


@pytest.mark.parametrize("section, keys", [("text_config", TEXT_INTEGERS), ("vision_config", VISION_INTEGERS)])
def test_bad_integers(section: str, keys: str, sound: hf.Checkpoint, tmp_path: Path) -> None:
    for i, (key, value) in enumerate((key, value) for key in keys.split() for value in BAD_INTEGERS):
        c = hf.edited(sound, tmp_path / str(i), "config.json", hf.setter(section, key, value))
        error = hf.refused(c, tmp_path / "out", errors.ModelFormatError, "config.json", key)
        assert error.path == str(c.folder / "config.json") and error.what.endswith(key)


def test_sizes_that_the_tensors_do_not_have(sound: hf.Checkpoint, tmp_path: Path) -> None:
    keys = [("text_config", key, 8) for key in TEXT_INTEGERS.split() if key != "max_position_embeddings"]
    keys += [("vision_config", key, 8) for key in VISION_INTEGERS.split() if key != "projection_dim"]
    keys += [("vision_config", "image_size", 42), ("vision_config", "patch_size", 28)]
    for i, (section, key, value) in enumerate(keys):
        config = json.loads((sound.folder / "config.json").read_text())[section]
        if key in ("num_attention_heads", "num_key_value_heads") and config["hidden_size"] % value == 0 and section == "vision_config":
            continue  # a tower's heads leave no trace in its tensors
        c = hf.edited(sound, tmp_path / str(i), "config.json", hf.setter(section, key, value))
        hf.refused(c, tmp_path / "out", errors.ModelFormatError, str(c.folder))


def test_bad_numbers(sound: hf.Checkpoint, tmp_path: Path) -> None:
    places = [("text_config", "rms_norm_eps"), ("vision_config", "layer_norm_eps")]
    for i, (section, key, value) in enumerate((*place, value) for place in places for value in BAD_NUMBERS):
        c = hf.edited(sound, tmp_path / str(i), "config.json", hf.setter(section, key, value))
        hf.refused(c, tmp_path / "out", errors.ModelFormatError, "config.json", key)
    for i, (key, value) in enumerate((key, value) for key in hf.LLAMA3 if key != "rope_type" for value in BAD_NUMBERS):
        c = hf.edited(
            sound,
            tmp_path / f"rope{i}",
            "config.json",
            lambda config, key=key, value=value: config["text_config"]["rope_parameters"].update({key: value}),
        )
        hf.refused(c, tmp_path / "out", errors.ModelFormatError, "config.json", key)


FOREIGN: list[tuple[str, str, Any]] = [
    ("", "model_type", "llava_next"),
    ("", "model_type", "qwen2_vl"),
    ("", "model_type", 7),
    ("", "projector_hidden_act", "relu"),
    ("", "vision_feature_select_strategy", "full"),
    ("", "multimodal_projector_bias", False),
    ("", "vision_feature_layer", [-2, -3]),
    ("", "quantization_config", {"quant_method": "awq"}),
    ("", "image_aspect_ratio", "anyres_max_9"),
    ("text_config", "model_type", "mistral"),
    ("text_config", "hidden_act", "gelu"),
    ("text_config", "sliding_window", 4096),
    ("text_config", "quantization_config", {}),
    ("text_config", "rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
    ("text_config", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ("vision_config", "model_type", "siglip_vision_model"),
    ("vision_config", "model_type", "pixtral"),
    ("vision_config", "hidden_act", "silu"),
    ("vision_config", "num_channels", 1),
]


@pytest.mark.parametrize("section, key, value", FOREIGN)
def test_other_models(section: str, key: str, value: Any, sound: hf.Checkpoint, tmp_path: Path) -> None:
    c = hf.edited(sound, tmp_path / "other", "config.json", hf.setter(section, key, value))
    error = hf.refused(c, tmp_path / "out", errors.UnsupportedModelError, "config.json", key.replace("rope_parameters", "rope"))
    assert error.what.startswith(f"{section}." if section else key)


ORIGINAL = [
    ("mm_projector_type", "linear"),
    ("mm_vision_select_feature", "cls_patch"),
    ("mm_patch_merge_type", "spatial_unpad"),
    ("mm_use_im_start_end", True),
    ("image_aspect_ratio", "anyres"),
]


@pytest.mark.parametrize("key, value", ORIGINAL)
def test_other_models_by_the_original_names(key: str, value: Any, sound_original: hf.Checkpoint, tmp_path: Path) -> None:
    c = hf.edited(sound_original, tmp_path / "other", "config.json", hf.setter("", key, value))
    hf.refused(c, tmp_path / "out", errors.UnsupportedModelError, "config.json", key)


def test_a_tower_that_is_not_there(sound_original: hf.Checkpoint, tmp_path: Path, rng: np.random.Generator) -> None:
    out = tmp_path / "out"
    c = hf.copy_of(sound_original, tmp_path / "a")
    c.vision = None
    hf.refused(c, out, errors.UnsupportedModelError, "mm_vision_tower", "someone/some-clip", "--vision FOLDER")
    hf.refused(c, out, errors.ModelFileNotFoundError, "no such folder", vision=tmp_path / "nowhere")
    hf.refused(c, out, errors.ModelFileNotFoundError, "config.json", vision=out.parent)
    known = hf.edited(c, tmp_path / "b", "config.json", hf.setter("", "mm_vision_tower", "openai/clip-vit-large-patch14-336"))
    hf.refused(known, out, errors.ModelFormatError, "class_embedding", "[64]", "[1024]")
    apart = hf.write_checkpoint(tmp_path / "c", rng, "apart")
    hf.write_json(
        apart.folder / "config.json", {**hf.original_config(apart.config), "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    )
    tower, apart.vision = apart.vision, None
    hf.refused(apart, out, errors.ModelFormatError, "no tensors of a vision tower", "openai/clip-vit-large-patch14-336")
    hf.write_json(tower / "config.json", {"model_type": "siglip", "vision_config": {}})
    hf.refused(apart, out, errors.UnsupportedModelError, "model_type", vision=tower)


PIXELS = [
    ("image_mean", [0.5, 0.5]),
    ("image_mean", [0.5, 0.5, math.nan]),
    ("image_std", [0.5, 0.0, 0.5]),
    ("image_std", "0.5"),
    ("crop_size", {"height": 224, "width": 224}),
    ("size", {"shortest_edge": 336}),
    ("do_center_crop", "yes"),
    ("rescale_factor", "x"),
]


@pytest.mark.parametrize("key, value", PIXELS)
def test_bad_preprocessors(key: str, value: Any, sound: hf.Checkpoint, tmp_path: Path) -> None:
    c = hf.edited(sound, tmp_path / "a", "preprocessor_config.json", hf.setter("", key, value))
    hf.refused(c, tmp_path / "out", errors.ModelFormatError, "preprocessor_config.json", key)
    whole = hf.edited(sound, tmp_path / "b", "processor_config.json", hf.setter("", "image_processor", {key: value}))
    hf.refused(whole, tmp_path / "out", errors.ModelFormatError, "processor_config.json", f"image_processor.{key}")


@pytest.mark.parametrize("key, value", [("resample", 2), ("do_normalize", False), ("do_resize", False), ("rescale_factor", 1.0)])
def test_other_preprocessors(key: str, value: Any, sound: hf.Checkpoint, tmp_path: Path) -> None:
    c = hf.edited(sound, tmp_path / "a", "preprocessor_config.json", hf.setter("", key, value))
    hf.refused(c, tmp_path / "out", errors.UnsupportedModelError, "preprocessor_config.json", key)


# ---- files ----


def test_broken_json(sound: hf.Checkpoint, tmp_path: Path) -> None:
    contents = [
        b"",
        b"{",
        b"[1]",
        b"7",
        b"\xff\xfe",
        b'{"a": ' + b"[" * 100000,
        b'{"a": ' + b"9" * 10000 + b"}",
        b"null",
        b'{"a": 1} x',
        b"\0",
    ]
    names = ["config.json", "model.safetensors.index.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"]
    for i, (name, content) in enumerate((name, content) for name in names for content in contents):
        c = hf.copy_of(sound, tmp_path / str(i))
        (c.folder / name).unlink(missing_ok=True)
        (c.folder / name).write_bytes(content)
        hf.refused(c, tmp_path / "out", errors.ModelFormatError, name)


def test_missing_files(sound: hf.Checkpoint, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.model", "model.safetensors.index.json", "model-00002-of-00002.safetensors"):
        c = hf.copy_of(sound, tmp_path / name)
        (c.folder / name).unlink()
        hf.refused(c, tmp_path / "out", errors.ModelFileNotFoundError, str(c.folder), name.split(".")[0])
    hf.refused(hf.Checkpoint(tmp_path / "nothing", None, {}, {}), tmp_path / "out", errors.ModelFileNotFoundError, "no such folder")
    hf.refused(hf.Checkpoint(sound.folder / "config.json", None, {}, {}), tmp_path / "out", errors.ModelFileError, "is no folder")


def test_pickles_are_not_opened(sound: hf.Checkpoint, tmp_path: Path) -> None:
    c = hf.copy_of(sound, tmp_path / "a")
    for path in c.folder.glob("*.safetensors*"):
        path.unlink()
    os.mkfifo(c.folder / "pytorch_model-00001-of-00002.bin")  # opening it would wait for ever
    hf.refused(c, tmp_path / "out", errors.UnsupportedModelError, "pytorch_model-00001-of-00002.bin", "pickles", "save_pretrained")


def test_no_way_out_of_the_folder(sound: hf.Checkpoint, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other.safetensors"
    shutil.copy(sound.folder / "model-00001-of-00002.safetensors", other)
    for i, name in enumerate(("../other.safetensors", str(other), "a/../../other.safetensors", "..", "", "a\nb", "\ud800")):
        c = hf.edited(
            sound, tmp_path / f"index{i}", "model.safetensors.index.json", lambda index, name=name: index["weight_map"].update({"x": name})
        )
        hf.refused(c, out, errors.ModelFormatError, "is no name of a file in this folder")
    for name in ("config.json", "tokenizer.model", "model-00001-of-00002.safetensors"):
        c = hf.copy_of(sound, tmp_path / f"link-{name}")
        (c.folder / name).unlink()
        (c.folder / name).symlink_to(sound.folder / name)
        hf.refused(c, out, errors.ModelFormatError, name, "a link out of the folder")
    c = hf.copy_of(sound, tmp_path / "fifo")
    (c.folder / "config.json").unlink()
    os.mkfifo(c.folder / "config.json")
    hf.refused(c, out, errors.ModelFormatError, "config.json", "no regular file")
    (c.folder / "config.json").unlink()
    (c.folder / "config.json").symlink_to("config.json")
    hf.refused(c, out, errors.ModelFileError, "config.json")


def test_the_cache_of_hugging_face(sound: hf.Checkpoint, tmp_path: Path) -> None:
    """Its snapshots are links to blobs beside them, and have a number for a name."""
    snapshot, blobs = tmp_path / "models--llava-hf--llava-x" / "snapshots" / "0a1b", tmp_path / "models--llava-hf--llava-x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sound.folder.iterdir():
        os.link(path, blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    paths = convert(snapshot, tmp_path / "out")
    assert [Path(path).name for path in paths] == ["llava-x-Q8_0.gguf", "mmproj-llava-x-F16.gguf"]


def shard_of(c: hf.Checkpoint, folder: Path) -> tuple[hf.Checkpoint, Path, dict[str, Any], bytes]:
    """A copy with one shard's header and data apart, to be put together anew."""
    c = hf.copy_of(c, folder)
    path = c.folder / "model-00002-of-00002.safetensors"
    header, data = hf.split_safetensors(path.read_bytes())
    path.unlink()
    return c, path, header, data


def write_shard(path: Path, header: Any, data: bytes) -> None:
    path.write_bytes(hf.join_safetensors(header, data))


def test_half_written_shards(sound: hf.Checkpoint, tmp_path: Path, rng: np.random.Generator) -> None:
    c, path, header, data = shard_of(sound, tmp_path / "a")
    write_shard(path, header, data)
    whole = path.read_bytes()
    for n in (0, 7, 8, 9, 1000, len(whole) - len(data), len(whole) - 1, *rng.integers(0, len(whole), 8).tolist()):
        path.write_bytes(whole[:n])
        hf.refused(c, tmp_path / "out", errors.ModelFormatError, path.name)
    path.write_bytes(whole + b"\0")
    hf.refused(c, tmp_path / "out", errors.ModelFormatError, path.name)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    hf.refused(c, tmp_path / "out", errors.ModelFormatError, path.name, "git lfs pull")


ENTRIES: list[dict[str, Any]] = [
    {"dtype": "F33"},
    {"dtype": 3},
    {"dtype": None},
    {"shape": [64, -64]},
    {"shape": [1 << 62, 1 << 62]},
    {"shape": "64"},
    {"shape": [64.0, 64]},
    {"shape": [[64], 64]},
    {"shape": [1] * 9},
    {"shape": [64]},
    {"data_offsets": [0]},
    {"data_offsets": [16, 0]},
    {"data_offsets": [-16, 0]},
    {"data_offsets": [0, 1 << 62]},
    {"data_offsets": ["0", "1"]},
    {"data_offsets": None},
]


@pytest.mark.parametrize("change", ENTRIES, ids=str)
def test_bad_entries(change: dict[str, Any], sound: hf.Checkpoint, tmp_path: Path) -> None:
    c, path, header, data = shard_of(sound, tmp_path / "a")
    name = "multi_modal_projector.linear_2.weight"
    write_shard(path, {**header, name: {**header[name], **change}}, data)
    hf.refused(c, tmp_path / "out", errors.ModelFormatError, path.name, name)


def test_bad_headers(sound: hf.Checkpoint, tmp_path: Path) -> None:
    c, path, header, data = shard_of(sound, tmp_path / "a")
    name = "multi_modal_projector.linear_2.weight"
    twice = {**header, name: {**header[name], "data_offsets": header["multi_modal_projector.linear_1.weight"]["data_offsets"]}}
    hole = {key: entry for key, entry in header.items() if key != name}
    for bad in (twice, hole, {**header, name: []}, [], {}, {**header, "x": 1}):
        write_shard(path, bad, data)
        hf.refused(c, tmp_path / "out", errors.ModelFormatError, path.name)
    write_shard(path, header, data)
    index = c.folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    for bad in (None, [], {"x": 3}, {**where, "x": path.name}, {**where, name: "model-00001-of-00002.safetensors"}):
        index.unlink()
        hf.write_json(index, {"weight_map": bad})
        hf.refused(c, tmp_path / "out", errors.ModelFormatError, "safetensors")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers(value: float, dtype: str, tmp_path: Path, rng: np.random.Generator) -> None:
    c = hf.write_checkpoint(tmp_path / "llava", rng, dtype=dtype)
    arrays = hf.make_arrays(c.config, rng)
    arrays["language_model.model.layers.1.mlp.up_proj.weight"][5, 7] = value
    hf.write_weights(c.folder, arrays, dtype, 1)
    hf.refused(c, tmp_path / "out", errors.ModelFormatError, "model.safetensors", "layers.1.mlp.up_proj.weight", f"value {5 * 64 + 7} ")


def test_tensors_that_do_not_fit(tmp_path: Path, rng: np.random.Generator) -> None:
    c = hf.write_checkpoint(tmp_path / "llava", rng)
    arrays, out = hf.make_arrays(c.config, rng), tmp_path / "out"
    up = "language_model.model.layers.1.mlp.up_proj.weight"
    changes: list[tuple[hf.Arrays, type[Exception], tuple[str, ...]]] = [
        ({up: arrays[up][:-1]}, errors.ModelFormatError, (up, "[95, 64]", "[96, 64]")),
        ({up: arrays[up].T}, errors.ModelFormatError, (up, "[64, 96]")),
        ({up: arrays[up].astype(np.int8)}, errors.UnsupportedModelError, (up, "I8")),
        ({"image_newline": arrays[up]}, errors.ModelFormatError, ("image_newline", "no place in LLaVA-1.5")),
        ({"language_model.model.layers.2.input_layernorm.weight": arrays[up]}, errors.ModelFormatError, ("layers.2.",)),
        ({"language_model.model.layers.0.self_attn.q_proj.bias": arrays[up]}, errors.ModelFormatError, ("q_proj.bias",)),
    ]
    for change, error, parts in changes:
        hf.write_safetensors(c.folder / "model.safetensors", {**arrays, **change}, "float32")
        hf.refused(c, out, error, "model.safetensors", *parts)
    for name in ("language_model.lm_head.weight", up, "vision_tower.vision_model.pre_layrnorm.bias", "multi_modal_projector.linear_1.bias"):
        hf.write_safetensors(c.folder / "model.safetensors", {key: value for key, value in arrays.items() if key != name}, "float32")
        hf.refused(c, out, errors.ModelFormatError, name.removeprefix("language_model."), "missing")
    idle = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": arrays[up],
        "vision_tower.vision_model.embeddings.position_ids": np.arange(5),
    }
    hf.write_safetensors(c.folder / "model.safetensors", {**arrays, **idle}, "float32")
    convert(c.folder, out)


def test_values_beyond_the_type(tmp_path: Path, rng: np.random.Generator) -> None:
    c = hf.write_checkpoint(tmp_path / "llava", rng)
    arrays, name = hf.make_arrays(c.config, rng), "language_model.model.layers.1.mlp.up_proj.weight"
    arrays[name][3, 4] = 1e6
    hf.write_weights(c.folder, arrays, "float32", 1)
    with pytest.raises(errors.ModelFormatError, match=rf"{name}: can't be written as F16: row 3, column 4"):
        convert(c.folder, tmp_path / "out", "f16")
    assert not (tmp_path / "out").exists()
    convert(c.folder, tmp_path / "out", "bf16")


def test_bad_tokenizers(tmp_path: Path, rng: np.random.Generator) -> None:
    c = hf.write_checkpoint(tmp_path / "llava", rng)
    path, out = c.folder / "tokenizer.model", tmp_path / "out"
    good = path.read_bytes()
    for bad in (
        b"",
        b"\0",
        b"junk",
        good[:-1],
        good[: len(good) // 2 + 1],
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        good + b"\x0a\x02\x0a\x05",
    ):
        path.write_bytes(bad)
        hf.refused(c, out, errors.ModelFormatError, "tokenizer.model")
    tokens, scores, types = tiny.vocabulary()
    kinds = [int(kind) for kind in types]
    for bad in (
        hf.sentencepiece_model(tokens, [math.nan, *scores[1:]], kinds),
        hf.sentencepiece_model(tokens, scores, [9, *kinds[1:]]),
        hf.sentencepiece_model(tokens, scores, [6, *kinds[1:]]),
        hf.sentencepiece_model(tokens * 2, scores * 2, kinds * 2),
    ):
        path.write_bytes(bad)
        hf.refused(c, out, errors.ModelFormatError, str(c.folder))
    for change in ({"trainer_3": 1}, {"trainer_24": 1}, {"normalizer_5": 0}):
        path.write_bytes(hf.sentencepiece_model(tokens, scores, kinds, **change))
        hf.refused(c, out, errors.UnsupportedModelError, "tokenizer.model")


TOKENIZER_JSON: list[tuple[type[Exception], str, Any]] = [
    (errors.UnsupportedModelError, "model.type", "WordPiece"),
    (errors.UnsupportedModelError, "model.byte_fallback", False),
    (errors.UnsupportedModelError, "model.continuing_subword_prefix", "##"),
    (errors.UnsupportedModelError, "normalizer", {"type": "NFKC"}),
    (errors.UnsupportedModelError, "pre_tokenizer", {"type": "ByteLevel"}),
    (errors.UnsupportedModelError, "pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "split": True}),
    (errors.ModelFormatError, "model.vocab", {"a": 1}),
    (errors.ModelFormatError, "model.vocab", {"a": 0, "b": 0}),
    (errors.ModelFormatError, "model.vocab", {"a": "0"}),
    (errors.ModelFormatError, "model.vocab", {"\ud800": 0}),
    (errors.ModelFormatError, "model.vocab", []),
    (errors.ModelFormatError, "model.merges", None),
    (errors.ModelFormatError, "model.merges", ["a"]),
    (errors.ModelFormatError, "model.merges", [["▁", "zzz"]]),
    (errors.ModelFormatError, "model.merges", [["a", "☃"]]),
    (errors.ModelFormatError, "model.merges", [7]),
    (errors.ModelFormatError, "model", 7),
    (errors.ModelFormatError, "added_tokens", {}),
    (errors.ModelFormatError, "added_tokens", [7]),
    (errors.ModelFormatError, "added_tokens", [{"id": -1, "content": "x"}]),
    (errors.ModelFormatError, "added_tokens", [{"id": 5, "content": "\ud800"}]),
    (errors.ModelFormatError, "added_tokens", [{"id": 5}]),
]


@pytest.mark.parametrize("error, key, value", TOKENIZER_JSON, ids=str)
def test_bad_tokenizer_json(error: type[Exception], key: str, value: Any, sound_original: hf.Checkpoint, tmp_path: Path) -> None:
    section, _, last = key.rpartition(".")
    c = hf.edited(sound_original, tmp_path / "a", "tokenizer.json", hf.setter(section, last, value))
    hf.refused(c, tmp_path / "out", error, "tokenizer.json")


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("config.json", "pad_token_id", 10**6),
        ("generation_config.json", "unk_token_id", "x"),
        ("tokenizer_config.json", "add_bos_token", 1),
        ("tokenizer_config.json", "added_tokens_decoder", {"x": {"content": "x"}}),
        ("tokenizer_config.json", "added_tokens_decoder", {"9": "x"}),
        ("added_tokens.json", "x", "9"),
        ("chat_template.json", "chat_template", 7),
        ("tokenizer_config.json", "chat_template", "x" * 300000),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_settings(name: str, key: str, value: Any, sound: hf.Checkpoint, tmp_path: Path) -> None:
    c = hf.edited(sound, tmp_path / "a", name, hf.setter("", key, value))
    hf.refused(c, tmp_path / "out", errors.ModelFormatError, name)


def test_random_damage(sound: hf.Checkpoint, tmp_path: Path, rng: np.random.Generator) -> None:
    """Whatever is done to a file: a typed error and nothing left, or a pair."""
    names = sorted(path.name for path in sound.folder.iterdir())
    for i in range(60):
        c = hf.copy_of(sound, tmp_path / str(i))
        path = c.folder / str(rng.choice(names))
        data = bytearray(path.read_bytes())
        path.unlink()
        head = len(data) if rng.random() < 0.3 else min(len(data), 2000)
        for at in rng.integers(0, head, 3):
            data[at] = rng.integers(0, 256)
        path.write_bytes(data)
        out = tmp_path / f"out{i}"
        try:
            convert(c.folder, out, "f32")
        except errors.KVSmoothError:
            assert not out.exists()
        else:
            assert len(hf.outputs(out)) == 2


def test_a_file_that_shrinks(sound: hf.Checkpoint, tmp_path: Path) -> None:
    c, path, header, data = shard_of(sound, tmp_path / "a")
    write_shard(path, header, data)
    tensor = tensors_of(Folder(c.folder))["multi_modal_projector.linear_2.weight"]
    os.truncate(path, os.path.getsize(path) - len(data) + 100)
    with pytest.raises(errors.ModelFormatError, match="the file ends within this tensor"):
        tensor.read()
