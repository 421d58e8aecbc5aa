"""All combinations of DSCR, KVSmooth and PruneHal: a caption goes on with the same tokens from a fork, a saved file, and after a rewind.

KVS_STACK_CAPTIONS=300 makes a soak of it; under a sanitizer that is what the stacks are released by.
"""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import Pair
from devices import DEVICE

import pykvsmooth as kvs

CAPTIONS = int(os.environ.get("KVS_STACK_CAPTIONS", "3"))
PROMPT = "Please describe the image in detail."
METHODS = {
    "dscr": kvs.DSCR(layers="1:", kernel="product", coord_norm="patch", gamma=0.5, rope_mode="pre"),
    "kvsmooth": kvs.KVSmooth(layers="1:4", lambda_ref=0.6),
    "prunehal": kvs.PruneHal(keep=0.5, times=2, reversible=True),
}
STACKS = [names for n in range(4) for names in itertools.combinations(METHODS, n)]


def more(session: kvs.Session, n: int) -> list[int]:
    """n greedy tokens, each fed as generated."""
    ids = []
    for _ in range(n):
        ids.append(int(session.logits().argmax()))
        session.feed(ids[-1:], generated=True)
    return ids


@pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize("names", STACKS, ids=lambda names: "+".join(names) or "plain")
def test_a_caption_goes_on(names: tuple[str, ...], kv_type: str, tiny_pair: Pair, rng: np.random.Generator, tmp_path: Path) -> None:
    stack = [METHODS[name] for name in rng.permutation(names)] if names else None
    with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj, device=DEVICE) as model:
        session = model.session(n_ctx=400, kv_type=kv_type, policy=stack)
        for _ in range(CAPTIONS):
            picture = rng.integers(0, 256, (*rng.integers(20, 90, 2), 3), np.uint8)
            middle, rest = (int(n) for n in rng.integers(1, 12, 2))
            session.generate(PROMPT, image=picture, max_tokens=0).result()
            whole = more(session, middle + rest)
            session.reset()
            session.generate(PROMPT, image=picture, max_tokens=0).result()
            assert more(session, middle) == whole[:middle]
            if "prunehal" in names and middle >= 2:
                assert session.prunings
            session.save(tmp_path / "s")
            with session.fork() as twin, kvs.Session.load(model, tmp_path / "s", policy=stack) as loaded:
                assert more(twin, rest) == whole[middle:] and more(loaded, rest) == whole[middle:]
                assert np.array_equal(twin.logits(), loaded.logits())
            back = int(rng.integers(1, rest + 1))
            assert more(session, rest) == whole[middle:]
            session.rewind(back)
            assert more(session, back) == whole[middle + rest - back :]
        session.close()
