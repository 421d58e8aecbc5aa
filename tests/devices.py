"""The device that tests of models and sessions run on: the CPU, or what KVS_TEST_DEVICE names (make test-cuda says "cuda")."""

import ctypes
import os
from collections.abc import Iterator

import pytest

import pykvsmooth as kvs
from pykvsmooth._native import lib, library_path

DEVICE = os.environ.get("KVS_TEST_DEVICE", "cpu")

NO_AMX = "no tiles of AMX here (make amx-emulated computes them in C)"


def kernel_set(isa: str) -> object:
    """A parameter that is skipped where these kernels can't be run."""
    reason = NO_AMX if isa == "amx" else f"this CPU has no {isa}"
    return pytest.param(isa, marks=pytest.mark.skipif(not lib.kvs_test_isa(isa.encode()), reason=reason))


KERNEL_SETS = [kernel_set(isa) for isa in ("base", "avx2", "avx512", "amx")]
MODEL_SETS = KERNEL_SETS if DEVICE == "cpu" else [pytest.param(None, id=DEVICE)]  # those of the device that models of tests run on


def open_model(path: object, isa: str | None, device: str = DEVICE, **options: object) -> kvs.Model:
    """A model that computes by these kernels; None: by those of its device."""
    with pytest.MonkeyPatch.context() as patch:
        if isa:
            patch.setenv("KVS_CPU", isa)
        model = kvs.Model(path, device=device, **options)
    assert isa is None or f"kernels: {isa} (" in model.device_reason, model.device_reason
    return model


def revive() -> None:
    """After an error that stays the shim is broken until the process ends, as a GPU is; then it goes on as a new process would find it."""
    ctypes.CDLL(str(library_path)).kvs_shim_revive()


@pytest.fixture
def revived() -> Iterator[None]:
    yield
    revive()
