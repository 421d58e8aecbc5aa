"""Every wrong argument has its exception, and the message says what is wrong and what to do."""

import copy
import errno
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import Pair

import pykvsmooth as kvs
from pykvsmooth import box

IMAGE = np.full((40, 30, 3), 90, np.uint8)


@pytest.fixture
def session(model: kvs.Model) -> Iterator[kvs.Session]:
    with model.session(n_ctx=128) as session:
        yield session


# ---- models ----


def test_the_tree_of_errors() -> None:
    for name in kvs.__all__:
        thing = getattr(kvs, name)
        if isinstance(thing, type) and issubclass(thing, BaseException):
            assert issubclass(thing, kvs.KVSmoothError), name
    assert issubclass(kvs.OutOfMemoryError, MemoryError) and issubclass(kvs.ModelFileNotFoundError, FileNotFoundError)
    assert kvs.OutOfMemoryError("x", 3, 2).needed == 3 and kvs.OutOfMemoryError("x", 3, 2).free == 2
    assert kvs.ContextOverflowError("x", 3, 2).n_ctx == 2


def test_no_model_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYKVSMOOTH_MODEL", raising=False)
    monkeypatch.setattr(box, "FOLDERS", ())
    with pytest.raises(kvs.KVSmoothError, match=r"Model\(path\).*PYKVSMOOTH_MODEL"):
        kvs.Model()


def test_missing_and_odd_files(tmp_path: Path) -> None:
    missing = tmp_path / "no such.gguf"
    with pytest.raises(kvs.ModelFormatError, match=r"no such\.gguf") as caught:
        kvs.Model(missing)
    assert caught.value.path.endswith("no such.gguf") and isinstance(caught.value, FileNotFoundError)
    with pytest.raises(kvs.ModelFormatError, match=str(tmp_path)):
        kvs.Model(tmp_path)
    text = tmp_path / "readme.gguf"
    text.write_text("hello, this is a text file, not a model at all\n")
    with pytest.raises(kvs.ModelFormatError, match=r"readme\.gguf") as caught:
        kvs.Model(text)
    assert caught.value.path == str(text) and not isinstance(caught.value, OSError)
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(kvs.ModelFormatError, match=r"empty\.gguf"):
        kvs.Model(tmp_path / "empty.gguf")


def test_truncated_model_names_file_and_tensor(tiny_pair: Pair, tmp_path: Path) -> None:
    data = Path(tiny_pair.text).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(kvs.ModelFormatError) as caught:
        kvs.Model(tmp_path / "cut.gguf", mmproj=False)
    assert "cut.gguf" in str(caught.value) and caught.value.path.endswith("cut.gguf")


