"""The vocabulary that goes into a GGUF file: from tokenizer.model (SentencePiece) or tokenizer.json, with the tokens that were added
later, and with unused ones up to the rows of the embedding."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import shown
from ..errors import ModelFileNotFoundError
from . import sentencepiece as spm
from . import tokenizer_json as fast_file
from .folder import Folder, Section, broken, clean, unsupported, utf8_text
from .sentencepiece import Piece
from .tokenizer_json import LLAMA_STYLE

ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0  # as llama.cpp's converter writes them; merging never looks at them
MAX_TEMPLATE = 256 << 10
SPECIAL = ("bos", "eos", "unk", "pad")
_log = logging.getLogger("pykvsmooth")


@dataclass
class Vocabulary:
    """ids: of the special tokens, None for what the model lacks. add_...: what is put around a text."""

    pieces: list[Piece]
    ids: dict[str, int | None]
    add_bos: bool = True
    add_eos: bool = False
    add_space_prefix: bool = True


@dataclass(frozen=True)
class _Added:
    text: str
    special: bool


def read_vocabulary(folder: Folder, n_vocab: int, configs: Sequence[Section]) -> Vocabulary:
    """n_vocab: rows of the embedding. configs: where special ids may be given, best first. ModelFormatError, UnsupportedModelError,
    ModelFileNotFoundError."""
    settings = folder.json("tokenizer_config.json") or Section({}, folder.path_of("tokenizer_config.json"))
    fast, data = folder.json("tokenizer.json"), folder.read("tokenizer.model")
    if data is not None:
        vocabulary = _from_sentencepiece(data, folder.path_of("tokenizer.model"))
    elif fast is not None:
        vocabulary = Vocabulary(fast_file.pieces_of(fast), dict.fromkeys(SPECIAL))
    else:
        path = folder.path_of("tokenizer.model")
        raise ModelFileNotFoundError(f"{folder.path}: there is no tokenizer.model and no tokenizer.json in it", path, errno.ENOENT)
    known = len(vocabulary.pieces)
    if known > n_vocab:
        raise broken(folder.path, "vocab_size", f"the tokenizer has {known} tokens, the embedding {n_vocab} rows")
    vocabulary.pieces += [Piece(f"[PAD{i}]", UNUSED_SCORE, spm.UNUSED) for i in range(known, n_vocab)]
    _add(vocabulary, _added_tokens(folder, fast, settings), known, folder)
    _find_special(vocabulary, dict(_named(settings)), configs)
    _set_switches(vocabulary, settings, fast)
    return vocabulary


def chat_template(folder: Folder) -> str | None:
    """The folder's jinja2 template, wherever it is; of several by name the one called default."""
    text = folder.text("chat_template.jinja", MAX_TEMPLATE)
    if text:
        return text
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        section = folder.json(name)
        value = section.get("chat_template") if section else None
        if isinstance(value, list):
            value = next((t.get("template") for t in value if isinstance(t, dict) and t.get("name") == "default"), None)
        if section is None or value is None:
            continue
        if not isinstance(value, str) or len(value) > MAX_TEMPLATE:
            raise section.broken("chat_template", f"must be a text of up to {MAX_TEMPLATE} characters")
        return utf8_text(value, section.path, "chat_template")
    return None


def _from_sentencepiece(data: bytes, path: str) -> Vocabulary:
    model = spm.parse(data, path)
    if model.kind != spm.BPE:
        raise unsupported(path, "model_type", f'"{spm.KINDS.get(model.kind, model.kind)}" can\'t be converted; {LLAMA_STYLE}')
    if model.whitespace_as_suffix or not model.escape_whitespaces:
        raise unsupported(path, "escape_whitespaces", f"spaces are not written as LLaMA's are; {LLAMA_STYLE}")
    if model.normalized or model.remove_extra_whitespaces:
        _log.warning("%s: it changes texts before it cuts them into pieces; a GGUF file can't, nor do transformers' fast tokenizers", path)
    for i, piece in enumerate(model.pieces):
        if piece.type == spm.BYTE and not fast_file.BYTE_TOKEN.fullmatch(piece.text):
            raise broken(path, f"piece {i}", "is a byte, but its text is not <0xNN>")
    ids = {name: id if 0 <= id < len(model.pieces) else None for name, id in model.ids.items()}
    return Vocabulary(model.pieces, ids, add_space_prefix=model.add_dummy_prefix)


# ---- tokens that were added ----


