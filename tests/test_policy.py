"""The policy object: its values, what it refuses, layers as slices and lists."""

from typing import Any

import numpy as np
import pytest

import pykvsmooth as kvs
from pykvsmooth.policies.kvsmooth import _CHOICES


def test_policy_values() -> None:
    policy = kvs.KVSmooth(lambda_ref=0.5, layers=[1, -1])
    assert policy == kvs.KVSmooth(lambda_ref=0.5, layers=(1, -1)) != kvs.KVSmooth(lambda_ref=0.5)
    assert hash(policy) == hash(kvs.KVSmooth(lambda_ref=0.5, layers=[1, -1]))
    assert repr(policy) == "KVSmooth(lambda_ref=0.5, layers=(1, -1))" and repr(kvs.KVSmooth()) == "KVSmooth()"
    assert eval(repr(policy), {"KVSmooth": kvs.KVSmooth}) == policy
    assert kvs.KVSmooth.llava15() == kvs.KVSmooth()
    assert (kvs.KVSmooth.minigpt4().lambda_ref, kvs.KVSmooth.instructblip().lambda_ref) == (0.5, 0.7)
    assert kvs.KVSmooth.minigpt4(window=7).window == 7
    with pytest.raises(AttributeError):
        policy.window = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        kvs.KVSmooth(0.9)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ("3:-1", 32, list(range(3, 31))),
        ("3:-1", 40, list(range(3, 39))),
        (":", 4, [0, 1, 2, 3]),
        ("-2:", 4, [2, 3]),
        ("::2", 5, [0, 2, 4]),
        ("::-2", 5, [0, 2, 4]),
        (" 1 : 3 ", 4, [1, 2]),
        ([3, -4, 0], 4, [0, 3]),
        (range(1, 3), 4, [1, 2]),
        (np.array([2]), 4, [2]),
    ],
    ids=str,
)
def test_layers(layers: Any, depth: int, expected: list[int]) -> None:
    assert kvs.KVSmooth(layers=layers).resolve_layers(depth) == expected


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"lambda_ref": 1.1}, ValueError),
        ({"lambda_ref": float("nan")}, ValueError),
        ({"lambda_ref": "0.9"}, TypeError),
        ({"half_width": -0.1}, ValueError),
        ({"lambda_max": 2}, ValueError),
        ({"window": 0}, ValueError),
        ({"window": 1025}, ValueError),
        ({"window": 1.5}, TypeError),
        ({"window": True}, TypeError),
        ({"mode": "fixed"}, ValueError),
        ({"lambda_fixed": 0.5}, ValueError),
        ({"mode": "fixed", "lambda_fixed": 1.5}, ValueError),
        ({"layers": "3"}, ValueError),
        ({"layers": "a:b"}, ValueError),
        ({"layers": "1:2:0"}, ValueError),
        ({"layers": 3}, TypeError),
        ({"layers": [1.5]}, TypeError),
        ({"layers": [True]}, TypeError),
        ({"target": "q"}, ValueError),
        ({"rope_mode": "pre"}, ValueError),
        ({"warm_start": "some"}, ValueError),
        ({"warm_start": ("prompt_rows", 16)}, ValueError),
        ({"warm_start": ("prompt_rows", "3")}, TypeError),
        ({"warm_start": ("prompt_rows", -1)}, ValueError),
        ({"warm_start": "prompt_rows(１)"}, ValueError),
        ({"layers": "１:"}, ValueError),
        ({"layers": {1: 2}}, TypeError),
        ({"mode": ["fixed"]}, TypeError),
        ({"lambda_ref": 10**400}, ValueError),
        ({"lambda_ref": True}, TypeError),
        ({"skip_token_ids": [1.5]}, TypeError),
        ({"entropy_include_self": 1}, TypeError),
        ({"skip_token_ids": "ab"}, TypeError),
        ({"skip_token_ids": 3}, TypeError),
        ({"target": "o", "smooth_prompt": "last_token"}, ValueError),
        ({"target": "o", "entropy_heads": "per_kv_group"}, ValueError),
        ({"lamda": 1}, TypeError),
        *[({name: "x"}, ValueError) for name in _CHOICES],
    ],
    ids=str,
)
def test_bad_policies(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        kvs.KVSmooth(**arguments)


def test_messages() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"window": 1.5}, "KVSmooth: window must be an integer, not float"),
        ({"layers": [1, 1.5]}, "KVSmooth: layers[1] must be an integer, not float"),
        ({"warm_start": ("prompt_rows", 16)}, "KVSmooth: warm_start, with window=15, must be in 0..15, not 16"),
        ({"layers": "1" * 5000 + ":"}, "KVSmooth: layers '1111"),
        ({"warm_start": f"prompt_rows({'1' * 5000})"}, "KVSmooth: warm_start must be "),
        ({"window": 10**5000}, "KVSmooth: window must be in 1..1024, not a number of 16610 bits"),
        ({"target": "x"}, "KVSmooth: target must be one of kv, k, v, o, not 'x'"),
    ]
    for arguments, message in cases:
        with pytest.raises((TypeError, ValueError)) as caught:
            kvs.KVSmooth(**arguments)
        assert str(caught.value).startswith(message) and len(str(caught.value)) < 200


def test_numpy_values() -> None:
    policy = kvs.KVSmooth(entropy_include_self=np.bool_(False), window=np.int64(7), lambda_ref=np.float32(0.5))
    assert policy == kvs.KVSmooth(entropy_include_self=False, window=7, lambda_ref=0.5)
    assert repr(policy) == "KVSmooth(lambda_ref=0.5, window=7, entropy_include_self=False)"


@pytest.mark.parametrize("skip", [-1, 10**4, 10**30])
def test_skipped_tokens_must_be_the_models(model: kvs.Model, skip: int) -> None:
    policy = kvs.KVSmooth(layers=[1], skip_token_ids=[0, model.n_vocab - 1, skip])
    with pytest.raises(kvs.PolicyError, match=f"skip_token_ids: .* has {model.n_vocab} tokens"):
        model.session(policy=policy)
    with pytest.raises(kvs.PolicyError, match=r"layers: .* has 4 layers"):
        model.session(policy=kvs.KVSmooth(layers=[10**5000]))
    model.session(policy=kvs.KVSmooth(layers=[1], skip_token_ids=[0, model.n_vocab - 1])).close()


def test_warm_start_spellings() -> None:
    spellings = ["none", "last_prompt_row", ("prompt_rows", 8), ["prompt_rows", 8], "prompt_rows(8)"]
    assert [kvs.KVSmooth(warm_start=s).warm_rows for s in spellings] == [0, 1, 8, 8, 8]


def test_for_model(model: kvs.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kvs.KVSmooth.for_model(model).resolve_layers(4) == [0, 1, 2]
    monkeypatch.setattr(model, "metadata", {"kvsmooth.lambda_ref": 0.25, "kvsmooth.layers": "1:3", "general.name": "MiniGPT-4"})
    assert kvs.KVSmooth.for_model(model) == kvs.KVSmooth(lambda_ref=0.25, layers="1:3")
    monkeypatch.setattr(model, "metadata", {"general.name": "MiniGPT-4"})
    assert kvs.KVSmooth.for_model(model, layers=[1]) == kvs.KVSmooth.minigpt4(layers=[1])
