"""stories260K, a real trained model: the exact text that llama2.c's own test expects, also across save and load, rewind and fork, on every
kernel set that is here."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from devices import open_model

import pykvsmooth as kvs

CONTINUE = """
import sys
import pykvsmooth as kvs
from test_stories import greedy
path, saved, n = sys.argv[1:]
with kvs.Model(path, device="cpu") as model:
    session = kvs.Session.load(model, saved, policy=None)
    sys.stdout.write(" ".join(map(str, greedy(session, int(n)))))
"""


def greedy(session: kvs.Session, n: int) -> list[int]:
    ids = []
    for _ in range(n):
        ids.append(int(session.logits().argmax()))
        session.feed(ids[-1:], generated=True)
    return ids


@pytest.fixture(scope="module")
def expected(shared_data: Path) -> tuple[list[int], str]:
    folder = shared_data / "stories260K"
    return json.loads((folder / "greedy200.json").read_text())["ids"], (folder / "expected_stdout.200.txt").read_text()


@pytest.fixture(scope="module")
def path(shared_data: Path) -> Path:
    return shared_data / "stories260K" / "stories260K-f32.gguf"


@pytest.fixture(scope="module")
def model(path: Path, model_isa: str | None) -> Iterator[kvs.Model]:
    with open_model(path, model_isa) as model:
        yield model


def begin(model: kvs.Model, kv_type: str = "f32") -> kvs.Session:
    """llama2.c's test starts from the beginning-of-sequence token alone."""
    session = model.session(n_ctx=256, kv_type=kv_type)
    session.feed([1])
    return session


def test_the_expected_text(model: kvs.Model, expected: tuple[list[int], str]) -> None:
    ids, text = expected
    with begin(model) as session:
        assert greedy(session, len(ids)) == ids
    assert model.detokenize(ids) == text


def test_after_save_and_a_new_process(
    path: Path, model_isa: str | None, model: kvs.Model, expected: tuple[list[int], str], tmp_path: Path
) -> None:
    ids, text = expected
    with begin(model) as session:
        head = greedy(session, 83)
        session.save(tmp_path / "half")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    environment |= {"KVS_CPU": model_isa} if model_isa else {}
    arguments = [sys.executable, "-c", CONTINUE, str(path), str(tmp_path / "half"), str(len(ids) - 83)]
    tail = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout
    assert model.detokenize(head + [int(i) for i in tail.split()]) == text


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
@pytest.mark.parametrize("policy", [None, kvs.KVSmooth(layers=[1, 2, 3])])
def test_after_rewind_and_replay(model: kvs.Model, expected: tuple[list[int], str], kv_type: str, policy: kvs.KVSmooth | None) -> None:
    """Twenty tokens elsewhere, back, and the same text again; under KVSmooth the text is its own, and repeats."""
    with model.session(n_ctx=256, kv_type=kv_type, policy=policy) as session:
        session.feed([1])
        head = greedy(session, 60)
        with session.fork() as straight:
            tail = greedy(straight, 120)
        session.feed(list(range(300, 320)), generated=True)
        session.rewind(20)
        again = greedy(session, 30)
        session.rewind(30)
        assert again == tail[:30]
        assert greedy(session, 120) == tail
    if policy is None and kv_type == "f32":
        assert head + tail == expected[0][:180]


def test_from_a_fork(model: kvs.Model, expected: tuple[list[int], str]) -> None:
    ids, text = expected
    with begin(model) as session:
        head = greedy(session, 50)
        with session.fork() as fork:
            session.feed([300, 301, 302], generated=True)  # what the parent does is not the fork's business
            assert model.detokenize(head + greedy(fork, len(ids) - 50)) == text


def test_as_a_stream(model: kvs.Model, expected: tuple[list[int], str]) -> None:
    """The same through generate: no template, greedy by default."""
    ids, text = expected
    with model.session(n_ctx=256, kv_type="f32") as session:
        stream = session.generate("", template=None, max_tokens=len(ids))
        assert "".join(token.text for token in stream) == text


def test_q8_0_weights_stay_close(path: Path, model_isa: str | None, model: kvs.Model, expected: tuple[list[int], str]) -> None:
    """Forced along the text, the quantized file chooses the same token where the margin is not tiny."""
    ids, _ = expected
    rounded_file = path.with_name("stories260K-Q8_0.gguf")
    with open_model(rounded_file, model_isa) as quantized, begin(model) as exact, begin(quantized) as rounded:
        errors, scale = [], []
        for token in ids[:100]:
            a, b = exact.logits(), rounded.logits()
            errors.append(b - a)
            scale.append(a)
            top = np.sort(a)[-2:]
            assert a.argmax() == b.argmax() or top[1] - top[0] < 0.3
            exact.feed([token], generated=True)
            rounded.feed([token], generated=True)
    assert (np.square(errors).sum() / np.square(scale).sum()) < 1e-3
