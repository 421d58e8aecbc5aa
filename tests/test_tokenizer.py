"""The tokenizer against a slow reference of the merge algorithm on vocabularies made up here, and on the published LLaMA vocabulary."""

import itertools
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny

from pykvsmooth._native import ffi, lib, new_error

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTES = [f"<0x{i:02X}>" for i in range(256)]
BAR = "▁"


class Vocabulary:
    """A model loaded for its vocabulary alone, through the C interface, so that any bytes can go in."""

    def __init__(self, path: str | Path) -> None:
        out, self.error = ffi.new("kvs_model **"), new_error()
        name = ffi.new("char[]", str(path).encode())
        params = ffi.new("kvs_model_params *", {"struct_size": ffi.sizeof("kvs_model_params"), "text_path": name, "threads": 1})
        self.status = lib.kvs_model_load(params, out, self.error)
        self.model = ffi.gc(out[0], lib.kvs_model_free) if out[0] != ffi.NULL else None
        self.what, self.message = (ffi.string(x).decode() for x in (self.error.what, self.error.message))

    def encode(self, text: str | bytes, add_bos: bool = False, special: bool = False) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        ids = ffi.new("int32_t[]", len(data) + 8)
        n = lib.kvs_tokenize(self.model, data, len(data), add_bos, special, ids, len(ids))
        assert 0 <= n <= len(ids)
        return list(ids[0:n])

    def piece(self, token: int, special: bool = False) -> bytes | None:
        length = ffi.new("int32_t *")
        data = lib.kvs_token_bytes(self.model, token, special, length)
        return None if data == ffi.NULL else ffi.buffer(data, length[0])[:]

    def decode(self, ids: Sequence[int]) -> bytes:
        """Without the space that was put in front."""
        pieces = {i: self.piece(i) for i in set(ids)}
        return b"".join(pieces[i] for i in ids).removeprefix(b" ")

    def kind(self, token: int) -> int:
        return lib.kvs_token_type(self.model, token)

    def info(self) -> Any:
        info = ffi.new("kvs_model_info *")
        lib.kvs_model_get_info(self.model, info)
        return info


