"""Whole quantized text models on every kernel set that is here, with prompts long enough for whole panels of rows.

What is promised (dots.h): a product with int8 has the same bits on every set, whatever the batch. Norms, attention and activations have
bits of their vectors, but these do not depend on the batch either. So each set must give to a prompt of any length the very bits that it
gives to its rows one by one, and AMX, which shares all but such products with AVX-512, the bits of that. Other sets differ from the plain
C kernels by as much as the order of float32 sums, and an activation that therefore falls to the other side of an int8.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import tiny
from conftest import SEED, Pair
from devices import KERNEL_SETS, kernel_set, open_model
from test_model import nmse
from twins import tokens

import pykvsmooth as kvs
from pykvsmooth._native import lib
from pykvsmooth.machine import cpu_text

# Up to 4 rows are few; 23 end in a row alone, 321 and 640 begin another panel of 320, 640 another pass of 512
LENGTHS = (1, 4, 5, 8, 23, 320, 321, 512, 640)
# Every type with integer kernels; 48, 96 and 451 rows are no whole panels of 32, and 96 columns no block of 256
TYPES = {
    "blk.0.attn_q": "q4_k", "blk.0.attn_k": "q6_k", "blk.0.attn_v": "q5_k", "blk.0.attn_output": "q8_0",
    "blk.0.ffn_gate": "iq4_xs", "blk.0.ffn_up": "q4_k", "blk.0.ffn_down": "q6_k",
    "blk.1.attn_q": "q2_k", "blk.1.attn_k": "q5_1", "blk.1.attn_v": "q3_k", "blk.1.attn_output": "q5_0",
    "blk.1.ffn_gate": "q4_0", "blk.1.ffn_up": "q4_1", "blk.1.ffn_down": "iq4_nl",
    "output.weight": "q6_k", "token_embd": "f16",
}  # fmt: skip
SHAPE = {"n_layer": 2, "n_embd": 256, "n_head": 4, "n_head_kv": 2, "head_dim": 24, "n_ff": 512, "n_vocab": 451, "n_ctx_train": 1024}


@dataclass
class Rows:
    """What a model computed: logits behind prompts of LENGTHS, and [layer, K or V] of all rows as (head, row, head_dim)."""

    logits: np.ndarray
    kv: np.ndarray


def rows_of(session: kvs.Session) -> np.ndarray:
    return np.array([session.kv(layer) for layer in range(session.model.n_layer)])


def one_by_one(model: kvs.Model, ids: list[int]) -> Rows:
    with model.session(n_ctx=len(ids), kv_type="f32") as session:
        logits = []
        for n, token in enumerate(ids, 1):
            session.feed([token])
            if n in LENGTHS:
                logits.append(session.logits())
        return Rows(np.array(logits), rows_of(session))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_pair(tmp_path_factory.mktemp("mixed"), seed=SEED, vision=False, load=False, types=TYPES, gain=1.0, **SHAPE)[0]


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return tokens(np.random.default_rng(SEED), max(LENGTHS))


@pytest.fixture(scope="module")
def alone(path: str, ids: list[int]) -> Callable[[str], Rows]:
    """Rows of a kernel set, fed one by one."""

    @functools.cache
    def compute(isa: str) -> Rows:
        with open_model(path, isa, "cpu", threads=2) as model:
            return one_by_one(model, ids)

    return compute


@pytest.mark.parametrize("isa", KERNEL_SETS)
def test_a_prompt_has_the_bits_of_its_rows(isa: str, path: str, ids: list[int], alone: Callable[[str], Rows]) -> None:
    rows = alone(isa)
    assert np.ptp(rows.logits, 0).min() > 0 and np.isfinite(rows.logits).all()  # no two prompts alike
    with open_model(path, isa, "cpu", threads=2) as model:
        for n, logits in zip(LENGTHS, rows.logits, strict=True):
            with model.session(n_ctx=n, kv_type="f32") as session:
                session.feed(ids[:n])
                differ = (rows_of(session) != rows.kv[:, :, :, :n]).any(axis=(0, 1, 2, 4))
                assert not differ.any(), f"{n} rows at once: {np.flatnonzero(differ)} differ"
                assert session.logits().tobytes() == logits.tobytes(), f"{n} rows at once"


@pytest.mark.parametrize("isa", KERNEL_SETS[1:])
def test_every_set_against_the_plain_kernels(isa: str, alone: Callable[[str], Rows]) -> None:
    rows, base = alone(isa), alone("base")
    errors = [nmse(rows.kv[0], base.kv[0]), nmse(rows.kv[1], base.kv[1]), nmse(rows.logits, base.logits)]
    print(isa, errors)
    assert errors[0] <= 1e-6  # behind one product: no rounding of rounding yet
    assert max(errors) <= 5e-3  # of 60 seeds: 2e-5 at the median, 1.5e-4 at most


@pytest.mark.parametrize("isa", [kernel_set("amx")])
def test_amx_has_the_bits_of_avx512(isa: str, alone: Callable[[str], Rows]) -> None:
    amx, avx512 = alone(isa), alone("avx512")
    assert amx.kv.tobytes() == avx512.kv.tobytes() and amx.logits.tobytes() == avx512.logits.tobytes()


@pytest.mark.parametrize("isa", KERNEL_SETS)
def test_loops_over_isas_pass_here(isa: str, cpu_isas: list[str]) -> None:
    """Tests that loop over the fixtures isas and cpu_isas leave out what is skipped here."""
    assert isa in cpu_isas


# ---- KVS_CPU ----

LOAD = """
import sys
import pykvsmooth as kvs
try:
    kvs.Model(sys.argv[1], mmproj=False, device="cpu").close()
