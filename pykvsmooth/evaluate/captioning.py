"""Captions for an evaluation: many pictures, several sessions at once, and a file that a later run goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

# plain JSON lines; nothing of a terminal in there
from ..cli.records import CaptionFile, caption_file, caption_record, dumps, file_facts, precision_facts
from .errors import EvaluationError
from .files import caption_of, json_lines
from .score import Caption, ImageId, TokenFacts

if TYPE_CHECKING:
    from ..batch import Batch
    from ..model import Model
    from ..policies.stack import Policy
    from ..stats import Result

PROMPT = "Please describe the image in detail."
Picture = tuple[ImageId, Any]  # the id, and what Session.generate takes as an image


def run(
    model: Model,
    pictures: Sequence[Picture],
    *,
    policy: Policy | Sequence[Policy] | None = None,
    prompt: str = PROMPT,
    out: str | None = None,
    tokens: bool = False,
    parallel: int = 4,
    n_ctx: int = 2048,
    kv_type: Any = "f16",
    progress: Callable[[int, int], Any] | None = None,
    **answer: Any,
) -> list[Caption]:
    """A caption of each picture, in their order.

    out: JSON lines as `pykvsmooth caption --out` writes them, with "image_id"; captions that are in the file with the same settings are
    taken from there. tokens: each caption keeps its tokens' texts, entropies and strengths. progress(done, all) after each caption.
    answer: max_tokens, temperature and the other arguments of Session.generate. A picture that can't be read ends the run with the
    library's error; what was captioned before is in the file. Two pictures of one id are an EvaluationError.
    """
    check_ids(pictures)
    settings = settings_of(model, policy, prompt, answer, n_ctx, kv_type) | ({"tokens": True} if tokens else {})
    report = progress or (lambda *_: None)
    with caption_file(out) as file:
        done = dict(_earlier(file, settings, pictures)) if file is not None else {}
        todo = [picture for picture in pictures if str(picture[0]) not in done]
        report(len(done), len(pictures))
        requests = ({"image": image, "prompt": prompt} for _, image in todo)
        width = max(1, min(parallel, len(todo)))
        with model.generate_batch(requests, n_ctx, kv_type, policy, parallel=width, on_error="raise", **answer) as batch:
            for index, result in _results(batch):
                image_id, image = todo[index]
                caption = _caption(image_id, result, tokens)
                if file is not None:
                    file.add(_record(_name(image_id, image), caption, result, settings))
                done[str(image_id)] = caption
                report(len(done), len(pictures))
    return [done[str(image_id)] for image_id, _ in pictures]


def settings_of(model: Model, policy: Any, prompt: str, answer: dict[str, Any], n_ctx: int, kv_type: str) -> dict[str, Any]:
    """All that the words of a caption depend on, but for the picture: in the order of `pykvsmooth caption`, whose files go on here."""
    from ..options import Options

    checked = {name: getattr(Options(**_sampling(answer)), name) for name in _SAMPLING}
    if not checked["temperature"]:
        checked["seed"] = None
    files = {"model": file_facts(model.path), "mmproj": file_facts(model.mmproj)}
    kept = {**checked, "mode": answer.get("mode", "pad"), "system": answer.get("system")}
    others = {name: value for name, value in answer.items() if name not in kept}
    place = {"n_ctx": n_ctx, "kv_type": kv_type, **precision_facts(model.precision)}
    return {**files, "prompt": prompt, "policy": repr(policy) if policy else "off", **kept, **others, **place}


_SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def _sampling(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name in _SAMPLING}


def check_ids(pictures: Sequence[Picture]) -> None:
    """EvaluationError if there are none, or two have the same id."""
    if not pictures:
        raise EvaluationError("there are no pictures to caption")
    seen: dict[str, Any] = {}
    for image_id, image in pictures:
        if str(image_id) in seen:
            both = f" ({_name(image_id, seen[str(image_id)])} and {_name(image_id, image)})"
            raise EvaluationError(f"two pictures have the image id {image_id}{both if isinstance(image, str) else ''}")
        seen[str(image_id)] = image


def _name(image_id: ImageId, image: Any) -> str:
    return image if isinstance(image, str) else str(image_id)


def _earlier(file: CaptionFile, settings: dict[str, Any], pictures: Sequence[Picture]) -> Iterator[tuple[str, Caption]]:
    """Captions of these pictures that the file has with the same settings."""
    wanted = {_name(image_id, image): image_id for image_id, image in pictures}
    wanted = {name: image_id for name, image_id in wanted.items() if file.has(name, settings)}
    kept = json.loads(dumps(settings))  # as it comes back from a file
    for number, line in json_lines(file.path) if wanted else ():
        if line.get("settings") == kept and line["image"] in wanted:
            image_id = wanted[line["image"]]
            yield str(image_id), caption_of(line, image_id, file.path, number)


def _results(batch: Batch) -> Iterator[tuple[int, Result]]:
    from ..stats import Result

    for index, item in batch:
        if isinstance(item, Result):
            yield index, item


def _caption(image_id: ImageId, result: Result, tokens: bool) -> Caption:
    facts = (TokenFacts(token.text, token.entropy, token.strength) for token in result.tokens) if tokens else ()
    return Caption(image_id, result.text, tuple(facts))


def _record(name: str, caption: Caption, result: Result, settings: dict[str, Any]) -> dict[str, Any]:
    record = {**caption_record(name, result, settings), "image_id": caption.image_id}
    if caption.tokens:
        record["tokens"] = [[token.text, token.entropy, token.strength] for token in caption.tokens]
    return record
