"""What the finished model says: greedy captions of development scenes, by transformers alone, held against what the scenes hold.

Objects are found by the nouns that the scenes' captions use: a quick look. The measure that counts is CHAIR (pykvsmooth eval chair).
"""

from __future__ import annotations

import json
import re

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from models.scenes import KINDS, SPLITS, Scene, scene, side

from . import language, tower
from .loop import Figures
from .recipe import Recipe
from .vocabulary import Vocabulary
from .work import Work, finished

SCENES = 200
LONGEST = 256  # tokens; a caption that has not ended by then is degenerate
NODES = {word: kind.node for kind in KINDS for word in kind.words}
_NOUN = re.compile(rf"\b({'|'.join(sorted(map(re.escape, NODES), key=len, reverse=True))})\b")


@torch.no_grad()
def captions(llava: LlavaForConditionalGeneration, words: Vocabulary, views: list[Scene], work: Work, batch: int = 50) -> list[list[int]]:
    """Ids of the greedy answers, EOS included where they end."""
    before, after = words.prompt()
    n_image = (llava.config.vision_config.image_size // llava.config.vision_config.patch_size) ** 2
    prompt = torch.tensor([*before, *[words.image] * n_image, *after], device=llava.device)
    answers: list[list[int]] = []
    with work.bar() as bar:
        row = bar.add_task("answers", total=len(views), note="")
        for i in range(0, len(views), batch):
            pictures = torch.from_numpy(np.stack([view.picture for view in views[i : i + batch]])).to(llava.device)
            ids = prompt.expand(len(pictures), -1)
            out = llava.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=tower.pixels(pictures),
                do_sample=False,
                max_new_tokens=LONGEST,
            )
            answers += [[token for token in ids if token != words.pad] for ids in out[:, len(prompt) :].tolist()]
            bar.update(row, completed=len(answers))
    return answers


def figures(texts: list[str], views: list[Scene]) -> Figures:
    """Shares: objects that are named, mentions that are true, captions with an invented object, sides of true mentions told right."""
    named = held = true = said = lied = sides = right = 0
    for text, view in zip(texts, views, strict=True):
        where: dict[str, set[str]] = {}
        for thing in view.objects:
            where.setdefault(thing.node, set()).add(side(thing))
        mentions = [(NODES[noun], sentence) for sentence in text.split(".") for noun in _NOUN.findall(sentence)]
        nodes = {node for node, _ in mentions}
        named, held = named + len(nodes & where.keys()), held + len(where)
        true, said = true + sum(node in where for node, _ in mentions), said + len(mentions)
        lied += bool(nodes - where.keys())
        for node, sentence in mentions:
            claims = re.findall(r"\bthe (left|right)\b", sentence)  # and not what somebody has left there
            if node in where and len(claims) == 1:
                sides, right = sides + 1, right + (claims[0] in where[node])
    return {
        "recall": named / max(1, held),
        "precision": true / max(1, said),
        "captions_with_invented": lied / max(1, len(texts)),
        "sides": right / max(1, sides),
    }


def make(work: Work, sight: Work, recipe: Recipe, device: torch.device) -> None:
    """Leaves answers.jsonl (image_id, caption, objects) and a line of figures in the log."""
    words = Vocabulary(sight.path("tokenizer.model"))
    llava = language.load(work, sight, recipe.sizes).to(device)
    views = [scene(SPLITS["development"] + i) for i in range(min(SCENES, recipe.development))]
    answers = captions(llava, words, views, work)
    texts = [words.decode(ids) for ids in answers]
    with finished(work.path("answers.jsonl")) as part, open(part, "w", encoding="utf-8") as file:
        for i, (text, view) in enumerate(zip(texts, views, strict=True)):
            line = {"image_id": f"development-{i:05d}", "caption": text, "objects": [thing.node for thing in view.objects]}
            file.write(json.dumps(line) + "\n")
    ended = sum(ids[-1:] == [words.eos] for ids in answers) / len(answers)
    work.log("answers", len(views), **figures(texts, views), tokens=sum(map(len, answers)) / len(answers), ended=ended)
