"""Hugging Face folders to GGUF pairs: what comes out computes what the checkpoint does, and what is no LLaVA-1.5 is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from reference.gguf_file import GGUFFile

pytest.importorskip("safetensors", reason="safetensors writes the folders that are converted")
import hf_write as hf

import pykvsmooth as kvs
from pykvsmooth import errors
from pykvsmooth._native import library_path
from pykvsmooth.cli import main as cli
from pykvsmooth.convert import convert
from pykvsmooth.mixes import MIXES, tensor_type

ROOT = Path(__file__).resolve().parents[1]
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "hf": {},
    "new-gqa-sharded": {"naming": "new", "num_key_value_heads": 2, "shards": 3},
    "transformers5-json-tied": {"naming": "transformers5", "tokenizer": "json", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "original-bf16": {"naming": "original", "dtype": "bfloat16", "shards": 2, "vision_feature_layer": 2},
    "apart-f16-linear": {"naming": "apart", "dtype": "float16", "rope_parameters": LINEAR},
    "llama3-wide-heads": {"rope_parameters": hf.LLAMA3, "head_dim": 20, "num_key_value_heads": 2, "v_hidden_act": "gelu"},
    "biases-last-layer": {"attention_bias": True, "mlp_bias": True, "vision_feature_layer": -1, "shards": 4},
    "24-blocks": {"v_num_hidden_layers": 24, "v_hidden_size": 16, "v_intermediate_size": 32},
}


def converted(c: hf.Checkpoint, out: Path, type: str = "f32", **options: Any) -> tuple[str, str]:
    return convert(c.folder, out, type, vision=c.vision, **options)


def runtime_logits(paths: tuple[str, str], before: list[int], picture: np.ndarray, after: list[int]) -> np.ndarray:
    """Row by row behind the picture: (len(after), V)"""
    with kvs.Model(paths[0], mmproj=paths[1], threads=1) as model, model.session(n_ctx=256, kv_type="f32") as session:
        session.feed(before)
        session.feed_image(picture)
        found = []
        for id in after:
            session.feed([id])
            found.append(session.logits().astype(np.float64))
    return np.array(found)


def example(rng: np.random.Generator, n_vocab: int, size: int) -> tuple[list[int], np.ndarray, list[int]]:
    picture = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return [1, *rng.integers(3, n_vocab, 4).tolist()], picture, rng.integers(3, n_vocab, 40).tolist()


def normalised(picture: np.ndarray, mean: list[float], std: list[float]) -> np.ndarray:
    return ((picture / 255.0 - mean) / std).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> hf.Checkpoint:
    return hf.write_checkpoint(tmp_path_factory.mktemp("sound") / "llava", np.random.default_rng(3), shards=2, rope_parameters=hf.LLAMA3)


# ---- what comes out ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Within 1e-3 of what the checkpoint's own tensors give."""
    c = hf.write_checkpoint(tmp_path / "llava", rng, **VARIANTS[variant])
    paths = converted(c, tmp_path / "out")
    before, picture, after = example(rng, c.text["vocab_size"], c.config["vision_config"]["image_size"])
    mean = [0.5, 0.4, 0.3] if c.vision else tiny.MEAN
    wanted = c.logits(before, normalised(picture, mean, tiny.STD), after)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(runtime_logits(paths, before, picture, after), wanted, rtol=0, atol=1e-3)


def test_same_bytes_by_any_naming(tmp_path: Path) -> None:
    found = set()
    for naming in ("hf", "new", "transformers5"):
        for shards in (1, 3):
            c = hf.write_checkpoint(tmp_path / f"{naming}{shards}" / "llava", np.random.default_rng(1), naming, shards=shards)
            paths = converted(c, tmp_path / f"{naming}{shards}" / "out", "q8_0")
            found.add(tuple(Path(path).read_bytes() for path in paths))
    assert len(found) == 1


