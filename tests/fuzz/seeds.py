"""Writes the seeds of the fuzz targets to tests/corpus: python tests/fuzz/seeds.py. Small on purpose, and the same on every run.

A seed is a sound file or one that takes a way of its own through a loader. Found cases stand beside them, under names of their own.
"""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import gguf
import gguf_write as gw
import numpy as np
import tiny
from gguf_write import ARRAY, BOOL, F32, F64, I8, I16, I32, I64, STRING, U8, U16, U32, U64, File, Tensor
from PIL import Image

import pykvsmooth as kvs
from fuzz.inputs import CORPUS, SESSION_OPTIONS, join, policies

EMBD, FF, IMAGE, PATCH = 8, 8, 4, 2
LOADS = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


def fill(f: File, seed: int = 1) -> File:
    """Random weights in place of zeros."""
    rng = np.random.default_rng(seed)
    for name, t in f.tensors.items():
        norm = "norm.weight" in str(name) or ("ln" in str(name) and str(name).endswith("weight"))
        values = rng.standard_normal(int(np.prod(t.dims))) * (0.1 if len(t.dims) == 1 else 0.5) + norm
        t.data = values.astype("<f4").tobytes()
    return f


def small_vocabulary(bare: bool = False) -> dict[str | bytes, tuple[int, object]]:
    """A vocabulary with every kind of token but most bytes. bare: without what may be left out."""
    pieces = {
        "<unk>": 2, "<s>": 3, "</s>": 3, "<0x41>": 6, "<0xE2>": 6, "<0x96>": 6, "<0x81>": 6, "▁": 1, "a": 1, "▁a": 1, "d": 1, "o": 1,
        "g": 1, "do": 1, "dog": 5, "▁dog": 1, "<image>": 4, "ä": 1, "g<": 4,
    }  # fmt: skip
    n = len(pieces)
    keys: dict[str | bytes, tuple[int, object]] = {
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, list(pieces))),
        "tokenizer.ggml.scores": (ARRAY, (F32, [-float(i) for i in range(n)])),
        "tokenizer.ggml.unknown_token_id": (U32, 0),
    }
    if bare:
        return keys
    keys["tokenizer.ggml.token_type"] = (ARRAY, (I32, list(pieces.values())))
    for name, value in {"bos": 1, "eos": 2, "padding": 0}.items():
        keys[f"tokenizer.ggml.{name}_token_id"] = (U32, value)
    for name in ("add_bos_token", "add_space_prefix"):
        keys["tokenizer.ggml." + name] = (BOOL, True)
    return keys


def text(n_layer: int = 2, **options: int) -> File:
    """gguf_write's text model with random weights and the small vocabulary."""
    n_vocab = len(small_vocabulary()["tokenizer.ggml.tokens"][1][1])
    f = gw.text(n_layer=n_layer, **{"embd": EMBD, "heads": 2, "heads_kv": 1, "ff": FF, **options})
    for name in ("token_embd.weight", "output.weight"):
        f.tensors[name] = Tensor((f.tensors[name].dims[0], n_vocab))
    f.keys = {name: value for name, value in f.keys.items() if not str(name).startswith("tokenizer.")} | small_vocabulary()
    return fill(f)


def mmproj(n_layer: int = 1, **options: int) -> File:
    return fill(
        gw.mmproj(n_layer=n_layer, **{"embd": 4, "heads": 2, "ff": 6, "image": IMAGE, "patch": PATCH, "inner": 4, "out": EMBD, **options})
    )


