"""What the tests of answers share: a prompt, a policy for the tiny model, an answer to compare with."""

from typing import Any

import pykvsmooth as kvs

PROMPT = "describe the red car and the small dog"
SMOOTH = kvs.KVSmooth(layers=[1, 2])


def answer(model: kvs.Model, prompt: str = PROMPT, policy: kvs.KVSmooth | None = None, kv_type: Any = "f16", **options: Any) -> kvs.Result:
    """An answer of a session that nobody used before."""
    with model.session(n_ctx=400, kv_type=kv_type, policy=policy, seed=1) as session:
        return session.generate(prompt, **options).result()


def ids(result: kvs.Result) -> list[int]:
    return [token.id for token in result.tokens]