@pytest.mark.parametrize("type", ["q8_0", "q4_k_m", "bf16"])
def test_types(type: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Each tensor gets the type of its mix, and the values are as near as the type allows; the pair runs."""
    c = hf.write_checkpoint(tmp_path / "llava", rng, hidden_size=256, intermediate_size=512, head_dim=64, v_hidden_size=32)
    exact, paths = converted(c, tmp_path / "exact"), converted(c, tmp_path / "out", type, mmproj_type="q8_0")
    for path, plain, mix in zip(paths, exact, (type, "q8_0"), strict=True):
        values = GGUFFile(plain)
        for tensor in gguf.GGUFReader(path).tensors:
            shape = [int(n) for n in reversed(tensor.shape)]
            kind = tensor_type(tensor.name, shape, mix, 2)
            assert tensor.tensor_type.name == kind, tensor.name
            wanted = values.tensor(tensor.name)
            step = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127, "Q4_K": 0.1, "Q6_K": 0.03}[kind]
            got = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            assert np.abs(got - wanted).max() <= step * np.abs(wanted).max()
        assert GGUFFile(path).get("general.file_type") == MIXES[mix].file_type
    before, picture, after = example(rng, c.text["vocab_size"], 28)
    assert np.isfinite(runtime_logits(paths, before, picture, after)).all()


def test_keys(tmp_path: Path, rng: np.random.Generator) -> None:
    """Everything that other runtimes look for, by llama.cpp's names."""
    c = hf.write_checkpoint(tmp_path / "llava-1.5-7b-hf", rng, num_key_value_heads=2, rope_parameters=LINEAR)
    (c.folder / "README.md").write_text("---\nlicense: llama2\nlicense_name: 'the name'\nlanguage:\n- en\n---\nlicense: other\n")
    hf.write_json(
        c.folder / "preprocessor_config.json", {"do_center_crop": True, "crop_size": 28, "image_std": [0.1, 0.2, 0.3], "resample": 3}
    )
    paths = converted(c, tmp_path / "out", "f16")
    assert [Path(path).name for path in paths] == ["llava-1.5-7b-hf-F16.gguf", "mmproj-llava-1.5-7b-hf-F16.gguf"]
    text, mmproj = (GGUFFile(path).keys for path in paths)
    tokens, scores, types = tiny.vocabulary()
    n = len(tokens)
    general = {"name": "llava-1.5-7b-hf", "basename": "llava-1.5", "license": "llama2", "license.name": "the name", "file_type": 1}
    general |= {"quantization_version": 2}
    for keys, kind, arch in ((text, "model", "llama"), (mmproj, "mmproj", "clip")):
        expected = {f"general.{key}": value for key, value in {**general, "type": kind, "architecture": arch}.items()}
        assert {key: keys[key] for key in expected} == expected
    assert {key.removeprefix("llama."): value for key, value in text.items() if key.startswith("llama.")} == {
        "vocab_size": n + 7,
        "context_length": 512,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4.0,
    }
    tokenizer = {key.removeprefix("tokenizer."): value for key, value in text.items() if key.startswith("tokenizer.")}
    assert tokenizer.pop("ggml.tokens") == [*tokens, "<image>", "<pad>", *(f"[PAD{n + i}]" for i in range(2, 7))]
    assert tokenizer.pop("ggml.scores") == [*scores, -1000.0, -1000.0, *([-10000.0] * 5)]
    assert tokenizer.pop("ggml.token_type") == [*map(int, types), 3, 3, 5, 5, 5, 5, 5]
    assert tokenizer == {
        "chat_template": hf.TEMPLATE,
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "ggml.padding_token_id": n + 1,
        "ggml.add_bos_token": True,
        "ggml.add_eos_token": False,
        "ggml.add_space_prefix": True,
    }
    assert {key.removeprefix("clip."): value for key, value in mmproj.items() if key.startswith("clip.")} == {
        "has_text_encoder": False,
        "has_vision_encoder": True,
        "has_llava_projector": True,
        "projector_type": "mlp",
        "use_gelu": False,
        "vision.image_size": 28,
        "vision.patch_size": 14,
        "vision.embedding_length": 64,
        "vision.feed_forward_length": 128,
        "vision.projection_dim": 48,
        "vision.block_count": 3,
        "vision.attention.head_count": 4,
        "vision.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "vision.feature_layer": [2],
        "vision.image_mean": pytest.approx(tiny.MEAN),
        "vision.image_std": pytest.approx([0.1, 0.2, 0.3]),
        "vision.image_aspect_ratio": "crop",
    }
    names = {tensor.name for tensor in gguf.GGUFReader(paths[1]).tensors}
    assert len(names) == 5 + 3 * 16 + 4 and not any("post_ln" in name for name in names)


def test_defaults_are_those_of_transformers(tmp_path: Path, rng: np.random.Generator) -> None:
    """Keys that llava-hf's config.json leaves out, as old versions of transformers wrote it."""
    sizes = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 2, "rms_norm_eps": 1e-6, "vocab_size": 32000}
    c = hf.write_checkpoint(tmp_path / "llava", rng, **sizes, v_num_attention_heads=12, v_hidden_size=24)
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "vocab_size"):
        del c.text[key]
    for key in ("num_attention_heads", "hidden_act", "layer_norm_eps", "projection_dim"):
        del c.config["vision_config"][key]
    for key in ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act"):
        del c.config[key]
    c.config["text_config"] |= {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5000.0}
    hf.write_json(c.folder / "config.json", c.config)
    text, mmproj = (GGUFFile(path).keys for path in converted(c, tmp_path / "out"))
    assert (text["llama.attention.head_count"], text["llama.attention.head_count_kv"], text["llama.vocab_size"]) == (32, 32, 32000)
    assert text["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert (text["llama.rope.freq_base"], text["llama.rope.scaling.factor"]) == (5000.0, 2.0)
    assert (mmproj["clip.vision.attention.head_count"], mmproj["clip.use_gelu"]) == (12, False)
    assert (mmproj["clip.vision.feature_layer"], mmproj["clip.vision.projection_dim"]) == ([2], 512)


def test_answers_from_the_folder(tmp_path: Path, rng: np.random.Generator) -> None:
    """The pair finds itself, and the template came along."""
    c = hf.write_checkpoint(tmp_path / "llava", rng, tokenizer="json")
    path, _ = converted(c, tmp_path / "out", "q8_0")
    with kvs.Model(path) as model, model.session(n_ctx=128) as session:
        assert model.has_vision and model.chat_template == hf.TEMPLATE
        result = session.generate("describe the cat", image=np.zeros((28, 28, 3), np.uint8), max_tokens=4).result()
        assert len(result.tokens) == 4 or result.finish_reason == "stop"


def test_what_suits_the_model(sound: hf.Checkpoint, tmp_path: Path) -> None:
    """A section "kvsmooth" of config.json is what KVSmooth.for_model finds in the file."""
    wanted = {"lambda_ref": 0.2, "half_width": 0.1, "window": 7, "layers": "1:2", "target": "v"}
    c = hf.edited(sound, tmp_path / "tuned", "config.json", hf.setter("", "kvsmooth", wanted))
    with kvs.Model(converted(c, tmp_path / "out")[0], mmproj=False) as model:
        assert kvs.KVSmooth.for_model(model) == kvs.KVSmooth(**wanted)
    with kvs.Model(converted(sound, tmp_path / "plain")[0], mmproj=False) as model:
        assert not [key for key in model.metadata if key.startswith("kvsmooth")]
    for i, (key, value) in enumerate(
        [("lambda_ref", 2), ("window", 1.5), ("layers", "9:"), ("layers", 3), ("half_width", "wide"), ("target", "q")]
    ):
        bad = hf.edited(sound, tmp_path / f"bad{i}", "config.json", hf.setter("", "kvsmooth", {**wanted, key: value}))
        hf.refused(bad, tmp_path / "none", errors.ModelFormatError, "config.json", "kvsmooth", key)


# ---- vocabularies ----


def vocabulary_keys(path: str) -> dict[str, Any]:
    return {key: value for key, value in GGUFFile(path).keys.items() if key.startswith("tokenizer.ggml.")}


def test_both_tokenizer_files_give_one_vocabulary(tmp_path: Path) -> None:
    found = []
    for kind in ("model", "json"):
        c = hf.write_checkpoint(tmp_path / kind / "llava", np.random.default_rng(5), tokenizer=kind)
        path, _ = converted(c, tmp_path / kind / "out")
        found.append((vocabulary_keys(path), path))
    scores = [keys.pop("tokenizer.ggml.scores") for keys, _ in found]
    assert found[0][0] == found[1][0]
    merged = [i for i, token in enumerate(found[0][0]["tokenizer.ggml.tokens"]) if len(token) > 1 and token.startswith("▁")]
    assert np.array_equal(np.argsort([scores[0][i] for i in merged]), np.argsort([scores[1][i] for i in merged]))
    texts = ["the cat of the man", "  a  red table<image>\nin the street.", "äé中 ☃", "ASSISTANT: <pad></s>x"]
    with kvs.Model(found[0][1], mmproj=False) as a, kvs.Model(found[1][1], mmproj=False) as b:
        for text in texts:
            for special in (False, True):
                assert a.tokenize(text, True, special) == b.tokenize(text, True, special)


def test_llamas_vocabulary(shared_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """LLaMA's 32000 pieces, by tokenizer.model and by tokenizer.json: pieces, their order and types, and ids of texts as published."""
    published = shared_data / "vocab" / "ggml-vocab-llama-spm.gguf"
    keys = GGUFFile(published).keys
    tokens, scores, types = (keys[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    cases = read_cases(shared_data / "vocab" / "ggml-vocab-llama-spm.gguf")
    for kind in ("model", "json"):
        c = hf.write_checkpoint(
            tmp_path / kind, np.random.default_rng(5), vocab_size=32000, hidden_size=32, head_dim=8, num_hidden_layers=1
        )
        (c.folder / "tokenizer.model").unlink()
        hf.write_json(c.folder / "tokenizer_config.json", {"unk_token": "<unk>", "bos_token": {"content": "<s>"}, "eos_token": "</s>"})
        hf.write_json(c.folder / "config.json", {**c.config, "pad_token_id": -1})
        if kind == "model":
            (c.folder / "tokenizer.model").write_bytes(hf.sentencepiece_model(tokens, scores, types))
        else:
            hf.write_json(c.folder / "tokenizer.json", llama_json(tokens, scores, types))
        path, _ = converted(c, tmp_path / f"{kind}-out")
        found = vocabulary_keys(path)
        assert (found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]) == (tokens, types)
        normal = np.array(types) == 1
        merged = normal & (np.array(scores) > -1e8) & (np.array([len(token) for token in tokens]) > 1)  # runs of spaces have -1e9
        order = np.argsort(np.array(found["tokenizer.ggml.scores"])[merged], kind="stable")
        assert np.array_equal(order, np.argsort(np.array(scores)[merged], kind="stable"))
        assert kind == "json" or found["tokenizer.ggml.scores"] == scores
        with kvs.Model(path, mmproj=False) as model:
            for text, ids in cases:
                assert model.tokenize(text) == ids, text
    assert not caplog.text


def read_cases(path: Path) -> list[tuple[str, list[int]]]:
    texts = path.with_name(path.name + ".inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    ids = path.with_name(path.name + ".out").read_text().splitlines()
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, ids, strict=False)]


def llama_json(tokens: list[str], scores: list[float], types: list[int]) -> dict[str, Any]:
    known = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == 1}
    pairs = [(token[:i], token[i:]) for token in known for i in range(1, len(token)) if token[:i] in known and token[i:] in known]
    pairs.sort(key=lambda pair: -known[pair[0] + pair[1]])
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "merges": [" ".join(pair) for pair in pairs]}
    model["vocab"] = {token: i for i, token in enumerate(tokens)}
    added = [{"id": i, "content": tokens[i], "special": True} for i in range(3)]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    return {"model": model, "added_tokens": added, "normalizer": None, "pre_tokenizer": metaspace}