def test_swapped_files_and_misfits(tiny_pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(kvs.ModelMismatchError, match="swapped"):
        kvs.Model(tiny_pair.mmproj, mmproj=tiny_pair.text)
    with pytest.raises((kvs.UnsupportedModelError, kvs.ModelMismatchError, kvs.ModelFormatError)):
        kvs.Model(tiny_pair.text, mmproj=tiny_pair.text)
    other = tiny.write_mmproj(tmp_path / "wide.gguf", np.random.default_rng(1), n_embd=96)
    with pytest.raises(kvs.ModelMismatchError, match=r"96.*64|64.*96"):
        kvs.Model(tiny_pair.text, mmproj=other)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"device": "cuda:99"}, kvs.DeviceError),
        ({"device": "tpu"}, ValueError),
        ({"device": 3}, TypeError),
        ({"device": "cpu", "gpu_layers": 3}, kvs.DeviceError),
        ({"gpu_layers": "some"}, TypeError),
        ({"gpu_layers": -1}, ValueError),
        ({"threads": 0}, ValueError),
        ({"threads": 1.5}, TypeError),
        ({"threads": True}, TypeError),
        ({"mmproj": True}, TypeError),
        ({"mmproj": 5}, TypeError),
        ({"mmproj": ""}, ValueError),
        ({"device": ""}, ValueError),
        ({"device": "cpu\0"}, ValueError),
        ({"device": "cuda:x"}, ValueError),
    ],
    ids=str,
)
def test_arguments_of_a_model(tiny_pair: Pair, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        kvs.Model(tiny_pair.text, **arguments)
    with pytest.raises(TypeError):
        kvs.Model(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [-1, "all"])
def test_gpu_layers_says_what_is_allowed(tiny_pair: Pair, layers: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r'gpu_layers .*"auto" .* or a number of layers'):
        kvs.Model(tiny_pair.text, gpu_layers=layers)


def test_paths_are_never_cut(tiny_pair: Pair, session: kvs.Session, tmp_path: Path) -> None:
    path = tmp_path / "a"
    uses = [
        lambda name: kvs.Model(tiny_pair.text + name),
        lambda name: kvs.Model(tiny_pair.text, mmproj=str(tiny_pair.mmproj) + name),
        lambda name: session.save(str(path) + name),
        lambda name: session.save(os.fsencode(path) + name.encode()),
        lambda name: kvs.Session.load(session.model, str(path) + name),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="embedded null"):
            use("\0zzz")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="path: is empty"):
        kvs.Model("")
    odd = tmp_path / os.fsdecode(b"not UTF-8 \xff")
    session.save(odd)
    assert kvs.Session.load(session.model, os.fsencode(odd)).n_past == 0


def test_trouble_of_the_system_with_session_files(session: kvs.Session, tmp_path: Path) -> None:
    """Also an OSError, and it says what to do."""
    (tmp_path / "file").touch()
    cases = [
        (lambda: session.save(tmp_path / "no" / "a"), errno.ENOENT, "check the path"),
        (lambda: session.save(tmp_path / "file" / "a"), errno.ENOTDIR, "choose another path"),
        (lambda: kvs.Session.load(session.model, tmp_path / "no"), errno.ENOENT, "check the path"),
    ]
    for use, number, message in cases:
        with pytest.raises(kvs.SessionFileError, match=message) as caught:
            use()
        error = caught.value
        assert isinstance(error, OSError) and isinstance(error, kvs.SessionIOError)
        assert (error.errno, error.strerror) == (number, os.strerror(number))
        assert error.path == error.filename and error.path.startswith(str(tmp_path)) and str(error).startswith(error.path)
        assert isinstance(error, FileNotFoundError) == (number == errno.ENOENT)
        assert pickle.loads(pickle.dumps(error)).errno == number
    with pytest.raises(kvs.SessionFileError, match="folder: name a file"):
        session.save(tmp_path)
    with pytest.raises(kvs.SessionFileError) as caught:
        kvs.Session.load(session.model, tmp_path / "file")
    assert not isinstance(caught.value, OSError)


def test_progress_cancels_the_load(tiny_pair: Pair) -> None:
    with pytest.raises(kvs.CancelledError):
        kvs.Model(tiny_pair.text, mmproj=False, progress=lambda fraction: False)

    def fail(fraction: float) -> None:
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="my own"):
        kvs.Model(tiny_pair.text, mmproj=False, progress=fail)


