"""Vision files: every published form of LLaVA-1.5 loads, everything else is refused with a message that helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_write as gw
import numpy as np
import pytest
from gguf_write import ARRAY, BOOL, F32, I32, STRING, U8, U32, File, Tensor
from loading import info, load, loaded, open_gguf, refused, refused_pair, replace

from pykvsmooth._native import lib

# ---- mmproj ----


def test_a_pair_loads(tmp_path: Path) -> None:
    i = loaded(tmp_path, gw.text(), gw.mmproj())
    assert (i.has_vision, i.image_size, i.patch_size, i.n_image, i.n_vision_layer) == (1, 8, 4, 4, 2)
    assert np.allclose(list(i.image_mean), [0.5, 0.4, 0.3]) and np.allclose(list(i.image_std), [0.2, 0.3, 0.4])
    assert i.mmproj_identity not in (0, i.identity)
    both = [*gw.text().tensors.values(), *gw.mmproj().tensors.values()]
    assert i.weight_bytes == sum(gw.nbytes(t.dims, t.kind) for t in both)


def rename(f: File, old: str, new: str) -> None:
    f.tensors = {str(k).replace(old, new): t for k, t in f.tensors.items()}


def test_published_forms_of_mmproj(tmp_path: Path) -> None:
    f = gw.mmproj()  # 2023: no projector type, ffn names swapped
    del f.keys["clip.projector_type"]
    for a, b in (("ffn_up", "ffn_x"), ("ffn_down", "ffn_up"), ("ffn_x", "ffn_down")):
        rename(f, a, b)
    assert loaded(tmp_path, gw.text(), f).n_vision_layer == 2
    f = gw.mmproj()  # mixed: each layer is told on its own
    t = f.tensors
    for kind in ("weight", "bias"):
        t[f"v.blk.1.ffn_up.{kind}"], t[f"v.blk.1.ffn_down.{kind}"] = t[f"v.blk.1.ffn_down.{kind}"], t[f"v.blk.1.ffn_up.{kind}"]
    loaded(tmp_path, gw.text(), f)
    f = gw.mmproj()
    rename(f, "attn_out.", "attn_output.")
    loaded(tmp_path, gw.text(), f)
    f = replace(gw.mmproj(), "clip.vision.projector_type", STRING, "mlp")
    del f.keys["clip.projector_type"], f.keys["clip.vision.block_count"], f.keys["clip.has_llava_projector"]
    loaded(tmp_path, gw.text(), f)
    f = gw.mmproj()
    f.tensors["v.patch_embd.weight"].kind = f.tensors["v.position_embd.weight"].kind = f.tensors["v.class_embd"].kind = gw.TYPE_F16
    f.tensors["v.patch_embd.bias"] = Tensor((16,))
    f.tensors["v.post_ln.weight"] = Tensor((16,))
    f.keys["clip.vision.mm_patch_merge_type"] = (STRING, "flat")
    f.keys["clip.vision.image_aspect_ratio"] = (STRING, "pad")
    loaded(tmp_path, gw.text(), f)
    loaded(tmp_path, gw.text(), gw.mmproj(ff=16))  # square: by the modern names


@pytest.mark.parametrize(
    ("held", "layer", "run"), [(22, None, 22), (23, None, 23), (24, None, 23), (25, None, 25), (24, 24, 24), (24, 22, 22)]
)
def test_blocks_that_run(tmp_path: Path, held: int, layer: int | None, run: int) -> None:
    f = gw.mmproj(n_layer=held)
    if layer is not None:
        f.keys["clip.vision.feature_layer"] = (U32, layer)
    assert loaded(tmp_path, gw.text(), f).n_vision_layer == run
    if layer is not None:
        f.keys["clip.vision.feature_layer"] = (ARRAY, (I32, [layer]))
        assert loaded(tmp_path, gw.text(), f).n_vision_layer == run


@pytest.mark.parametrize(
    ("kind", "value", "code", "match"),
    [
        (U32, 3, "FORMAT", "3 blocks are to run, the file holds 2"),
        (U32, 0, "FORMAT", "0 blocks are to run"),
        (I32, -2, "FORMAT", "-2 blocks are to run"),
        (ARRAY, (I32, [1, 2]), "UNSUPPORTED", "features joined from several layers"),
        (ARRAY, (I32, []), "UNSUPPORTED", "a list of other than one layer"),
        (ARRAY, (F32, [2.0]), "FORMAT", "must be an integer"),
        (STRING, "2", "FORMAT", "must be an integer"),
    ],
)
def test_refused_feature_layers(tmp_path: Path, kind: int, value: Any, code: str, match: str) -> None:
    f = replace(gw.mmproj(), "clip.vision.feature_layer", kind, value)
    refused_pair(tmp_path, f, code=getattr(lib, "KVS_E_" + code), match=match, what="clip.vision.feature_layer")


@pytest.mark.parametrize(
    ("key", "kind", "value", "code", "match"),
    [
        ("general.architecture", STRING, "llama", "MISMATCH", "this is a text model, not an mmproj: are the two paths swapped?"),
        ("general.architecture", STRING, "siglip", "UNSUPPORTED", 'architecture "siglip" is no mmproj'),
        ("clip.projector_type", STRING, "ldpv2", "UNSUPPORTED", 'projector "ldpv2" (MobileVLM 2: convolutions and pooling) can\'t be run'),
        ("clip.projector_type", STRING, "mlp_norm", "UNSUPPORTED", 'projector "mlp_norm" (Yi-VL'),
        ("clip.projector_type", STRING, "brandnew", "UNSUPPORTED", "projector \"brandnew\" (another model) can't be run: only LLaVA-1.5's"),
        ("clip.vision.projector_type", STRING, "gemma3", "UNSUPPORTED", 'projector "gemma3" (Gemma 3'),
        ("clip.has_vision_encoder", BOOL, False, "UNSUPPORTED", "is false: this file is no mmproj"),
        ("clip.has_llava_projector", BOOL, False, "UNSUPPORTED", "is false"),
        ("clip.has_vision_encoder", U32, 1, "FORMAT", "is of type u32, bool is needed"),
        ("clip.use_silu", BOOL, True, "UNSUPPORTED", "a tower with SiLU"),
        ("clip.vision.mm_patch_merge_type", STRING, "spatial_unpad", "UNSUPPORTED", "LLaVA-1.6"),
        ("clip.vision.image_aspect_ratio", STRING, "anyres", "UNSUPPORTED", "LLaVA-1.6"),
        ("clip.vision.image_grid_pinpoints", ARRAY, (I32, [336, 672]), "UNSUPPORTED", "LLaVA-1.6"),
        ("clip.vision.image_size", U32, 0, "FORMAT", "0 is out of range"),
        ("clip.vision.image_size", U32, 9, "FORMAT", "is not a multiple of clip.vision.patch_size"),
        ("clip.vision.image_size", U32, 4096, "FORMAT", "4096 is out of range, 1 to 2048"),
        ("clip.vision.image_size", U32, 2048, "UNSUPPORTED", "more than 16384 patches"),
        ("clip.vision.image_size", U32, 12, "FORMAT", "has the shape [16, 5], but the hyperparameters ask for [16, 10]"),
        ("clip.vision.patch_size", U32, 0, "FORMAT", "0 is out of range"),
        ("clip.vision.patch_size", U32, 8, "FORMAT", "has the shape [4, 4, 3, 16], but the hyperparameters ask for [8, 8, 3, 16]"),
        ("clip.vision.attention.head_count", U32, 0, "FORMAT", "0 is out of range"),
        ("clip.vision.attention.head_count", U32, 3, "FORMAT", "does not divide clip.vision.embedding_length"),
        ("clip.vision.attention.layer_norm_epsilon", F32, 0.0, "FORMAT", "0 is out of range"),
        ("clip.vision.image_mean", ARRAY, (F32, [0.5, 0.5]), "FORMAT", "one value for each of red, green and blue"),
        ("clip.vision.image_mean", ARRAY, (F32, [0.5, float("nan"), 0.5]), "FORMAT", "values must be finite"),
        ("clip.vision.image_mean", ARRAY, (U8, [1, 1, 1]), "FORMAT", "is of type array of u8, an array of f32 is needed"),
        ("clip.vision.image_mean", F32, 0.5, "FORMAT", "is of type f32, an array of f32 is needed"),
        ("clip.vision.image_std", ARRAY, (F32, [0.5, 0.0, 0.5]), "FORMAT", "finite and positive"),
        ("clip.vision.image_std", ARRAY, (F32, [0.5, float("inf"), 0.5]), "FORMAT", "finite and positive"),
        ("clip.vision.block_count", U32, 3, "FORMAT", "3 blocks are promised, the file holds 2"),
        ("clip.vision.block_count", U32, 1, "FORMAT", "1 blocks are promised, the file holds 2"),
    ],
)
def test_refused_mmproj_keys(tmp_path: Path, key: str, kind: int, value: Any, code: str, match: str) -> None:
    f = replace(gw.mmproj(), key, kind, value)
    failure = refused_pair(tmp_path, f, code=getattr(lib, "KVS_E_" + code), match=match)
    assert failure.path.endswith("mmproj.gguf")
    assert failure.what == key or "shape" in match


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("mm.3.weight", 'projector "mlp_norm" (Yi-VL'),
        ("v.image_newline", "LLaVA-1.6"),
        ("model.image_newline", "LLaVA-1.6"),
        ("v.blk.0.attn_qkv.weight", "fused q, k and v"),
    ],
)
def test_tensors_of_other_models(tmp_path: Path, name: str, match: str) -> None:
    f = gw.mmproj()
    f.tensors[name] = Tensor((16,))
    refused_pair(tmp_path, f, code=lib.KVS_E_UNSUPPORTED, match=match, what=name)


def test_every_missing_tensor_of_an_mmproj_is_named(tmp_path: Path) -> None:
    for name in gw.mmproj(n_layer=1).tensors:
        f = gw.mmproj(n_layer=1)
        del f.tensors[name]
        if str(name).startswith("v.blk") and not any(str(n).startswith("v.blk") for n in f.tensors):
            continue
        refused_pair(tmp_path, f, code=lib.KVS_E_FORMAT, match="this tensor is missing", what=str(name))
    f = gw.mmproj(n_layer=0)
    f.keys["clip.vision.block_count"] = (U32, 1)
    refused_pair(tmp_path, f, code=lib.KVS_E_FORMAT, match="the file holds no block of a vision tower")


def test_shapes_of_an_mmproj(tmp_path: Path) -> None:
    for name, t in gw.mmproj(n_layer=1).tensors.items():
        f = gw.mmproj(n_layer=1)
        f.tensors[name] = Tensor((t.dims[0] + 1, *t.dims[1:]))
        refused_pair(tmp_path, f, code=lib.KVS_E_FORMAT, match="has the shape [")


def test_tensors_without_a_place(tmp_path: Path) -> None:
    for name in ("mm.4.weight", "v.blk.0.ls1.weight", "v.something"):
        f = gw.mmproj()
        f.tensors[name] = Tensor((8,))
        refused_pair(tmp_path, f, code=lib.KVS_E_UNSUPPORTED, match="this tensor has no place", what=name)
    f = gw.mmproj()
    for name in ("v.post_ln.weight", "t.position_embd.weight", "visual_projection.weight", "logit_scale"):
        f.tensors[name] = Tensor((8,))
    load(gw.text().write(tmp_path / "t.gguf"), f.write(tmp_path / "m.gguf"))


def test_a_pair_that_does_not_fit(tmp_path: Path) -> None:
    failure = refused_pair(
        tmp_path,
        gw.mmproj(out=64),
        code=lib.KVS_E_MISMATCH,
        match="this mmproj gives rows of 64 values, the text model text.gguf wants 32: they are not of one pair",
        what="mm.2.weight",
    )
    assert failure.path.endswith("mmproj.gguf")
    text, image = gw.text().write(tmp_path / "t.gguf"), gw.mmproj().write(tmp_path / "i.gguf")
    refused(load, image, text, code=lib.KVS_E_MISMATCH, match="are the two paths swapped?")
    refused(load, text, text, code=lib.KVS_E_MISMATCH, match="this is a text model, not an mmproj")


# ---- real files ----


def test_golden_files(shared_data: Path) -> None:
    folder = shared_data / "golden-tiny"
    ids = set()
    for name in ("mmproj-f32.gguf", "mmproj-legacy-f32.gguf"):
        i = info(load(folder / "text-f32.gguf", folder / name))
        assert (i.n_layer, i.n_embd, i.n_vocab, i.n_image, i.n_vision_layer) == (4, 64, 514, 16, 2)
        ids.add((i.identity, i.mmproj_identity))
    assert len({a for a, _ in ids}) == 1 and len({b for _, b in ids}) == 2


def test_stories_and_vocabulary(shared_data: Path) -> None:
    for name in ("stories260K-f32.gguf", "stories260K-Q8_0.gguf"):  # GQA, tied
        i = info(load(shared_data / "stories260K" / name))
        assert (i.n_layer, i.n_head, i.n_head_kv, i.head_dim, i.n_vocab, i.n_ff) == (5, 8, 4, 8, 512, 172)
    vocab = shared_data / "vocab" / "ggml-vocab-llama-spm.gguf"
    assert lib.kvs_gguf_n_keys(open_gguf(vocab)) == 22
    refused(load, vocab, code=lib.KVS_E_FORMAT, match="the file holds a vocabulary only, no weights", what="token_embd.weight")