def test_switches_and_ids(tmp_path: Path, rng: np.random.Generator, caplog: pytest.LogCaptureFixture) -> None:
    c = hf.write_checkpoint(tmp_path / "llava", rng, tokenizer="json")
    tokenizer = json.loads((c.folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 300, "content": tokenizer_text(tokenizer, 300), "special": False})
    tokenizer["added_tokens"].append({"id": 100000, "content": "<far>", "special": True})
    tokenizer["normalizer"] = None
    tokenizer["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    tokenizer["post_processor"]["single"].pop(0)
    hf.write_json(c.folder / "tokenizer.json", tokenizer)
    hf.write_json(c.folder / "tokenizer_config.json", {})
    hf.write_json(c.folder / "generation_config.json", {"eos_token_id": [5, 2], "unk_token_id": 0})
    del c.text["eos_token_id"], c.config["pad_token_id"]
    hf.write_json(c.folder / "config.json", c.config)
    keys = vocabulary_keys(converted(c, tmp_path / "out")[0])
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_space_prefix"]) == (False, True)
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 5)
    assert "tokenizer.ggml.padding_token_id" not in keys
    assert keys["tokenizer.ggml.token_type"][300] == 4
    assert "<far>" in caplog.text and "space in front" in caplog.text


def tokenizer_text(tokenizer: dict[str, Any], id: int) -> str:
    return next(token for token, i in tokenizer["model"]["vocab"].items() if i == id)


