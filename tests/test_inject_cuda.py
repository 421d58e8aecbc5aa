"""Want of memory on a GPU, and where it shares a model with the CPU: what test_inject.py asks of the CPU. Over tests/shim (make test-cuda),
whose small models load in milliseconds, so that every refusal is tried."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import SEED
from test_inject import FILES, INJECTS, each_refusal, nothing_is_left  # noqa: F401

import pykvsmooth as kvs
from pykvsmooth.machine import cuda_text

pytestmark = pytest.mark.skipif(not (INJECTS and cuda_text().startswith("archs shim")), reason="needs tests/shim: make test-cuda")

IMAGE = np.random.default_rng(SEED).integers(0, 256, (28, 28, 3), np.uint8)
MACHINES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {  # environment, and what is asked for
    "check": ({"KVS_CHECK": "1"}, {"device": "cuda"}),
    "full": ({"KVS_SHIM_MEMORY": "100000"}, {"device": "auto"}),
}


@cache
def pair() -> tuple[str, str | None]:
    folder = Path(FILES.name) / "cuda"
    text = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_head_kv": 1, "n_ff": 32, "n_ctx_train": 128}
    tower = {"v_layer": 2, "v_embd": 32, "v_head": 2, "v_ff": 32, "image": 28}
    return tiny.write_pair(folder, seed=SEED, load=False, **text, **tower)[:2]


@contextmanager
def machine(kind: str) -> Iterator[dict[str, Any]]:
    """What a model is asked for there."""
    environment, options = MACHINES[kind]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield options


def open_model(options: dict[str, Any]) -> kvs.Model:
    text, mmproj = pair()
    model = kvs.Model(text, mmproj=mmproj, threads=1, **options)
    model._end_ids = frozenset()
    return model


def caption(session: kvs.Session, n: int = 4) -> list[int]:
    return [token.id for token in session.generate("a dog", image=IMAGE, max_tokens=n).result().tokens]


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("kind", MACHINES)
def test_load(kind: str, lasting: bool) -> None:
    def check(_: object, outcome: Any, expected: kvs.Model) -> None:
        if isinstance(outcome, Exception):
            assert type(outcome) is kvs.OutOfMemoryError and "out of memory" in str(outcome)
            return
        assert outcome.n_gpu_layers in (0, expected.n_gpu_layers)
        with outcome, outcome.session(n_ctx=64) as session:
            assert len(caption(session, 2)) == 2

    assert each_refusal(lambda: machine(kind), open_model, check, lasting) > 100


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"device": "auto", "gpu_layers": 2}], ids=["cuda", "auto"])
def test_what_a_device_wanted_is_told(options: dict[str, Any]) -> None:
    def check(_: object, outcome: Any, __: object) -> None:
        if isinstance(outcome, kvs.Model):
            outcome.close()
        elif "can't be had" in str(outcome) and "needed for" in str(outcome):
            seen.append(outcome.needed)

    seen: list[int] = []
    each_refusal(lambda: nullcontext(options), open_model, check)
    assert seen and all(seen)
