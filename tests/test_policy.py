"""The policy object: its values, what it refuses, layers as slices and lists."""

from typing import Any

import numpy as np
import pytest

import pykvsmooth as kvs
from pykvsmooth._native import ffi, lib, new_error, string
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
    monkeypatch.setattr(
        model, "metadata", {"kvsmooth.lambda_ref": 0.25, "kvsmooth.layers": "1:3", "kvsmooth.target": "v", "general.name": "MiniGPT-4"}
    )
    assert kvs.KVSmooth.for_model(model) == kvs.KVSmooth(lambda_ref=0.25, layers="1:3", target="v")
    monkeypatch.setattr(model, "metadata", {"general.name": "MiniGPT-4"})
    assert kvs.KVSmooth.for_model(model, layers=[1]) == kvs.KVSmooth.minigpt4(layers=[1])


# ---- PruneHal ----


def test_prunehal_values() -> None:
    policy = kvs.PruneHal(keep=0.5, layers=[1, -1], top_k=[9, 3])
    assert policy == kvs.PruneHal(keep=0.5, layers=(1, -1), top_k=(9, 3)) != kvs.PruneHal(keep=0.5)
    assert hash(policy) == hash(kvs.PruneHal(keep=0.5, layers=[1, -1], top_k=[9, 3]))
    assert repr(policy) == "PruneHal(keep=0.5, layers=(1, -1), top_k=(9, 3))" and repr(kvs.PruneHal()) == "PruneHal()"
    assert eval(repr(policy), {"PruneHal": kvs.PruneHal}) == policy
    assert kvs.PruneHal.llava15() == kvs.PruneHal()
    assert kvs.PruneHal.instructblip() == kvs.PruneHal(keep=0.7, times=2) and kvs.PruneHal.qwen_vl() == kvs.PruneHal(keep=0.9, times=4)
    assert kvs.PruneHal.qwen_vl(reversible=True).reversible
    assert (kvs.PruneHal(top_k=7).counts, policy.counts, kvs.PruneHal().counts) == ((7,), (9, 3), ())
    assert kvs.PruneHal(top_k=np.int64(7)) == kvs.PruneHal(top_k=7) and kvs.PruneHal(top_k=np.array([9, 3])).counts == (9, 3)
    with pytest.raises(AttributeError):
        policy.keep = 0.3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"keep": 0}, ValueError),
        ({"keep": -0.1}, ValueError),
        ({"keep": 1.01}, ValueError),
        ({"keep": float("nan")}, ValueError),
        ({"keep": "0.4"}, TypeError),
        ({"times": -1}, ValueError),
        ({"times": 1.5}, TypeError),
        ({"times": True}, TypeError),
        ({"force_step": 1}, ValueError),
        ({"force_step": -2}, ValueError),
        ({"force_step": None}, TypeError),
        ({"vote_fraction": 1.1}, ValueError),
        ({"vote_fraction": float("nan")}, ValueError),
        ({"vote_strict": 1}, TypeError),
        ({"reference": "mean"}, ValueError),
        ({"index_scope": "head"}, ValueError),
        ({"reduction": "sum"}, ValueError),
        ({"per_image_quota": "yes"}, TypeError),
        ({"reversible": None}, TypeError),
        ({"layers": "3"}, ValueError),
        ({"layers": [1.5]}, TypeError),
        ({"top_k": 0}, ValueError),
        ({"top_k": []}, ValueError),
        ({"top_k": [5, 0]}, ValueError),
        ({"top_k": [5, 2.5]}, TypeError),
        ({"top_k": "5"}, TypeError),
        ({"top_k": 2.5}, TypeError),
        ({"prune_separators": True}, TypeError),
    ],
    ids=str,
)
def test_bad_prunehal(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        kvs.PruneHal(**arguments)


def test_prunehal_for_model(model: kvs.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kvs.PruneHal.for_model(model) == kvs.PruneHal.llava15()
    monkeypatch.setattr(model, "metadata", {"general.name": "Qwen-VL", "prunehal.times": 2, "prunehal.layers": "1:"})
    assert kvs.PruneHal.for_model(model, top_k=9) == kvs.PruneHal(keep=0.9, times=2, layers="1:", top_k=9)


@pytest.mark.parametrize("layers", [[4], [-5], [], "4:", [10**30]], ids=str)
def test_layers_that_the_model_does_not_have(layers: Any, model: kvs.Model) -> None:
    with pytest.raises(kvs.PolicyError, match="4 layers"):
        model.session(policy=kvs.PruneHal(layers=layers))


def test_a_stack_is_ordered_and_each_method_at_most_once(model: kvs.Model) -> None:
    smooth, prune = kvs.KVSmooth(layers=[1]), kvs.PruneHal()
    with model.session(policy=[prune, smooth]) as session:
        assert session.policy == (smooth, prune)
    with pytest.raises(kvs.PolicyError, match="two PruneHal"):
        model.session(policy=[prune, kvs.PruneHal(keep=0.5)])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("struct_size", 3),
        ("keep", float("nan")),
        ("keep", 0.0),
        ("keep", 1.5),
        ("times", -1),
        ("force_step", 1),
        ("vote_fraction", float("nan")),
        ("reference", 4),
        ("scope", 3),
        ("n_top_k", -1),
        ("n_layers", 0),
        ("n_layers", 5),
    ],
)
def test_the_native_side_checks_prunehal_again(field: str, value: Any, model: kvs.Model) -> None:
    params = ffi.new("kvs_session_params *")
    params.struct_size, params.n_ctx, params.kv_type = ffi.sizeof("kvs_session_params"), 64, lib.KVS_TYPE_F16
    prune, keep = kvs.PruneHal().to_native(4)
    setattr(prune, field, value)
    params.prune = prune
    out, err = ffi.new("kvs_session **"), new_error()
    with model._handle as pointer:
        assert lib.kvs_session_new(pointer, params, out, err) == lib.KVS_E_POLICY
    assert string(err.message).startswith("PruneHal: ") and out[0] == ffi.NULL and keep
