"""Want of memory on a GPU, and where it shares a model with the CPU: what test_inject.py asks of the CPU. Over tests/shim (make test-cuda),
whose small models load in milliseconds, so that every refusal is tried."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import SEED
from test_inject import ALL_TESTS, FILES, INJECTS, STACKS, bits, each_refusal, each_refusal_of_a_batch, leaks, needs_lsan, nothing_is_left  # noqa: F401

import pykvsmooth as kvs
from pykvsmooth.machine import cuda_text

pytestmark = pytest.mark.skipif(not (INJECTS and cuda_text().startswith("archs shim")), reason="needs tests/shim: make test-cuda")

IMAGE = np.random.default_rng(SEED).integers(0, 256, (28, 28, 3), np.uint8)
MACHINES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {  # environment, and what is asked for
    "cuda": ({}, {"device": "cuda"}),
    "shared": ({}, {"device": "cuda", "gpu_layers": 1}),
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


@contextmanager
def fresh(kind: str, stack: str) -> Iterator[kvs.Session]:
    """A session of a model that has run nothing, so that no buffer is there yet."""
    with machine(kind) as options, open_model(options) as model, model.session(n_ctx=64, policy=STACKS[stack], seed=7) as session:
        yield session


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("kind", MACHINES)
def test_caption(kind: str, stack: str) -> None:
    """All refusals with all policies together, some of them with each alone: a caption takes the shim a twentieth of a second."""

    def check(session: kvs.Session, outcome: Any, expected: list[int]) -> None:
        if isinstance(outcome, Exception):
            assert session._handle._user is None
            outcome = caption(session)
        assert outcome == expected

    each_refusal(lambda: fresh(kind, stack), caption, check, lasting=stack in ("plain", "prunehal"), some=0 if stack == "stack" else 6)


@pytest.mark.parametrize("kind", MACHINES)
def test_batch(kind: str) -> None:
    """Every refusal on the GPU alone, some of them elsewhere."""
    requests = [{"prompt": "a dog"}, {"prompt": "a", "temperature": 1.0, "seed": 3}, {"prompt": "a", "repetition_penalty": 1.2}]

    @contextmanager
    def opened() -> Iterator[kvs.Model]:
        with machine(kind) as options, open_model(options) as model:
            yield model

    each_refusal_of_a_batch(opened, requests, some=0 if kind == "cuda" else 20, n_ctx=64, on_error="yield", max_tokens=3)


@pytest.mark.parametrize("kind", MACHINES)
def test_rows_that_come_back(kind: str, tmp_path: Path) -> None:
    """Of a session that was loaded, into a model that has moved none yet: what a GPU moves them with is asked for only now. Without it they
    are neither here nor there, and the GPU is given up."""
    with fresh(kind, "stack") as session:
        caption(session)
        assert session.prunings
        session.save(tmp_path / "s")

    @contextmanager
    def loaded() -> Iterator[kvs.Session]:
        with (
            machine(kind) as options,
            open_model(options) as model,
            kvs.Session.load(model, tmp_path / "s", policy=STACKS["stack"]) as session,
        ):
            yield session

    def restored(session: kvs.Session) -> list[Any]:
        session.restore()
        return session.prunings

    def check(session: kvs.Session, outcome: Any, _: Any) -> None:
        if isinstance(outcome, Exception):
            assert kind != "full" and re.search("cuda:0 failed: .*rows of pictures could not be moved", str(outcome))
            with pytest.raises(kvs.DeviceError):
                session.feed([5])
        else:
            assert outcome == []
            seen.append(bits(session))
            assert seen[-1] == seen[0]

    seen: list[Any] = []
    each_refusal(loaded, restored, check, errors=(kvs.DeviceError,))


@needs_lsan
def test_leak_sanitizer() -> None:
    ours = leaks(ALL_TESTS, __file__, "-k", "load or come_back")  # captions take minutes under it
    assert not ours, "\n".join(ours[:3])