def _added_tokens(folder: Folder, fast: Section | None, settings: Section) -> dict[int, _Added]:
    """By id. The same tokens stand in up to three files; the later ones of these know more."""
    found: dict[int, _Added] = {}
    plain = folder.json("added_tokens.json") or Section({}, folder.path)
    special = {text for _, text in _named(settings)}
    for text, id in plain.values.items():
        found[_id(plain, text, id)] = _Added(utf8_text(text, plain.path, text), text in special)
    decoder = settings.section("added_tokens_decoder") or Section({}, settings.path)
    for key, entry in decoder.values.items():
        number = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else None
        found[_id(decoder, key, number)] = _entry(decoder, key, entry)
    entries = fast.get("added_tokens") if fast else None
    if fast is not None and entries is not None:
        if not isinstance(entries, list):
            raise fast.broken("added_tokens", f"must be a list, not {shown(entries)}")
        for i, entry in enumerate(entries):
            key = f"added_tokens[{i}]"
            found[_id(fast, key, entry.get("id") if isinstance(entry, dict) else None)] = _entry(fast, key, entry)
    return found


def _id(section: Section, key: str, id: Any) -> int:
    if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < 1 << 31:
        raise section.broken(key, "must have an id, a whole number from 0 on")
    return id


def _entry(section: Section, key: str, entry: Any) -> _Added:
    text = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text:
        raise section.broken(key, "must be an object with the token's text as content")
    return _Added(utf8_text(text, section.path, section.key(key)), entry.get("special") is True)


def _add(vocabulary: Vocabulary, added: dict[int, _Added], known: int, folder: Folder) -> None:
    pieces = vocabulary.pieces
    for id, token in sorted(added.items()):
        if id >= len(pieces):
            _log.warning("%s: the added token %d, %s, has no row in the embedding and is left out", folder.path, id, clean(token.text))
        elif pieces[id].type != spm.UNKNOWN:
            pieces[id] = Piece(token.text, 0.0 if id < known else ADDED_SCORE, spm.CONTROL if token.special else spm.USER_DEFINED)


# ---- special tokens ----


def _named(settings: Section) -> Iterator[tuple[str, str]]:
    """bos, eos, unk, pad and the like with their texts."""
    for key, value in settings.values.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            yield key.removesuffix("_token"), text


def _find_special(vocabulary: Vocabulary, named: dict[str, str], configs: Sequence[Section]) -> None:
    """By the text that the tokenizer's settings give, else by the id that a config gives, else by tokenizer.model's own."""
    ids, pieces = vocabulary.ids, vocabulary.pieces
    by_text = {piece.text: id for id, piece in enumerate(pieces)}
    for name in SPECIAL:
        given = [_configured(config, f"{name}_token_id", len(pieces)) for config in configs]
        found = [by_text.get(named[name]) if name in named else None, *given, ids[name]]
        ids[name] = next((id for id in found if id is not None), None)
    if ids["unk"] is not None and all(piece.type != spm.UNKNOWN for piece in pieces):
        pieces[ids["unk"]] = Piece(pieces[ids["unk"]].text, 0.0, spm.UNKNOWN)
    for name in ("bos", "eos"):
        id = ids[name]
        if id is not None and pieces[id].type == spm.NORMAL:
            pieces[id] = Piece(pieces[id].text, 0.0, spm.CONTROL)


def _configured(config: Section, key: str, n_vocab: int) -> int | None:
    """An id, of several the first; -1 has meant none."""
    value = config.get(key)
    if isinstance(value, list) and value:
        value = value[0]
    if value is None or value == -1:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < n_vocab:
        raise config.broken(key, f"must be the id of one of {n_vocab} tokens, not {shown(value)}")
    return value


def _set_switches(vocabulary: Vocabulary, settings: Section, fast: Section | None) -> None:
    """Is there a BOS in front, and a space? As the settings say, else as tokenizer.json does it, else as tokenizer.model."""
    bos, prefix = settings.flag("add_bos_token"), settings.flag("add_prefix_space")
    if fast is not None:
        scheme = fast_file.prefix_scheme(fast)
        prefix = scheme != "never" if prefix is None else prefix
        bos = fast_file.adds_bos(fast) if bos is None else bos
        if prefix and scheme == "first":
            _log.warning("%s: puts a space in front of a text only; by a GGUF file each piece between special tokens gets one", fast.path)
    vocabulary.add_bos = vocabulary.add_bos if bos is None else bos
    vocabulary.add_eos = bool(settings.flag("add_eos_token", False))
    vocabulary.add_space_prefix = vocabulary.add_space_prefix if prefix is None else prefix