def test_which_mmproj(tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYKVSMOOTH_MMPROJ", raising=False)
    text = str(shutil.copy(tiny_pair.text, tmp_path / "model.gguf"))
    with kvs.Model(text) as model:
        assert not model.has_vision and model.mmproj is None
        with pytest.raises(kvs.UnsupportedModelError, match=r"no mmproj\*.gguf"):
            model.encode_image(IMAGE)
    (tmp_path / "mmproj-broken.gguf").write_text("not a model")
    tiny.write_mmproj(tmp_path / "mmproj-wide.gguf", np.random.default_rng(1), n_embd=96)
    with kvs.Model(text) as model, model.session() as session:
        assert not model.has_vision
        with pytest.raises(kvs.UnsupportedModelError, match=r"mmproj-wide\.gguf: made for models of width 96, this one has 64"):
            session.generate("What is it?", image=IMAGE)
    shutil.copy(tiny_pair.mmproj, tmp_path / "mmproj-f32.gguf")
    with kvs.Model(text) as model:
        assert model.mmproj == str(tmp_path / "mmproj-f32.gguf") and model.has_vision
    with kvs.Model(text, mmproj=False) as model:
        assert not model.has_vision
    shutil.copy(tiny_pair.mmproj, tmp_path / "mmproj-q8.gguf")
    with pytest.raises(kvs.ModelMismatchError, match=r"mmproj-f32\.gguf, mmproj-q8\.gguf"):
        kvs.Model(text)
    monkeypatch.setenv("PYKVSMOOTH_MMPROJ", str(tmp_path / "mmproj-q8.gguf"))
    monkeypatch.setenv("PYKVSMOOTH_MODEL", text)
    with kvs.Model() as model:
        assert model.has_vision and model.path == text


# ---- sessions and answers ----


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"n_ctx": 0}, ValueError),
        ({"n_ctx": -5}, ValueError),
        ({"n_ctx": 2.5}, TypeError),
        ({"n_ctx": "2048"}, TypeError),
        ({"n_ctx": True}, TypeError),
        ({"n_ctx": 1 << 30}, ValueError),
        ({"kv_type": "q4_0"}, ValueError),
        ({"kv_type": None}, TypeError),
        ({"seed": 1.5}, TypeError),
        ({"seed": "a"}, TypeError),
        ({"policy": "kvsmooth"}, TypeError),
        ({"policy": kvs.KVSmooth}, TypeError),
        ({"policy": [kvs.KVSmooth(), kvs.KVSmooth()]}, kvs.PolicyError),
        ({"exact_rows": -1}, ValueError),
        ({"policy": kvs.KVSmooth(layers=[4])}, kvs.PolicyError),
        ({"policy": kvs.KVSmooth(layers=[-5])}, ValueError),
    ],
    ids=str,
)
def test_arguments_of_a_session(model: kvs.Model, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        model.session(**arguments)


def test_empty_selection_of_layers_names_the_depth(model: kvs.Model) -> None:
    for layers in ("3:-1", "2:2", ":0", []):
        with pytest.raises(ValueError, match="4 layers"):
            model.session(policy=kvs.KVSmooth(layers=layers))


def test_what_numpy_can_not_have(session: kvs.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    from pykvsmooth import session as module

    def refuse(*_: object) -> None:
        raise MemoryError("Unable to allocate 3 PiB")

    session.feed([1, 5])
    monkeypatch.setattr(module.np, "empty", refuse)
    for use in (
        lambda: session.kv(0),
        lambda: session.positions(0),
        lambda: session.entropies(),
        lambda: session.model.encode_image(IMAGE),
    ):
        with pytest.raises(kvs.OutOfMemoryError, match="out of memory: Unable to allocate 3 PiB"):
            use()
    monkeypatch.undo()
    assert session.kv(0)[0].shape[1] == 2


def test_a_cache_that_can_not_be_had(model: kvs.Model) -> None:
    with tiny_memory(model) as wanted, pytest.raises(kvs.OutOfMemoryError) as caught:
        wanted()
    assert caught.value.needed > 1 << 20


class tiny_memory:
    """A limit on the address space around a call, in a child of this process's own limits."""

    def __init__(self, model: kvs.Model) -> None:
        self.model = model

    def __enter__(self) -> Any:
        import resource

        self.limit = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + (64 << 20), self.limit[1]))
        return lambda: self.model.session(n_ctx=1 << 20, kv_type="f32")

    def __exit__(self, *_: object) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, self.limit)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_tokens": -1}, ValueError),
        ({"max_tokens": 1.0}, TypeError),
        ({"temperature": -0.1}, ValueError),
        ({"temperature": float("nan")}, ValueError),
        ({"temperature": float("inf")}, ValueError),
        ({"temperature": "hot"}, TypeError),
        ({"top_k": -1}, ValueError),
        ({"top_p": 0.0}, ValueError),
        ({"top_p": 1.1}, ValueError),
        ({"min_p": -0.1}, ValueError),
        ({"min_p": 1.5}, ValueError),
        ({"repetition_penalty": 0}, ValueError),
        ({"logprobs": 21}, ValueError),
        ({"logprobs": True}, TypeError),
        ({"stop": ""}, ValueError),
        ({"stop": ["a", ""]}, ValueError),
        ({"stop": [3]}, TypeError),
        ({"seed": 0.5}, TypeError),
        ({"template": "llama2"}, ValueError),
        ({"template": 7}, TypeError),
        ({"system": 7}, TypeError),
        ({"system": "Be kind.", "template": None}, ValueError),
        ({"image": IMAGE, "images": [IMAGE]}, ValueError),
        ({"images": "street.jpg"}, TypeError),
        ({"images": 5}, TypeError),
        ({"image": IMAGE, "mode": "tile"}, ValueError),
        ({"image": 5}, TypeError),
        ({"image": "no such.jpg"}, kvs.ImageError),
        ({"image": b"no picture"}, kvs.ImageError),
        ({"image": IMAGE.astype(np.float32)}, (TypeError, kvs.ImageError)),
        ({"foo": 1}, TypeError),
    ],
    ids=str,
)
def test_arguments_of_an_answer(session: kvs.Session, arguments: dict[str, Any], error: type[Exception]) -> None:
    """At the call, before the first token, and the session is as it was."""
    with pytest.raises(error):
        session.generate("What is it?", **arguments)
    with pytest.raises(error):
        session.chat("What is it?", **arguments)
    assert session.n_past == 0
    assert session.generate("a dog", max_tokens=2).result().finish_reason in ("length", "stop")


