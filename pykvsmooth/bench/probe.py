"""Loads a pair in a process of its own, which stages.py starts, and prints one JSON object: load_s, and with --whole peak_bytes, too.

    python -m pykvsmooth.bench.probe MODEL '{"mmproj": false, "threads": 1, ...}' [--whole]

The second argument: what Model takes beside the path.

--whole goes on to a session of 1024 rows, a picture, a prompt and a few tokens: the peak of a caption, not of a load.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from ..machine import peak_bytes
from ..model import Model

N_CTX, PROMPT_ROWS, TOKENS = 1024, 32, 4


def main(path: str, asked: str, *whole: str) -> None:
    begin = time.perf_counter()
    model = Model(path, **json.loads(asked))
    found = {"load_s": time.perf_counter() - begin}
    if whole:
        _caption(model)
        found["peak_bytes"] = peak_bytes()
    print(json.dumps(found))


def _caption(model: Model) -> None:
    session = model.session(n_ctx=max(N_CTX, model.n_image + PROMPT_ROWS + TOKENS))
    if model.has_vision:
        session.feed_image(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8))
    ids = [3 + i % (model.n_vocab - 3) for i in range(PROMPT_ROWS)]
    session.feed(ids)
    session.feed(ids[:TOKENS], generated=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
