"""Cancelling what is long, on the device of the tests: a load at each tenth of it, a picture's encoding. Prompts and answers are in
test_threads.py."""

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import SEED, Pair
from devices import DEVICE

import pykvsmooth as kvs


def left() -> tuple[int, int, int]:
    gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count(".gguf")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here")
@pytest.mark.parametrize("gpu_layers", ["auto", 1])
def test_a_load_at_each_tenth(gpu_layers: int | str, tiny_pair: Pair) -> None:
    if DEVICE == "cpu" and gpu_layers != "auto":
        pytest.skip("the CPU has all layers")
    seen: list[float] = []

    def load(until: float) -> None:
        """Cancelled when that much is done."""
        seen.clear()

        def progress(fraction: float) -> bool:
            seen.append(fraction)
            return fraction < until

        kvs.Model(tiny_pair.text, tiny_pair.mmproj, device=DEVICE, gpu_layers=gpu_layers, progress=progress).close()

    load(2)
    before = left()
    assert seen == sorted(seen) and (seen[0], seen[-1]) == (0, 1)
    for until in np.linspace(0, 1, 11):
        with pytest.raises(kvs.CancelledError):
            load(float(until))
        assert seen[-1] >= until and left() == before
    load(2)
    assert seen[-1] == 1 and left() == before


def test_a_picture(tmp_path: Path, rng: np.random.Generator) -> None:
    """Its encoding ends as cancelled, the session is as it was, and the model goes on."""
    text, mmproj, _ = tiny.write_pair(
        tmp_path, seed=SEED, load=False, v_layer=8, v_embd=512, v_head=8, v_ff=2048, image=336
    )  # a quarter of a second on two cores
    picture = rng.integers(0, 256, (336, 336, 3), np.uint8)
    with kvs.Model(text, mmproj, device=DEVICE) as model, model.session(n_ctx=1024) as session:
        expected = session.generate("a dog", template=None, max_tokens=3).result().text
        session.reset()
        stream = session.generate("a dog", image=picture, template=None, max_tokens=3)
        timer = threading.Timer(0.05, stream.cancel)
        timer.start()
        result = stream.result()
        timer.join()
        assert (result.finish_reason, result.tokens, session.n_past) == ("cancelled", [], 0)
        assert session.generate("a dog", template=None, max_tokens=3).result().text == expected