def quantized(kind: str) -> File:
    """A text model of one layer with all matrices of that type."""
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng, width = np.random.default_rng(2), max(block, EMBD)
    f = text(1, embd=width, ff=width, heads=max(2, width // 16))
    del f.tensors["output.weight"]  # tied
    for t in f.tensors.values():
        if len(t.dims) == 1:
            continue
        blocks = tiny.stored(rng, t.dims[::-1], gguf.GGMLQuantizationType[kind], 0.3)[0]
        t.kind, t.data = int(gguf.GGMLQuantizationType[kind]), np.ascontiguousarray(blocks).tobytes()
    return f


def with_keys(f: File, **keys: tuple[int, object]) -> File:
    f.keys |= {name.replace("__", "."): value for name, value in keys.items()}
    return f


# ---- one function for each target: name -> bytes ----


def gguf_seeds() -> dict[str, bytes]:
    every = File({"general.architecture": (STRING, "llama"), "general.alignment": (U32, 64)}, alignment=64)
    numbers = {U8: 7, I8: -7, U16: 7, I16: -7, U32: 7, I32: -7, F32: 0.5, BOOL: True, U64: 1 << 40, I64: -7, F64: 0.25}
    for kind, value in numbers.items():
        every.keys[f"number.{kind}"] = (kind, value)
        every.keys[f"array.{kind}"] = (ARRAY, (kind, [value] * 3))
    every.keys |= {"array.strings": (ARRAY, (STRING, ["", "ab", "ä"])), "array.empty": (ARRAY, (U32, []))}
    every.tensors = {"a.weight": Tensor((4, 3)), "b": Tensor((2,), gw.TYPE_F16), "c": Tensor((32, 2), gw.TYPE_Q8_0), "d": Tensor((4,), 19)}
    heads = {"web": b"<!DOCTYPE html><html>", "lfs": b"version https://git-lfs.github.com/spec/v1", "zip": b"PK\3\4" + bytes(20)}
    heads |= {"ggml": b"tjgg\3\0\0\0" + bytes(20), "words": b"Entry not found\n", "short": b"GGUF\3\0", "bytes": b"\x7f\x80" + bytes(30)}
    old = File({"a": (U8, 1)}, version=2)
    wrong = {f"version-{v}": File(version=v).to_bytes() for v in (1, 4, 3 << 24)}
    return {"every": every.to_bytes(), "old": old.to_bytes(), "empty": File().to_bytes(), **heads, **wrong}


def vocabulary_file(vocabulary: dict[str | bytes, tuple[int, object]]) -> bytes:
    """Part 1 of a split model that has its vocabulary and hyperparameters; tests/test_corpus.py lays the weights beside it."""
    keys = gw.text(1, embd=2, heads=1, heads_kv=1, ff=2).keys
    keys = {name: value for name, value in keys.items() if not str(name).startswith("tokenizer.")}
    return File(keys | {"split.no": (U16, 0), "split.count": (U16, 2)} | vocabulary).to_bytes()


def tokenizer_seeds() -> dict[str, bytes]:
    vocabularies = {"small": small_vocabulary(), "bare": small_vocabulary(bare=True), "bytes": gw.vocabulary(264)}
    files = {name: vocabulary_file(keys) for name, keys in vocabularies.items()}
    texts = {"words": b"a dog", "marks": "USER: <image>\n▁dog</s>".encode(), "broken": b"\xe2\x96 \xff\xc0a\xed\xa0\x80"}
    seeds = {f"{f}-{t}": join(3, files[f], texts[t]) for f in files for t in texts if f != "bytes" or t == "broken"}
    unused = {**small_vocabulary(), "tokenizer.ggml.token_type": (ARRAY, (I32, [2, 3, 3, 6, 6, 6, 6, 1] + [5] * 11))}
    pieces = len(small_vocabulary()["tokenizer.ggml.tokens"][1][1])
    lies = {"scores": (ARRAY, (F32, [float("nan")] * pieces)), "token_type": (ARRAY, (I32, [6] * pieces)), "model": (STRING, "gpt2")}
    lies |= {"bos_token_id": (U32, pieces), "tokens": (ARRAY, (STRING, []))}
    seeds |= {
        f"lie-{name}": join(0, vocabulary_file(small_vocabulary() | {f"tokenizer.ggml.{name}": lie}), b"") for name, lie in lies.items()
    }
    known = {**small_vocabulary(), "tokenizer.ggml.token_type": (ARRAY, (I32, [1] * pieces))}
    del known["tokenizer.ggml.unknown_token_id"]
    seeds["no-unknown"] = join(0, vocabulary_file(known), b"")
    seeds["long"] = join(0, files["small"], b"a dog d o g do " * 20)
    return seeds | {"unused": join(0, vocabulary_file(unused), b"dog dog a")}


def detokenizer_seeds() -> dict[str, bytes]:
    ids = struct.pack("<8i", 0, 1, 3, 7, 15, 16, -1, 1 << 30)
    return {f"{name}-words": join(i, vocabulary_file(small_vocabulary(bare=bool(i))), ids) for i, name in enumerate(("small", "bare"))}


def mmproj_seeds() -> dict[str, bytes]:
    legacy = mmproj()
    del legacy.keys["clip.projector_type"], legacy.keys["clip.vision.block_count"]
    up, down = legacy.tensors["v.blk.0.ffn_up.weight"], legacy.tensors["v.blk.0.ffn_down.weight"]
    legacy.tensors |= {"v.blk.0.ffn_up.weight": down, "v.blk.0.ffn_down.weight": up}
    up, down = legacy.tensors["v.blk.0.ffn_up.bias"], legacy.tensors["v.blk.0.ffn_down.bias"]
    legacy.tensors |= {"v.blk.0.ffn_up.bias": down, "v.blk.0.ffn_down.bias": up}
    two = with_keys(mmproj(2), clip__vision__feature_layer=(ARRAY, (I32, [1])), clip__use_gelu=(BOOL, True))
    two.tensors["v.post_ln.weight"] = Tensor((4,))
    flat = mmproj()
    flat.tensors["v.patch_embd.weight"] = Tensor((3 * PATCH * PATCH, 4), data=flat.tensors["v.patch_embd.weight"].data)
    flat.tensors["v.patch_embd.bias"] = Tensor((4,))
    renamed = mmproj()
    for part in ("weight", "bias"):
        renamed.tensors[f"v.blk.0.attn_output.{part}"] = renamed.tensors.pop(f"v.blk.0.attn_out.{part}")
    half = mmproj()
    for t in half.tensors.values():
        t.kind, t.data = gw.TYPE_F16, np.frombuffer(t.data, "<f4").astype("<f2").tobytes()
    refused = {
        "merge": with_keys(mmproj(), clip__vision__mm_patch_merge_type=(STRING, "spatial_unpad")),
        "pinpoints": with_keys(mmproj(), clip__vision__image_grid_pinpoints=(ARRAY, (I32, [336, 672]))),
        "projector": with_keys(mmproj(), clip__projector_type=(STRING, "ldpv2")),
        "features": with_keys(mmproj(), clip__vision__feature_layer=(ARRAY, (I32, [1, 1]))),
        "deep": with_keys(mmproj(), clip__vision__feature_layer=(ARRAY, (I32, [9]))),
        "wide": mmproj(out=EMBD + 4),
        "patches": mmproj(),
    }
    lies = {
        "image_std": (ARRAY, (F32, [0.0, 1.0, 1.0])),
        "attention.head_count": (U32, 3),
        "block_count": (U32, 7),
        "feature_layer": (STRING, ""),
    }
    refused |= {f"lie-{name}": with_keys(mmproj(), **{f"clip.vision.{name}": value}) for name, value in lies.items()}
    refused |= {"fused": mmproj(), "a-text-model": text(1)}
    refused["fused"].tensors["v.blk.0.attn_qkv.weight"] = Tensor((4, 12))
    refused["patches"].tensors["v.patch_embd.weight"] = Tensor((PATCH, PATCH, 3, 5))
    return {
        name: f.to_bytes()
        for name, f in {"sound": mmproj(), "legacy": legacy, "two": two, "flat": flat, "renamed": renamed, "f16": half, **refused}.items()
    }


def split(f: File, shared: int = 0, promised: int = 0, second_is: int = 1, **keys: tuple[int, object]) -> bytes:
    """A text model in two parts, of which so many tensors are in both; what it promises, the number of the second part, and keys of the
    first one may be lies."""
    names = list(f.tensors)
    first = with_keys(
        File(dict(f.keys), {name: f.tensors[name] for name in names[: 5 + shared]}), split__no=(U16, 0), split__count=(U16, 2)
    )
    with_keys(first, split__tensors__count=(I32, len(names) + promised), **keys)
    second = File({"split.no": (U16, second_is), "split.count": (U16, 2)}, {name: f.tensors[name] for name in names[5:]})
    return join(0, first.to_bytes(), b"", second.to_bytes())


def model_seeds() -> dict[str, bytes]:
    sound, image = text(1).to_bytes(), mmproj().to_bytes()
    seeds = {f"policies-{o}": join(o, sound, image, b"") for o in (0, 23, 47, 64 + 7, 128 + 1)}
    seeds["no-room"] = join(256, sound, b"", b"")
    seeds["text-only"] = join(1, sound, b"", b"")
    linear = with_keys(text(1), llama__rope__scaling__type=(STRING, "linear"), llama__rope__scaling__factor=(F32, 2.0))
    biased = text(1, heads=2)
    del biased.tensors["output.weight"]
    biased.tensors |= {
        f"blk.0.{name}.bias": Tensor((n,)) for name, n in {"attn_q": EMBD, "attn_k": EMBD // 2, "ffn_up": FF, "ffn_down": EMBD}.items()
    }
    biased.tensors["rope_freqs.weight"] = Tensor((2,), data=gw.floats(1, 2))
    biased.tensors["blk.0.attn_rot_embd"] = Tensor((4,))
    yarn = with_keys(text(1), llama__rope__scaling__type=(STRING, "yarn"))
    still = text(1)
    still.tensors["rope_freqs.weight"] = Tensor((2,))
    for name, f in {"linear": linear, "biased": biased, "yarn": yarn, "still": still}.items():
        seeds[name] = join(0, f.to_bytes(), b"", b"")
    lies = {"attention.head_count": (U32, 3), "attention.head_count_kv": (U32, 5), "attention.key_length": (U32, 3)}
    lies |= {"rope.dimension_count": (U32, 64), "vocab_size": (U32, 1), "rope.freq_base": (F32, float("nan")), "expert_count": (U32, 8)}
    refused = {f"lie-{name}": with_keys(text(1), **{f"llama.{name}": value}) for name, value in lies.items()}
    refused |= {
        "stranger": with_keys(text(1), general__architecture=(STRING, "mamba")),
        "missing": text(1),
        "shape": text(1),
        "extra": text(1),
    }
    del refused["missing"].tensors["blk.0.ffn_up.weight"]
    refused["shape"].tensors["blk.0.ffn_up.weight"] = Tensor((EMBD, FF + 1))
    refused["extra"].tensors["blk.0.attn_sinks.weight"] = Tensor((4,))
    odd = {f"llama.attention.{name}_length": (U32, 3) for name in ("key", "value")}
    refused |= {"foreign-type": text(1), "norm-shape": text(1), "norm-nan": text(1), "odd-heads": with_keys(text(1), **odd)}
    refused["norm-nan"].tensors["output_norm.weight"].data = np.full(EMBD, np.nan, "<f4").tobytes()
    refused["foreign-type"].tensors["output.weight"].kind = 19
    refused["norm-shape"].tensors["output_norm.weight"] = Tensor((EMBD, 2))
    seeds |= {f"refused-{name}": join(0, f.to_bytes(), b"", b"") for name, f in refused.items()}
    seeds |= {"swapped": join(0, image, sound, b""), "split": split(text(1)), "split-twice": split(text(1), shared=1)}
    seeds |= {"split-promise": split(text(1), promised=1), "split-second": split(text(1), split__no=(U16, 1))}
    seeds["split-third"] = split(text(1), second_is=2)
    seeds |= {f"split-{n}": split(text(1), split__count=(U16, n)) for n in (3, 100)}
    for kind in LOADS:
        if gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] <= 32:
            seeds["type-" + kind] = join(1, quantized(kind).to_bytes(), b"", b"")
    return seeds


def session_seeds(folder: Path) -> dict[str, bytes]:
    """Saved over the pair in tests/corpus/fixed, by the policies of each set of options."""
    seeds = {}
    picture = np.random.default_rng(3).integers(0, 256, (IMAGE, IMAGE, 3), np.uint8)
    with kvs.Model(str(CORPUS / "fixed/text.gguf"), mmproj=str(CORPUS / "fixed/mmproj.gguf"), threads=1, device="cpu") as model:
        model._end_ids = frozenset()
        for options, kind in SESSION_OPTIONS:
            with model.session(n_ctx=40, kv_type=kind, policy=policies(options), seed=1) as session:
                list(session.generate("a dog", image=picture if options else None, max_tokens=4, template=None))
                if options == 15:  # a second turn
                    list(session.chat("a dog", max_tokens=2, template=None))
                session.save(folder / "saved")
            seeds[f"policies-{options}-{kind}"] = join(options, (folder / "saved").read_bytes())
    return seeds


def image_seeds() -> dict[str, bytes]:
    pixels = np.random.default_rng(4).integers(0, 256, (6, 9, 4), np.uint8)
    picture, seeds = Image.fromarray(pixels, "RGBA"), {}

    def save(name: str, mode: str, **options: object) -> None:
        file = io.BytesIO()
        picture.convert(mode).save(file, **options)
        seeds[name] = file.getvalue()

    for kind in ("PNG", "GIF", "WEBP", "TIFF", "BMP", "TGA", "ICO", "JPEG2000", "DDS", "SGI", "PPM", "PCX"):
        save(kind.lower(), "RGB", format=kind)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    save("jpeg-turned", "RGB", format="JPEG", exif=exif)
    save("jpeg-cmyk", "CMYK", format="JPEG")
    save("png-alpha", "RGBA", format="PNG")
    save("png-palette", "P", format="PNG", transparency=3)
    save("png-wide", "I;16", format="PNG")
    save("tiff-packed", "L", format="TIFF", compression="packbits")
    save("gif-moving", "P", format="GIF", save_all=True, append_images=[picture.convert("P").rotate(90)], loop=0)
    return seeds


TEMPLATES = {
    "plain": "{% for m in messages %}{{ m.role | upper }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "parts": "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endfor %}",
    "checks": "{{ bos_token }}{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ messages | tojson }}",
    "macro": "{% macro turn(m) %}[{{ m.content | trim }}]{% endmacro %}{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{% if loop.index0 > 3 %}{% break %}{% endif %}{{ turn(m) }}{{ ns.n }}{% endfor %}{{ eos_token }}",
    "date": "{{ strftime_now('%d %b %Y') }}{{ messages[-1].content.split('<image>')[-1] }}",
    "escape": "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}",
    "words": "no template at all",
}


def template_seeds() -> dict[str, bytes]:
    return {name: text.encode() for name, text in TEMPLATES.items()}


def write(target: str, seeds: dict[str, bytes]) -> None:
    (CORPUS / target).mkdir(parents=True, exist_ok=True)
    for name, data in seeds.items():
        (CORPUS / target / name).write_bytes(data)


if __name__ == "__main__":
    import tempfile

    write("fixed", {"text.gguf": text().to_bytes(), "mmproj.gguf": mmproj().to_bytes()})
    for target in ("gguf", "tokenizer", "detokenizer", "mmproj", "model", "image", "template"):
        write(target, globals()[target + "_seeds"]())
    with tempfile.TemporaryDirectory() as folder:
        write("session", session_seeds(Path(folder)))
