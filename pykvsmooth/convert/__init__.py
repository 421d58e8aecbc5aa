"""From the folder of a Hugging Face checkpoint of LLaVA-1.5 to the pair of GGUF files that this runtime, and others, load.

folder.py opens files, shards.py tensors, config.py reads the sizes, weights.py says what becomes of each tensor; sentencepiece.py,
tokenizer_json.py and vocabulary.py make the vocabulary, keys.py the metadata. Neither torch nor transformers is needed, nothing in a
folder is run, and no path out of it is followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .. import gguf_out
from ..checks import c_path, integer, utf8
from ..errors import ModelFileError
from ..mixes import mix_name, tensor_type
from ..quantize import encode
from .config import read_config
from .folder import Folder, Section, broken
from .keys import read_general, write_general, write_mmproj_keys, write_policy_keys, write_text_keys
from .vocabulary import read_vocabulary
from .weights import Weight, plan

if TYPE_CHECKING:
    from .config import Config

__all__ = ["convert"]

MAX_STEM = 60  # characters of the name that go into the files' names
Progress = Callable[[str, int, int], None]
PathLike = str | os.PathLike[str]


def convert(
    folder: PathLike,
    out: PathLike,
    type: str = "q8_0",
    mmproj_type: str | None = None,
    *,
    name: str | None = None,
    vision: PathLike | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[str, str]:
    """Writes the text model and the mmproj of a checkpoint into the folder out, which is made if need be; gives both paths.

    folder: with config.json, safetensors (F32, F16, BF16; one file or shards) and a tokenizer, named as llava-hf, transformers or the
    original LLaVA name things. type, mmproj_type: mixes ("f32", "q8_0", "q4_k_m"; see pykvsmooth.mixes.MIXES); the mmproj's default is
    "f16", beside an "f32" text model "f32". name: of the model, default the folder's. vision: the folder of the CLIP model, where the
    checkpoint does not hold its tower. threads: default the processors that this process may use. progress(tensor, done, total) is
    called before each tensor.

    Memory: a few tensors, however large the checkpoint is. Files that stand in the way are replaced; whatever ends the call early
    leaves neither file. ModelFormatError, ModelFileError, ModelFileNotFoundError and UnsupportedModelError name the file and the key or
    tensor; ValueError and TypeError are about arguments; ImportError: the package gguf is missing.
    """
    mix = mix_name(type)
    mmproj_mix = mix_name(mmproj_type or ("f32" if mix == "f32" else "f16"))
    threads = None if threads is None else integer("threads", threads, 1, 1024)
    source, tower = Folder(folder), None if vision is None else Folder(vision, "vision")
    config = read_config(source, tower)
    text, mmproj = plan(source, tower, config)
    vocabulary = read_vocabulary(source, config.text.n_vocab, _id_sections(source, config))
    general = read_general(source, None if name is None else utf8("name", name).decode(), config)
    target, stem = os.fsdecode(c_path("out", out)), re.sub(r"[^\w.+-]+", "-", general.name).strip("-.")[:MAX_STEM] or "llava"
    paths = (os.path.join(target, f"{stem}-{mix.upper()}.gguf"), os.path.join(target, f"mmproj-{stem}-{mmproj_mix.upper()}.gguf"))
    copier = _Copier(len(text) + len(mmproj), threads, progress)
    with _made(target), _both_or_none(paths), gguf_out.create(paths[0], "llama") as first, gguf_out.create(paths[1], "clip") as second:
        write_general(first.keys, general, "model", text, mix)
        write_text_keys(first.keys, config.text, vocabulary, general.template)
        write_policy_keys(first.keys, config.top, config.text.n_layer)
        write_general(second.keys, general, "mmproj", mmproj, mmproj_mix)
        write_mmproj_keys(second.keys, config.vision, config.pixels)
        copier.copy(text, first, mix, config.text.n_layer)
        copier.copy(mmproj, second, mmproj_mix, 0)
    return paths


def _id_sections(folder: Folder, config: Config) -> list[Section]:
    """Where ids of special tokens are given: llava-hf's pad stands at the top, BOS and EOS in text_config."""
    generation = folder.json("generation_config.json")
    return [s for s in (config.top, config.top.section("text_config"), generation) if s is not None]


class _Copier:
    def __init__(self, total: int, threads: int | None, progress: Progress | None) -> None:
        self._total, self._threads, self._progress, self._done = total, threads, progress, 0

    def copy(self, weights: Sequence[Weight], out: gguf_out.Out, mix: str, n_layer: int) -> None:
        tied = all(weight.name != "output.weight" for weight in weights)
        types = [tensor_type(weight.name, weight.shape, mix, n_layer, tied) for weight in weights]
        out.begin([gguf_out.Spec(weight.name, weight.shape, kind) for weight, kind in zip(weights, types, strict=True)])
        for weight, kind in zip(weights, types, strict=True):
            if self._progress is not None:
                self._progress(weight.name, self._done, self._total)
            self._done += 1
            out.write(self._encoded(weight, kind))

    def _encoded(self, weight: Weight, kind: str) -> Any:
        values = weight.read()
        if kind == "F32":
            return values
        try:
            return encode(values.reshape(-1, weight.shape[-1]), kind, self._threads)
        except ValueError as error:  # beyond the range of the type
            raise broken(*weight.place, f"can't be written as {kind}: {error}") from error


@contextmanager
def _made(folder: str) -> Iterator[None]:
    """The folder exists; what was made of it goes again if the block fails."""
    missing = []
    path = os.path.abspath(folder)
    while not os.path.exists(path):
        missing.append(path)
        path = os.path.dirname(path)
    try:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise ModelFileError(f"{folder}: this folder can't be made: {error.strerror}", folder, error.errno) from error
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                os.rmdir(path)
        raise


@contextmanager
def _both_or_none(paths: Sequence[str]) -> Iterator[None]:
    """A pair of which one file could not get its name is none."""
    before = [_identity(path) for path in paths]
    try:
        yield
    except BaseException:
        for path, old in zip(paths, before, strict=True):
            if _identity(path) != old:
                with suppress(OSError):
                    os.unlink(path)
        raise


def _identity(path: str) -> tuple[int, int] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns
