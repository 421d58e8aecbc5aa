"""A run as one JSON object. Its keys:

version, library (its file), commit (short; "-dirty": with changes; only in a git checkout), compiler (of the library; only if it names
one), complete (false: it was interrupted, or stopped by an error), settings (as bench.Settings has them), machine (as machine.facts
says), model: path, mmproj, weight_bytes, token_bytes (of the weights, read for one token), output_bytes (of them, the output matrix's),
row_operations (of the layers' matrices, for one row of a prompt), picture_operations (tower and projector), device, device_reason,
gpu_layers (of layers), layers, vision_blocks, image_rows, vision_precision (what came of settings.precision: f32, bf16, f16; null without
a tower), kv_type (of the cache).

figures: a list of
  what     roof, load, first pass (of the first token that is fed to a session of a model just loaded: on a CPU it brings the weights
           into the order that the kernels read), encode, prefill, decode, policy, beside, sessions, answer (a caption with the model
           loaded: from the picture's file to the last token), split (a token with half of the layers on a GPU, over what those with
           all and none of them there predict), caption (the whole process)
  at       which of them: {"kind": "read"}, {"depth": 640}, {"rows": 640}, {"sessions": 4, "depth": 128}, {"tokens": 128}
  threads, unit ("s", "tokens/s", "rows/s", "bytes/s", "operations/s", "ratio"), error (empty if all went well)
  value    {median, min, q1, q3, max, n} of values, the repetitions that count; null where there are none
  roofs    by kind (read, read_huge, f32, int8, bf16, amx_int8, amx_bf16; of a GPU read, copy, f32, int8, f16_mma): the same of what
           was measured right before and right after each repetition, the mean of both; none where a GPU and the CPU share the layers
  shares   by kind: the same of the share of that roof, 0..1
  peers    by setting: value, values, error, dropped (true: 15 % behind the best after three repetitions or
           more, by the median of pairs, so it was not run to the end)
  peer     the best setting, or null; ahead: how many times faster than it, pair by pair: value as above, or null
  more     encode: operations, s_per_block. prefill: operations. decode: bytes_per_token. load: peak_bytes (after a caption at n_ctx 1024),
           page_cache. caption: tokens, peak_bytes, peer_peak_bytes, stats, unequal (fewer tokens than asked for: not compared).
           answer: tokens, stats, unequal, compared (what the peer's seconds are). split: gpu_s, cpu_s, half_s (of a token),
           output_share (of what is read for it: the output matrix, which is the GPU's).
           sessions: against_one. policy (values: seconds of a token with KVSmooth over those without it): interval (95 %, bootstrap over
           tokens), off_s, on_s, control (without it against without it: the noise), instructions (the ratio of those, or why not).
           beside (values: seconds of a token while another process keeps one thread busy over those without it): interval (over
           repetitions), alone_s, beside_s, fair (what it would be if all threads shared the cores evenly; only of a CPU)
Bytes, operations (a multiply-add is two) and seconds throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .figures import Figure, spread
from .roofs import MEMORY

if TYPE_CHECKING:
    from .run import Bench


def record(bench: Bench) -> dict[str, Any]:
    return {
        **bench.origin,
        "complete": bench.complete,
        "settings": asdict(bench.settings),
        "machine": bench.machine,
        "model": bench.model_facts,
        "figures": [_figure(figure, bench) for figure in bench.figures],
    }


def held_against(figure: Figure) -> list[str]:
    """The roofs that say something about this figure: by the units that it may use, tiles before vectors, and of memory the faster way."""
    units = {"prefill": ("int8", "amx_int8", "f16_mma"), "encode": ("f32", "bf16", "amx_bf16", "f16_mma")}
    tiles = {"int8": ("amx_int8", "f16_mma"), "bf16": ("amx_bf16",)}
    there = {kind for kind, shares in figure.shares.items() if shares}
    kinds = [kind for kind in units.get(figure.what, MEMORY) if kind in there and not there.intersection(tiles.get(kind, ()))]
    return kinds if figure.what in units else sorted(kinds, key=lambda kind: spread(figure.roofs[kind]).median)[-1:]


def against_one(figure: Figure, figures: Sequence[Figure]) -> list[float]:
    """Tokens per second of many sessions over those of one, pair by pair; empty where one was not measured."""
    alone = next((f for f in figures if f.what == "sessions" and f.threads == figure.threads and f.at.get("sessions") == 1), None)
    return [many / one for many, one in zip(figure.values, alone.values, strict=False)] if alone else []


def seconds_per_block(figure: Figure, model: dict[str, Any]) -> float | None:
    """Of an encode, all that it does shared among the blocks of the tower."""
    blocks = model.get("vision_blocks")
    return spread(figure.values).median / blocks if figure.values and blocks else None


def _figure(figure: Figure, bench: Bench) -> dict[str, Any]:
    more = dict(figure.more)
    if figure.what == "sessions":
        more["against_one"] = _spread(against_one(figure, bench.figures))
    if figure.what == "encode":
        more["s_per_block"] = seconds_per_block(figure, bench.model_facts)
    return {
        "what": figure.what,
        "at": figure.at,
        "threads": figure.threads,
        "unit": figure.unit,
        "error": figure.error,
        "value": _spread(figure.values),
        "values": figure.values,
        "roofs": {kind: _spread(values) for kind, values in figure.roofs.items()},
        "shares": {kind: _spread(values) for kind, values in figure.shares.items()},
        "peers": {name: {"value": _spread(peer.values), **asdict(peer)} for name, peer in figure.peers.items()},
        "peer": figure.best_peer(),
        "ahead": _spread(figure.ahead()),
        "more": more,
    }


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    return asdict(spread(values)) if values else None
