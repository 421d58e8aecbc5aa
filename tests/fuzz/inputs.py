"""Inputs of the fuzz targets, as tests/fuzz/harness.h reads them: options, then each part behind its length, the last one without."""

from __future__ import annotations

import struct
from pathlib import Path

import pykvsmooth as kvs

CORPUS = Path(__file__).resolve().parents[1] / "corpus"
N_PARTS = {"gguf": 0, "mmproj": 0, "model": 3, "tokenizer": 2, "detokenizer": 2, "session": 1}  # 0: the file as it is
SESSION_OPTIONS = [
    (0, "f32"),
    (1, "f16"),
    (2, "f16"),
    (4, "f16"),
    (7, "q8_0"),
    (12, "f16"),
    (15, "f32"),
    (17, "f16"),
    (36, "f16"),
    (63, "f16"),
]


def join(options: int, *parts: bytes) -> bytes:
    return struct.pack("<I", options) + b"".join(struct.pack("<I", len(part)) + part for part in parts[:-1]) + parts[-1]


def split(data: bytes, n_parts: int) -> tuple[int, list[bytes]]:
    """Options and parts; what is cut short is padded or empty."""
    options, data = int.from_bytes(data[:4], "little"), data[4:]
    parts = []
    for _ in range(n_parts - 1):
        length, data = int.from_bytes(data[:4], "little"), data[4:]
        parts.append(data[:length])
        data = data[length:]
    return options, [*parts, data]


def policies(options: int) -> list[kvs.KVSmooth | kvs.DSCR | kvs.PruneHal]:
    """What choose_policies of harness.c makes of these options."""
    variant = bool(options & 16)
    smooth = kvs.KVSmooth(
        lambda_ref=0.5,
        half_width=0.25,
        window=3,
        layers=[0],
        rope_mode="relative" if variant else "post",
        entropy_heads="per_kv_group" if variant else "all",
        ema="one_step" if variant else "recursive",
    )
    dscr = kvs.DSCR(sigma_d=0.5, sigma_s=0.5, alpha=0.5, beta=1.0, cut=0.0, coord_norm="patch", layers=[0])
    prune = kvs.PruneHal(keep=0.5, layers=[0], reversible=bool(options & 8), index_scope="kv_head" if options & 32 else "layer")
    return [policy for bit, policy in ((1, smooth), (2, dscr), (4, prune)) if options & bit]
