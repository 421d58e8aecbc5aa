"""Loads a pair in a process of its own, which stages.py starts, and prints one JSON object: load_s, and first_pass_s or peak_bytes.

    python -m pykvsmooth.bench.probe MODEL '{"mmproj": false, "threads": 1, ...}' KV_TYPE [--whole]

The second argument: what Model takes beside the path. KV_TYPE: of the cache.

first_pass_s: of the first token that is fed to a session, without making that. On a CPU it brings the weights into the order that the
kernels read.
--whole goes on to a session of 1024 rows, a picture, a prompt and a few tokens instead: the peak of a caption, not of a load. A token in
front would change the order of things, and so the peak.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from ..machine import peak_bytes
from ..model import Model
from ..session import KVType

N_CTX, PROMPT_ROWS, TOKENS = 1024, 32, 4


def main(path: str, asked: str, kv_type: KVType, *whole: str) -> None:
    begin = time.perf_counter()
    model = Model(path, **json.loads(asked))
    found = {"load_s": time.perf_counter() - begin}
    if whole:
        _caption(model, kv_type)
        found["peak_bytes"] = peak_bytes()
    else:
        found["first_pass_s"] = _first_pass(model, kv_type)
    print(json.dumps(found))


def _first_pass(model: Model, kv_type: KVType) -> float:
    with model.session(n_ctx=N_CTX, kv_type=kv_type) as session:
        begin = time.perf_counter()
        session.feed([3 % model.n_vocab])
        return time.perf_counter() - begin


def _caption(model: Model, kv_type: KVType) -> None:
    session = model.session(n_ctx=max(N_CTX, model.n_image + PROMPT_ROWS + TOKENS), kv_type=kv_type)
    if model.has_vision:
        session.feed_image(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8))
    ids = [3 + i % (model.n_vocab - 3) for i in range(PROMPT_ROWS)]
    session.feed(ids)
    session.feed(ids[:TOKENS], generated=True)


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]  # KV_TYPE is what session() refuses or takes
