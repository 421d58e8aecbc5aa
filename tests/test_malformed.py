"""Damage by name: every count, length, type and offset of a sound pair set to what it must not be, and the odd values that a shape check
can't see. test_loader.py, test_mmproj.py and test_tokenizer.py have the cases of one key or tensor each."""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf_write as gw
import numpy as np
import pytest
from conftest import Pair
from gguf_write import ARRAY, BOOL, F32, F64, I8, I16, I32, I64, STRING, U8, U16, U32, U64, File, Tensor
from loading import Failure, load, open_gguf, refused, refused_pair, refused_text, replace

import pykvsmooth as kvs
from pykvsmooth._native import lib

DAMAGE = (lib.KVS_E_FORMAT, lib.KVS_E_UNSUPPORTED, lib.KVS_E_MISMATCH)


# ---- every count and length of a file ----


@dataclass
class Field:
    """A number in the header of a file."""

    name: str
    at: int
    format: str
    value: int


class Walk:
    """The fields of a file's header, front to back. Of an array of strings the first and the last length."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 24
        self.fields = [Field("n_tensors", 8, "<Q", self.number("<Q", 8)), Field("n_keys", 16, "<Q", self.number("<Q", 16))]
        n_tensors, n_keys = (field.value for field in self.fields)
        for _ in range(n_keys):
            self.key()
        for _ in range(n_tensors):
            self.tensor()

    def number(self, form: str, at: int) -> int:
        return struct.unpack_from(form, self.data, at)[0]

    def take(self, name: str, form: str, keep: bool = True) -> int:
        value = self.number(form, self.at)
        if keep:
            self.fields.append(Field(name, self.at, form, value))
        self.at += struct.calcsize(form)
        return value

    def string(self, name: str, keep: bool = True) -> str:
        n = self.take(name, "<Q", keep)
        self.at += n
        return self.data[self.at - n : self.at].decode()

    def key(self) -> None:
        name = self.string("length of a key's name")
        kind = self.take(f"type of {name}", "<I")
        if kind == STRING:
            self.string(f"length of {name}")
        elif kind == ARRAY:
            element = self.take(f"element type of {name}", "<I")
            n = self.take(f"count of {name}", "<Q")
            for i in range(n):
                if element == STRING:
                    self.string(f"length of {name}[{i}]", keep=i in (0, n - 1))
                else:
                    self.at += struct.calcsize(gw.PACK[element])
        else:
            self.at += struct.calcsize(gw.PACK[kind])

    def tensor(self) -> None:
        name = self.string("length of a tensor's name")
        for i in range(self.take(f"n_dims of {name}", "<I")):
            self.take(f"dims[{i}] of {name}", "<Q")
        self.take(f"type of {name}", "<I")
        self.take(f"offset of {name}", "<Q")


def lies(field: Field) -> Iterator[int]:
    """0, 1, the largest, what overflows a product or a sum, and the neighbours of the truth."""
    top = (1 << 8 * struct.calcsize(field.format)) - 1
    wrong = {0, 1, 2, top, top - 31, top // 2 + 1, top // 4 + 1, 1 << 31, field.value - 1, field.value + 1}
    yield from sorted(v for v in wrong - {field.value} if 0 <= v <= top)


def is_another_truth(field: Field, lie: int) -> bool:
    """Numbers may be signed or not; zeros of a narrower tensor type are zeros."""
    wide = {U32: I32, I32: U32}
    return field.name.startswith(("type of", "element type of")) and (wide.get(field.value) == lie or field.value == gw.TYPE_F32)


@pytest.mark.parametrize("which", ["text", "mmproj"])
def test_every_count_length_type_and_offset(tmp_path: Path, which: str) -> None:
    sound = {"text": gw.text(n_layer=1), "mmproj": gw.mmproj(n_layer=1)}
    paths = {name: f.write(tmp_path / f"{name}.gguf") for name, f in sound.items()}
    data = bytearray(Path(paths[which]).read_bytes())
    fields = Walk(bytes(data)).fields
    assert len(fields) > 100
    for field in fields:
        for lie in lies(field):
            struct.pack_into(field.format, data, field.at, lie)
            Path(paths[which]).write_bytes(data)
            try:
                load(paths["text"], paths["mmproj"])
                assert is_another_truth(field, lie), f"{field.name}: {lie} for {field.value} is accepted"
            except Failure as failure:
                assert failure.code in DAMAGE, (field, lie, failure.message)
                assert failure.path == paths[which] and failure.path in failure.message
                assert failure.what or failure.offset >= 0, (field, lie, failure.message)
        struct.pack_into(field.format, data, field.at, field.value)


def test_what_is_too_large_for_metadata(tmp_path: Path) -> None:
    """In a file that has the room (it is sparse)."""
    records = {
        "a string of 314572800 bytes": gw.key("a", STRING, gw.string(b"", 300 << 20)),
        "an array of 314572800 elements of type u8": gw.key("a", ARRAY, gw.array(U8, [], 300 << 20)),
        "an array of 39321600 strings": gw.key("a", ARRAY, gw.array(STRING, [], 300 << 17)),
    }
    for what, record in records.items():
        with open(tmp_path / "big.gguf", "wb") as file:
            file.write(File(extra_keys=[record]).header())
            file.truncate(1 << 33)
        match = f"{what} does not fit into the 256 MiB that metadata may have"
        refused(open_gguf, tmp_path / "big.gguf", code=lib.KVS_E_FORMAT, match=match, what="a")


# ---- wrong types of metadata ----

VALUES: dict[int, Any] = {
    **dict.fromkeys((U8, I8, U16, I16, U32, I32, U64, I64), 2),
    **dict.fromkeys((F32, F64), 0.5),
    BOOL: True,
    STRING: "x",
    ARRAY: (STRING, ["x", "y"]),
}
INTEGERS = {U8, I8, U16, I16, U32, I32, U64, I64}
CLASSES = [INTEGERS, {F32, F64}, {BOOL}, {STRING}, {ARRAY}]


@pytest.mark.parametrize("which", ["text", "mmproj"])
def test_every_key_with_every_other_type(tmp_path: Path, which: str) -> None:
    sound = {"text": gw.text(n_layer=1), "mmproj": gw.mmproj(n_layer=1)}
    optional = {
        "text": {"llama.attention.key_length": U32, "llama.rope.dimension_count": U32, "llama.rope.freq_base": F32, "llama.vocab_size": U32,
                 "llama.rope.scaling.type": STRING, "llama.rope.scaling.factor": F32, "tokenizer.ggml.add_bos_token": BOOL,
                 "tokenizer.ggml.padding_token_id": U32, "split.count": U16, "split.no": U16},
        "mmproj": {"clip.use_gelu": BOOL, "clip.use_silu": BOOL, "clip.vision.feature_layer": U32, "clip.vision.projector_type": STRING,
                   "clip.vision.image_aspect_ratio": STRING},
    }[which]  # fmt: skip
    kinds = {str(key): kind for key, (kind, _) in sound[which].keys.items()} | optional
    for key, kind in kinds.items():
        for other, value in VALUES.items():
            if any(kind in same and other in same for same in CLASSES) and kind != ARRAY:
                continue
            if key == "clip.vision.feature_layer" and other == ARRAY:
                continue  # may be a list: test_mmproj.py
            files = {"text": gw.text(n_layer=1), "mmproj": gw.mmproj(n_layer=1)}
            good = files[which].keys.get(key)
            if kind == ARRAY and other == ARRAY:
                assert good
                value = (F32, [0.5] * 260) if good[1][0] != F32 else (STRING, ["x"] * len(good[1][1]))
            files[which].keys[key] = (other, value)
            code = lib.KVS_E_FORMAT
            failure = refused_pair(tmp_path, files["mmproj"], files["text"], code=code, match="", what=key)
            assert re.search("is of type .*(needed|not u32)|must be an integer", failure.message), failure.message
            assert failure.offset > 24 and failure.message.endswith(f"(at byte {failure.offset})")


# ---- values ----


def test_two_thousand_million_layers(tmp_path: Path) -> None:
    for kind, n in ((U32, 1 << 31), (I32, -(1 << 31)), (U64, 1 << 63), (U32, (1 << 32) - 1)):
        f = replace(gw.text(), "llama.block_count", kind, n)
        match = f"{min(n, (1 << 63) - 1)} is out of range, 1 to 1024 is possible"
        refused_text(tmp_path, f, code=lib.KVS_E_FORMAT, match=match, what="llama.block_count")
        f = replace(gw.mmproj(), "clip.vision.block_count", kind, n)
        refused_pair(tmp_path, f, code=lib.KVS_E_FORMAT, match="is out of range, 1 to 1024 is possible", what="clip.vision.block_count")


@pytest.mark.parametrize(
    ("key", "kind", "value", "match"),
    [
        ("llama.rope.freq_base", F32, float("inf"), "inf is out of range"),
        ("llama.rope.freq_base", F32, -10000.0, "-10000 is out of range"),
        ("llama.rope.freq_base", F64, 1e300, "1e+300 is out of range"),
        ("llama.rope.freq_base", F32, 1e-30, "1e-30 is out of range"),
        ("llama.rope.scaling.factor", F32, 1e30, "1e+30 is out of range, 0.0001 to 10000 is possible"),
        ("llama.rope.scaling.factor", F32, -4.0, "-4 is out of range"),
        ("llama.rope.scaling.factor", F32, float("nan"), "nan is out of range"),
        ("llama.rope.dimension_count", U32, 0, "0 is out of range, 1 to 512"),
        ("llama.rope.dimension_count", U32, 1 << 31, "2147483648 is out of range"),
        ("llama.rope.scaling.type", STRING, "lin\0ear", "no printable ASCII"),
        ("llama.context_length", U32, 1 << 31, "2147483648 is out of range, 1 to 1073741824"),
        ("llama.feed_forward_length", U64, 1 << 40, "1099511627776 is out of range"),
        ("llama.attention.head_count", U32, 1 << 20, "1048576 is out of range, 1 to 1024"),
    ],
)
def test_absurd_numbers(tmp_path: Path, key: str, kind: int, value: Any, match: str) -> None:
    failure = refused_text(tmp_path, replace(gw.text(), key, kind, value), code=lib.KVS_E_FORMAT, match=match, what=key)
    assert failure.offset > 24


def test_a_vocabulary_of_another_size_than_the_embedding(tmp_path: Path) -> None:
    for n in (259, 261):
        f = gw.text()
        f.tensors["token_embd.weight"] = Tensor((32, n))
        match = f"has the shape [32, {n}], but the hyperparameters ask for [32, 260]"
        refused_text(tmp_path, f, code=lib.KVS_E_FORMAT, match=match, what="token_embd.weight")
    f = gw.text()
    f.keys |= gw.vocabulary(300)
    refused_text(tmp_path, f, code=lib.KVS_E_FORMAT, match="[32, 260], but the hyperparameters ask for [32, 300]", what="token_embd.weight")


def test_a_projector_wider_than_any(tmp_path: Path) -> None:
    """Its hidden width stands nowhere but in the shapes of its tensors."""
    match = "has 65537 rows, at most 65536 make sense here"
    refused_pair(tmp_path, gw.mmproj(inner=65537), code=lib.KVS_E_FORMAT, match=match, what="mm.0.weight")


def test_more_tensors_than_any_model_has(tmp_path: Path) -> None:
    """In parts, each name is looked for in all others."""
    n = 70_000
    for i in range(2):
        f = File(keys=gw.text().keys if i == 0 else {}, n_tensors=n)
        f.keys |= {"split.no": (U16, i), "split.count": (U16, 2)}
        data = f.header() + b"".join(gw.string(f"{i}.{j}") + struct.pack("<IQIQ", 1, 1, 0, 32 * j) for j in range(n))
        with open(tmp_path / f"m-{i + 1:05}-of-00002.gguf", "wb") as file:
            file.write(data)
            file.truncate(len(data) + 32 * (n + 1))
    refused(load, tmp_path / "m-00001-of-00002.gguf", code=lib.KVS_E_FORMAT, match="the parts hold more than 131072 tensors")


def test_tokenizers_say_where(tmp_path: Path) -> None:
    """Every refusal of a vocabulary has the place of the key."""
    for key, kind, value, match in (
        ("tokenizer.ggml.scores", ARRAY, (F32, [0.0] * 3), "3 entries for 260 tokens"),
        ("tokenizer.ggml.scores", ARRAY, (F32, [0.0] * 259 + [float("nan")]), "the score of token 259 is not a finite number"),
        ("tokenizer.ggml.token_type", ARRAY, (I32, [1] * 261), "261 entries for 260 tokens"),
        ("tokenizer.ggml.token_type", ARRAY, (I32, [1] * 259 + [9]), "token 259 has type 9; 0 to 6 are known"),
        ("tokenizer.ggml.token_type", ARRAY, (I32, [6] * 260), "token 0 is a byte, but its text is not <0xNN>"),
        ("tokenizer.ggml.bos_token_id", U32, 260, "260 is out of range, 0 to 259"),
        ("tokenizer.ggml.model", STRING, "gpt2", '"gpt2" is not supported'),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, []), "0 tokens; 1 to 16777216 can be"),
    ):
        code = lib.KVS_E_UNSUPPORTED if key.endswith("model") else lib.KVS_E_FORMAT
        failure = refused_text(tmp_path, replace(gw.text(), key, kind, value), code=code, match=match, what=key)
        assert failure.offset > 24 and f"(at byte {failure.offset})" in failure.message
    f = gw.text()
    del f.keys["tokenizer.ggml.scores"]
    refused_text(tmp_path, f, code=lib.KVS_E_FORMAT, match="this key is missing", what="tokenizer.ggml.scores")


def test_strings_that_are_no_text(tmp_path: Path) -> None:
    """Where a string is a name it is refused (test_loader.py); elsewhere its bytes are what they are, and nothing is cut at a zero."""
    f = gw.text()
    f.keys["general.name"] = (STRING, gw.string(b"a\0b\xff\xfe"))
    f.keys["tokenizer.chat_template"] = (STRING, gw.string(b"{{ \xc3 }}\0rest"))
    _, (_, tokens) = f.keys["tokenizer.ggml.tokens"]
    tokens[259] = gw.string(b"x\0\xe4\xb8")  # not UTF-8
    f.keys["tokenizer.ggml.tokens"] = (
        ARRAY,
        struct.pack("<IQ", STRING, 260) + b"".join(t if isinstance(t, bytes) else gw.string(t) for t in tokens),
    )
    with kvs.Model(f.write(tmp_path / "text.gguf"), mmproj=False, device="cpu") as model:
        assert model.metadata["general.name"] == "a\0b\ufffd\ufffd"
        assert model.chat_template == "{{ \ufffd }}\0rest"
        assert model.token_bytes(259) == b"x\0\xe4\xb8" and model.detokenize([259]) == "x\0\ufffd"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [gw.TYPE_F32, gw.TYPE_F16, gw.TYPE_BF16])
def test_norms_and_biases_that_are_not_finite(tmp_path: Path, value: float, kind: int) -> None:
    data = np.ones(32, np.float32)
    data[5] = value
    if kind == gw.TYPE_BF16:
        raw = (data.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    else:
        raw = data.astype(np.float16 if kind == gw.TYPE_F16 else np.float32).tobytes()
    for name in ("blk.1.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight", "blk.0.attn_q.bias"):
        f = gw.text()
        f.tensors[name] = Tensor((32,), kind=kind, data=raw)
        match = f"its value 5 is {value:g}: norms and biases must be finite"
        failure = refused_text(tmp_path, f, code=lib.KVS_E_FORMAT, match=match, what=name)
        at = failure.offset
        assert Path(failure.path).read_bytes()[at : at + len(raw) // 32] == raw[5 * len(raw) // 32 : 6 * len(raw) // 32]
    f = gw.mmproj(embd=32)
    f.tensors["v.blk.1.ln2.bias"] = Tensor((32,), kind=kind, data=raw)
    refused_pair(tmp_path, f, code=lib.KVS_E_FORMAT, match="norms and biases must be finite", what="v.blk.1.ln2.bias")


def test_rope_factors_that_are_not_finite(tmp_path: Path) -> None:
    for bad in ("inf", "-inf", "nan"):
        f = gw.text()
        f.tensors["rope_freqs.weight"] = Tensor((4,), data=gw.floats(1, 1, float(bad), 1))
        match = f"its value 2 is {bad}: a frequency can't be divided by it"
        refused_text(tmp_path, f, code=lib.KVS_E_FORMAT, match=match, what="rope_freqs.weight")


@pytest.mark.parametrize("scale", [0x7E00, 0x7C00, 0xFC00], ids=["nan", "inf", "-inf"])
def test_scales_that_are_not_finite(tmp_path: Path, scale: int) -> None:
    """Matrices are not read at load: the pass that meets such a block says so, and the session stays as it was."""
    block = struct.pack("<H", scale) + b"\1" * 32
    f = gw.text()
    for name, t in list(f.tensors.items()):
        if len(t.dims) == 1:
            f.tensors[name] = Tensor(t.dims, data=gw.floats(*[1.0] * t.dims[0]))
    sound = struct.pack("<H", 0x3000) + bytes(range(1, 33))
    f.tensors["token_embd.weight"] = Tensor((32, 260), kind=gw.TYPE_Q8_0, data=sound * 259 + block)
    with kvs.Model(f.write(tmp_path / "text.gguf"), mmproj=False, device="cpu") as model, model.session(n_ctx=16) as session:
        session.feed([5, 6])
        assert np.isfinite(session.logits()).all()
        with pytest.raises(kvs.NumericError):
            session.feed([259])
            session.logits()
    f.tensors["token_embd.weight"] = Tensor((32, 260), kind=gw.TYPE_Q8_0, data=sound * 260)
    f.tensors["blk.1.attn_v.weight"] = Tensor((32, 16), kind=gw.TYPE_Q8_0, data=block * 16)
    f.tensors["blk.1.attn_output.weight"] = Tensor((32, 32), kind=gw.TYPE_Q8_0, data=sound * 32)
    f.tensors["output.weight"] = Tensor((32, 260), kind=gw.TYPE_Q8_0, data=sound * 260)
    with kvs.Model(f.write(tmp_path / "text.gguf"), mmproj=False, device="cpu") as model, pytest.raises(kvs.NumericError):
        session = model.session(n_ctx=16)
        session.feed([5])
        session.logits()


# ---- files that are cut, and what is no file ----


@pytest.mark.parametrize("which", ["text", "mmproj"])
def test_a_file_cut_at_each_4_kib(tiny_pair: Pair, tmp_path: Path, which: str) -> None:
    paths = {"text": Path(tiny_pair.text), "mmproj": Path(tiny_pair.mmproj)}
    data = paths[which].read_bytes()
    assert len(data) > 40 * 4096
    cut = paths[which] = tmp_path / "cut.gguf"
    for n in range(0, len(data), 4096):
        cut.write_bytes(data[:n])
        with pytest.raises(Failure) as caught:
            load(paths["text"], paths["mmproj"])
        failure = caught.value
        assert failure.code == lib.KVS_E_FORMAT and failure.path == str(cut) and failure.path in failure.message
        assert n == 0 or re.search(r"is the download complete|cut short|does not fit into the file|room for", failure.message), (
            failure.message
        )
        assert failure.offset >= 0


def opened(path: Path) -> kvs.KVSmoothError:
    """The error of a file that can't be opened, which is the same in either place."""
    with pytest.raises(kvs.ModelFileError) as caught:
        kvs.Model(path)
    assert str(path) in str(caught.value) and caught.value.filename == str(path)
    return caught.value


