"""Text models: sound files of every published form load, and each way to break one is refused with a message that helps."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import gguf_write as gw
import numpy as np
import pytest
from gguf_write import ARRAY, BOOL, F32, F64, I8, I32, STRING, U8, U16, U32, U64, File, Tensor
from loading import Failure, info, load, loaded, open_gguf, refused, refused_text, replace

from pykvsmooth._native import ffi, lib

# ---- files of the operating system ----


def test_missing_file(tmp_path: Path) -> None:
    failure = refused(open_gguf, tmp_path / "none.gguf", code=lib.KVS_E_IO, match="No such file")
    assert failure.offset == 2


def test_folder(tmp_path: Path) -> None:
    refused(open_gguf, tmp_path, code=lib.KVS_E_IO, match="is a folder")


def test_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(open_gguf, tmp_path / "pipe.gguf", code=lib.KVS_E_IO, match="no regular file")


def test_device() -> None:
    refused(open_gguf, "/dev/zero", code=lib.KVS_E_IO, match="no regular file")


def test_a_link_to_a_model_is_followed(tmp_path: Path) -> None:
    gw.text().write(tmp_path / "text.gguf")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "text.gguf")
    assert lib.kvs_gguf_n_tensors(open_gguf(tmp_path / "link.gguf")) == 21


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "the file is empty"),
        (b"GG", "the file has 2 bytes only"),
        (b"GGUF\3\0\0\0" + bytes(15), "the file has 23 bytes only"),
        (b"<!DOCTYPE html><html>no such page</html>", 'starts with "<!DOCTYPE html><html>no such pag", not with GGUF: is this a web page'),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
        (b"Entry not found\n", "is this a text file?"),
        (b"PK\3\4" + bytes(40), "ZIP archive"),
        (b"tjgg\3\0\0\0" + bytes(40), "old GGML file"),
        (b"\x7f\x80\x1b[31m" + bytes(40), "starts with the bytes 7f 80 1b 5b"),
    ],
)
def test_what_is_not_gguf(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    refused(open_gguf, tmp_path / "model.gguf", code=lib.KVS_E_FORMAT, match=match, offset=0)


# ---- the container ----


@pytest.mark.parametrize(
    ("version", "match"),
    [(0, "version 0 is not"), (1, "convert the model again"), (4, "version 4 is not supported, 2 and 3 are"), (0x03000000, "big-endian")],
)
def test_versions_that_do_not_load(tmp_path: Path, version: int, match: str) -> None:
    refused(open_gguf, File(version=version).write(tmp_path / "m.gguf"), code=lib.KVS_E_FORMAT, match=match, offset=4)


@pytest.mark.parametrize("version", [2, 3])
def test_versions_that_load(tmp_path: Path, version: int) -> None:
    f = gw.text()
    f.version = version
    file = open_gguf(f.write(tmp_path / "m.gguf"))
    assert lib.kvs_gguf_version(file) == version
    assert info(load(f.write(tmp_path / "m.gguf"))).n_layer == 2


@pytest.mark.parametrize("count", [4, 1 << 20, 1 << 32, 1 << 63, (1 << 64) - 1])
def test_counts_beyond_the_file(tmp_path: Path, count: int) -> None:
    f = File(n_keys=count, keys={"a": (U8, 1)})
    refused(open_gguf, f.write(tmp_path / "k.gguf"), code=lib.KVS_E_FORMAT, match=f"the header counts {count} keys", offset=16)
    f = File(n_tensors=count, keys={"a": (U8, 1)})
    refused(open_gguf, f.write(tmp_path / "t.gguf"), code=lib.KVS_E_FORMAT, match=f"the header counts {count} tensors", offset=8)


def test_counts_beyond_reason(tmp_path: Path) -> None:
    with open(tmp_path / "big.gguf", "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 2_000_000, 0))
        file.truncate(200 << 20)  # sparse: room enough
    refused(open_gguf, tmp_path / "big.gguf", code=lib.KVS_E_FORMAT, match="2000000 tensors, more than 1048576", offset=8)


def test_metadata_beyond_reason(tmp_path: Path) -> None:
    with open(tmp_path / "big.gguf", "wb") as file:
        file.write(File(extra_keys=[gw.key("a", STRING, gw.string(b"", 300 << 20))], n_keys=2).header())
        file.truncate(400 << 20)
    refused(open_gguf, tmp_path / "big.gguf", code=lib.KVS_E_FORMAT, match="does not fit", what="a")


def test_every_cut_is_refused(tmp_path: Path) -> None:
    """No prefix of a sound file is sound, and none of them crashes."""
    f = gw.text(n_layer=1)
    whole = f.to_bytes()
    header = len(f.header())
    path = tmp_path / "cut.gguf"
    cuts = [*range(600), *range(header - 1200, header + 40), len(whole) - 32 - 1]
    for n in cuts:
        path.write_bytes(whole[:n])
        with pytest.raises(Failure) as caught:
            open_gguf(path)
        assert caught.value.code == lib.KVS_E_FORMAT and caught.value.message
    path.write_bytes(whole[: header + 4096])
    refused(open_gguf, path, code=lib.KVS_E_FORMAT, match="is the download complete?", what="token_embd.weight")


KEY_AT = 24 + 8 + 1 + 4  # where the value of a first key named with one letter begins


@pytest.mark.parametrize(
    ("record", "what", "match", "offset"),
    [
        (gw.string(b"") + bytes(6), "key 1 of 1", "its name is empty", 24),
        (gw.string(b"a\0b") + struct.pack("<IB", U8, 1), "key 1 of 1", "no printable ASCII", 33),
        (gw.string(b"a\x1b[31m") + struct.pack("<IB", U8, 1), "key 1 of 1", "no printable ASCII", 33),
        (gw.string("é") + struct.pack("<IB", U8, 1), "key 1 of 1", "no printable ASCII", 32),
        (gw.string(b"k" * 65536) + struct.pack("<IB", U8, 1), "key 1 of 1", "its name has 65536 bytes, 65535 are allowed", 24),
        (gw.string(b"abc", 1 << 62) + bytes(20), "key 1 of 1", "does not fit into the file", 24),
        (gw.string(b"abc", (1 << 64) - 8) + bytes(20), "key 1 of 1", "does not fit into the file", 24),
        (gw.key("a", 13, b"\0"), "a", "unknown type 13", 33),
        (gw.key("a", 1 << 31, b"\0"), "a", "unknown type 2147483648", 33),
        (gw.key("a", U64, b"\0\0\0"), "a", "the file ends after 40 bytes", KEY_AT),
        (gw.key("a", BOOL, b"\2"), "a", "a bool must be 0 or 1, not 2", KEY_AT),
        (gw.key("a", STRING, gw.string(b"xy", 3)), "a", "a string of 3 bytes does not fit", KEY_AT),
        (gw.key("a", STRING, gw.string(b"xy", (1 << 64) - 1)), "a", "does not fit", KEY_AT),
        (gw.key("a", ARRAY, gw.array(U8, b"xy", 3)), "a", "an array of 3 elements of type u8 does not fit", KEY_AT),
        (gw.key("a", ARRAY, gw.array(F64, [], 1 << 61)), "a", "does not fit", KEY_AT),
        (gw.key("a", ARRAY, gw.array(STRING, [], 1 << 61)), "a", "does not fit", KEY_AT + 12),
        (gw.key("a", ARRAY, gw.array(STRING, ["xy"], 2)), "a", "does not fit", None),
        (gw.key("a", ARRAY, gw.array(BOOL, [0, 1, 3])), "a", "a bool must be 0 or 1, not 3", KEY_AT + 14),
        (gw.key("a", ARRAY, struct.pack("<IQ", ARRAY, 1) + gw.array(U8, b"x")), "a", "arrays of arrays", KEY_AT),
        (gw.key("a", ARRAY, struct.pack("<IQ", 77, 0)), "a", "elements of the unknown type 77", KEY_AT),
        (gw.key("general.alignment", U32, 0), "general.alignment", "must be a power of two from 8 to 65536, not 0", None),
        (gw.key("general.alignment", U32, 4), "general.alignment", "not 4", None),
        (gw.key("general.alignment", U32, 48), "general.alignment", "not 48", None),
        (gw.key("general.alignment", U32, 1 << 17), "general.alignment", "not 131072", None),
        (gw.key("general.alignment", U64, 32), "general.alignment", "is of type u64, not u32", None),
    ],
)
def test_broken_keys(tmp_path: Path, record: bytes, what: str, match: str, offset: int | None) -> None:
    path = File(extra_keys=[record]).write(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(File(extra_keys=[record]).header())
    refused(open_gguf, path, code=lib.KVS_E_FORMAT, match=match, what=what, offset=offset)


def test_duplicates(tmp_path: Path) -> None:
    f = File(keys={"a": (U8, 1), "b": (U8, 2)}, extra_keys=[gw.key("a", U8, 3)])
    refused(
        open_gguf, f.write(tmp_path / "m.gguf"), code=lib.KVS_E_FORMAT, match="this key appears twice", what="a", offset=24 + 2 * 14 + 13
    )
    raw = File(tensors={"t": Tensor((8,)), "u": Tensor((8,))}).to_bytes().replace(gw.string("u"), gw.string("t"))
    (tmp_path / "m.gguf").write_bytes(raw)
    refused(open_gguf, tmp_path / "m.gguf", code=lib.KVS_E_FORMAT, match="this tensor appears twice", what="t")


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (Tensor((), n_dims=0), "1 to 4 dimensions, not 0"),
        (Tensor((1, 1, 1, 1, 1)), "1 to 4 dimensions, not 5"),
        (Tensor((8,), n_dims=1 << 31), "1 to 4 dimensions, not 2147483648"),
        (Tensor((8, 0), data=b""), "its dimension 1 is 0"),
        (Tensor((1 << 63,), data=b""), f"its dimension 0 is {1 << 63}"),
        (Tensor((1 << 32, 1 << 32), data=b""), "product of its dimensions overflows"),
        (Tensor((1 << 21, 1 << 21, 1 << 21), data=b""), "product of its dimensions overflows"),
        (Tensor((1 << 62,), data=b""), "size in bytes overflows"),
        (Tensor((33,), kind=gw.TYPE_Q8_0, data=b""), "rows of 33 elements are not whole Q8_0 blocks of 32"),
        (Tensor((16, 2), kind=gw.TYPE_Q8_0, data=b""), "rows of 16 elements are not whole Q8_0 blocks"),
        (Tensor((8,), kind=1 << 31, data=b""), "2147483648 is no tensor type"),
        (Tensor((8,), offset=4), "its offset 4 is not a multiple of the alignment 32"),
        (Tensor((8,), offset=(1 << 64) - 32), "goes beyond the end of the file"),
        (Tensor((8,), offset=1 << 40), "goes beyond the end of the file"),
        (Tensor((8,), offset=32), "goes beyond the end of the file"),
        (Tensor((1 << 40,), data=b"x"), "goes beyond the end of the file"),
        (Tensor((8,), kind=16, offset=1 << 40), "goes beyond the end of the file"),
    ],
)
def test_broken_tensors(tmp_path: Path, tensor: Tensor, match: str) -> None:
    f = File(tensors={"some.tensor": tensor})
    failure = refused(open_gguf, f.write(tmp_path / "m.gguf"), code=lib.KVS_E_FORMAT, match=match, what="some.tensor")
    assert 24 + 8 + 11 <= failure.offset <= len(f.header())


@pytest.mark.parametrize("name", ["", "x" * 64, "a\0b", "a\nb", "ü"])
def test_broken_tensor_names(tmp_path: Path, name: str) -> None:
    f = File(tensors={name: Tensor((8,))})
    refused(open_gguf, f.write(tmp_path / "m.gguf"), code=lib.KVS_E_FORMAT, match="its name", what="tensor 1 of 1")


def test_overlap(tmp_path: Path) -> None:
    for offset in (0, 32):
        f = File(tensors={"a": Tensor((16,)), "b": Tensor((16,), offset=offset)})
        refused(open_gguf, f.write(tmp_path / "m.gguf"), code=lib.KVS_E_FORMAT, match="its data overlaps that of")
    f = File(tensors={"a": Tensor((16,)), "b": Tensor((16,), offset=64)})
    assert lib.kvs_gguf_n_tensors(open_gguf(f.write(tmp_path / "m.gguf"))) == 2
    f = File(tensors={"a": Tensor((16,), offset=128), "b": Tensor((16,), offset=0)}, keys={"pad": (U8, 0)})
    (tmp_path / "m.gguf").write_bytes(f.to_bytes() + bytes(128))  # the order of offsets is free
    assert lib.kvs_gguf_n_tensors(open_gguf(tmp_path / "m.gguf")) == 2


def test_values_come_back(tmp_path: Path) -> None:
    """Any sound file may be looked at, whatever its architecture and tensor types."""
    f = File(alignment=64)
    f.keys = {
        "general.architecture": (STRING, "mamba"),
        "general.alignment": (U32, 64),
        "i8": (I8, -5),
        "u64": (U64, (1 << 64) - 1),
        "f64": (F64, 1e300),
        "bool": (BOOL, True),
        "bytes": (STRING, gw.string(b"\xff\0\xfe")),
        "empty": (ARRAY, (U16, [])),
        "i32s": (ARRAY, (I32, [1, -2, 3])),
        "bools": (ARRAY, (BOOL, [1, 0])),
        "strings": (ARRAY, (STRING, ["a", "", "\u2581b"])),
    }
    f.tensors = {"x": Tensor((32, 3), kind=gw.TYPE_Q8_0), "odd": Tensor((256, 2), kind=16), "y": Tensor((2, 3, 4, 5), kind=gw.TYPE_F16)}
    file = open_gguf(f.write(tmp_path / "m.gguf"))
    key, tensor = ffi.new("kvs_gguf_key *"), ffi.new("kvs_gguf_tensor *")
    seen = {}
    for i in range(lib.kvs_gguf_n_keys(file)):
        assert lib.kvs_gguf_key_at(file, i, key) == 0
        seen[ffi.string(key.name).decode()] = (i, key.type, key.element_type, key.count)
    assert list(seen) == list(f.keys)
    assert seen["i32s"][1:] == (ARRAY, I32, 3) and seen["i8"][1:] == (I8, -1, 1) and seen["empty"][1:] == (ARRAY, U16, 0)

    def text(name: str, j: int = 0) -> bytes:
        n = ffi.new("int64_t *")
        p = lib.kvs_gguf_string(file, seen[name][0], j, n)
        return ffi.buffer(p, n[0])[:]

    assert text("bytes") == b"\xff\0\xfe"
    assert [text("strings", j) for j in range(3)] == [b"a", b"", "\u2581b".encode()]
    assert lib.kvs_gguf_int(file, seen["i8"][0], 0) == -5
    assert lib.kvs_gguf_int(file, seen["bool"][0], 0) == 1
    assert [lib.kvs_gguf_int(file, seen["i32s"][0], j) for j in range(3)] == [1, -2, 3]
    assert [lib.kvs_gguf_int(file, seen["bools"][0], j) for j in range(2)] == [1, 0]
    assert lib.kvs_gguf_float(file, seen["f64"][0], 0) == 1e300
    # out of range: nothing, not a crash
    assert lib.kvs_gguf_int(file, seen["i32s"][0], 3) == 0 and lib.kvs_gguf_int(file, 99, 0) == 0 and lib.kvs_gguf_int(file, -1, -1) == 0
    assert lib.kvs_gguf_string(file, seen["strings"][0], 3, ffi.NULL) == ffi.NULL
    assert lib.kvs_gguf_string(file, seen["i8"][0], 0, ffi.NULL) == ffi.NULL
    assert lib.kvs_gguf_key_at(file, 11, key) == lib.KVS_E_ARGUMENT and lib.kvs_gguf_tensor_at(file, -1, tensor) == lib.KVS_E_ARGUMENT

    tensors = []
    for i in range(3):
        assert lib.kvs_gguf_tensor_at(file, i, tensor) == 0
        tensors.append((ffi.string(tensor.name).decode(), tensor.type, list(tensor.dims), tensor.bytes, tensor.n_dims, tensor.offset))
    start = (len(f.header()) + 63) // 64 * 64
    assert tensors == [
        ("x", 8, [32, 3, 1, 1], 102, 2, start),
        ("odd", 16, [256, 2, 1, 1], -1, 2, start + 128),
        ("y", 1, [2, 3, 4, 5], 240, 4, start + 192),
    ]
    refused(load, tmp_path / "m.gguf", code=lib.KVS_E_UNSUPPORTED, match='architecture "mamba" can\'t be run; what loads: text models')


def test_hundred_thousand_names_are_quick(tmp_path: Path) -> None:
    n = 100_000
    keys = b"".join(gw.key(f"k{i % n}", U8, i & 1) for i in range(n + 1))
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, n + 1) + keys)
    refused(open_gguf, tmp_path / "m.gguf", code=lib.KVS_E_FORMAT, match="this key appears twice", what="k0")


def test_random_damage_never_crashes(tmp_path: Path, rng: np.random.Generator) -> None:
    path, mm = tmp_path / "m.gguf", tmp_path / "mm.gguf"
    sound = gw.text(n_layer=1)
    image = gw.mmproj(n_layer=1)
    for _ in range(300):
        for f, p in ((sound, path), (image, mm)):
            raw = bytearray(f.to_bytes())
            for at in rng.integers(0, len(f.header()), rng.integers(0, 3)):
                raw[at] = rng.integers(0, 256)
            p.write_bytes(raw)
        try:
            load(path, mm)
        except Failure as failure:
            assert failure.message


# ---- text models ----


def test_a_text_model_loads(tmp_path: Path) -> None:
    i = loaded(tmp_path, gw.text())
    assert (i.n_layer, i.n_embd, i.n_ff, i.n_head, i.n_head_kv, i.head_dim, i.n_vocab) == (2, 32, 48, 4, 2, 8, 260)
    assert i.has_vision == 0 and i.identity != 0 and i.mmproj_identity == 0
    assert i.weight_bytes == sum(gw.nbytes(t.dims, t.kind) for t in gw.text().tensors.values())


def test_forms_of_text_models(tmp_path: Path) -> None:
    f = gw.text(heads_kv=4)
    del f.keys["llama.attention.head_count_kv"], f.tensors["output.weight"]  # MHA by default, tied
    i = loaded(tmp_path, f)
    assert i.n_head_kv == 4
    assert i.weight_bytes == sum(gw.nbytes(t.dims, t.kind) for t in f.tensors.values())
    for name, n in {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32, "ffn_gate": 48, "ffn_up": 48, "ffn_down": 32}.items():
        f = gw.text()
        f.tensors[f"blk.0.{name}.bias"] = Tensor((n,))
        loaded(tmp_path, f)
        f.tensors[f"blk.0.{name}.bias"] = Tensor((n + 1,))
        refused_text(tmp_path, f, code=lib.KVS_E_FORMAT, match=f"shape [{n + 1}], but the hyperparameters ask for [{n}]")
    f = gw.text()  # a head size of its own
    f.keys |= {"llama.attention.key_length": (U32, 12), "llama.attention.value_length": (U32, 12)}
    for layer in range(2):
        for name, dims in {"attn_q": (32, 48), "attn_k": (32, 24), "attn_v": (32, 24), "attn_output": (48, 32)}.items():
            f.tensors[f"blk.{layer}.{name}.weight"] = Tensor(dims)
    assert loaded(tmp_path, f).head_dim == 12


def test_widened_norms_and_foreign_extras(tmp_path: Path) -> None:
    f = gw.text()
    f.tensors["output_norm.weight"] = Tensor((32,), kind=gw.TYPE_F16)
    f.tensors["blk.0.ffn_norm.weight"] = Tensor((32,), kind=gw.TYPE_BF16)
    f.tensors["blk.1.attn_rot_embd"] = Tensor((4,), kind=16)  # a table of angles: neither its shape nor its type matters
    assert loaded(tmp_path, f).n_layer == 2


EXTRAS = ["blk.1.attn_norm.bias", "blk.0.attn_q_norm.weight", "blk.0.ffn_gate_inp.weight", "blk.2.attn_q.weight", "x"]


@pytest.mark.parametrize("name", EXTRAS)
def test_tensors_without_a_place(tmp_path: Path, name: str) -> None:
    """Running without them would be another model."""
    f = gw.text()
    f.tensors[name] = Tensor((32,))
    refused(load, f.write(tmp_path / "t.gguf"), code=lib.KVS_E_UNSUPPORTED, match="this tensor has no place", what=name)


def test_identity_follows_contents(tmp_path: Path) -> None:
    same = loaded(tmp_path, gw.text()).identity
    assert loaded(tmp_path, gw.text()).identity == same
    others = set()
    f = gw.text()
    f.tensors["blk.1.ffn_up.weight"].data = np.full(32 * 48, 1e-3, np.float32).tobytes()
    others.add(loaded(tmp_path, f).identity)
    others.add(loaded(tmp_path, replace(gw.text(), "llama.rope.freq_base", F32, 5e5)).identity)
    others.add(loaded(tmp_path, replace(gw.text(), "llama.attention.layer_norm_rms_epsilon", F32, 1e-6)).identity)
    others.add(loaded(tmp_path, replace(gw.text(), "llama.rope.scaling.factor", F32, 2.0)).identity)
    f = gw.text()
    f.tensors["rope_freqs.weight"] = Tensor((4,), data=gw.floats(1, 1, 2, 4))
    others.add(loaded(tmp_path, f).identity)
    assert len(others | {same}) == 6
    f = gw.text()
    f.tensors["rope_freqs.weight"] = Tensor((4,), data=gw.floats(2, 2, 2, 2))
    linear = replace(gw.text(), "llama.rope.scale_linear", F32, 2.0)
    assert loaded(tmp_path, linear).identity in others  # the old key means the same as the new one
    assert loaded(tmp_path, replace(linear, "llama.rope.scaling.type", STRING, "none")).identity == same


@pytest.mark.parametrize(
    ("key", "kind", "value", "code", "match"),
    [
        ("general.architecture", STRING, "qwen2", "UNSUPPORTED", 'architecture "qwen2" can\'t be run; what loads'),
        ("general.architecture", STRING, "clip", "MISMATCH", "this is an mmproj (the image half of a pair), not a text model"),
        ("general.architecture", U32, 1, "FORMAT", "is of type u32, a string is needed"),
        ("general.architecture", STRING, "x" * 100, "FORMAT", "a string of 100 bytes"),
        ("general.architecture", STRING, "lla\0ma", "FORMAT", "no printable ASCII"),
        ("general.architecture", STRING, "\x9b31m", "FORMAT", "no printable ASCII"),
        ("llama.block_count", U32, 0, "FORMAT", "0 is out of range, 1 to 1024"),
        ("llama.block_count", U32, 1025, "FORMAT", "1025 is out of range"),
        ("llama.block_count", I32, -1, "FORMAT", "-1 is out of range"),
        ("llama.block_count", U64, (1 << 64) - 1, "FORMAT", "out of range"),
        ("llama.block_count", STRING, "2", "FORMAT", "is of type string, an integer is needed"),
        ("llama.block_count", F32, 2.0, "FORMAT", "is of type f32, an integer is needed"),
        ("llama.block_count", ARRAY, (U32, [2, 2]), "FORMAT", "is of type array of u32, an integer is needed"),
        ("llama.embedding_length", U32, 0, "FORMAT", "0 is out of range"),
        ("llama.embedding_length", U32, 1 << 31, "FORMAT", "out of range"),
        ("llama.embedding_length", U32, 34, "FORMAT", "does not divide the embedding length"),
        ("llama.context_length", U32, 0, "FORMAT", "0 is out of range"),
        ("llama.feed_forward_length", U32, 0, "FORMAT", "0 is out of range"),
        ("llama.attention.head_count", U32, 0, "FORMAT", "0 is out of range"),
        ("llama.attention.head_count", U32, 6, "FORMAT", "does not divide the embedding length, 32"),
        ("llama.attention.head_count", U32, 32, "FORMAT", "odd or large head size 1"),
        ("llama.attention.head_count_kv", U32, 3, "FORMAT", "3 does not divide the number of heads, 4"),
        ("llama.attention.head_count_kv", U32, 0, "FORMAT", "0 is out of range"),
        ("llama.attention.key_length", U32, 12, "FORMAT", "12 differs from the value length, 8"),
        ("llama.attention.layer_norm_rms_epsilon", F32, 0.0, "FORMAT", "0 is out of range"),
        ("llama.attention.layer_norm_rms_epsilon", F32, -1e-5, "FORMAT", "out of range"),
        ("llama.attention.layer_norm_rms_epsilon", F32, float("nan"), "FORMAT", "nan is out of range"),
        ("llama.attention.layer_norm_rms_epsilon", F32, float("inf"), "FORMAT", "inf is out of range"),
        ("llama.attention.layer_norm_rms_epsilon", U32, 1, "FORMAT", "is of type u32, f32 is needed"),
        ("llama.rope.freq_base", F32, 0.0, "FORMAT", "0 is out of range"),
        ("llama.rope.freq_base", F32, float("nan"), "FORMAT", "nan is out of range"),
        ("llama.rope.dimension_count", U32, 7, "FORMAT", "7 must be even"),
        ("llama.rope.dimension_count", U32, 10, "FORMAT", "10 must be even, and the head size at most, which is 8"),
        ("llama.rope.scaling.type", STRING, "yarn", "UNSUPPORTED", 'rope scaling "yarn" can\'t be run'),
        ("llama.rope.scaling.factor", F32, 0.0, "FORMAT", "0 is out of range"),
        ("llama.rope.scale_linear", F32, float("inf"), "FORMAT", "inf is out of range"),
        ("llama.rope.scaling.attn_factor", F32, 1.2, "UNSUPPORTED", "models with this scaling (1.2)"),
        ("llama.logit_scale", F32, 0.5, "UNSUPPORTED", "models with this scaling (0.5)"),
        ("llama.expert_count", U32, 8, "UNSUPPORTED", "models with experts (MoE; 8 of them here) can't be run"),
        ("llama.vocab_size", U32, 261, "FORMAT", "261 differs from the length of the token list, 260"),
    ],
)
def test_refused_hyperparameters(tmp_path: Path, key: str, kind: int, value: Any, code: str, match: str) -> None:
    f = replace(gw.text(), key, kind, value)
    failure = refused_text(tmp_path, f, code=getattr(lib, "KVS_E_" + code), match=match)
    assert failure.what == key or "divide" in match


@pytest.mark.parametrize("key", ["general.architecture", "llama.context_length", "llama.block_count", "llama.attention.head_count"])
def test_missing_keys(tmp_path: Path, key: str) -> None:
    f = gw.text()
    del f.keys[key]
    refused_text(tmp_path, f, code=lib.KVS_E_FORMAT, match="this key is missing", what=key)


def test_harmless_variants(tmp_path: Path) -> None:
    for key, kind, value in [("llama.expert_count", U32, 0), ("llama.rope.scaling.attn_factor", F32, 1.0), ("llama.vocab_size", U64, 260)]:
        assert loaded(tmp_path, replace(gw.text(), key, kind, value)).n_layer == 2


def test_rope_factors_must_divide(tmp_path: Path) -> None:
    for bad in (0.0, -1.0, float("nan")):
        f = gw.text()
        f.tensors["rope_freqs.weight"] = Tensor((4,), data=gw.floats(1, 1, bad, 1))
        refused_text(tmp_path, f, code=lib.KVS_E_FORMAT, match="its value 2 is", what="rope_freqs.weight")
    f = gw.text()
    f.tensors["rope_freqs.weight"] = Tensor((8,))
    refused_text(tmp_path, f, code=lib.KVS_E_FORMAT, match="shape [8], but the hyperparameters ask for [4]", what="rope_freqs.weight")


def test_every_missing_tensor_is_named(tmp_path: Path) -> None:
    for name in gw.text(n_layer=1).tensors:
        f = gw.text(n_layer=1)
        del f.tensors[name]
        if name == "output.weight":
            loaded(tmp_path, f)
        else:
            refused_text(tmp_path, f, code=lib.KVS_E_FORMAT, match="this tensor is missing", what=str(name))


def test_every_wrong_shape_is_named(tmp_path: Path) -> None:
    for name, t in gw.text(n_layer=1).tensors.items():
        f = gw.text(n_layer=1)
        f.tensors[name] = Tensor((t.dims[0] + 2, *t.dims[1:]))
        refused_text(tmp_path, f, code=lib.KVS_E_FORMAT, match=f"has the shape [{t.dims[0] + 2}", what=str(name))
        f.tensors[name] = Tensor((t.dims[0], *t.dims[1:], 2)) if len(t.dims) == 1 else Tensor((t.dims[0], t.dims[1] + 1))
        refused_text(tmp_path, f, code=lib.KVS_E_FORMAT, match="but the hyperparameters ask for [", what=str(name))


def test_a_type_that_does_not_load_is_named(tmp_path: Path) -> None:
    f = gw.text(embd=256, ff=256)
    f.tensors["blk.1.ffn_up.weight"] = Tensor((256, 256), kind=19)
    refused_text(tmp_path, f, code=lib.KVS_E_UNSUPPORTED, match="tensors of type IQ1_S (19) can't be run; F32", what="blk.1.ffn_up.weight")
    f.tensors["blk.1.ffn_up.weight"] = Tensor((256, 256), kind=4711)
    refused_text(tmp_path, f, code=lib.KVS_E_UNSUPPORTED, match="unknown (4711)", what="blk.1.ffn_up.weight")


def test_vocabulary_only(tmp_path: Path) -> None:
    f = gw.text()
    f.tensors.clear()
    refused_text(tmp_path, f, code=lib.KVS_E_FORMAT, match="the file holds a vocabulary only, no weights")


# ---- split models ----


def write_split(folder: Path, n: int = 3, **lies: int) -> list[Path]:
    whole = gw.text()
    names = list(whole.tensors)
    paths = []
    for i in range(n):
        f = File(keys=dict(whole.keys) if i == 0 else {})
        f.keys["split.no"] = (U16, lies.get(f"no{i}", i))
        f.keys["split.count"] = (U16, lies.get(f"count{i}", n))
        f.keys["split.tensors.count"] = (I32, lies.get("tensors", len(names)))
        f.tensors = {name: whole.tensors[name] for name in names[i::n]}
        if lies.get("twice") == i:
            f.tensors["token_embd.weight"] = whole.tensors["token_embd.weight"]
        paths.append(folder / f"m-{i + 1:05}-of-{n:05}.gguf")
        f.write(paths[-1])
    return paths


def test_split_model(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    split = info(load(paths[0]))
    whole = loaded(tmp_path, gw.text())
    assert (split.n_layer, split.weight_bytes) == (2, whole.weight_bytes)
    paths[1].unlink()
    failure = refused(load, paths[0], code=lib.KVS_E_IO, match="part 2 of 3 of this split model is missing")
    assert failure.path.endswith("m-00002-of-00003.gguf")
    refused(
        load, paths[2], code=lib.KVS_E_FORMAT, match="this is part 3 of 3 of a split model; give the first part instead: ", what="split.no"
    )


def test_split_model_that_lies(tmp_path: Path) -> None:
    first = write_split(tmp_path, no1=2)[0]
    refused(load, first, code=lib.KVS_E_FORMAT, match="this is part 3 of 3 by its own account, part 2 of 3 by its name", what="split.no")
    first = write_split(tmp_path, count2=4)[0]
    refused(load, first, code=lib.KVS_E_FORMAT, match="part 3 of 4 by its own account", what="split.no")
    first = write_split(tmp_path, tensors=22)[0]
    refused(load, first, code=lib.KVS_E_FORMAT, match="22 tensors are promised, the 3 parts hold 21", what="split.tensors.count")
    first = write_split(tmp_path, twice=2)[0]
    refused(load, first, code=lib.KVS_E_FORMAT, match="this tensor is in part 1, too", what="token_embd.weight")
    first = write_split(tmp_path, n=2, count0=1000)[0]
    refused(load, first, code=lib.KVS_E_UNSUPPORTED, match="a model of 1000 parts", what="split.count")
    renamed = write_split(tmp_path)[0].rename(tmp_path / "mine.gguf")
    refused(load, renamed, code=lib.KVS_E_FORMAT, match="its name does not end in -00001-of-00003.gguf", what="split.count")
