"""tokenizer.json, where it holds a tokenizer of LLaMA's style: the pieces of its vocabulary, and what it puts in front of a text."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from ..checks import shown
from .folder import Section, utf8_text
from .sentencepiece import BYTE, NORMAL, UNKNOWN, Piece

LLAMA_STYLE = "what converts is LLaMA's tokenizer: SentencePiece's BPE with byte tokens"
BAR = "▁"  # SentencePiece's visible space
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
LONG = 64  # characters; LLaMA's longest piece has 27
_log = logging.getLogger("pykvsmooth")


def pieces_of(fast: Section) -> list[Piece]:
    """ModelFormatError, UnsupportedModelError."""
    model = fast.section("model") or Section({}, fast.path, "model.")
    model.only("type", ("BPE",), LLAMA_STYLE)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        model.only(key, ("",), LLAMA_STYLE)
    if model.get("byte_fallback") is not True or not _is_metaspace(fast):
        raise fast.unsupported("pre_tokenizer", f"this is not LLaMA's tokenizer (LLaMA 3's is another); {LLAMA_STYLE}")
    tokens = _ordered(model)
    ranks, unknown = _ranks(model, set(tokens)), model.text("unk_token", None)
    _check_merges(fast, model, [token for token in tokens if token != unknown and not BYTE_TOKEN.fullmatch(token)])
    # SentencePiece's scores are minus the order of the merges. What no merge makes needs none, but is below, as in its own files.
    rest = iter(range(len(ranks), len(ranks) + len(tokens)))
    pieces = []
    for token in tokens:
        if token == unknown or BYTE_TOKEN.fullmatch(token):
            pieces.append(Piece(token, 0.0, UNKNOWN if token == unknown else BYTE))
        else:
            pieces.append(Piece(token, -float(ranks[token] if token in ranks else next(rest)), NORMAL))
    return pieces


def prefix_scheme(fast: Section) -> str:
    """Where a space is put in front of text: always, first (the beginning only), never."""
    if any(part.get("type") == "Prepend" for part in _parts(fast.section("normalizer"), "normalizers")):
        return "always"
    for part in _parts(fast.section("pre_tokenizer"), "pretokenizers"):
        if part.get("type") == "Metaspace":
            return str(part.get("prepend_scheme") or ("never" if part.get("add_prefix_space") is False else "always"))
    return "never"


def adds_bos(fast: Section) -> bool | None:
    """Does the template that encloses a text begin with a special token? None without a template."""
    processor = fast.section("post_processor")
    single = processor.get("single") if processor else None
    if not isinstance(single, list) or not single:
        return None
    return isinstance(single[0], dict) and "SpecialToken" in single[0]


def _parts(section: Section | None, list_key: str) -> Iterator[Section]:
    """A normalizer or pre-tokenizer, or those that it is a sequence of."""
    if section is None:
        return
    inner = section.get(list_key) if section.get("type") == "Sequence" else None
    if isinstance(inner, list):
        yield from (Section(part, section.path, section.key("")) for part in inner if isinstance(part, dict))
    else:
        yield section


def _is_metaspace(fast: Section) -> bool:
    """Spaces become U+2581, by a normalizer or by a pre-tokenizer that does not cut there, and nothing else is done."""
    normalizers = list(_parts(fast.section("normalizer"), "normalizers"))
    cutters = list(_parts(fast.section("pre_tokenizer"), "pretokenizers"))
    for part in normalizers:
        replaces = part.get("type") == "Replace" and part.get("content") == BAR and part.get("pattern") in ({"String": " "}, {"Regex": " "})
        if not replaces and not (part.get("type") == "Prepend" and part.get("prepend") == BAR):
            return False
    good = all(c.get("type") == "Metaspace" and c.get("replacement") == BAR and c.get("split") is False for c in cutters)
    return good and bool(cutters or any(part.get("type") == "Replace" for part in normalizers))


def _ordered(model: Section) -> list[str]:
    """The tokens by their ids, which are 0..n-1."""
    vocab = model.section("vocab")
    values = {} if vocab is None else vocab.values
    if not values or any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < len(values) for i in values.values()):
        raise model.broken("vocab", "must give each token an id, from 0 on")
    if len(set(values.values())) < len(values):
        raise model.broken("vocab", "gives two tokens one id")
    tokens = sorted(values, key=lambda token: int(values[token]))
    return [utf8_text(token, model.path, f"model.vocab, token {i}") for i, token in enumerate(tokens)]


def _pairs(model: Section) -> Iterator[tuple[str, str]]:
    """The merges; either form that transformers has written."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise model.broken("merges", f"must be a list, not {shown(merges)}")
    for i, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise model.broken("merges", f"merge {i} must be two tokens, not {shown(merge)}")
        yield pair[0], pair[1]


def _ranks(model: Section, tokens: set[str]) -> dict[str, int]:
    """The order in which merges make tokens."""
    ranks: dict[str, int] = {}
    for i, (left, right) in enumerate(_pairs(model)):
        if not {left, right, left + right} <= tokens:
            raise model.broken("merges", f"merge {i}, {shown([left, right])}, is not of tokens and to a token")
        ranks.setdefault(left + right, len(ranks))
    return ranks


def _check_merges(fast: Section, model: Section, normal: list[str]) -> None:
    """A GGUF file has a score for a token, not for a merge, and merges any two neighbours that make one. That is the same where the merges
    are all that there can be, and those that make one token stand together, as in files that came from SentencePiece."""
    entries = fast.get("added_tokens")
    added = {entry.get("content") for entry in entries if isinstance(entry, dict)} if isinstance(entries, list) else set()
    known = {token for token in normal if token not in added}
    pairs = list(_pairs(model))
    made = [left + right for left, right in pairs]
    runs = sum(token != before for token, before in zip(made, ["", *made], strict=False))
    splits = ((token[:i], token[i:]) for token in known if len(token) <= LONG for i in range(1, len(token)))
    possible = {(left, right) for left, right in splits if left in known and right in known}
    missing = len(possible.difference(pairs))
    if missing or runs > len(set(made)):
        reason = f"its merges are not SentencePiece's ({missing} are missing): some texts may become other tokens"
        _log.warning("%s: %s", model.path, reason)
