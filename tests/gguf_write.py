"""GGUF files byte by byte, sound ones and broken ones: every count, type, length and offset may be set to a lie.

For random models that run, see tiny.py; this module is for what a loader must refuse.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
PACK = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}
TYPE_F32, TYPE_F16, TYPE_Q8_0, TYPE_BF16 = 0, 1, 8, 30
BLOCKS = {TYPE_F32: (1, 4), TYPE_F16: (1, 2), TYPE_Q8_0: (32, 34), TYPE_BF16: (1, 2)}


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def scalar(kind: int, value: Any) -> bytes:
    return string(value) if kind == STRING else struct.pack("<" + PACK[kind], value)


def array(kind: int, values: Any, count: int | None = None) -> bytes:
    head = struct.pack("<IQ", kind, len(values) if count is None else count)
    return head + b"".join(scalar(kind, value) for value in values)


def key(name: str | bytes, kind: int, value: Any) -> bytes:
    """value: what the type says, or bytes as they are to stand in the file."""
    if not isinstance(value, bytes):
        value = array(*value) if kind == ARRAY else scalar(kind, value)
    return string(name) + struct.pack("<I", kind) + value


def nbytes(dims: tuple[int, ...], kind: int) -> int:
    block, size = BLOCKS[kind]
    n = 1
    for dim in dims:
        n *= dim
    return n // block * size


@dataclass
class Tensor:
    """dims[0] is the row length. data: None = zeros. offset: None = behind the one before it."""

    dims: tuple[int, ...]
    kind: int = TYPE_F32
    data: bytes | None = None
    offset: int | None = None
    n_dims: int | None = None


@dataclass
class File:
    keys: dict[str | bytes, tuple[int, Any]] = field(default_factory=dict)
    tensors: dict[str | bytes, Tensor] = field(default_factory=dict)
    version: int = 3
    alignment: int = 32  # of the layout; what the file says of it is a key
    extra_keys: list[bytes] = field(default_factory=list)  # raw records behind the keys
    n_keys: int | None = None
    n_tensors: int | None = None

    def header(self) -> bytes:
        n_keys = len(self.keys) + len(self.extra_keys)
        counts = len(self.tensors) if self.n_tensors is None else self.n_tensors, n_keys if self.n_keys is None else self.n_keys
        out = b"GGUF" + struct.pack("<IQQ", self.version, *counts)
        out += b"".join(key(name, *value) for name, value in self.keys.items()) + b"".join(self.extra_keys)
        offset = 0
        for name, t in self.tensors.items():
            at = offset if t.offset is None else t.offset
            dims = struct.pack(f"<I{len(t.dims)}Q", len(t.dims) if t.n_dims is None else t.n_dims, *t.dims)
            out += string(name) + dims + struct.pack("<IQ", t.kind, at)
            offset = at + self.padded(self.data(t))
        return out

    def padded(self, data: bytes) -> int:
        return (len(data) + self.alignment - 1) // self.alignment * self.alignment

    @staticmethod
    def data(t: Tensor) -> bytes:
        if t.data is not None:
            return t.data
        return bytes(nbytes(t.dims, t.kind) if t.kind in BLOCKS else 32)

    def to_bytes(self) -> bytes:
        out = self.header()
        out += bytes(-len(out) % self.alignment)
        for t in self.tensors.values():
            data = self.data(t)
            out += data + bytes(self.padded(data) - len(data))
        return out

    def write(self, path: Path) -> str:
        path.write_bytes(self.to_bytes())
        return str(path)


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def vocabulary(n: int = 260) -> dict[str | bytes, tuple[int, Any]]:
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    tokens += [chr(0x4E00 + i) for i in range(n - len(tokens))]
    types = [2, 3, 3] + [6] * 256 + [1] * (n - 259)
    return {
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.scores": (ARRAY, (F32, [0.0] * n)),
        "tokenizer.ggml.token_type": (ARRAY, (I32, types)),
        "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.eos_token_id": (U32, 2),
        "tokenizer.ggml.unknown_token_id": (U32, 0),
    }


def text(n_layer: int = 2, embd: int = 32, heads: int = 4, heads_kv: int = 2, ff: int = 48, vocab: int = 260) -> File:
    """A sound text model of zeros."""
    d = embd // heads
    f = File()
    f.keys["general.architecture"] = (STRING, "llama")
    for name, value in {
        "context_length": 64,
        "embedding_length": embd,
        "block_count": n_layer,
        "feed_forward_length": ff,
        "attention.head_count": heads,
        "attention.head_count_kv": heads_kv,
    }.items():
        f.keys["llama." + name] = (U32, value)
    f.keys["llama.attention.layer_norm_rms_epsilon"] = (F32, 1e-5)
    f.keys |= vocabulary(vocab)
    f.tensors["token_embd.weight"] = Tensor((embd, vocab))
    f.tensors["output_norm.weight"] = Tensor((embd,))
    f.tensors["output.weight"] = Tensor((embd, vocab))
    for i in range(n_layer):
        for name, dims in {
            "attn_norm": (embd,),
            "attn_q": (embd, heads * d),
            "attn_k": (embd, heads_kv * d),
            "attn_v": (embd, heads_kv * d),
            "attn_output": (heads * d, embd),
            "ffn_norm": (embd,),
            "ffn_gate": (embd, ff),
            "ffn_up": (embd, ff),
            "ffn_down": (ff, embd),
        }.items():
            f.tensors[f"blk.{i}.{name}.weight"] = Tensor(dims)
    return f


def mmproj(
    n_layer: int = 2, embd: int = 16, heads: int = 2, ff: int = 24, image: int = 8, patch: int = 4, inner: int = 20, out: int = 32
) -> File:
    """A sound mmproj of zeros that fits text()."""
    f = File()
    f.keys["general.architecture"] = (STRING, "clip")
    for name in ("has_vision_encoder", "has_llava_projector"):
        f.keys["clip." + name] = (BOOL, True)
    f.keys["clip.projector_type"] = (STRING, "mlp")
    for name, value in {
        "image_size": image,
        "patch_size": patch,
        "embedding_length": embd,
        "feed_forward_length": ff,
        "block_count": n_layer,
        "attention.head_count": heads,
    }.items():
        f.keys["clip.vision." + name] = (U32, value)
    f.keys["clip.vision.attention.layer_norm_epsilon"] = (F32, 1e-5)
    f.keys["clip.vision.image_mean"] = (ARRAY, (F32, [0.5, 0.4, 0.3]))
    f.keys["clip.vision.image_std"] = (ARRAY, (F32, [0.2, 0.3, 0.4]))
    t = f.tensors
    t["v.class_embd"] = Tensor((embd,))
    t["v.patch_embd.weight"] = Tensor((patch, patch, 3, embd))
    t["v.position_embd.weight"] = Tensor((embd, (image // patch) ** 2 + 1))
    square, up, down = (embd, embd), (embd, ff), (ff, embd)
    layers = {f"v.blk.{i}.": i for i in range(n_layer)}
    dense = {"mm.0": (embd, inner), "mm.2": (inner, out)}
    norms = ["v.pre_ln"]
    for blk in layers:
        norms += [blk + "ln1", blk + "ln2"]
        dense |= {blk + name: square for name in ("attn_q", "attn_k", "attn_v", "attn_out")}
        dense |= {blk + "ffn_up": up, blk + "ffn_down": down}
    for name in norms:
        t[name + ".weight"] = t[name + ".bias"] = Tensor((embd,))
    for name, dims in dense.items():
        t[name + ".weight"], t[name + ".bias"] = Tensor(dims), Tensor((dims[1],))
    return f