@pytest.mark.parametrize(("prompt", "n"), [("a <image>", 0), ("a <image>", 2), ("<image> and <image>", 1), ("<image><image><image>", 2)])
def test_marks_and_pictures_must_match(session: kvs.Session, prompt: str, n: int) -> None:
    for template in ("auto", None):
        with pytest.raises(ValueError, match="<image> marks"):
            session.generate(prompt, images=[IMAGE] * n, template=template)


def test_prompt_must_be_text(session: kvs.Session) -> None:
    for prompt in (None, 3, b"bytes", ["a"]):
        with pytest.raises(TypeError):
            session.generate(prompt)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            session.chat(prompt)  # type: ignore[arg-type]


def test_context_overflow_has_the_numbers_and_does_no_work(model: kvs.Model) -> None:
    with model.session(n_ctx=40) as session:
        prompt = "a dog " * 40
        needed = 1 + len(model.tokenize(prompt)) + 1
        with pytest.raises(kvs.ContextOverflowError, match="40") as caught:
            session.generate(prompt, template=None)
        assert (caught.value.needed, caught.value.n_ctx) == (needed, 40) and session.n_past == 0
        fits = model.tokenize(prompt)[: 40 - 2]
        session.feed([1, *fits])
        with pytest.raises(kvs.ContextOverflowError) as caught:
            session.feed([5, 6])
        assert (caught.value.needed, caught.value.n_ctx, session.n_past) == (41, 40, 39)
        session.feed([5], generated=True)
        with pytest.raises(kvs.ContextOverflowError):
            session.feed([5], generated=True)
    with model.session(n_ctx=model.n_image) as session, pytest.raises(kvs.ContextOverflowError):
        session.generate("a", image=IMAGE)
    with model.session(n_ctx=64) as session:
        session.chat("a dog", max_tokens=20).result()
        with pytest.raises(kvs.ContextOverflowError) as caught:
            session.chat("a dog " * 40)
        assert caught.value.needed > 64