def test_links_that_go_round(tmp_path: Path) -> None:
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    one.symlink_to(other)
    other.symlink_to(one)
    assert "Too many levels of symbolic links" in str(opened(one))
    (tmp_path / "nowhere.gguf").symlink_to(tmp_path / "gone.gguf")
    assert isinstance(opened(tmp_path / "nowhere.gguf"), FileNotFoundError)


def test_what_is_no_file(tmp_path: Path, tiny_pair: Pair) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "is no regular file: a model is mapped, not streamed" in str(opened(tmp_path / "pipe.gguf"))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert "cannot be opened" in str(opened(tmp_path / "s"))
    assert "is a folder" in str(opened(tmp_path))
    for device in ("/dev/zero", "/dev/null", "/dev/urandom"):
        assert "no regular file" in str(opened(Path(device)))
    assert "Not a directory" in str(opened(Path(tiny_pair.text) / "below.gguf"))
    for odd in (tmp_path, tmp_path / "pipe.gguf", Path("/dev/zero")):  # in the mmproj's place
        with pytest.raises(kvs.ModelFileError, match=re.escape(str(odd))):
            kvs.Model(tiny_pair.text, mmproj=odd)


def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    gw.text().write(path)
    path.chmod(0)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)  # root may read everything
        assert "Permission denied; check the path and its permissions" in str(opened(path))
    finally:
        if root:
            os.seteuid(0)