def test_merges_that_scores_cannot_say(tmp_path: Path, rng: np.random.Generator, caplog: pytest.LogCaptureFixture) -> None:
    c = hf.write_checkpoint(tmp_path / "llava", rng, tokenizer="json")
    tokenizer = json.loads((c.folder / "tokenizer.json").read_text())
    converted(c, tmp_path / "out")
    assert not caplog.text
    del tokenizer["model"]["merges"][3]
    hf.write_json(c.folder / "tokenizer.json", tokenizer)
    converted(c, tmp_path / "out")
    assert "(1 are missing)" in caplog.text


# ---- what is left behind, and what it takes ----


@pytest.mark.parametrize("tensor", ["token_embd.weight", "blk.1.ffn_up.weight", "v.blk.0.ln1.bias", "mm.2.bias"])
def test_interrupted(tensor: str, sound: hf.Checkpoint, tmp_path: Path) -> None:
    """Nothing stays of a new folder; what was in an old one is as it was."""
    out = tmp_path / "made" / "anew"

    def progress(name: str, done: int, total: int) -> None:
        assert [".tmp" in file for file in hf.outputs(out)].count(True) >= 1
        if name == tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(sound.folder, out, progress=progress)
    assert not (tmp_path / "made").exists()
    out.mkdir(parents=True)
    (out / "llava-Q8_0.gguf").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        convert(sound.folder, out, progress=progress)
    assert hf.outputs(out) == ["llava-Q8_0.gguf"] and (out / "llava-Q8_0.gguf").read_bytes() == b"old"