SURROGATE = "a dog \ud800"
HUGE = 10**5000  # more digits than Python writes


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda s: s.feed(None), TypeError, "ids must be a list of integers, not NoneType"),
        (lambda s: s.feed(5), TypeError, "ids must be a list of integers, not int"),
        (lambda s: s.feed(b"ab"), TypeError, "ids must be a list of integers, not bytes"),
        (lambda s: s.feed({1: 2}), TypeError, "ids must be a list of integers, not dict"),
        (lambda s: s.feed([[1], [2, 3]]), TypeError, "ids[0] must be an integer, not list"),
        (lambda s: s.feed(np.ones((2, 2), int)), TypeError, "ids[0] must be an integer, not ndarray"),
        (lambda s: s.feed(np.int64(3)), TypeError, "ids must be a list of integers, not int64"),
        (lambda s: s.feed([1, HUGE]), ValueError, "ids[1] must be in 0.."),
        (lambda s: s.feed([True]), TypeError, "ids[0] must be an integer, not bool"),
        (lambda s: s.model.detokenize(None), TypeError, "ids must be a list of integers, not NoneType"),
        (lambda s: s.model.detokenize([3, 1 << 40]), ValueError, "ids[1] must be in 0.."),
        (lambda s: s.model.generate_batch(None), TypeError, "requests must be a list"),
        (lambda s: s.feed_embeddings(None), TypeError, "embeddings must be an array of shape (n, 64), float32, not NoneType"),
        (
            lambda s: s.feed_embeddings(np.ones((1, 64), complex)),
            TypeError,
            "embeddings must be an array of shape (n, 64), float32, not compl",
        ),
        (lambda s: s.feed_embeddings([[1.0], [1.0, 2.0]]), ValueError, "embeddings must be an array of shape (n, 64), float32, not lists"),
        (lambda s: s.feed_embeddings(np.ones((2, 63))), ValueError, "embeddings must be an array of shape (n, 64), float32, not (2, 63)"),
        (lambda s: s.feed_embeddings(np.full((1, 64), 1e300)), ValueError, "embeddings must be finite"),
        (lambda s: s.generate(SURROGATE), ValueError, "prompt: holds a lone surrogate at 6"),
        (lambda s: s.generate("\udc80"), ValueError, "prompt: holds a lone surrogate at 0"),
        (lambda s: s.chat(SURROGATE), ValueError, "message: holds a lone surrogate at 6"),
        (lambda s: s.generate("a", system=SURROGATE), ValueError, "system: holds a lone surrogate at 6"),
        (lambda s: s.generate("a", stop=["b", SURROGATE]), ValueError, "stop[1]: holds a lone surrogate at 6"),
        (lambda s: s.generate("a", template="{{ \udcff }}"), ValueError, "template: holds a lone surrogate at 3"),
        (lambda s: s.model.tokenize(SURROGATE), ValueError, "text: holds a lone surrogate at 6"),
        (lambda s: s.generate("a", temperature=math.inf), ValueError, "temperature must be finite and at least 0, not inf"),
        (lambda s: s.generate("a", temperature=math.nan), ValueError, "temperature must be finite and at least 0, not nan"),
        (
            lambda s: s.generate("a", temperature=10**400),
            ValueError,
            "temperature must be finite and at least 0, not a number of 1329 bits",
        ),
        (lambda s: s.generate("a", temperature=1j), TypeError, "temperature must be a number, not complex"),
        (lambda s: s.generate("a", top_k=HUGE), ValueError, "top_k must be in 0..2147483647, not a number of"),
        (lambda s: s.generate("a", stop=3), TypeError, "stop must be None, a text or a list of texts, not int"),
        (lambda s: s.generate("a", stop=b"a"), TypeError, "stop must be None, a text or a list of texts, not bytes"),
        (lambda s: s.generate("a", mode="foo"), ValueError, "mode must be one of pad, crop, stretch, not 'foo'"),
        (lambda s: s.chat("a", mode=None), TypeError, "mode must be one of pad, crop, stretch, not NoneType"),
        (
            lambda s: s.generate("a", images=np.zeros((2, 9, 9, 3), np.uint8)),
            TypeError,
            "images must be a list of pictures, not ndarray; list",
        ),
        (lambda s: s.model.session(kv_type=["f16"]), TypeError, "kv_type must be one of f16, f32, q8_0, not list"),
        (lambda s: s.save(None), TypeError, "path must be a path, not NoneType"),
        (lambda s: s.save(""), ValueError, "path: is empty"),
        (lambda s: s.save("/nowhere/\ud800"), ValueError, "path: holds a lone surrogate at 9"),
        (lambda s: kvs.Session.load(None, "x"), TypeError, "model must be a Model, not NoneType"),
        (lambda s: kvs.Session(None), TypeError, "model must be a Model, not NoneType"),
        (lambda s: kvs.Session.load(s.model, None), TypeError, "path must be a path, not NoneType"),
        (lambda s: s.rewind(HUGE), ValueError, "n_tokens"),
    ],
)
def test_messages_name_the_argument(session: kvs.Session, use: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        use(session)
    assert type(caught.value) is error and str(caught.value).startswith(message)
    assert session.n_past == 0


def test_what_else_is_accepted(session: kvs.Session) -> None:
    session.feed(np.array([1, 5], np.uint8))
    session.feed(iter([6]))
    session.feed(range(2))
    session.feed([np.int16(3)])
    assert session.n_past == 6 and session.model.detokenize(np.array([1])) == ""
    session.feed_embeddings(np.zeros((1, 64), int))
    assert session.n_past == 7
    result = session.generate("a dog", stop=None, max_tokens=np.int8(2), temperature=np.float32(0.5), top_p=1).result()
    assert result.finish_reason in ("length", "stop")
    assert session.generate("a dog", stop=("a",), max_tokens=1).result() and session.model.session(policy=(kvs.KVSmooth(layers=[1]),))


@pytest.mark.parametrize("ids", [[-1], [1 << 20], [1, 2, 10**6], [1.5], ["a"], [[1, 2]]], ids=str)
def test_ids_out_of_range(session: kvs.Session, ids: list[Any]) -> None:
    for generated in (False, True):
        with pytest.raises((ValueError, TypeError)):
            session.feed(ids, generated=generated)
    assert session.n_past == 0


def test_the_lower_floor(session: kvs.Session, model: kvs.Model) -> None:
    with pytest.raises(ValueError):
        session.logits()
    assert session.entropies().shape == (0, 4) and session.kv(0)[0].shape == (4, 0, 16)
    session.feed([])
    session.feed([1, 5, 6])
    for layer in (4, -5):
        with pytest.raises(ValueError, match="layer"):
            session.kv(layer)
        with pytest.raises(ValueError, match="layer"):
            session.positions(layer)
    with pytest.raises(TypeError):
        session.kv("0")  # type: ignore[arg-type]
    assert np.array_equal(session.kv(-1)[0], session.kv(3)[0])
    for rows in (np.zeros((3, 63)), np.zeros(64), np.full((1, 64), np.nan)):
        with pytest.raises(ValueError, match="embeddings"):
            session.feed_embeddings(rows)
    for n in (-1, 4):
        with pytest.raises(ValueError):
            session.rewind(n)
    with pytest.raises(ValueError):
        model.token_bytes(model.n_vocab)
    with pytest.raises(TypeError):
        model.tokenize(b"bytes")  # type: ignore[arg-type]
    assert session.n_past == 3


# ---- life ----


def test_use_after_close(tiny_pair: Pair, tmp_path: Path) -> None:
    model = kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj)
    model._end_ids = frozenset()
    session = model.session()
    stream = session.generate("a dog")
    next(stream)
    session.close()
    session.close()
    assert len(stream.result().tokens) == 1 and stream.finish_reason == "cancelled"
    uses = [
        lambda: session.generate("a"),
        lambda: session.feed([1]),
        lambda: session.logits(),
        lambda: session.n_past,
        lambda: session.fork(),
        lambda: session.save(tmp_path / "x"),
        lambda: session.reset(),
    ]
    for use in uses:
        with pytest.raises(kvs.ClosedError):
            use()
    open_session = model.session()
    model.close()
    model.close()
    for use in (
        lambda: open_session.feed([1]),
        lambda: model.session(),
        lambda: model.tokenize("a"),
        lambda: model.encode_image(IMAGE),
        lambda: model.generate_batch(["a"]),
    ):
        with pytest.raises(kvs.ClosedError):
            use()
    assert "closed" in repr(model) and "closed" in repr(session) and model.closed and session.closed


