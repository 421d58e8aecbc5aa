"""python -m models.parity HF_FOLDER MODEL.gguf [--scenes 50]

Is the greedy text of the runtime that of Hugging Face transformers, plain and under KVSmooth? The pair is the folder's, converted to
F16; transformers runs in float64 on the same rounded weights, with attention written out and the smoothing of arXiv 2602.04268
(equations 5 and 13 to 15) done on its cache after each step. It is fed the runtime's tokens, so that one difference is one difference.
Each is listed, with the reference's margin there and the closest two entropies that were ranked so far. Needs the extra "train".
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration

import pykvsmooth as kvs
from models.scenes import PROMPT, SPLITS, scene

MARGIN = 0.05  # of the reference's logits, below which either token may come
GAP = 1e-3  # of ranked entropies, below which either order may come
TEMPLATE = "USER: <image>\n{} ASSISTANT:"


def reference(folder: Path) -> LlavaForConditionalGeneration:
    """The folder's model in float64, its matrices rounded as an F16 file has them."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "position_embedding" not in name:
            weight.data = weight.data.half()
    return model.double().eval()


@dataclass
class Smoother:
    """KVSmooth as the paper has it, on a transformers cache: rank of the row entropy among the last 15, EMA of the newest K and V, or of
    one of them (target "k", "v", "kv")."""

    layers: list[int]
    lambda_ref: float
    half_width: float
    window: int
    target: str
    queues: dict[int, list[float]] = field(default_factory=dict)
    gap: float = np.inf

    def after(self, attentions: tuple[torch.Tensor, ...], cache: DynamicCache) -> None:
        for i in self.layers:
            p = attentions[i][0, :, 0]
            entropy = float(-torch.where(p > 0, p * p.clamp_min(1e-300).log(), 0).sum(-1).mean())
            older = self.queues.setdefault(i, [])[-(self.window - 1) :]
            self.gap = min([self.gap, *(abs(one - entropy) for one in older)])
            strength = sum(one < entropy for one in older) / (len(older) + 1)
            strength = min(max(strength, self.lambda_ref - self.half_width, 0.0), self.lambda_ref + self.half_width, 1.0)
            self.queues[i].append(entropy)
            mixed = {"k": cache.layers[i].keys, "v": cache.layers[i].values}
            for rows in (mixed[name] for name in self.target):
                rows[:, :, -1] = (1 - strength) * rows[:, :, -1] + strength * rows[:, :, -2]


@dataclass
class Tally:
    captions: int = 0
    tokens: int = 0
    excused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@torch.no_grad()
def follow(model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], ids: list[int], smoother: Smoother | None) -> list[tuple]:
    """Fed with the tokens that the runtime chose: where the reference would have chosen another, (step, its token, margin, gap)."""
    cache, found = DynamicCache(), []
    out = model(**inputs, past_key_values=cache, use_cache=True)
    for step, token in enumerate(ids):
        logits = out.logits[0, -1]
        best = int(logits.argmax())
        if best != token:
            found.append((step, best, float(logits[best] - logits[token]), smoother.gap if smoother else np.inf))
        out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True, output_attentions=smoother is not None)
        if smoother:
            smoother.after(out.attentions, cache)
    return found


def check(
    model: LlavaForConditionalGeneration, processor: AutoProcessor, ours: kvs.Model, policy: kvs.KVSmooth | None, scenes: int
) -> Tally:
    tally = Tally()
    for i in range(scenes):
        picture = scene(SPLITS["test"] + i).picture
        session = ours.session(n_ctx=1024, kv_type="f32", policy=policy)
        stream = session.generate(PROMPT, image=picture, max_tokens=256)
        ids = [token.id for token in stream] + ([ours.eos_id] if stream.finish_reason == "stop" else [])
        inputs = processor(text=TEMPLATE.format(PROMPT), images=Image.fromarray(picture), return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].double()
        smoother = policy and Smoother(
            policy.resolve_layers(ours.n_layer), policy.lambda_ref, policy.half_width, policy.window, policy.target
        )
        for step, best, margin, gap in follow(model, dict(inputs), ids, smoother):
            line = f"scene {i}, token {step}: {ids[step]} here, {best} there; margin {margin:.4f}, closest entropies {gap:.2e}"
            (tally.excused if margin < MARGIN or gap < GAP else tally.wrong).append(line)
        session.close()
        tally.captions += 1
        tally.tokens += len(ids)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder")
    parser.add_argument("model", type=Path, help="its F16 text model, with the mmproj beside it")
    parser.add_argument("--scenes", type=int, default=50)
    args = parser.parse_args()
    model, processor = reference(args.folder), AutoProcessor.from_pretrained(args.folder)
    bad = 0
    with kvs.Model(args.model, device="cpu", precision="exact") as ours:
        policies = {"plain": None, "for this model": kvs.KVSmooth.for_model(ours), "published": kvs.KVSmooth()}
        for name, policy in policies.items():
            tally = check(model, processor, ours, policy, args.scenes)
            bad += len(tally.wrong)
            print(
                f"{name} ({policy}): {tally.captions} captions, {tally.tokens} tokens, {len(tally.excused) + len(tally.wrong)} differ, ",
                end="",
            )
            print(f"{len(tally.wrong)} of them without excuse", flush=True)
            print("".join(f"  {line}\n" for line in tally.excused + tally.wrong), end="")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
