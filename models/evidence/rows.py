"""Which settings are compared, and on which grid the best one is looked for."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pykvsmooth as kvs

# (lambda_ref, half_width): strengths from 0 upwards, then the paper's window of 0.2 to either side
WINDOWS = ((0.05, 0.05), (0.1, 0.1), (0.15, 0.15), (0.2, 0.2), (0.3, 0.2), (0.5, 0.2), (0.9, 0.2))
LAYERS = ("0:1", "0:2", "0:4", "0:8", "1:4", "1:8", "3:8")  # of eight
MIXED: dict[Any, str] = {"kv": "keys and values", "k": "keys only", "v": "values only"}  # targets
TARGETS = {target: MIXED[target] for target in ("kv", "v")}  # of the grid
PUBLISHED = "KVSmooth, as published (0.9, 3:-1)"
OTHERS: tuple[dict[str, Any], ...] = ({"target": "k"}, {"target": "o"}, {"target": "kv", "rope_mode": "relative"}, {"mix": "damp"})


def grid() -> dict[str, kvs.KVSmooth]:
    """The settings that are tried on the development split."""
    settings = ((target, layers, ref, width) for target in TARGETS for layers in LAYERS for ref, width in WINDOWS)
    return {
        label(target, layers, ref, width): kvs.KVSmooth(target=target, layers=layers, lambda_ref=ref, half_width=width)
        for target, layers, ref, width in settings
    }


def label(target: str, layers: str, ref: float, width: float) -> str:
    return f"{TARGETS[target]}, layers {layers}, {ref:g} ± {width:g}"


def around(best: kvs.KVSmooth) -> dict[str, kvs.KVSmooth]:
    """Its neighbours in the other switches, on the development split, too."""
    return {f"best, {_said(change)}": changed(best, **change) for change in OTHERS}


def changed(policy: kvs.KVSmooth, **changes: Any) -> kvs.KVSmooth:
    return kvs.KVSmooth(**{**{f.name: getattr(policy, f.name) for f in fields(policy)}, **changes})


def rows(best: kvs.KVSmooth, mean_strength: float, n_layer: int) -> dict[str, kvs.KVSmooth]:
    """What the page compares with the plain model. mean_strength: of the best setting's run on the same scenes."""
    return {
        "KVSmooth, best of the development split": best,
        PUBLISHED: kvs.KVSmooth(),
        f"fixed strength {mean_strength:.3f}, the best one's mean": changed(best, mode="fixed", lambda_fixed=mean_strength),
        "damping: no previous row": changed(best, mix="damp"),
        **{name: changed(best, target=target) for target, name in MIXED.items() if target != best.target},
        "attention outputs (o_t)": changed(best, target="o"),
        **dict([_toggled(best, "first layer", 0, n_layer), _toggled(best, "last layer", n_layer - 1, n_layer)]),
        "relative rope, keys and values": changed(best, target="kv", rope_mode="relative"),
    }


def siblings() -> dict[str, dict[str, Any]]:
    """What is tried of the other two methods on the development split, by method. The scenes are flat: DSCR has its spatial term alone."""
    pruning = {f"keep {keep:g}, prunings {times}": kvs.PruneHal(keep=keep, times=times) for keep in (0.5, 0.75, 0.9) for times in (1, 3)}
    refining = {
        f"{kernel}, layers {layers}, gamma {gamma:g}": make(layers=layers, gamma=gamma)
        for kernel, make in {"sum": kvs.DSCR, "product": kvs.DSCR.bilateral}.items()
        for layers in ("2:", "5:")
        for gamma in (0.1, 0.3)
    }
    return {"PruneHal": pruning, "DSCR": refining}


def methods(model: kvs.Model, best: kvs.KVSmooth, pruning: kvs.PruneHal, refining: kvs.DSCR) -> dict[str, Any]:
    """The sibling methods as published and as the development split likes them best, and what stacks of the latter do."""
    return {
        "PruneHal, as published for LLaVA-1.5": kvs.PruneHal.for_model(model),
        "PruneHal, best of the development split": pruning,
        "DSCR, as published": kvs.DSCR.for_model(model),
        "DSCR, best of the development split": refining,
        "KVSmooth + PruneHal": [best, pruning],
        "DSCR + KVSmooth": [refining, best],
        "DSCR + PruneHal": [refining, pruning],
        "DSCR + KVSmooth + PruneHal": [refining, best, pruning],
    }


def _toggled(best: kvs.KVSmooth, what: str, layer: int, n_layer: int) -> tuple[str, kvs.KVSmooth]:
    """With this layer where the best setting is without it, and the other way round."""
    layers = set(best.resolve_layers(n_layer))
    word = "out" if layer in layers else "in"
    return f"{what} {word}", changed(best, layers=sorted(layers ^ {layer}))


def _said(change: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in change.items())
