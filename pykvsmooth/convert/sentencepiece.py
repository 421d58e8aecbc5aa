"""tokenizer.model: the part of SentencePiece's ModelProto that a GGUF file repeats.

The sentencepiece package tells neither the kind of a model nor its normalizer, and its protobuf classes need protobuf, which checks
nothing that we want checked; the wire format is a page. Field numbers: sentencepiece_model.proto of the SentencePiece project.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from .folder import broken

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
BPE = 2
KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces; GGUF's token types are the same numbers


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: int


@dataclass
class SentencePieceModel:
    pieces: list[Piece] = field(default_factory=list)
    kind: int = 1
    ids: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1})
    normalized: bool = False  # characters are replaced (NFKC and the like)
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    whitespace_as_suffix: bool = False


def parse(data: bytes, path: str) -> SentencePieceModel:
    """ModelFormatError for what is no ModelProto."""
    model = SentencePieceModel()
    for number, value in _fields(data, path, 0):
        if number == 1 and isinstance(value, _Bytes):
            model.pieces.append(_piece(value, path, len(model.pieces)))
        elif number == 2 and isinstance(value, _Bytes):
            _read_trainer(model, value, path)
        elif number == 3 and isinstance(value, _Bytes):
            _read_normalizer(model, value, path)
    if not model.pieces:
        raise broken(path, "", "is no SentencePiece model: there are no pieces in it")
    return model


@dataclass(frozen=True)
class _Bytes:
    data: bytes
    at: int


def _piece(message: _Bytes, path: str, index: int) -> Piece:
    text, score, kind = b"", 0.0, NORMAL
    for number, value in _fields(message.data, path, message.at):
        if number == 1 and isinstance(value, _Bytes):
            text = value.data
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    if not math.isfinite(score):
        raise broken(path, f"piece {index}", "its score is no finite number", message.at)
    if not NORMAL <= kind <= BYTE:
        raise broken(path, f"piece {index}", f"has the type {kind}; 1 to 6 are known", message.at)
    try:
        return Piece(text.decode(), score, kind)
    except UnicodeDecodeError:
        raise broken(path, f"piece {index}", "is not UTF-8", message.at) from None


def _read_trainer(model: SentencePieceModel, message: _Bytes, path: str) -> None:
    ids = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}
    for number, value in _fields(message.data, path, message.at):
        if not isinstance(value, int):
            continue
        if number == 3:
            model.kind = value
        elif number == 24:
            model.whitespace_as_suffix = bool(value)
        elif number in ids:
            model.ids[ids[number]] = value


def _read_normalizer(model: SentencePieceModel, message: _Bytes, path: str) -> None:
    for number, value in _fields(message.data, path, message.at):
        if number == 2 and isinstance(value, _Bytes):
            model.normalized = bool(value.data)
        elif number == 3:
            model.add_dummy_prefix = bool(value)
        elif number == 4:
            model.remove_extra_whitespaces = bool(value)
        elif number == 5:
            model.escape_whitespaces = bool(value)


def _fields(data: bytes, path: str, base: int) -> Iterator[tuple[int, int | float | _Bytes]]:
    """The fields of a message: number and value. base: where it begins in the file."""
    at = 0
    while at < len(data):
        begin = at
        tag, at = _varint(data, at, path, base)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(data, at, path, base)
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        length = {FIXED64: 8, FIXED32: 4}.get(wire, 0)
        if wire == BYTES:
            length, at = _varint(data, at, path, base)
        elif not length:
            raise broken(path, "", "is no SentencePiece model", base + begin)
        if length > len(data) - at:
            raise broken(path, "", f"is no SentencePiece model, or only the beginning of one: a field of {length} bytes", base + begin)
        content, start = data[at : at + length], base + at
        at += length
        yield number, _Bytes(content, start) if wire == BYTES else struct.unpack("<f" if wire == FIXED32 else "<d", content)[0]


def _varint(data: bytes, at: int, path: str, base: int) -> tuple[int, int]:
    """A number of up to 64 bits and where it ends."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value & ((1 << 64) - 1), at + i + 1
    raise broken(path, "", "is no SentencePiece model, or only the beginning of one", base + at)