def test_sessions_keep_the_weights(tiny_pair: Pair) -> None:
    def make() -> kvs.Session:
        return kvs.Model(tiny_pair.text, mmproj=False).session()

    session = make()  # nobody else holds the model
    assert session.generate("a dog", max_tokens=3).result().text is not None


@pytest.mark.parametrize("what", ["model", "session", "stream"])
def test_no_pickle(model: kvs.Model, session: kvs.Session, what: str) -> None:
    thing = {"model": model, "session": session, "stream": session.generate("a")}[what]
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(thing)
    with pytest.raises(TypeError, match="can't be pickled"):
        copy.copy(thing)


def test_after_a_fork(tiny_pair: Pair) -> None:
    """A child of os.fork() gets an error, not a hang; it may load a model of its own."""
    code = f"""
import os, sys
import pykvsmooth as kvs
model = kvs.Model({tiny_pair.text!r}, mmproj=False)
session = model.session()
list(session.generate("a dog", max_tokens=2))
pid = os.fork()
if pid == 0:
    for use in (lambda: session.generate("a"), lambda: model.tokenize("a"), lambda: session.n_past):
        try:
            use()
            os._exit(1)
        except kvs.KVSmoothError as error:
            if "fork" not in str(error):
                os._exit(2)
    session.close(); model.close()
    own = kvs.Model({tiny_pair.text!r}, mmproj=False)
    list(own.session().generate("a dog", max_tokens=2))
    del own, session, model
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
list(session.generate("a dog", max_tokens=2))
"""
    assert run(code) == ("", "")


