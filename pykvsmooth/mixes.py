"""Which type each tensor of a GGUF file gets. The names and rules of the mixes are those that llama.cpp's files have made common."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .checks import choice


@dataclass(frozen=True)
class Mix:
    """type: of all matrices that no rule names. file_type: what general.file_type says."""

    type: str
    file_type: int


MIXES = {
    "f32": Mix("F32", 0),
    "f16": Mix("F16", 1),
    "bf16": Mix("BF16", 32),
    "q8_0": Mix("Q8_0", 7),
    "q4_0": Mix("Q4_0", 2),
    "q4_1": Mix("Q4_1", 3),
    "q5_0": Mix("Q5_0", 8),
    "q5_1": Mix("Q5_1", 9),
    "q2_k": Mix("Q2_K", 10),
    "q3_k_s": Mix("Q3_K", 11),
    "q3_k_m": Mix("Q3_K", 12),
    "q4_k_s": Mix("Q4_K", 14),
    "q4_k_m": Mix("Q4_K", 15),
    "q5_k_s": Mix("Q5_K", 16),
    "q5_k_m": Mix("Q5_K", 17),
    "q6_k": Mix("Q6_K", 18),
}
SHORT = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
PLAIN = ("F32", "F16", "BF16")
# Rows that are no multiple of 256 get a type of 32-blocks with no fewer bits, and F16 where they are no multiple of 32 either.
BLOCK = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32}
IN_PLACE = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LAYER = re.compile(r"blk\.(\d{1,6})\.(\w+)\.weight")


def mix_name(mix: str) -> str:
    """The mix that is meant, "q4_k_m" for "Q4_K". ValueError for an unknown one."""
    low = mix.lower() if isinstance(mix, str) else mix
    return choice("mix", SHORT.get(low, low), [*MIXES, *SHORT])


def tensor_type(name: str, shape: Sequence[int], mix: str, n_layer: int, tied: bool = False) -> str:
    """The type ("Q6_K") of a tensor in a file of this mix.

    name as in GGUF; shape as NumPy has it, the length of a row last; n_layer: blocks "blk.N" of the language model; tied: there is no
    output.weight, the embedding serves as both.
    """
    return fitting_type(wanted_type(name, shape, mix, n_layer, tied), shape[-1])


def wanted_type(name: str, shape: Sequence[int], mix: str, n_layer: int, tied: bool = False) -> str:
    """tensor_type, were rows always multiples of 256.

    Vectors (norms, biases, the class embedding) and the position embedding are F32. The tower's patch kernel is F16, or F32 in an F32 or
    BF16 file: other runtimes can convolve with nothing else. In a quantized file the output matrix, which every token depends on, has
    at least Q6_K. The mixes then give more bits to attn_v and ffn_down, where errors hurt most: see _richer.
    """
    mix = mix_name(mix)
    base = MIXES[mix].type
    if len(shape) < 2 or not name.endswith(".weight") or name.startswith("v.position_embd"):
        return "F32"
    if name.startswith("v.patch_embd"):
        return "F32" if base in ("F32", "BF16") else "F16"
    if base in PLAIN:
        return base
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q8_0" if base == "Q8_0" else "Q6_K"
    block = _LAYER.fullmatch(name)
    return (block and _richer(block[2], int(block[1]), n_layer, shape, mix)) or base


def _richer(part: str, layer: int, n_layer: int, shape: Sequence[int], mix: str) -> str | None:
    """The type of a matrix that a mix treats better than the rest. Outer layers: the first and the last eighth; "often": these, and every
    third one between."""
    eighth = n_layer // 8
    first = layer < eighth
    often = first or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2
    grouped = shape[0] * 4 <= shape[-1]  # four query heads or more share a KV head: attn_v is small, and each of its rows counts
    rules: dict[tuple[str, str], str | None] = {
        ("q2_k", "attn_v"): "Q4_K" if grouped else "Q3_K",
        ("q2_k", "ffn_down"): "Q3_K",
        ("q2_k", "attn_output"): "Q3_K",
        ("q3_k_m", "attn_v"): "Q5_K" if layer < 2 else "Q4_K",
        ("q3_k_m", "ffn_down"): "Q5_K" if layer < n_layer // 16 else "Q4_K",
        ("q3_k_m", "attn_output"): "Q4_K",
        ("q4_k_s", "attn_v"): "Q5_K" if layer < 4 else None,
        ("q4_k_s", "ffn_down"): "Q5_K" if first else None,
        ("q4_k_m", "attn_v"): "Q6_K" if often else None,
        ("q4_k_m", "ffn_down"): "Q6_K" if often else None,
        ("q5_k_m", "attn_v"): "Q6_K" if often else None,
        ("q5_k_m", "ffn_down"): "Q6_K" if often else None,
    }
    return rules.get((mix, part))


def fitting_type(wanted: str, cols: int) -> str:
    """wanted, or what stands in its place where rows of cols values are no whole blocks."""
    if cols % BLOCK.get(wanted, 256) == 0:
        return wanted
    other = IN_PLACE.get(wanted, "F16")
    return other if cols % BLOCK[other] == 0 else "F16"
