"""Models of other seeds are trained but not shipped: their captions of the test scenes are, and the page scores those.

A file a seed, other_seeds/N.jsonl.gz, of lines {"policy": its repr or "None", "image_id": number of the scene, "caption": text,
"tokens": their texts}. python -m models.evidence seed makes one.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pykvsmooth.evaluate import Caption, EvaluationError, TokenFacts

from .runs import Asked, Run

FOLDER = Path(__file__).parent / "other_seeds"


def keep(path: Path, runs: list[tuple[Asked, Run]]) -> None:
    """The same bytes for the same captions."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for policy, run in runs for record in _records(policy, run))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))


def kept() -> dict[int, Path]:
    """The seeds whose captions are there."""
    return {int(path.name.partition(".")[0]): path for path in sorted(FOLDER.glob("*.jsonl.gz"))}


def read(path: Path, policy: Asked, count: int) -> Run:
    """Captions of the first scenes under a policy. EvaluationError: they were made under other ones, or of fewer scenes."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        records = [record for record in map(json.loads, file) if record["policy"] == repr(policy)]
    if len(records) < count:
        raise EvaluationError(f"has {len(records)} captions of {policy!r}, not {count}: make it again", str(path))
    return Run("test", tuple(_caption(record) for record in records[:count]))


def _records(policy: Asked, run: Run) -> Iterator[dict[str, Any]]:
    for one in run.captions:
        yield {
            "policy": repr(policy),
            "image_id": one.image_id,
            "caption": one.text,
            "tokens": [token.text for token in one.tokens],
        }


def _caption(record: dict[str, Any]) -> Caption:
    return Caption(record["image_id"], record["caption"], tuple(TokenFacts(text, None, None) for text in record["tokens"]))
