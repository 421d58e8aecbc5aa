"""The checkpoint in the box: what Model() and a command without --model take."""

import errno
import logging
import shutil
from pathlib import Path

import pytest
from conftest import Pair

import pykvsmooth as kvs
from pykvsmooth import box


@pytest.fixture
def packed(tmp_path: Path, tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A box with the tiny pair in it; no variable names another model."""
    shutil.copy(tiny_pair.text, tmp_path / box.TEXT)
    shutil.copy(tiny_pair.mmproj, tmp_path / "mmproj-of-the-box.gguf")
    monkeypatch.setattr(box, "FOLDERS", (tmp_path / "none", tmp_path))
    monkeypatch.delenv("PYKVSMOOTH_MODEL", raising=False)
    monkeypatch.delenv("PYKVSMOOTH_MMPROJ", raising=False)
    return tmp_path


def test_a_model_without_a_path_is_the_one_in_the_box(packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pykvsmooth"), kvs.Model() as model:
        assert model.path == str(packed / box.TEXT) and model.has_vision
    assert [record.getMessage() for record in caplog.records if "in the box" in record.getMessage()]


def test_the_variable_and_the_argument_come_first(packed: Path, tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKVSMOOTH_MODEL", tiny_pair.text)
    with kvs.Model() as model:
        assert model.path == tiny_pair.text
    monkeypatch.setenv("PYKVSMOOTH_MODEL", "nowhere.gguf")
    with kvs.Model(tiny_pair.text) as model:
        assert model.path == tiny_pair.text
    with pytest.raises(
        kvs.ModelFileNotFoundError, match=r"nowhere\.gguf: no such file; the environment variable PYKVSMOOTH_MODEL"
    ) as caught:
        kvs.Model()
    assert (caught.value.filename, caught.value.errno) == ("nowhere.gguf", errno.ENOENT)
    monkeypatch.setenv("PYKVSMOOTH_MMPROJ", "no.gguf")
    with pytest.raises(kvs.ModelFileNotFoundError, match=r"no\.gguf: no such file; the environment variable PYKVSMOOTH_MMPROJ"):
        kvs.Model(tiny_pair.text)


def test_no_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box, "FOLDERS", ())
    assert box.folder() is None and box.text_model() is None and box.scenes() == []
