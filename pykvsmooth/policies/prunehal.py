"""PruneHal's parameters (arXiv 2510.19183; docs/methods.md): what the paper leaves open is an option here, with a default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from .._native import ffi, lib
from ..checks import choice, integer, integers, real
from . import layers
from .parameters import Parameters

if TYPE_CHECKING:
    from ..model import Model

_REFERENCES = {
    "running_mean_reset": lib.KVS_REFERENCE_RUNNING_MEAN_RESET,
    "running_mean": lib.KVS_REFERENCE_RUNNING_MEAN,
    "last_prune": lib.KVS_REFERENCE_LAST_PRUNE,
    "first": lib.KVS_REFERENCE_FIRST,
}
_SCOPES = {"layer": lib.KVS_SCOPE_LAYER, "global": lib.KVS_SCOPE_GLOBAL, "kv_head": lib.KVS_SCOPE_KV_HEAD}
_FLAGS = ("vote_strict", "per_image_quota", "reversible")
MAX_COUNT = 1 << 20


@dataclass(frozen=True, kw_only=True, repr=False)
class PruneHal(Parameters):
    """Parameters of PruneHal. Instances are immutable, compare by value, and belong to no model until a session is made.

    Each layer's attention to the picture is its head-mean mass per row of the picture that is still there. Where that is below
    sqrt(keep) times the layer's reference, the layer votes; when more than vote_fraction of the layers vote (vote_strict=False: so many
    or more), the best attended share keep of those rows stays, in every layer, and the rest leaves the cache: memory and time fall.
    At most times such prunings per answer. Steps are counted from 1, the last row of the prompt that holds the newest picture; each
    generated row is the next one, and a new picture in a later turn starts afresh. Pruning acts behind a step, so the first token
    and the second never change.

    force_step: the step that prunes without a vote, 2 as in the paper; 0 for none. reference: the mean over the steps since the last
    pruning ("running_mean_reset"; the step right behind it can't vote), over all ("running_mean"), the value at the last pruning
    ("last_prune"), or that of step 1 ("first"). index_scope: which rows stay is chosen per layer, for all layers together ("global",
    by the mean over layers) or per KV head. reduction: of a key's attention over query heads. per_image_quota: False lets several
    pictures compete, one row of each stays for sure; True keeps the share of each. layers: a Python slice as text or a list of ints,
    those that vote and lose rows. top_k: fixed numbers of rows that stay after the first, second, ... pruning instead of shares (then
    there are no more prunings than numbers; a number among several pictures is shared out with per_image_quota). reversible: dropped
    rows are kept in host memory, for Session.restore() and for rewinds.

    The paper's separator rows (prune_separators) do not exist in LLaVA-1.5 pictures. Raises TypeError and ValueError; layers are
    compared with the model (PolicyError) when a session is made. A session without a picture is never pruned.
    """

    keep: float = 0.4
    times: int = 3
    force_step: int = 2
    reference: Literal["running_mean_reset", "running_mean", "last_prune", "first"] = "running_mean_reset"
    vote_fraction: float = 0.5
    vote_strict: bool = True
    index_scope: Literal["layer", "global", "kv_head"] = "layer"
    reduction: Literal["mean", "max"] = "mean"
    per_image_quota: bool = False
    layers: str | Sequence[int] = ":"
    top_k: int | Sequence[int] | None = None
    reversible: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            choice(f"PruneHal: {name}", getattr(self, name), choices)
        self._set("keep", real("PruneHal: keep", self.keep, 0.0, 1.0, open_low=True))
        self._set("vote_fraction", real("PruneHal: vote_fraction", self.vote_fraction, 0.0, 1.0))
        self._set("times", integer("PruneHal: times", self.times, 0, MAX_COUNT))
        self._set("force_step", integer("PruneHal: force_step", self.force_step, 0, MAX_COUNT))
        if self.force_step == 1:
            raise ValueError(
                "PruneHal: force_step must be 0 (never) or 2 and more: step 1 is the prompt's last row, which sets the reference"
            )
        for name in _FLAGS:
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise TypeError(f"PruneHal: {name} must be True or False, not {type(getattr(self, name)).__name__}")
            self._set(name, bool(getattr(self, name)))
        self._set("layers", layers.check("PruneHal", self.layers))
        if self.top_k is not None:
            self._set("top_k", self._check_top_k())

    def _check_top_k(self) -> int | tuple[int, ...]:
        if not isinstance(self.top_k, (str, bytes)) and not hasattr(self.top_k, "__len__"):
            return integer("PruneHal: top_k", self.top_k, 1, MAX_COUNT)
        counts = tuple(integers("PruneHal: top_k", self.top_k, 1, MAX_COUNT))
        if not counts:
            raise ValueError("PruneHal: top_k is empty; give the numbers of rows that stay, or None")
        return counts

    @property
    def counts(self) -> tuple[int, ...]:
        """top_k as a tuple; empty where shares are kept."""
        return () if self.top_k is None else (self.top_k,) if isinstance(self.top_k, int) else tuple(self.top_k)

    def resolve_layers(self, n_layer: int) -> list[int]:
        """The layers as 0-based numbers for a model of this depth, rising. PolicyError if none is left or one is out of range."""
        return layers.resolve("PruneHal", self.layers, n_layer)

    def to_native(self, n_layer: int) -> tuple[Any, list[Any]]:
        """(kvs_prune_params *, what must be kept alive beside it). PolicyError for layers that a model of this depth does not have."""
        chosen = self.resolve_layers(n_layer)
        layer_list, count_list = ffi.new("int32_t[]", chosen), ffi.new("int32_t[]", list(self.counts) or [0])
        params = ffi.new("kvs_prune_params *")
        params.struct_size = ffi.sizeof("kvs_prune_params")
        params.keep, params.times, params.force_step = self.keep, self.times, self.force_step
        params.reference, params.scope = _REFERENCES[self.reference], _SCOPES[self.index_scope]
        params.vote_fraction, params.vote_at_least = self.vote_fraction, not self.vote_strict
        params.reduction_max = self.reduction == "max"
        params.per_image_quota, params.reversible = self.per_image_quota, self.reversible
        params.n_top_k, params.top_k = len(self.counts), count_list
        params.n_layers, params.layers = len(chosen), layer_list
        return params, [layer_list, count_list]

    # ---- presets: hyperparameters that the paper's reviews quote ----

    @classmethod
    def llava15(cls, **changes: Any) -> PruneHal:
        """LLaVA-1.5, 7B and 13B: 576 rows, then 230, 92, 36."""
        return cls(**{"keep": 0.4, "times": 3, **changes})

    @classmethod
    def instructblip(cls, **changes: Any) -> PruneHal:
        """InstructBLIP-7B: 32 rows, then 22, 15."""
        return cls(**{"keep": 0.7, "times": 2, **changes})

    @classmethod
    def qwen_vl(cls, **changes: Any) -> PruneHal:
        """Qwen-VL-7B: 256 rows, then 230, 207, 186, 167."""
        return cls(**{"keep": 0.9, "times": 4, **changes})

    @classmethod
    def for_model(cls, model: Model, **changes: Any) -> PruneHal:
        """What the file asks for: keys prunehal.keep, .times and .layers of its metadata; else the preset that its name speaks of
        (MiniGPT-4 is not in the paper: InstructBLIP's, which has as many rows); else LLaVA-1.5's."""
        name = " ".join(str(model.metadata.get(key, "")) for key in ("general.name", "general.basename")).lower().replace("-", "")
        known = {"instructblip": (0.7, 2), "minigpt4": (0.7, 2), "qwenvl": (0.9, 4)}
        keep, times = next((value for key, value in known.items() if key in name), (0.4, 3))
        found: dict[str, Any] = {"keep": keep, "times": times}
        for key in ("keep", "times", "layers"):
            if f"prunehal.{key}" in model.metadata:
                found[key] = model.metadata[f"prunehal.{key}"]
        return cls(**{**found, **changes})


# The choices of the fields that have them, from their types.
_CHOICES = {name: get_args(kind) for name, kind in get_type_hints(PruneHal).items() if get_origin(kind) is Literal}