def test_quiet_at_exit(tiny_pair: Pair) -> None:
    """Whatever is still open when the interpreter ends, nothing is printed: by main, by a thread, or by a finalizer."""
    code = f"""
import threading, time
import pykvsmooth as kvs
model = kvs.Model({tiny_pair.text!r}, mmproj={tiny_pair.mmproj!r})
session, other = model.session(policy=kvs.KVSmooth(layers=[1])), model.session(n_ctx=4000)
stream = session.generate("a dog")
model._end_ids = frozenset()
next(stream)
def work():
    for token in other.generate("a dog", max_tokens=None):
        pass
threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
"""
    assert run(code) == ("", "")


def test_import_is_quiet_and_light() -> None:
    code = "import sys, pykvsmooth; assert not {'PIL', 'asyncio', 'jinja2', 'rich'} & set(sys.modules), sys.modules.keys()"
    assert run(code) == ("", "")


def test_library_that_can_not_be_had(tmp_path: Path) -> None:
    (tmp_path / "libkvs.so").write_text("no library")
    for path, message in ((tmp_path / "nothing.so", "KVS_LIBRARY"), (tmp_path / "libkvs.so", "does not load")):
        result = subprocess.run(
            [sys.executable, "-c", "import pykvsmooth; pykvsmooth.Model"],
            capture_output=True,
            text=True,
            env={**environment(), "KVS_LIBRARY": str(path)},
        )
        assert result.returncode == 1 and "ImportError" in result.stderr and message in result.stderr


def environment() -> dict[str, str]:
    import pykvsmooth._native as native

    root = str(Path(kvs.__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), "KVS_LIBRARY": str(native.library_path)}


def run(code: str) -> tuple[str, str]:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment())
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr
