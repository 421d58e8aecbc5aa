"""KVSmooth's arithmetic through the cache ops, against a float64 model of one layer's cache."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from pykvsmooth._native import ffi, lib

K, V, OUT = lib.KVS_TARGET_K, lib.KVS_TARGET_V, lib.KVS_TARGET_O
F32, F16, Q8_0 = lib.KVS_TYPE_F32, lib.KVS_TYPE_F16, lib.KVS_TYPE_Q8_0


@dataclass
class Options:
    lambda_ref: float = 0.9
    half_width: float = 0.2
    lambda_max: float = 1.0
    lambda_fixed: float = float("nan")
    window: int = 15
    target: int = K | V
    den_capacity: int = 0
    rope_relative: int = 0
    skip_first: int = 0
    warm_start: int = 0
    norm_log_len: int = 0
    per_kv_head: int = 0
    exclude_self: int = 0
    midrank: int = 0
    ema_one_step: int = 0
    damp: int = 0

    def struct(self):
        params = ffi.new("kvs_smooth_params *", vars(self))
        params.struct_size = ffi.sizeof("kvs_smooth_params")
        return params


def floats(array: np.ndarray):
    assert array.dtype == np.float32 and array.flags.c_contiguous
    return ffi.from_buffer("float[]", array, require_writable=False)


def smooth(isa: str, options: Options, kv_type: int, k: np.ndarray, v: np.ndarray, entropy: np.ndarray):
    n, n_kv_head, head_dim = k.shape
    k_out, v_out = np.full_like(k, np.nan), np.full_like(v, np.nan)
    strength = np.full((n, n_kv_head if options.per_kv_head else 1), -1, np.float32)
    status = lib.kvs_test_smooth(
        isa.encode(), options.struct(), kv_type, n_kv_head, head_dim, n, floats(k), floats(v), floats(entropy),
        floats(k_out), floats(v_out), floats(strength),
    )  # fmt: skip
    assert status == 0
    return k_out, v_out, strength


def strengths(o: Options, z: np.ndarray) -> np.ndarray:
    """(n) entropies of one group -> (n) strengths; row 0 is the prompt's."""
    n = len(z)
    seen = np.maximum(np.arange(n) + 1 - o.exclude_self, 2)
    z = (z / np.log(seen.astype(np.float32)).astype(np.float32)).astype(np.float32) if o.norm_log_len else z
    result = np.full(n, np.nan)
    for i in range(2 if o.skip_first else 1, n):
        queue = z[max(i - o.window + 1, 0 if o.warm_start else 1) : i + 1]
        rank = (queue < z[i]).sum() + (0.5 * ((queue == z[i]).sum() - 1) if o.midrank else 0)
        hat = rank / (o.window if o.den_capacity else len(queue))
        result[i] = np.clip(np.clip(hat, o.lambda_ref - o.half_width, o.lambda_ref + o.half_width), 0, o.lambda_max)
        if not np.isnan(o.lambda_fixed):
            result[i] = o.lambda_fixed
    return result


def turn(x: np.ndarray) -> np.ndarray:
    """One position on, theta 10000, adjacent pairs."""
    d = x.shape[-1]
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * 10000.0 ** (-np.arange(0, d, 2) / d))
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def ema(o: Options, x: np.ndarray, lam: np.ndarray, moved: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """x (n, G, d), lam (n, G)"""
    raw, out = x.astype(np.float64), x.astype(np.float64)
    for i in range(1, len(x)):
        if np.isnan(lam[i, 0]):
            continue
        weight = lam[i][:, None]
        before = 0 if o.damp else moved((raw if o.ema_one_step else out)[i - 1])
        out[i] = (1 - weight) * raw[i] + weight * before
    return out


def model(o: Options, k: np.ndarray, v: np.ndarray, entropy: np.ndarray):
    groups = entropy if o.per_kv_head else entropy.astype(np.float64).mean(1, keepdims=True).astype(np.float32)
    lam = np.stack([strengths(o, z) for z in groups.T], 1)
    wide = np.broadcast_to(lam, entropy.shape)
    k_out = ema(o, k, wide, turn if o.rope_relative else lambda x: x) if o.target & K else k.astype(np.float64)
    v_out = ema(o, v, wide, lambda x: x) if o.target & (V | OUT) else v.astype(np.float64)
    return k_out, v_out, lam


def draw(rng: np.random.Generator, n: int, n_kv_head: int, head_dim: int):
    shape = (n, n_kv_head, head_dim)
    k, v = rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32)
    entropy = rng.uniform(0, 6, shape[:2]).astype(np.float32)
    if rng.integers(2):  # ties
        entropy = np.rint(entropy).astype(np.float32)
    return k, v, entropy


def random_options(rng: np.random.Generator) -> Options:
    flag = lambda: int(rng.integers(2))  # noqa: E731
    target = int(rng.choice([K, V, K | V, OUT]))
    return Options(
        lambda_ref=float(np.float32(rng.uniform(0, 1))),
        half_width=float(np.float32(rng.choice([0, 0.2, 1]))),
        lambda_max=float(np.float32(rng.choice([0.5, 1]))),
        lambda_fixed=float(np.float32(rng.uniform(0, 1))) if rng.random() < 0.2 else float("nan"),
        window=int(rng.integers(1, 20)),
        target=target,
        den_capacity=flag(),
        rope_relative=flag(),
        skip_first=flag(),
        warm_start=flag(),
        norm_log_len=flag(),
        per_kv_head=flag(),
        exclude_self=flag(),
        midrank=flag(),
        ema_one_step=flag(),
        damp=int(rng.random() < 0.2),
    )


@pytest.mark.parametrize("case", range(60))
def test_every_switch_against_the_model(isas: list[str], rng: np.random.Generator, case: int) -> None:
    o = random_options(rng)
    k, v, entropy = draw(rng, int(rng.integers(1, 45)), int(rng.integers(1, 4)), int(rng.choice([2, 16, 20, 64, 128])))
    expected_k, expected_v, lam = model(o, k, v, entropy)
    for isa in isas:
        got_k, got_v, strength = smooth(isa, o, F32, k, v, entropy)
        np.testing.assert_allclose(strength, lam, rtol=0, atol=2e-7, err_msg=f"{isa} {o}")
        np.testing.assert_allclose(got_k, expected_k, rtol=0, atol=3e-6, err_msg=f"{isa} {o}")
        np.testing.assert_allclose(got_v, expected_v, rtol=0, atol=3e-6, err_msg=f"{isa} {o}")


@pytest.mark.parametrize(("kv_type", "ulp"), [(F16, 2**-10), (Q8_0, 1 / 127)])
def test_rows_are_quantized_once_from_float32(isas: list[str], rng: np.random.Generator, kv_type: int, ulp: float) -> None:
    """After 40 mixtures at strength 0.93 the error is that of one rounding, not of forty."""
    o = Options(lambda_fixed=0.93)
    k, v, entropy = draw(rng, 41, 2, 64)
    expected_k, expected_v, _ = model(o, k, v, entropy)
    for isa in isas:
        got_k, got_v, _ = smooth(isa, o, kv_type, k, v, entropy)
        for got, expected in ((got_k, expected_k), (got_v, expected_v)):
            largest = np.abs(expected.reshape(*expected.shape[:-1], -1, 32)).max(-1).repeat(32, -1)
            assert (np.abs(got - expected) <= 0.51 * ulp * largest * 1.01 + 1e-6).all()


@pytest.mark.parametrize("kv_type", [F32, F16, Q8_0])
def test_strength_zero_changes_no_bit(isas: list[str], rng: np.random.Generator, kv_type: int) -> None:
    k, v, entropy = draw(rng, 20, 2, 36)
    for isa in isas:
        for options in (Options(lambda_fixed=0.0), Options(lambda_ref=0, half_width=0), Options(lambda_fixed=0.0, rope_relative=1)):
            zero = smooth(isa, options, kv_type, k, v, entropy)
            plain = smooth(isa, Options(target=OUT), kv_type, k, v, entropy)
            plain_v = smooth(isa, Options(target=K), kv_type, k, v, entropy)[1]
            assert (zero[2][1:] == 0).all() and np.isnan(zero[2][0]).all()
            assert zero[0].tobytes() == plain[0].tobytes() and zero[1].tobytes() == plain_v.tobytes()


def test_strength_one_repeats_the_prompt_row(isas: list[str], rng: np.random.Generator) -> None:
    k, v, entropy = draw(rng, 12, 3, 20)
    for isa in isas:
        got_k, got_v, _ = smooth(isa, Options(lambda_fixed=1.0), F32, k, v, entropy)
        np.testing.assert_array_equal(got_k, np.broadcast_to(k[0], k.shape))
        np.testing.assert_array_equal(got_v, np.broadcast_to(v[0], v.shape))


def test_the_strengths_of_the_paper(isas: list[str]) -> None:
    """What a full queue of 15 can give, rank by rank, for the three models."""
    steps = np.arange(15) / 15
    for isa in isas:
        for lambda_ref, low, high in ((0.9, 0.7, 1.0), (0.5, 0.3, 0.7), (0.7, 0.5, 0.9)):
            for rank in range(15):
                others = np.setdiff1d(np.arange(15), rank)
                entropy = np.concatenate([[0], others, [rank]]).astype(np.float32)[:, None]
                k = np.zeros((16, 1, 2), np.float32)
                strength = smooth(isa, Options(lambda_ref=lambda_ref), F32, k, k, entropy)[2]
                assert abs(strength[-1, 0] - np.clip(steps[rank], low, high)) < 1e-6
