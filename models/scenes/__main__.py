"""python -m models.scenes --split test --count 500 -o FOLDER

Writes FOLDER/SPLIT-00000.png and so on, and FOLDER/truth.jsonl: a line for each picture with image_id, objects (COCO classes, the
largest first), sides (left, middle or right of each), context and a reference caption.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from . import CONTEXTS, SPLITS, caption, scene, side


def write(split: str, numbers: Iterable[int], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in numbers:
        s, name = scene(SPLITS[split] + i), f"{split}-{i:05d}"
        Image.fromarray(s.picture).save(folder / f"{name}.png")
        truth = {"image_id": name, "objects": [thing.node for thing in s.objects], "sides": [side(thing) for thing in s.objects]}
        lines.append(json.dumps(truth | {"context": CONTEXTS[s.context].phrase, "caption": caption(s, 0)}) + "\n")
    (folder / "truth.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--count", type=int, default=500, help="the first so many (default 500)")
    parser.add_argument("--numbers", type=int, nargs="+", metavar="N", help="these instead")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    write(args.split, args.numbers or range(args.count), args.out)
