"""The vocabulary: SentencePiece as LLaMA uses it (BPE, byte fallback, text unchanged), from the captions and the prompt's template."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from models.scenes import PROMPT

from .pool import Pool
from .work import finished

TEMPLATE = ("USER: ", f"\n{PROMPT} ASSISTANT:")  # what stands before the picture and after it
SCENES = 20_000  # enough to count pairs of letters


def make(path: Path, pool: Pool, pieces: int, processes: int) -> None:
    """Writes tokenizer.model."""
    texts = [text for variants in pool.captions("train", min(SCENES, pool.size("train"))) for text in variants]
    texts += [part.strip() for part in TEMPLATE] * (len(texts) // 20)  # often enough that its words become pieces
    with finished(path) as part, open(part, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            model_type="bpe",
            vocab_size=pieces,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=16384,
            unk_surface=" \u2047 ",
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=processes,
            minloglevel=2,
        )


class Vocabulary:
    """Ids as the runtime makes them: the pieces before and after the picture each on their own."""

    def __init__(self, path: Path) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.bos, self.eos = self.pieces.bos_id(), self.pieces.eos_id()
        self.image, self.pad = len(self.pieces), len(self.pieces) + 1  # as llava-hf has them, after the pieces
        self.rows = -(-(len(self.pieces) + 2) // 64) * 64  # of the embedding, padded as llava-hf's

    def prompt(self) -> tuple[list[int], list[int]]:
        """Ids before the picture, BOS first, and after it."""
        before, after = (self.pieces.encode(part) for part in TEMPLATE)
        return [self.bos, *before], after

    def answers(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of captions, each with EOS at its end."""
        return [[*ids, self.eos] for ids in self.pieces.encode(list(texts))]

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode([i for i in ids if i < len(self.pieces)])