def write(path: Path, tokens: Sequence[Any], scores: Sequence[float] | None, kinds: Sequence[int] | None, **keys: Any) -> Path:
    """The smallest model there is around a vocabulary. keys: those of tokenizer.ggml; None leaves one out."""
    keys = {"model": "llama", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | keys
    w = tiny.Writer(path, "llama", np.random.default_rng(0), "f32")
    sizes = {"context_length": 64, "embedding_length": 8, "block_count": 1, "feed_forward_length": 8, "vocab_size": len(tokens)}
    for key, value in (sizes | {"attention.head_count": 2, "attention.head_count_kv": 2, "rope.dimension_count": 4}).items():
        w.gguf.add_uint32("llama." + key, value)
    w.gguf.add_layer_norm_rms_eps(1e-5)
    w.gguf.add_token_list(tokens)
    if scores is not None:
        w.gguf.add_array("tokenizer.ggml.scores", [float(score) for score in scores])
    if kinds is not None:
        w.gguf.add_token_types(kinds)
    for key, value in keys.items():
        add = {str: w.gguf.add_string, bool: w.gguf.add_bool, int: w.gguf.add_uint32}.get(type(value))
        if add:
            add("tokenizer.ggml." + key, value)
    w.tensor("token_embd.weight", max(len(tokens), 1), 8)
    for name, rows in {"attn_q": 8, "attn_k": 8, "attn_v": 8, "attn_output": 8, "ffn_gate": 8, "ffn_up": 8, "ffn_down": 8}.items():
        w.dense(f"blk.0.{name}", rows, 8, False)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        w.norm(name, 8)
    return Path(w.close())


def make(
    path: Path, pieces: Sequence[Any], scores: Sequence[float] = (), kinds: Sequence[int] = (), with_bytes: bool = True, **keys: Any
) -> Vocabulary:
    """Unknown, two control tokens, bytes if wanted, then pieces: the ids of these begin at first(with_bytes)."""
    head = ["<unk>", "<s>", "</s>"] + (BYTES if with_bytes else [])
    head_kinds = [UNKNOWN, CONTROL, CONTROL] + ([BYTE] * 256 if with_bytes else [])
    scores, kinds = list(scores) or [-float(i) for i in range(len(pieces))], list(kinds) or [NORMAL] * len(pieces)
    vocabulary = Vocabulary(write(path, head + list(pieces), [0.0] * len(head) + scores, head_kinds + kinds, **keys))
    assert vocabulary.status == lib.KVS_OK, vocabulary.message
    return vocabulary


def first(with_bytes: bool = True) -> int:
    return 259 if with_bytes else 3


# ---- the reference: what SentencePiece's BPE means, one merge at a time ----


def merge(text: str, prefix: bool, pieces: dict[str, tuple[int, float]], with_bytes: bool) -> list[int]:
    symbols = list((BAR if prefix else "") + text.replace(" ", BAR))
    while True:
        pairs = [(-pieces[a + b][1], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in pieces]
        if not pairs:
            break
        i = min(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    ids: list[int] = []
    run = False
    for symbol in symbols:
        unknown = symbol not in pieces and not with_bytes
        if symbol in pieces:
            ids.append(pieces[symbol][0])
        elif with_bytes:
            ids += [3 + byte for byte in symbol.encode()]
        elif not run:
            ids.append(0)
        run = unknown
    return ids


def reference(text: str, prefix: bool, pieces: dict[str, tuple[int, float]], with_bytes: bool, specials: dict[str, int]) -> list[int]:
    pattern = "|".join(re.escape(s) for s in sorted(specials, key=len, reverse=True))
    ids: list[int] = []
    for part in re.split(f"({pattern})", text) if specials else [text]:
        ids += [specials[part]] if part in specials else merge(part, prefix, pieces, with_bytes) if part else []
    return ids


def random_pieces(rng: np.random.Generator, alphabet: list[str]) -> list[str]:
    """Characters, and strings that merges of them can reach."""
    reach = list(alphabet)
    for _ in range(int(rng.integers(5, 80))):
        joined = "".join(rng.choice(reach, 2))
        if len(joined) < 12:
            reach.append(joined)
    known = reach[int(rng.integers(0, 2)) :]  # sometimes a character is no piece
    return list(dict.fromkeys(known))


def random_text(rng: np.random.Generator, n: int) -> str:
    """Letters, spaces and the whole of Unicode, U+2581 and zero bytes among them."""
    ranges = [(32, 127), (32, 33), (0, 0x300), (0x300, 0xD800), (0x2580, 0x2583), (0xE000, 0x10000), (0x10000, 0x110000)]
    bounds = [ranges[i] for i in rng.choice(len(ranges), n, p=[0.4, 0.1, 0.1, 0.15, 0.05, 0.05, 0.15])]
    return "".join(chr(rng.integers(lo, hi)) for lo, hi in bounds)


@pytest.mark.parametrize("with_bytes", [True, False])
def test_random_vocabularies(rng: np.random.Generator, tmp_path: Path, with_bytes: bool) -> None:
    for trial in range(12):
        alphabet = [*rng.choice(list("abcdeé中🦙ß"), int(rng.integers(2, 7)), replace=False), BAR]
        pieces = random_pieces(rng, alphabet)
        scores = (-rng.integers(0, rng.choice([1, 5, 1000]), len(pieces))).astype(float).tolist()  # many ties
        user = {"[ab]": USER, "[ab]c": USER, "a a": USER, "é": USER} if trial % 2 else {}
        user = {text: kind for text, kind in user.items() if text not in pieces}
        prefix, at = trial % 3 != 0, first(with_bytes)
        names = [*pieces, *user]
        vocabulary = make(
            tmp_path / f"{trial}.gguf",
            names,
            scores + [0.0] * len(user),
            [NORMAL] * len(pieces) + list(user.values()),
            with_bytes,
            add_space_prefix=prefix,
        )
        table = {p: (at + i, s) for i, (p, s) in enumerate(zip(pieces, scores, strict=True))}
        always = {p: at + len(pieces) + i for i, p in enumerate(user)}
        for special in (False, True):
            specials = always | ({"<unk>": 0, "<s>": 1, "</s>": 2} if special else {})
            words = [c for c in alphabet if c != BAR] + [" ", "z", "<s>", "</s>", "[ab]", "[ab]c", "<", "s>"]
            for _ in range(25):
                text = "".join(rng.choice(words, int(rng.integers(0, 40))))
                want = reference(text, prefix, table | {p: (i, 0.0) for p, i in always.items()}, with_bytes, specials)
                assert vocabulary.encode(text, special=special) == want, (text, names, scores)
                assert vocabulary.encode(text, add_bos=True, special=special) == [1, *want]


def test_round_trip_of_any_text(rng: np.random.Generator, tmp_path: Path) -> None:
    vocabulary = make(tmp_path / "v.gguf", [*random_pieces(rng, list("abcé中" + BAR)), "th", "e", BAR + "e"])
    for _ in range(2000):
        text = random_text(rng, int(rng.integers(0, 60)))
        assert vocabulary.decode(vocabulary.encode(text)) == text.encode()
        assert vocabulary.decode(vocabulary.encode(text, add_bos=True)) == text.encode()


def test_round_trip_of_any_bytes(rng: np.random.Generator, tmp_path: Path) -> None:
    vocabulary = make(tmp_path / "v.gguf", ["a", "é", "中", "🦙", BAR, BAR + "a", "\0"])
    broken = [b"\xe2\x96", b"\xc0\x80", b"\xed\xa0\x80", b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xff", b"\xf0\x9f\xa6", b"\x80", b"\0"]
    for _ in range(500):
        parts = [*broken, "🦙".encode(), b"a", b" ", BAR.encode(), rng.bytes(3)]
        data = b"".join(parts[i] for i in rng.integers(0, len(parts), int(rng.integers(0, 30))))
        ids = vocabulary.encode(data)
        assert vocabulary.decode(ids) == data
        assert 0 not in ids


def test_bytes_that_are_no_character(tmp_path: Path) -> None:
    vocabulary = make(tmp_path / "v.gguf", ["a", "é", BAR])
    bar = first() + 2
    assert vocabulary.encode(b"\xc3") == [bar, 3 + 0xC3]
    assert vocabulary.encode(b"\xc3\xa9\xa9") == [bar, first() + 1, 3 + 0xA9]
    assert vocabulary.encode(BAR) == [bar, 3 + 0xE2, 3 + 0x96, 3 + 0x81]  # its own character, not a space
    assert vocabulary.encode("\0") == [bar, 3]


def test_equal_scores_merge_from_the_left(tmp_path: Path) -> None:
    vocabulary = make(tmp_path / "v.gguf", ["a", "aa"], [0.0, -1.0], add_space_prefix=False)
    assert vocabulary.encode("aaaaa") == [260, 260, 259]
    assert vocabulary.encode("a" * 7, add_bos=True) == [1, 260, 260, 260, 259]


def test_special_tokens(tmp_path: Path) -> None:
    pieces = ["a", "b", BAR, BAR + "a", BAR + "b", "<x>", "<x>y", "<c>"]
    kinds = [NORMAL] * 5 + [USER, USER, CONTROL]
    v = make(tmp_path / "v.gguf", pieces, kinds=kinds)
    ids = {p: first() + i for i, p in enumerate(pieces)} | {"</s>": 2}
    ba, bb, bar = ids[BAR + "a"], ids[BAR + "b"], ids[BAR]
    assert v.encode("a</s>b", special=True) == [ba, 2, bb]  # every fragment gets its space
    assert v.encode("</s></s>b", special=True) == [2, 2, bb]
    assert v.encode("a</s>") == [ba, *(3 + b for b in b"</s>")]
    assert v.encode("a<c>b", special=True) == [ba, ids["<c>"], bb]
    assert ids["<c>"] not in v.encode("a<c>b")
    assert v.encode("a<x>yb<x>b") == [ba, ids["<x>y"], bb, ids["<x>"], bb]  # user-defined: always, the longest
    assert v.encode("<s>a", add_bos=True, special=True) == [1, 1, ba]
    assert v.encode("", add_bos=True) == [1]
    assert v.encode("") == []
    assert v.encode(" ") == [bar, bar]


def test_no_text_is_merged_into_control_tokens(tmp_path: Path) -> None:
    """Else a user could end a turn with what he writes."""
    pieces = ["<", "/", "s", ">", "</", "s>", "<0x41>x", BAR]
    vocabulary = make(tmp_path / "v.gguf", pieces, [0.0] * len(pieces))
    ids = vocabulary.encode("</s><s><unk><0x0A>")
    assert not {0, 1, 2, 3 + 10} & set(ids)


def test_token_bytes_and_kinds(tmp_path: Path) -> None:
    v = make(tmp_path / "v.gguf", [BAR + "a" + BAR, "é", "", "<u>", "<gone>"], kinds=[NORMAL, NORMAL, NORMAL, USER, UNUSED])
    at = first()
    assert [v.kind(i) for i in (0, 1, 2, 3, at, at + 3, at + 4, at + 5, -1)] == [2, 3, 3, 6, 1, 4, 5, -1, -1]
    assert [v.piece(i) for i in (at, at + 1, at + 2, at + 3)] == [b" a ", "é".encode(), b"", b"<u>"]
    assert (v.piece(2), v.piece(2, special=True)) == (b"", b"</s>")
    assert (v.piece(0), v.piece(0, special=True)) == (" ⁇ ".encode(), b"<unk>")
    assert [v.piece(3 + i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert v.piece(-1) is None and v.piece(at + 5) is None


def test_unused_pieces_fall_apart(rng: np.random.Generator, tmp_path: Path) -> None:
    v = make(tmp_path / "v.gguf", ["a", "b", "ab", "aba", "abab"], [0, 0, -1, -3, -2], [1, 1, 1, 5, 5], add_space_prefix=False)
    assert v.encode("abab") == [261, 261]
    assert v.encode("aba") == [261, 259]
    for trial in range(5):
        pieces = random_pieces(rng, ["a", "b", "c", BAR])
        kinds = [UNUSED if len(p) > 1 and rng.random() < 0.4 else NORMAL for p in pieces]
        v = make(tmp_path / f"{trial}.gguf", pieces, (-rng.integers(0, 50, len(pieces))).astype(float).tolist(), kinds)
        for _ in range(40):
            text = "".join(rng.choice(list("abc "), 40))
            ids = v.encode(text)
            assert UNUSED not in map(v.kind, ids)
            assert v.decode(ids) == text.encode()


def test_duplicates_and_empty_tokens(tmp_path: Path) -> None:
    v = make(tmp_path / "v.gguf", ["a", "", "a", "<c>", "<c>", ""], kinds=[1, 1, 1, 3, 3, 4], add_space_prefix=False)
    assert v.encode("aa") == [261, 261]  # the last one
    assert v.encode("a<c>a", special=True) == [261, 263, 261]


def test_long_pieces(tmp_path: Path) -> None:
    word = "ab" * 100_000
    v = make(tmp_path / "v.gguf", ["a", "b", "ab", word, "<" + word + ">"], kinds=[1, 1, 1, 1, 4], add_space_prefix=False)
    assert set(v.encode(word)) == {261}
    assert v.piece(262) == word.encode()


def test_capacity(tmp_path: Path) -> None:
    v = make(tmp_path / "v.gguf", ["a", BAR])
    ids = ffi.new("int32_t[]", [-7] * 6)
    assert lib.kvs_tokenize(v.model, b"aaaa", 4, 1, 0, ids, 3) == 6
    assert list(ids) == [1, 260, 259, -7, -7, -7]
    assert lib.kvs_tokenize(v.model, b"aaaa", 4, 1, 0, ffi.NULL, 0) == 6


def test_long_texts_take_no_longer_than_they_should(rng: np.random.Generator, tmp_path: Path) -> None:
    """A quadratic tokenizer would need minutes."""
    pieces = [*("a" * (1 << i) for i in range(12)), BAR, BAR * 2, BAR * 4, "b", "ab"]
    v = make(tmp_path / "v.gguf", pieces, kinds=[NORMAL] * (len(pieces) - 1) + [UNUSED])
    texts = [
        "a" * (1 << 20),
        " " * (1 << 20),
        "".join(rng.choice(list("ab "), 1 << 20)),
        "<" * (1 << 20),
        BAR * (1 << 18),
        "</s>a" * 200_000,
    ]
    for text in texts:
        start = time.monotonic()
        ids = v.encode(text)
        assert time.monotonic() - start < 10  # well under one second on a free machine
        assert v.decode(ids) == text.encode()


def test_kinds_are_inferred(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "a", BAR + "a", "<pad>"]
    scores = [-float(i) for i in range(len(tokens))]
    v = Vocabulary(write(tmp_path / "v.gguf", tokens, scores, None, padding_token_id=261))
    assert v.status == lib.KVS_OK, v.message
    assert [v.kind(i) for i in (0, 1, 2, 3, 258, 259, 260, 261)] == [2, 3, 3, 6, 6, 1, 1, 3]
    assert v.encode("aä") == [260, 3 + 0xC3, 3 + 0xA4]


def test_ids_of_the_file(tmp_path: Path) -> None:
    none = {"bos_token_id": None, "eos_token_id": None, "unknown_token_id": None}
    info = make(tmp_path / "a.gguf", ["a"], **none).info()  # told by kind and text
    assert (info.bos, info.eos, info.unk, info.pad, info.add_bos, info.add_space_prefix) == (1, 2, 0, -1, 1, 1)
    info = make(tmp_path / "b.gguf", ["a"], padding_token_id=2, eos_token_id=1, add_bos_token=False, add_space_prefix=False).info()
    assert (info.bos, info.eos, info.unk, info.pad, info.add_bos, info.add_space_prefix) == (1, 1, 0, 2, 0, 0)


REFUSED = {  # tokens, scores, kinds, keys; the key that the message names
    "model": (["<unk>", "a"], [0, 0], [2, 1], {"model": "gpt2"}, "tokenizer.ggml.model"),
    "no model": (["<unk>", "a"], [0, 0], [2, 1], {"model": None}, "tokenizer.ggml.model"),
    "no scores": (["<unk>", "a"], None, [2, 1], {}, "tokenizer.ggml.scores"),
    "few scores": (["<unk>", "a"], [0], [2, 1], {}, "tokenizer.ggml.scores"),
    "many scores": (["<unk>", "a"], [0, 0, 0], [2, 1], {}, "tokenizer.ggml.scores"),
    "nan": (["<unk>", "a"], [0, float("nan")], [2, 1], {}, "tokenizer.ggml.scores"),
    "inf": (["<unk>", "a"], [0, float("-inf")], [2, 1], {}, "tokenizer.ggml.scores"),
    "few kinds": (["<unk>", "a"], [0, 0], [2], {}, "tokenizer.ggml.token_type"),
    "kind 7": (["<unk>", "a"], [0, 0], [2, 7], {}, "tokenizer.ggml.token_type"),
    "kind -1": (["<unk>", "a"], [0, 0], [2, -1], {}, "tokenizer.ggml.token_type"),
    "byte": (["<unk>", "<0xG0>"], [0, 0], [2, 6], {}, "tokenizer.ggml.token_type"),
    "bos": (["<unk>", "a"], [0, 0], [2, 1], {"bos_token_id": 2}, "tokenizer.ggml.bos_token_id"),
    "pad": (["<unk>", "a"], [0, 0], [2, 1], {"padding_token_id": 2**32 - 1}, "tokenizer.ggml.padding_token_id"),
    "nothing unknown": (["a", "b"], [0, 0], [1, 1], {"unknown_token_id": None}, "tokenizer.ggml.tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    tokens, scores, kinds, keys, what = REFUSED[case]
    keys = {"bos_token_id": None, "eos_token_id": None} | keys
    v = Vocabulary(write(tmp_path / "v.gguf", tokens, scores, kinds, **keys))
    assert v.model is None
    assert v.status == (lib.KVS_E_UNSUPPORTED if case == "model" else lib.KVS_E_FORMAT), v.message
    assert v.what == what
    assert str(tmp_path / "v.gguf") in v.message
    if case == "model":
        assert "gpt2" in v.message and '"llama"' in v.message


# ---- the published vocabulary ----


@pytest.fixture(scope="module")
def llama(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Vocabulary, list[str]]:
    fields = gguf.GGUFReader(shared_data / "vocab" / "ggml-vocab-llama-spm.gguf").fields
    tokens, scores, kinds = (fields["tokenizer.ggml." + key].contents() for key in ("tokens", "scores", "token_type"))
    vocabulary = Vocabulary(write(tmp_path_factory.mktemp("llama") / "v.gguf", tokens, scores, kinds))
    assert vocabulary.status == lib.KVS_OK, vocabulary.message
    return vocabulary, tokens


def test_llama_vocabulary(llama: tuple[Vocabulary, list[str]], shared_data: Path) -> None:
    file = shared_data / "vocab" / "ggml-vocab-llama-spm.gguf"
    with open(f"{file}.inp", encoding="utf-8", newline="") as f:
        texts = f.read().split("\n__ggml_vocab_test__\n")
    wanted = [[int(i) for i in line.split()] for line in Path(f"{file}.out").read_text().split("\n")]
    assert len(texts) == len(wanted) == 47
    for text, ids in zip(texts, wanted, strict=True):
        assert llama[0].encode(text) == ids, text


def test_llama_round_trip(llama: tuple[Vocabulary, list[str]], rng: np.random.Generator) -> None:
    vocabulary, tokens = llama
    for i in range(2000):
        text = random_text(rng, int(rng.integers(0, 80)))
        if i % 2:
            text = "".join(tokens[t] for t in rng.integers(259, len(tokens), 20)).replace(BAR, " ")
        assert vocabulary.decode(vocabulary.encode(text)) == text.encode()


def test_llama_prompt_around_an_image(llama: tuple[Vocabulary, list[str]]) -> None:
    """The pieces beside "<image>", encoded one by one, are what transformers gives for the whole prompt of LLaVA-1.5."""
    vocabulary = llama[0]
    assert vocabulary.encode("USER: ", add_bos=True, special=True) == [1, 3148, 1001, 29901, 29871]
    question = vocabulary.encode("\nWhat's the content of the image?\nASSISTANT:", special=True)
    assert question == [29871, 13, 5618, 29915, 29879, 278, 2793, 310, 278, 1967, 29973, 13, 22933, 9047, 13566, 29901]
    assert vocabulary.encode("yes</s>USER: more", special=True) == [4874, 2, 3148, 1001, 29901, 901]
