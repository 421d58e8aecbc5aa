"""The finished model as a Hugging Face folder that LlavaForConditionalGeneration and AutoProcessor load, laid out as llava-hf's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from . import language, tower
from .recipe import Sizes
from .vocabulary import Vocabulary
from .work import Work, finished_folder

# Vicuna's, as the runtime's own: USER: <image>\n{prompt} ASSISTANT: {answer}</s>
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: "
    "{% for part in m.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %} "
    "{% elif m.role == 'assistant' %}ASSISTANT: "
    "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}</s>"
    "{% else %}{% for part in m.content if part.type == 'text' %}{{ part.text }} {% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def merges(words: Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece merges whatever two pieces make the best piece: as ranked pairs, the best (first made) result first."""
    pieces = {words.pieces.id_to_piece(i): i for i in range(len(words.pieces)) if not words.pieces.is_byte(i)}
    pairs = []
    for piece, rank in pieces.items():
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs += sorted(((rank, pieces[a], a, b) for a, b in cuts if a in pieces and b in pieces), key=lambda pair: pair[:2])
    return [(a, b) for _, _, a, b in pairs]


def tokenizer(words: Vocabulary) -> Tokenizer:
    """The same ids from the tokenizers library: every piece of text between control tokens gets SentencePiece's space in front."""
    ids = {words.pieces.id_to_piece(i): i for i in range(len(words.pieces))}
    made = Tokenizer(BPE(ids, merges(words), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", words.bos)])
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ("<unk>", "<s>", "</s>", "<image>", "<pad>")])
    return made


def side_files(words: Vocabulary, sizes: Sizes) -> dict[str, dict]:
    """Names and contents of the small files beside the weights."""
    added = {0: "<unk>", words.bos: "<s>", words.eos: "</s>", words.image: "<image>", words.pad: "<pad>"}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    square = {"height": sizes.image, "width": sizes.image}
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": True,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": sizes.positions,
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
            "extra_special_tokens": {"image_token": "<image>"},
            "added_tokens_decoder": {str(i): {"content": text, "special": True, "normalized": False} for i, text in added.items()},
            **names,
        },
        "special_tokens_map.json": {**names, "image_token": "<image>"},
        "chat_template.json": {"chat_template": TEMPLATE},
        "generation_config.json": {"bos_token_id": words.bos, "eos_token_id": words.eos, "pad_token_id": words.pad},
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": sizes.patch,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_resize": True,
            "size": {"shortest_edge": sizes.image},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(tower.MEAN),
            "image_std": list(tower.STD),
            "do_convert_rgb": True,
        },
    }


def make(work: Work, sight: Work, sizes: Sizes) -> Path:
    """Leaves the folder llava in work: float32 weights and all that belongs to them."""
    words, path = Vocabulary(sight.path("tokenizer.model")), work.path("llava")
    with finished_folder(path) as part:
        language.load(work, sight, sizes).save_pretrained(part)
        shutil.copyfile(sight.path("tokenizer.model"), part / "tokenizer.model")
        tokenizer(words).save(str(part / "tokenizer.json"))
        for name, content in side_files(words, sizes).items():
            (part / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
