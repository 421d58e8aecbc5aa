"""Every seed and found case of the fuzz targets through the package: it loads and works, or it is refused with an error of ours."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf_write as gw
import numpy as np
import pytest
from fuzz import fuzz_image, fuzz_template
from fuzz.inputs import CORPUS, N_PARTS, policies, split
from gguf_write import Tensor
from loading import Failure, open_gguf

import pykvsmooth as kvs
from pykvsmooth._native import ffi, lib
from pykvsmooth.gguf import read_metadata

N_CTX, MAX_ROWS = 48, 32
PART_1, PART_2 = "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"


def cases(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())


def each(target: str) -> Any:
    return pytest.mark.parametrize("case", cases(target), ids=lambda path: path.name)


def test_the_corpus_is_small() -> None:
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(sizes) < 1 << 20 and max(sizes) < 16 << 10
    assert {path.name for path in CORPUS.iterdir()} == {*N_PARTS, "fixed", "image", "template"}


@each("gguf")
def test_gguf(case: Path, tmp_path: Path) -> None:
    (tmp_path / "case.gguf").write_bytes(case.read_bytes())
    with suppress(kvs.KVSmoothError):
        assert all(isinstance(name, str) for name in read_metadata(str(tmp_path / "case.gguf")))
    with suppress(kvs.KVSmoothError):
        kvs.Model(str(tmp_path / "case.gguf"), threads=1, device="cpu").close()


def one_step(model: kvs.Model, options: int = 0) -> None:
    """A prompt with a picture, if the model sees, and tokens behind it."""
    small = model.has_vision and model.n_image <= MAX_ROWS
    picture = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3) if small else None
    kept = [policy for policy in policies(options) if small or isinstance(policy, kvs.KVSmooth)]
    with suppress(kvs.KVSmoothError), model.session(n_ctx=N_CTX, policy=kept) as session:
        list(session.generate("a dog", image=picture, max_tokens=3, template=None))


@each("model")
def test_model(case: Path, tmp_path: Path) -> None:
    options, parts = split(case.read_bytes(), N_PARTS["model"])
    for name, data in zip((PART_1, "mmproj.gguf", PART_2), parts, strict=True):
        (tmp_path / name).write_bytes(data)
    mmproj = str(tmp_path / "mmproj.gguf") if parts[1] else False
    with suppress(kvs.KVSmoothError), kvs.Model(str(tmp_path / PART_1), mmproj=mmproj, threads=1, device="cpu") as model:
        one_step(model, options)


@each("mmproj")
def test_mmproj(case: Path) -> None:
    with suppress(kvs.KVSmoothError), kvs.Model(str(CORPUS / "fixed/text.gguf"), mmproj=str(case), threads=1, device="cpu") as model:
        one_step(model)


def n_tokens(path: Path) -> int:
    with suppress(Failure):
        file, key = open_gguf(path), ffi.new("kvs_gguf_key *")
        for i in range(lib.kvs_gguf_n_keys(file)):
            lib.kvs_gguf_key_at(file, i, key)
            if ffi.string(key.name) == b"tokenizer.ggml.tokens":
                return int(key.count)
    return 0


def with_vocabulary(case: Path, tmp_path: Path) -> tuple[int, str, bytes]:
    """The case's vocabulary as part 1 of a split model, and behind it weights for so many tokens; the options, its path, the rest."""
    options, (vocabulary, rest) = split(case.read_bytes(), 2)
    (tmp_path / PART_1).write_bytes(vocabulary)
    weights = gw.text(1, embd=2, heads=1, heads_kv=1, ff=2)
    weights.keys = {"split.no": (gw.U32, 1), "split.count": (gw.U32, 2)}
    for name in ("token_embd.weight", "output.weight"):
        weights.tensors[name] = Tensor((2, max(1, n_tokens(tmp_path / PART_1))))
    weights.write(tmp_path / PART_2)
    return options, str(tmp_path / PART_1), rest


@each("tokenizer")
def test_tokenizer(case: Path, tmp_path: Path) -> None:
    options, path, raw = with_vocabulary(case, tmp_path)
    with suppress(kvs.KVSmoothError), kvs.Model(path, mmproj=False, threads=1, device="cpu") as model:
        text = raw.decode("utf-8", "replace")
        ids = model.tokenize(text, add_bos=bool(options & 1), special=bool(options & 2))
        assert all(0 <= i < model.n_vocab for i in ids)
        assert isinstance(model.detokenize(ids), str)


@each("detokenizer")
def test_detokenizer(case: Path, tmp_path: Path) -> None:
    _, path, raw = with_vocabulary(case, tmp_path)
    with suppress(kvs.KVSmoothError), kvs.Model(path, mmproj=False, threads=1, device="cpu") as model:
        ids = [i[0] % model.n_vocab for i in struct.iter_unpack("<i", raw[: len(raw) // 4 * 4])]
        assert b"".join(model.token_bytes(i, special=True) for i in ids) is not None
        assert isinstance(model.detokenize(ids), str)


@pytest.mark.parametrize("target", ["tokenizer", "detokenizer"])
def test_vocabularies_of_seeds_become_models(target: str, tmp_path: Path) -> None:
    with kvs.Model(with_vocabulary(CORPUS / target / "small-words", tmp_path)[1], mmproj=False, threads=1, device="cpu") as model:
        assert model.detokenize(model.tokenize("a dog")) == "a dog"


@pytest.fixture(scope="module")
def sound() -> Iterator[kvs.Model]:
    with kvs.Model(str(CORPUS / "fixed/text.gguf"), mmproj=str(CORPUS / "fixed/mmproj.gguf"), threads=1, device="cpu") as model:
        model._end_ids = frozenset()
        yield model


@each("session")
def test_session(case: Path, sound: kvs.Model, tmp_path: Path) -> None:
    options, (data,) = split(case.read_bytes(), 1)
    (tmp_path / "saved").write_bytes(data)
    seed = case.name.startswith("policies-")
    try:
        session = kvs.Session.load(sound, tmp_path / "saved", policy=policies(options))
    except kvs.KVSmoothError:
        assert not seed, "a seed must load: the layout has changed, run tests/fuzz/seeds.py"
        return
    with session, suppress(kvs.KVSmoothError):
        assert 0 <= session.n_past <= session.n_ctx
        list(session.generate("a dog", max_tokens=2, template=None))


@each("image")
def test_image(case: Path) -> None:
    fuzz_image.try_one(case.read_bytes())


@each("template")
def test_template(case: Path) -> None:
    fuzz_template.try_one(case.read_bytes())
