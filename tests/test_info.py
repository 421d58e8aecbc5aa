"""pykvsmooth info: packages that are there, and those that are not."""

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata

import pytest
from conftest import Run

from pykvsmooth.cli import info


def facts(run: Callable[..., Run]) -> dict[str, str]:
    got = run("info")
    assert (got.code, got.err) == (0, "")
    return dict(line.split(": ", 1) for line in got.out.splitlines())


def test_optional_packages(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # not to be found
    said = facts(run)["optional packages"]
    assert f"rich {metadata.version('rich')}, " in said and f"gguf {metadata.version('gguf')}, " in said
    assert said.endswith("onnxruntime not installed (pip install 'pykvsmooth[depth]')")


def test_a_package_of_another_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nobody)
    assert info._optional("rich", "cli") == "rich of unknown version"


def test_nothing_heavy_is_imported() -> None:
    program = "import sys; from pykvsmooth.cli import info; dict(info._facts()); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"matplotlib", "onnxruntime", "gguf", "jinja2"} & set(done.stdout.split())


def test_the_environment(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYKVSMOOTH_DEPTH_MODEL", raising=False)
    assert facts(run)["PYKVSMOOTH_DEPTH_MODEL"] == "not set"
    monkeypatch.setenv("PYKVSMOOTH_DEPTH_MODEL", "none.onnx")
    assert facts(run)["PYKVSMOOTH_DEPTH_MODEL"] == "none.onnx (there is no such file)"