except kvs.DeviceError as error:
    print(type(error).__name__, error)
"""


def load_with(value: str, path: str) -> str:
    environment = os.environ | {"KVS_CPU": value, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8:surrogateescape"}
    done = subprocess.run([sys.executable, "-c", LOAD, path], env=environment, check=True, capture_output=True, timeout=120)
    assert done.stderr == b""
    return done.stdout.decode("utf-8", "surrogateescape")  # a long value is cut, and may be cut within a character


@pytest.mark.parametrize("value", ["avx1024", "AVX2", "€" * 20], ids=["unknown", "upper", "cut"])
def test_kernels_that_there_are_not(value: str, tiny_pair: Pair, cpu_isas: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A typed error that names the variable, the value (or how it begins) and what there is."""
    says = load_with(value, tiny_pair.text)
    assert says.startswith(f'DeviceError KVS_CPU: there are no kernels "{value[:8]}') and '" in this build; it has base' in says
    assert all(isa in says.split(" it has ")[1] for isa in cpu_isas)
    monkeypatch.setenv("KVS_CPU", value)
    assert "kernels: none (KVS_CPU: there are no kernels" in cpu_text()


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "amx"])
def test_kernels_that_this_cpu_can_not_run(isa: str, tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it can run are taken; of the others, the error says what they need, or that the build lacks them."""
    monkeypatch.setenv("KVS_CPU", isa)
    if lib.kvs_test_isa(isa.encode()):
        with kvs.Model(tiny_pair.text, mmproj=False, device="cpu") as model:
            assert model.device_reason == f"kernels: {isa} (forced by KVS_CPU)"
        return
    lacking = rf'(the kernels "{isa}" need .*, which this CPU|there are no kernels "{isa}"|the kernel does not give this process the tile)'
    with pytest.raises(kvs.DeviceError, match="^KVS_CPU: " + lacking):
        kvs.Model(tiny_pair.text, mmproj=False, device="cpu")


def test_an_empty_name_forces_nothing(tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVS_CPU", "")
    with kvs.Model(tiny_pair.text, mmproj=False, device="cpu") as model:
        assert model.device_reason.endswith(" (best of this CPU)")
