"""Machines with two GPUs, with a GPU or a driver that is too old, and with one of 7.5, the oldest that will do. Over tests/shim, which is
what it is told to be. What the shim can't show of 7.5: the PTX that device.cuh has for it, which only test_cuda_build.py compiles."""

import logging
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from test_attention import test_against_float64 as test_attention_on_turing  # noqa: F401
from test_attention import test_full_attention as test_full_attention_on_turing  # noqa: F401
from test_cuda_gemm import test_against_numpy as test_many_rows_on_turing  # noqa: F401
from test_cuda_gemm import test_tiles as test_tiles_on_turing  # noqa: F401
from test_cuda_matvec import test_against_numpy as test_few_rows_on_turing  # noqa: F401

import pykvsmooth as kvs
from pykvsmooth.machine import cuda_text

pytestmark = pytest.mark.skipif(not cuda_text().startswith("archs shim"), reason="a machine that is what it is told to be: make test-cuda")


@pytest.fixture(autouse=True)
def turing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copies under the way of others, 64 KiB of shared memory, and no kernel that begins early."""
    if "turing" in request.node.name:
        monkeypatch.setenv("KVS_SHIM_SM", "75")


@pytest.fixture
def isas() -> list[str]:
    return ["cuda"]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KVS_SHIM_DEVICES", "2")
    yield


def answer(model: kvs.Model) -> bytes:
    with model.session(n_ctx=64, policy=kvs.KVSmooth(layers="1:")) as session:
        session.feed([1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15])
        for id in (20, 21, 22):
            session.feed([id], generated=True)
        return session.logits().tobytes()


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("layers", ["auto", 2])
def test_the_second_device(layers: Any, tiny_pair) -> None:
    """By its name alone; both at once, by one thread, one step here and one there."""
    assert "available: 2 devices, cuda:0 is " in cuda_text()
    options: dict[str, Any] = {"mmproj": tiny_pair.mmproj, "gpu_layers": layers}
    with kvs.Model(tiny_pair.text, device="cuda:1", **options) as second, kvs.Model(tiny_pair.text, device="cuda", **options) as first:
        assert (first.device, second.device) == ("cuda:0", "cuda:1") and " on cuda:1 (" in second.device_reason
        assert answer(first) == answer(second) == answer(first)
        with first.session(n_ctx=64) as a, second.session(n_ctx=64) as b:
            for session in (a, b):
                session.feed([1, 5, 6])
            for id in (20, 21, 22):
                for session in (a, b):
                    session.feed([id], generated=True)
            np.testing.assert_array_equal(a.logits(), b.logits())
            image = np.random.default_rng(1).integers(0, 256, (24, 32, 3), np.uint8)
            np.testing.assert_array_equal(first.encode_image(image), second.encode_image(image))
    with kvs.Model(tiny_pair.text, mmproj=False) as model:
        assert model.device == "cuda:0"


def test_what_auto_takes_is_said_to_be_new(tiny_pair, caplog: pytest.LogCaptureFixture) -> None:
    """Until the backend has run on a GPU; who asks for one by name knows."""
    for device, said in (("auto", [logging.WARNING]), ("cuda", []), ("cpu", [])):
        caplog.clear()
        with kvs.Model(tiny_pair.text, mmproj=False, device=device) as model:
            assert (model.device == "cuda:0") == (device != "cpu")
            assert [record.levelno for record in caplog.records if "has not run on a GPU yet" in record.getMessage()] == said


@pytest.mark.usefixtures("two")
def test_there_is_no_third_device(tiny_pair) -> None:
    for name in ("cuda:2", "cuda:99"):
        why = f'device "{name}" can\'t be had: there is no {name}: this machine has 2 devices, from cuda:0 on; use "cpu" or "auto"'
        with pytest.raises(kvs.DeviceError, match=re.escape(why)):
            kvs.Model(tiny_pair.text, mmproj=False, device=name)
    with pytest.raises((kvs.DeviceError, ValueError)):
        kvs.Model(tiny_pair.text, mmproj=False, device="cuda:100")


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("KVS_SHIM_DRIVER", "12040", "the NVIDIA driver knows CUDA 12.4, and this build needs 13.0"),
        ("KVS_SHIM_DRIVER", "0", "no NVIDIA driver is installed"),
        ("KVS_SHIM_DEVICES", "0", "no GPU was found"),
        ("KVS_SHIM_SM", "70", "cuda:0 has compute capability 7.0, and at least 7.5 is needed"),
    ],
)
def test_a_machine_that_will_not_do(variable: str, value: str, why: str, tiny_pair, run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name it is an error, else the CPU is taken, and the reason is there to be read."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(kvs.DeviceError, match=f'^device "cuda" can\'t be had: {why}; use "cpu" or "auto"$'):
        kvs.Model(tiny_pair.text, mmproj=False, device="cuda")
    with kvs.Model(tiny_pair.text, mmproj=False, device="auto") as model:
        assert model.device == "cpu" and model.device_reason.startswith(f"no GPU: {why}; ")
        assert len(answer(model)) == 4 * model.n_vocab
    if variable != "KVS_SHIM_SM":
        assert f"cuda: archs shim; unavailable: {why}\n" in run("info").out


def test_a_turing_card_runs_a_model(tiny_pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit what a newer one gives: the order of sums does not depend on the card."""
    with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, device="cuda") as model:
        assert "compute capability 7.5" in model.device_reason
        found = answer(model)
    monkeypatch.delenv("KVS_SHIM_SM")
    with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, device="cuda") as model:
        assert "compute capability 9.0" in model.device_reason and answer(model) == found