def test_a_split_model_with_a_part_missing_or_wrong(tmp_path: Path) -> None:
    whole = gw.text()
    names = list(whole.tensors)
    paths = []
    for i in range(3):
        f = File(keys=dict(whole.keys) if i == 0 else {})
        f.keys |= {"split.no": (U16, i), "split.count": (U16, 3), "split.tensors.count": (I32, len(names))}
        f.tensors = {name: whole.tensors[name] for name in names[i::3]}
        paths.append(Path(f.write(tmp_path / f"m-{i + 1:05}-of-00003.gguf")))
    kvs.Model(paths[0], mmproj=False).close()
    for missing in (1, 2):
        kept = paths[missing].read_bytes()
        paths[missing].unlink()
        with pytest.raises(kvs.ModelFileNotFoundError, match=f"part {missing + 1} of 3 of this split model is missing") as caught:
            kvs.Model(paths[0], mmproj=False)
        assert caught.value.path == str(paths[missing])
        paths[missing].mkdir()
        with pytest.raises(kvs.ModelFileError, match="is a folder"):
            kvs.Model(paths[0], mmproj=False)
        paths[missing].rmdir()
        paths[missing].write_bytes(kept[: len(kept) // 2])
        with pytest.raises(kvs.ModelFormatError, match=re.escape(paths[missing].name)):
            kvs.Model(paths[0], mmproj=False)
        paths[missing].write_bytes(kept)
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(kvs.ModelFormatError, match="this is part 2 of 3 by its own account, part 3 of 3 by its name"):
        kvs.Model(paths[0], mmproj=False)
