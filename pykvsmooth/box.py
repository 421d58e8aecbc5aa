"""The checkpoint in the box: a small LLaVA, trained on pictures made of pictograms, so that everything can be tried at once.

The wheel carries it beside this file; a checkout has it in models/demo.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = "scenes-llava-Q8_0.gguf"
FOLDERS = (Path(__file__).with_name("box"), Path(__file__).parents[1] / "models" / "demo")


def folder() -> Path | None:
    """Where the box is; None if this installation has none."""
    return next((folder for folder in FOLDERS if (folder / TEXT).is_file()), None)


def text_model() -> Path | None:
    found = folder()
    return found / TEXT if found else None


def scenes() -> list[dict[str, Any]]:
    """The test scenes, a dict each: picture (a path), image_id, objects (COCO classes), context, caption. Empty without a box."""
    found = folder()
    if found is None:
        return []
    lines = (found / "scenes" / "truth.jsonl").read_text().splitlines()
    return [{"picture": str(found / "scenes" / f"{truth['image_id']}.png"), **truth} for truth in map(json.loads, lines)]
