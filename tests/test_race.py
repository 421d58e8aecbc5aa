"""models/race_transformers.py: the smoothing of its rival is the one that captions are compared with, and it runs from end to end."""

import math
import re
import sys
from types import SimpleNamespace

import pytest
import tiny

torch = pytest.importorskip("torch", reason="the rival runs on it")
pytest.importorskip("transformers", reason="the rival is it")

import pykvsmooth as kvs
from models import parity, race_transformers
from pykvsmooth import gguf_in


def test_smoothing_for_all_layers_at_once() -> None:
    """Row by row as models/parity.py, which does it layer by layer, on caches that begin alike."""
    layers, policy = 6, kvs.KVSmooth(lambda_ref=0.5, half_width=0.4)
    mine = race_transformers.Smoother(policy, layers)
    plain = parity.Smoother(policy.resolve_layers(layers), 0.5, 0.4, policy.window, "kv")
    caches = [SimpleNamespace(layers=[SimpleNamespace(keys=None, values=None) for _ in range(layers)]) for _ in range(2)]
    draw = torch.Generator().manual_seed(0)
    smoothed = set()
    for step in range(20):
        attentions = tuple(torch.rand(1, 4, 1, 9 + step, generator=draw).pow(3).softmax(-1) for _ in range(layers))
        rows = torch.randn(2, layers, 1, 4, 2 if step == 0 else 1, 8, generator=draw)
        for cache in caches:
            for layer, key, value in zip(cache.layers, *rows.clone(), strict=True):
                layer.keys = key if layer.keys is None else torch.cat((layer.keys, key), 2)
                layer.values = value if layer.values is None else torch.cat((layer.values, value), 2)
        for smoother, cache in zip((mine, plain), caches, strict=True):
            smoother.after(attentions, cache)
        for i, (a, b) in enumerate(zip(caches[0].layers, caches[1].layers, strict=True)):
            assert torch.allclose(a.keys, b.keys, atol=1e-5) and torch.allclose(a.values, b.values, atol=1e-5), (step, i)
            smoothed |= {i} if not torch.equal(a.keys[:, :, -1], rows[0, i, :, :, -1]) else set()
    assert smoothed == {3, 4}  # the paper's layers of six


def test_a_race(tmp_path, monkeypatch, capsys) -> None:
    text, _, _ = tiny.write_pair(tmp_path, seed=1, vision=False, load=False, n_layer=6)  # of four layers the paper smooths none
    argv = ["race", "--model", text, "--device", "cpu", "--threads", "1", "--depth", "24", "--tokens", "3", "--repeat", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    race_transformers.main()
    rows = re.findall(
        r"^\| (\w+) \| [\d.e-]+ ms \| [\d.e-]+ ms \| ([\d.]+) x \[[\d.]+, [\d.]+\] \|$", capsys.readouterr().out, re.MULTILINE
    )
    assert [name for name, _ in rows] == ["plain", "KVSmooth"] and all(float(ratio) > 0 for _, ratio in rows)


def test_the_rival_has_our_shape(model: kvs.Model) -> None:
    """As many weights; attention that can be looked at."""
    rival = race_transformers.theirs(model, "cpu")
    assert sum(one.numel() for one in rival.parameters()) == sum(math.prod(tensor.shape) for tensor in gguf_in.read(model.path).tensors)
    assert rival.config._attn_implementation == "eager" and rival.dtype == torch.float32
