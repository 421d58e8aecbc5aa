"""The objects in COCO's pictures, from the user's copy of the annotations of 2014.

As in CHAIR's scorer: the classes of the segmented instances, and the objects that the reference captions name. The files are large and
are read whole, one after the other; what came of them is kept in the user's cache folder as JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .chair import mentions, node_of
from .errors import EvaluationError

RULES = 1  # raised when other objects come of the same files: older caches are not read then
NAMES = tuple(f"{kind}_{split}2014.json" for kind in ("instances", "captions") for split in ("train", "val"))


def coco_truth(folder: str, parity: bool = False, progress: Callable[[str], Any] | None = None) -> dict[str, frozenset[str]]:
    """{image id as text: node words} of all pictures that the files in the folder speak of: instances and captions, train and val 2014,
    whichever are there, but instances at least. progress(file name) is called before each is read. Raises EvaluationError."""
    paths = [path for name in NAMES if (path := Path(folder) / name).is_file()]
    if not any(path.name.startswith("instances") for path in paths):
        raise EvaluationError(f"has none of COCO's {NAMES[0]} and {NAMES[1]}; give the folder with the annotations of 2014", folder)
    facts = [[os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    identity = {"rules": RULES, "parity": parity, "files": facts}
    cache = cache_folder() / f"coco-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}.json"
    truth = _cached(cache, identity)
    if truth is None:
        found = _read(paths, parity, progress or (lambda _: None))
        truth = {key: sorted(nodes) for key, nodes in found.items()}
        _keep(cache, {**identity, "truth": truth})
    return {key: frozenset(nodes) for key, nodes in truth.items()}


def has_captions(folder: str) -> bool:
    """Are the reference captions there, too? Without them fewer objects count as true."""
    return any((Path(folder) / name).is_file() for name in NAMES if name.startswith("captions"))


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/pykvsmooth, ~/.cache by default."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "pykvsmooth"


def _read(paths: list[Path], parity: bool, progress: Callable[[str], Any]) -> dict[str, set[str]]:
    truth: dict[str, set[str]] = {}
    for path in paths:
        progress(path.name)
        try:
            with open(path, "rb") as file:
                content = json.load(file)
            add = _add_instances if path.name.startswith("instances") else _add_captions
            for image in content["images"]:
                truth.setdefault(_key(image["id"]), set())
            add(truth, content, parity)
        except OSError as error:
            raise EvaluationError(f"can't be read: {error.strerror}", str(path)) from error
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, EvaluationError):
                raise
            raise EvaluationError(f"is not as COCO's annotations are ({type(error).__name__}: {error})", str(path)) from error
    return truth


def _key(image_id: Any) -> str:
    if isinstance(image_id, bool) or not isinstance(image_id, int):
        raise TypeError("an image id is no number")
    return str(image_id)


def _add_instances(truth: dict[str, set[str]], content: dict[str, Any], parity: bool) -> None:
    nodes = {category["id"]: node_of(category["name"]) for category in content["categories"]}
    for annotation in content["annotations"]:
        node = nodes[annotation["category_id"]]
        if node is None:
            raise ValueError(f"category {annotation['category_id']} is none of the 80 classes")
        truth.setdefault(_key(annotation["image_id"]), set()).add(node)


def _add_captions(truth: dict[str, set[str]], content: dict[str, Any], parity: bool) -> None:
    for annotation in content["annotations"]:
        truth.setdefault(_key(annotation["image_id"]), set()).update(mentions(annotation["caption"], parity))


def _cached(path: Path, identity: dict[str, Any]) -> dict[str, list[str]] | None:
    try:
        content = json.loads(path.read_bytes())
        truth = content.pop("truth")
        sound = content == identity and all(isinstance(nodes, list) and None not in map(node_of, nodes) for nodes in truth.values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    return truth if sound else None


def _keep(path: Path, content: dict[str, Any]) -> None:
    """Written whole or not at all. Without it the next run reads COCO's files again, that is all."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(content, file)
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