def test_progress(sound: hf.Checkpoint, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    paths = convert(sound.folder, tmp_path / "out", progress=lambda *call: calls.append(call))
    names = [tensor.name for path in paths for tensor in gguf.GGUFReader(path).tensors]
    assert calls == [(name, i, len(names)) for i, name in enumerate(names)]


def test_places_that_cannot_be_written(sound: hf.Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    hf.refused(sound, tmp_path / "file" / "out", errors.ModelFileError, str(tmp_path / "file"))
    with pytest.raises(errors.ModelFileError, match="file"):
        convert(sound.folder, tmp_path / "file")
    out = tmp_path / "out"
    (out / "mmproj-llava-F32.gguf").mkdir(parents=True)
    hf.refused(sound, out, errors.ModelFileError, "mmproj-llava-F32.gguf")


def test_arguments(sound: hf.Checkpoint, tmp_path: Path) -> None:
    for options in ({"type": "q9"}, {"mmproj_type": "iq4_nl"}, {"threads": 0}, {"name": "\ud800"}):
        with pytest.raises(ValueError):
            convert(sound.folder, tmp_path / "out", **options)
    for options in ({"type": 8}, {"name": 7}, {"threads": "2"}, {"vision": 7}):
        with pytest.raises(TypeError):
            convert(sound.folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    paths = convert(sound.folder, tmp_path / "out", "Q4_K", name="../Ein Name\n/x")
    assert [Path(path).parent == tmp_path / "out" and Path(path).exists() for path in paths] == [True, True]
    assert GGUFFile(paths[0]).get("general.name") == "../Ein Name\n/x"


def test_memory_is_a_few_tensors(tmp_path: Path, rng: np.random.Generator) -> None:
    c = hf.write_checkpoint(
        tmp_path / "llava", rng, dtype="float16", num_hidden_layers=16, hidden_size=128, head_dim=32, intermediate_size=2048, shards=4
    )
    convert(c.folder, tmp_path / "warm")
    total, largest = sum(os.path.getsize(path) for path in c.folder.glob("*.safetensors")), 128 * 2048 * 4
    tracemalloc.start()
    try:
        convert(c.folder, tmp_path / "out", threads=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * largest + (2 << 20) < total / 2, (peak, largest, total)


# ---- the command ----


def test_command(sound: hf.Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert cli.main(["convert", str(sound.folder), "-o", str(out), "--type", "q4_k_m", "--name", "mine"]) == 0
    shown = capsys.readouterr()
    assert shown.out.split() == [str(out / "mine-Q4_K_M.gguf"), str(out / "mmproj-mine-F16.gguf")]
    assert "written in" in shown.err
    assert cli.main(["convert", str(sound.folder), "-o", str(out), "--type", "f32", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.out.split() == [str(out / "llava-F32.gguf"), str(out / "mmproj-llava-F32.gguf")] and not shown.err
    assert cli.main(["convert", str(tmp_path), "-o", str(out)]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and "config.json" in shown.err
    for option, value, says in (
        ("--type", "q9", "--type must be one of f32"),
        ("--mmproj-type", "q9", "error: --mmproj-type must be one of f32"),
        ("--threads", "0", "at least 1"),
    ):
        assert cli.main(["convert", str(sound.folder), "-o", str(out), option, value]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_nothing(number: int, sound: hf.Checkpoint, tmp_path: Path) -> None:
    """The command is stopped between two tensors."""
    out = tmp_path / "out"
    program = (
        "import sys, time\nimport pykvsmooth.convert as c\nplain = c._Copier._encoded\n"
        "def slow(*args):\n    print('writing', flush=True)\n    time.sleep(60)\n    return plain(*args)\n"
        "c._Copier._encoded = slow\nfrom pykvsmooth.cli.main import main\nsys.exit(main())\n"
    )
    command = [sys.executable, "-c", program, "convert", str(sound.folder), "-o", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KVS_LIBRARY": library_path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "writing\n"
        assert hf.outputs(out)
        process.send_signal(number)
        begin = time.monotonic()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and time.monotonic() - begin < 20
    assert "Traceback" not in err and not out.exists()


# ---- transformers ----


@pytest.mark.parametrize("naming", ["hf", "new"])
@pytest.mark.parametrize("variant", ["plain", "gqa", "tied"])
def test_transformers(variant: str, naming: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Logits of text and picture against LlavaForConditionalGeneration in float64."""
    torch = pytest.importorskip("torch", reason="torch runs the reference")
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    changes = {"plain": {}, "gqa": {"num_key_value_heads": 2, "rope_parameters": hf.LLAMA3}, "tied": {"tie_word_embeddings": True}}[variant]
    c = hf.write_checkpoint(tmp_path / "llava", rng, naming, shards=2, **changes)
    paths = converted(c, tmp_path / "out")
    before, picture, after = example(rng, c.text["vocab_size"] - 7, 28)
    n_image = (28 // 14) ** 2
    model = transformers.LlavaForConditionalGeneration.from_pretrained(c.folder, dtype=torch.float64, attn_implementation="eager")
    ids = torch.tensor([[*before, *[c.config["image_token_index"]] * n_image, *after]])
    pixels = torch.tensor(normalised(picture, tiny.MEAN, tiny.STD)[None])
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=pixels).logits[0, -len(after) :].numpy()
    np.testing.assert_allclose(runtime_logits(paths, before, picture, after), wanted, rtol=0, atol=1e-3)
