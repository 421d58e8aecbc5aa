"""KVS_LIBRARY=build/cuda-shim/libkvs_shim.so python -m models.cards --pair 7B TEXT.gguf MMPROJ.gguf [--pair 13B ...]

SPEED.md's table of consumer cards: computed, not measured. How many layers fit is what the loader itself chooses (gpu_layers="auto") on a
device with 92 % of the card's memory free; tests/shim is such a device (`make test-cuda` builds it), and the pair is really loaded there,
so the machine needs as much memory. Seconds of a token are the bytes that it reads over the card's bandwidth, as its maker gives it, and
for layers that found no room over the CPU's.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

import pykvsmooth as kvs
from pykvsmooth.bench import work
from pykvsmooth.machine import cuda_text

# name, GB of memory, GB/s as the maker gives them
CARDS = (
    ("RTX 2060", 6, 336),
    ("RTX 4060", 8, 272),
    ("RTX 3080", 10, 760),
    ("RTX 3060", 12, 360),
    ("RTX 4070", 12, 504),
    ("RTX 5070", 12, 672),
    ("T4", 16, 320),
    ("RTX 4060 Ti", 16, 288),
    ("RTX 5060 Ti", 16, 448),
    ("RTX 5080", 16, 960),
    ("RTX 3090", 24, 936),
    ("RTX 4090", 24, 1008),
    ("RTX 5090", 32, 1792),
)
FREE = 0.92  # of a card's memory: a desktop has the rest
AIM = 0.6  # of the bandwidth


@dataclass(frozen=True)
class Token:
    """GB that one reads: of each layer with its cached rows, and of the output matrix, which is always the card's."""

    layers: int
    layer: float
    output: float

    def per_second(self, on_card: int, card: float, cpu: float) -> float:
        """With so many layers on the card, at these GB/s."""
        return 1 / ((on_card * self.layer + self.output) / card + (self.layers - on_card) * self.layer / cpu)

    @property
    def total(self) -> float:
        return self.layers * self.layer + self.output


def loaded(text: str, mmproj: str, memory: float, depth: int) -> tuple[Token, int]:
    """(what a token reads, layers on a card of so many GB)"""
    os.environ["KVS_SHIM_MEMORY"] = str(int(memory * FREE * 2**30))
    with kvs.Model(text, mmproj=mmproj, device="cuda") as model:
        found = work.of_model(model)
        layers = found.token_bytes - found.output_bytes + work.cache_bytes(model, "f16", depth)
        return Token(model.n_layer, layers / model.n_layer / 1e9, found.output_bytes / 1e9), model.n_gpu_layers


def plans(text: str, mmproj: str, depth: int) -> tuple[Token, dict[int, int]]:
    """(what a token reads, layers that fit by the GB of each card). Where all fit, they fit on larger ones, too."""
    least, *larger = sorted({card[1] for card in CARDS})
    token, on_card = loaded(text, mmproj, least, depth)
    fit = {least: on_card}
    for memory in larger:
        if on_card < token.layers:
            _, on_card = loaded(text, mmproj, memory, depth)
        fit[memory] = on_card
    return token, fit


def cells(token: Token, on_card: int, bandwidth: float, cpu: float) -> str:
    speeds = [token.per_second(on_card, bandwidth * share, cpu) for share in (AIM, 1)]
    digits = 0 if speeds[0] >= 10 else 1
    return f"{'all' if on_card == token.layers else f'{on_card} of {token.layers}'} | " + " / ".join(f"{x:.{digits}f}" for x in speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=3, action="append", required=True, metavar=("NAME", "TEXT.gguf", "MMPROJ.gguf"))
    parser.add_argument("--depth", type=int, default=640, help="rows in the cache (default: 640)")
    parser.add_argument("--cpu", type=float, default=40, help="GB/s of the CPU, which has the other layers (default: 40)")
    args = parser.parse_args()
    if not cuda_text().startswith("archs shim"):
        parser.error("this needs the library of tests/shim, whose memory is what one says; set KVS_LIBRARY to it")
    found = {name: plans(text, mmproj, args.depth) for name, text, mmproj in args.pair}
    print(", ".join(f"{name}: a token reads {token.total:.2f} GB" for name, (token, _) in found.items()) + "\n")
    print("| card | memory | bandwidth | " + " | ".join(f"{name}: layers on it | tokens/s at 60 / 100 %" for name in found) + " |")
    print("|---" * (3 + 2 * len(found)) + "|")
    for card, memory, bandwidth in CARDS:
        row = " | ".join(cells(token, fit[memory], bandwidth, args.cpu) for token, fit in found.values())
        print(f"| {card} | {memory} GB | {bandwidth} GB/s | {row} |")


if __name__ == "__main__":
    main()
