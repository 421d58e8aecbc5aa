"""The language model and the projector, trained on captions with the tower's features as they are.

The prompt is what the runtime feeds: BOS, the words before the picture, its rows, the words after it; then the caption and EOS, which alone
have a loss. Captions of like length share a step, so that little is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from . import tower
from .blocks import compute_type, linear, rms_norm, rotations, text_block
from .loop import Figures, Loop, fill, keep, order
from .pool import Pool
from .recipe import Recipe, Sizes, TrainingError
from .vocabulary import Vocabulary
from .work import Work

BUCKET = 40  # steps whose captions are sorted by length together
IGNORED = -100


def config(sizes: Sizes, words: Vocabulary) -> LlavaConfig:
    text = LlamaConfig(
        vocab_size=words.rows,
        hidden_size=sizes.width,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.positions,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=words.bos,
        eos_token_id=words.eos,
        pad_token_id=words.pad,
    )
    return LlavaConfig(
        vision_config=tower.config(sizes),
        text_config=text,
        image_token_index=words.image,
        image_seq_length=sizes.grid**2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


class Speaker(nn.Module):
    """What of a LlavaForConditionalGeneration learns here: projector, decoder, output."""

    def __init__(self, llava: LlavaForConditionalGeneration, words: Vocabulary) -> None:
        super().__init__()
        self.projector, self.decoder, self.output = llava.model.multi_modal_projector, llava.model.language_model, llava.lm_head
        self.before, self.after = words.prompt()

    @property
    def prompt_rows(self) -> int:
        """Rows of text before the answer; the picture's come on top."""
        return len(self.before) + len(self.after)

    def forward(self, features: Tensor, answers: Tensor) -> Tensor:
        """features: (n, patches, width); answers: (n, rows) ids. Returns the rows that choose the answers, (n, rows, width), normed."""
        dtype = compute_type(features.device)
        picture = linear(F.gelu(linear(features.to(dtype), self.projector.linear_1)), self.projector.linear_2).float()
        before, after = (torch.tensor(ids, device=answers.device).expand(len(answers), -1) for ids in (self.before, self.after))
        embed = self.decoder.embed_tokens
        x = torch.cat([embed(before), picture, embed(torch.cat([after, answers[:, :-1]], 1))], 1)
        rows, heads = x.shape[1], self.decoder.config.num_attention_heads
        turn = rotations(rows, x.shape[2] // heads, 10000.0, x.device, dtype)
        mask = torch.full((rows, rows), -torch.inf, device=x.device, dtype=dtype).triu(1)
        first = rows - answers.shape[1]
        for layer in self.decoder.layers[:-1]:
            x = text_block(x, layer, heads, turn, mask, 0)
        return rms_norm(text_block(x, self.decoder.layers[-1], heads, turn, mask, first), self.decoder.norm, dtype)


@dataclass
class Reading:
    """Features (n, patches, width) and captions of a split: per scene its variants as ids, EOS at the end."""

    features: NDArray[np.float16]
    answers: list[list[NDArray[np.uint16]]]

    @staticmethod
    def of(work: Work, pool: Pool, split: str, words: Vocabulary, n: int) -> Reading:
        features, texts = np.load(work.path(f"features-{split}.npy"))[:n], pool.captions(split, n)
        if len(features) != len(texts):
            raise TrainingError(f"{work.path(f'features-{split}.npy')}: {len(features)} scenes, not {len(texts)}: remove it")
        return Reading(features, [[np.array(ids, np.uint16) for ids in words.answers(variants)] for variants in texts])

    def batch(self, which: NDArray[np.int64], epoch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Features, answers (padded with 0) and targets (padded with IGNORED). Each epoch reads another variant."""
        chosen = [self.answers[i][(i + epoch) % len(self.answers[i])] for i in which]
        answers = np.zeros((len(chosen), max(len(ids) for ids in chosen)), np.int64)
        targets = np.full_like(answers, IGNORED)
        for row, ids in enumerate(chosen):
            answers[row, : len(ids)] = targets[row, : len(ids)] = ids
        return tuple(torch.from_numpy(values).to(device) for values in (self.features[which], answers, targets))

    def lengths(self, epoch: int) -> NDArray[np.int64]:
        return np.array([len(variants[(i + epoch) % len(variants)]) for i, variants in enumerate(self.answers)])


@dataclass(eq=False)
class Plan:
    """Which scenes a step reads: shuffled, then sorted by length within BUCKET steps, then the steps shuffled."""

    reading: Reading
    seed: int
    size: int

    @property
    def per_epoch(self) -> int:
        return max(1, len(self.reading.answers) // self.size)

    @lru_cache(maxsize=1)  # noqa: B019 - a run has one plan
    def epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        n, lengths = len(self.reading.answers), self.reading.lengths(epoch)
        shuffled = order(self.seed, epoch, n)
        batches = []
        for i in range(0, n, self.size * BUCKET):
            piece = shuffled[i : i + self.size * BUCKET]
            piece = piece[np.argsort(lengths[piece], kind="stable")]
            batches += [piece[j : j + self.size] for j in range(0, len(piece), self.size)]
        full = [batch for batch in batches if len(batch) == self.size] or batches
        return [full[i] for i in np.random.default_rng([self.seed, epoch, 1]).permutation(len(full))]

    def step(self, step: int) -> tuple[NDArray[np.int64], int]:
        epoch, at = divmod(step, self.per_epoch)
        return self.epoch(epoch)[at], epoch


def loss(speaker: Speaker, features: Tensor, answers: Tensor, targets: Tensor) -> Tensor:
    """Mean over the caption's tokens; rows without a target get no logits."""
    rows = speaker(features, answers)
    wanted = targets != IGNORED
    return F.cross_entropy(linear(rows[wanted], speaker.output).float(), targets[wanted])


def look(speaker: Speaker, reading: Reading, batch: int, device: torch.device) -> Figures:
    total = tokens = 0.0
    for i in range(0, len(reading.answers), batch):
        features, answers, targets = reading.batch(np.arange(i, min(i + batch, len(reading.answers))), 0, device)
        n = (targets != IGNORED).sum().item()
        total, tokens = total + n * loss(speaker, features, answers, targets).item(), tokens + n
    return {"development": total / tokens}


def make(work: Work, sight: Work, pool: Pool, recipe: Recipe, device: torch.device, every: float) -> None:
    """Leaves language.safetensors: tensors of projector, decoder and output. sight: the work folder of tower and vocabulary."""
    torch.manual_seed(recipe.seed)
    words, pace = Vocabulary(sight.path("tokenizer.model")), recipe.language
    speaker = Speaker(LlavaForConditionalGeneration(config(recipe.sizes, words)), words).to(device)
    plan = Plan(Reading.of(sight, pool, "train", words, min(pace.samples, recipe.scenes)), recipe.seed, pace.batch)
    unseen = Reading.of(sight, pool, "development", words, min(recipe.development, 300))

    def step_loss(step: int) -> dict[str, Tensor]:
        which, epoch = plan.step(step)
        return {"loss": loss(speaker, *plan.reading.batch(which, epoch, device))}

    identity = {"seed": recipe.seed, "scenes": recipe.scenes}
    loop = Loop(work, "language", speaker, pace, step_loss, lambda: look(speaker, unseen, pace.batch, device), identity, every)
    loop.run()
    keep(speaker, work.path("language.safetensors"))
    loop.forget()


def load(work: Work, sight: Work, sizes: Sizes) -> LlavaForConditionalGeneration:
    """The whole model, of a finished tower and a finished language stage."""
    words = Vocabulary(sight.path("tokenizer.model"))
    llava = LlavaForConditionalGeneration(config(sizes, words))
    fill(Speaker(llava, words), work.path("language.safetensors"))
    fill(llava.model.vision_tower, sight.path("tower.safetensors"))
    return llava.eval()
