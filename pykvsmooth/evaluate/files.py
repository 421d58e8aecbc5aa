"""Captions and truth as JSON lines, and lists of image ids. Everything in them is untrusted: errors name file and line."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .chair import node_of
from .errors import EvaluationError
from .score import Caption, ImageId, TokenFacts

_LONGEST = 16 << 20  # bytes of a line


def read_captions(path: str, settings: Mapping[str, Any] | None = None, id_of: Callable[[str], ImageId] | None = None) -> list[Caption]:
    """Lines {"image_id": 7, "caption": "..."}, or those of `pykvsmooth caption --out` and --json, whose image_id is id_of(image name).

    settings: only lines that were made with these, others are passed over. Lines of single tokens are passed over, too.
    Raises EvaluationError; two captions of one image are one.
    """
    id_of = id_of or stem
    captions: dict[str, Caption] = {}
    for number, line in json_lines(path):
        if line.get("type") == "token" or (settings is not None and line.get("settings") != settings):
            continue
        if "image_id" not in line and isinstance(line.get("image"), str):
            line["image_id"] = id_of(line["image"])
        caption = caption_of(line, _image_id(line, path, number), path, number)
        if str(caption.image_id) in captions:
            hint = (
                "; the file has captions of several settings, `eval run` with one of them and this --out scores it"
                if settings is None and "settings" in line
                else ""
            )
            raise EvaluationError(f"image {caption.image_id} has a caption already{hint}", path, number)
        captions[str(caption.image_id)] = caption
    return list(captions.values())


def caption_of(line: dict[str, Any], image_id: ImageId, path: str, number: int) -> Caption:
    """A line of a file as the caption of that image."""
    text = line.get("caption")
    if not isinstance(text, str):
        raise EvaluationError('"caption" must be text', path, number)
    return Caption(image_id, text, _token_facts(line, path, number))


def read_truth(path: str) -> dict[str, frozenset[str]]:
    """Lines {"image_id": 7, "objects": ["dog", "sofa"]} -> {"7": node words}. Any entry of CHAIR's list of words names its class."""
    truth: dict[str, frozenset[str]] = {}
    for number, line in json_lines(path):
        key = str(_image_id(line, path, number))
        if key in truth:
            raise EvaluationError(f"image {key} is in the file already", path, number)
        objects = line.get("objects")
        if not isinstance(objects, list) or not all(isinstance(name, str) for name in objects):
            raise EvaluationError('"objects" must be a list of names', path, number)
        truth[key] = frozenset(_node(name, path, number) for name in objects)
    return truth


def read_ids(path: str) -> list[str]:
    """Image ids, one a line: as they are, or in JSON lines under "image_id" (a file of captions will do)."""
    ids: dict[str, None] = {}
    for number, text in _lines(path):
        if text.startswith("{"):
            text = str(_image_id(_object(text, path, number), path, number))
        if text in ids:
            raise EvaluationError(f"image {text} is in the file already", path, number)
        ids[text] = None
    return list(ids)


def opera500() -> list[str]:
    """The image ids of OPERA's published captions: the pictures on which most later papers' figures can be compared."""
    return (importlib.resources.files(__package__) / "data" / "opera500.txt").read_text("ascii").split()


def stem(name: str) -> str:
    """What stands for a picture where nothing else is said: its file name without folder and ending."""
    return os.path.splitext(os.path.basename(name))[0]


def coco_id(name: str) -> ImageId:
    """COCO's number in a file name: COCO_val2014_000000391895.jpg is 391895. A name without one at its end stays as it is."""
    found = re.search(r"(?<![0-9])[0-9]{1,18}$", stem(name))
    return int(found[0]) if found else stem(name)


def json_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line that is not blank."""
    for number, text in _lines(path):
        yield number, _object(text, path, number)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), 1):
                if len(line) == _LONGEST:
                    raise EvaluationError(f"is longer than {_LONGEST} bytes", path, number)
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError:
                    raise EvaluationError("is not UTF-8 text", path, number) from None
                if text:
                    yield number, text
    except OSError as error:
        raise EvaluationError(f"can't be read: {error.strerror}", path) from error


def _object(text: str, path: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise EvaluationError("is no JSON", path, number) from None
    if not isinstance(value, dict):
        raise EvaluationError("is no JSON object", path, number)
    return value


def _image_id(line: dict[str, Any], path: str, number: int) -> ImageId:
    image_id = line.get("image_id")
    if isinstance(image_id, bool) or not isinstance(image_id, (int, str)) or image_id == "":
        raise EvaluationError('"image_id" must be a number or a name', path, number)
    return image_id


def _token_facts(line: dict[str, Any], path: str, number: int) -> tuple[TokenFacts, ...]:
    """What `eval run --tokens` keeps: [text, entropy, strength] each."""
    tokens = line.get("tokens", [])
    try:
        facts = tuple(TokenFacts(text, _number(entropy), _number(strength)) for text, entropy, strength in tokens)
        if not all(isinstance(token.text, str) for token in facts):
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        raise EvaluationError('"tokens" must be a list of [text, entropy, strength]', path, number) from None
    return facts


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    return float(value)


def _node(name: str, path: str, number: int) -> str:
    node = node_of(name)
    if node is None:
        raise EvaluationError(f"{name!r} is none of COCO's 80 classes, nor one of CHAIR's words for them", path, number)
    return node
