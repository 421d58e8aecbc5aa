"""KVSmooth (arXiv 2602.04268) as a policy of a session: its parameters, checked, and their native form.

After the attention of a smoothed layer the newest K and V rows are mixed with the rows before them,
K_t <- (1 - l) K_t + l K_{t-1} (eq. 15), with a strength l that is the rank of this token's row entropy (eq. 5) among the last
`window` ones (eq. 13), kept within lambda_ref +- half_width (eq. 14).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from .._native import ffi, lib
from ..checks import choice, integer, integers, real, shown
from ..errors import PolicyError
from . import layers
from .parameters import Parameters

if TYPE_CHECKING:
    from ..model import Model

_TARGETS = {"kv": lib.KVS_TARGET_K | lib.KVS_TARGET_V, "k": lib.KVS_TARGET_K, "v": lib.KVS_TARGET_V, "o": lib.KVS_TARGET_O}
MAX_WINDOW = 1024


def _warm_rows(value: Any) -> int:
    """Prompt rows whose entropies enter the queue before the first generated token."""
    if value == "none":
        return 0
    if value == "last_prompt_row":
        return 1
    match = re.fullmatch(r"prompt_rows\(([0-9]{1,18})\)", value) if isinstance(value, str) else None
    if match:
        return int(match[1])
    if isinstance(value, (tuple, list)) and len(value) == 2 and value[0] == "prompt_rows":
        return integer("KVSmooth: warm_start", value[1])
    raise ValueError(f'KVSmooth: warm_start must be "none", "last_prompt_row" or ("prompt_rows", n), not {shown(value)}')


@dataclass(frozen=True, kw_only=True, repr=False)
class KVSmooth(Parameters):
    """Parameters of KVSmooth. Instances are immutable, compare by value, and belong to no model until a session is made.

    lambda_ref, half_width, lambda_max: the window of strengths is [lambda_ref - half_width, lambda_ref + half_width], cut to
    [0, lambda_max]. window: entropies in the queue (the paper's M). layers: a Python slice as text ("3:-1") or a list of ints,
    negative as in Python. mode "fixed": lambda_fixed is the strength, as it is. lambda_den: the rank is divided by the entries
    in the queue ("fill") or by window ("capacity"). rope_mode "relative": the previous key is turned by one position first.
    target: which rows are mixed; "o" is the attention output. first_token "skip": the first answer token is not mixed with the
    prompt. warm_start: "none", "last_prompt_row" or ("prompt_rows", n). smooth_prompt "last_token": that row is smoothed, too.
    entropy_norm "log_len": entropies are divided by ln(rows). entropy_heads "per_kv_group": a strength per KV head.
    entropy_include_self=False leaves the newest key out. rank_ties "midrank": equal entropies count one half. queue_scope
    "session": the queue outlives a turn. ema "one_step": the previous row enters as it was before its own smoothing. mix "damp":
    rows are scaled by 1 - l and nothing is mixed in, an ablation of ours. skip_token_ids: tokens that are never smoothed.

    Raises TypeError and ValueError; layers and skip_token_ids are compared with the model (PolicyError) when a session is made.
    """

    lambda_ref: float = 0.9
    window: int = 15
    half_width: float = 0.2
    layers: str | Sequence[int] = "3:-1"
    mode: Literal["adaptive", "fixed"] = "adaptive"
    lambda_fixed: float | None = None
    lambda_den: Literal["fill", "capacity"] = "fill"
    lambda_max: float = 1.0
    rope_mode: Literal["post", "relative"] = "post"
    target: Literal["kv", "k", "v", "o"] = "kv"
    first_token: Literal["mix_with_prompt", "skip"] = "mix_with_prompt"
    warm_start: str | tuple[str, int] = "none"
    smooth_prompt: Literal["off", "last_token"] = "off"
    entropy_norm: Literal["none", "log_len"] = "none"
    entropy_heads: Literal["all", "per_kv_group"] = "all"
    entropy_include_self: bool = True
    rank_ties: Literal["strict", "midrank"] = "strict"
    queue_scope: Literal["turn", "session"] = "turn"
    ema: Literal["recursive", "one_step"] = "recursive"
    mix: Literal["ema", "damp"] = "ema"
    skip_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            choice(f"KVSmooth: {name}", getattr(self, name), choices)
        for name in ("lambda_ref", "half_width", "lambda_max"):
            self._set(name, real(f"KVSmooth: {name}", getattr(self, name), 0.0, 1.0))
        self._check_mode()
        self._set("window", integer("KVSmooth: window", self.window, 1, MAX_WINDOW))
        integer(f"KVSmooth: warm_start, with window={self.window},", _warm_rows(self.warm_start), 0, self.window)
        if not isinstance(self.entropy_include_self, (bool, np.bool_)):
            raise TypeError(f"KVSmooth: entropy_include_self must be True or False, not {type(self.entropy_include_self).__name__}")
        self._set("entropy_include_self", bool(self.entropy_include_self))
        if isinstance(self.warm_start, list):
            self._set("warm_start", tuple(self.warm_start))
        self._set("skip_token_ids", tuple(integers("KVSmooth: skip_token_ids", self.skip_token_ids)))
        self._set("layers", layers.check("KVSmooth", self.layers))
        self._check_pairs()

    def _check_mode(self) -> None:
        if self.mode == "fixed" and self.lambda_fixed is None:
            raise ValueError('KVSmooth: mode="fixed" needs lambda_fixed')
        if self.mode == "adaptive" and self.lambda_fixed is not None:
            raise ValueError('KVSmooth: lambda_fixed needs mode="fixed"')
        if self.lambda_fixed is not None:
            self._set("lambda_fixed", real("KVSmooth: lambda_fixed", self.lambda_fixed, 0.0, 1.0))

    def _check_pairs(self) -> None:
        if self.target == "o" and self.smooth_prompt != "off":
            raise ValueError('KVSmooth: target="o" and smooth_prompt exclude each other: the output of the last prompt row is used already')
        if self.target == "o" and self.entropy_heads != "all":
            raise ValueError('KVSmooth: entropy_heads="per_kv_group" is for targets k and v: an output mixes all heads')

    @property
    def warm_rows(self) -> int:
        """So many last prompt rows put their entropies into the queue."""
        return _warm_rows(self.warm_start)

    @property
    def touches_prompt(self) -> bool:
        """Does the end of a prompt leave a mark on its last rows?"""
        return self.warm_rows > 0 or self.smooth_prompt != "off"

    def resolve_layers(self, n_layer: int) -> list[int]:
        """The layers as 0-based numbers for a model of this depth, rising. PolicyError if none is left or one is out of range."""
        return layers.resolve("KVSmooth", self.layers, n_layer)

    def to_native(self, n_layer: int, n_vocab: int) -> tuple[Any, list[Any]]:
        """(kvs_smooth_params *, what must be kept alive beside it). PolicyError for what a model of this size does not have."""
        chosen = self.resolve_layers(n_layer)
        for i in self.skip_token_ids:
            if not 0 <= i < n_vocab:
                raise PolicyError(f"KVSmooth: skip_token_ids: {shown(i)} is out of range; the model has {n_vocab} tokens, 0..{n_vocab - 1}")
        layer_list = ffi.new("int32_t[]", chosen)
        skip_list = ffi.new("int32_t[]", list(self.skip_token_ids) or [0])
        params = ffi.new("kvs_smooth_params *")
        params.struct_size = ffi.sizeof("kvs_smooth_params")
        params.lambda_ref, params.half_width, params.lambda_max = self.lambda_ref, self.half_width, self.lambda_max
        params.lambda_fixed = math.nan if self.lambda_fixed is None else self.lambda_fixed
        params.window = self.window
        params.target = _TARGETS[self.target]
        params.den_capacity = self.lambda_den == "capacity"
        params.rope_relative = self.rope_mode == "relative"
        params.skip_first = self.first_token == "skip"
        params.warm_start = self.warm_rows
        params.smooth_last_prompt = self.smooth_prompt == "last_token"
        params.norm_log_len = self.entropy_norm == "log_len"
        params.per_kv_head = self.entropy_heads == "per_kv_group"
        params.exclude_self = not self.entropy_include_self
        params.midrank = self.rank_ties == "midrank"
        params.scope_session = self.queue_scope == "session"
        params.ema_one_step = self.ema == "one_step"
        params.damp = self.mix == "damp"
        params.n_layers, params.layers = len(chosen), layer_list
        params.n_skip_ids, params.skip_ids = len(self.skip_token_ids), skip_list
        return params, [layer_list, skip_list]

    # ---- presets: table of section 5.1 of the paper ----

    @classmethod
    def llava15(cls, **changes: Any) -> KVSmooth:
        """The paper's setting for LLaVA-1.5: lambda_ref 0.9."""
        return cls(**{"lambda_ref": 0.9, **changes})

    @classmethod
    def minigpt4(cls, **changes: Any) -> KVSmooth:
        """The paper's setting for MiniGPT-4: lambda_ref 0.5."""
        return cls(**{"lambda_ref": 0.5, **changes})

    @classmethod
    def instructblip(cls, **changes: Any) -> KVSmooth:
        """The paper's setting for InstructBLIP: lambda_ref 0.7."""
        return cls(**{"lambda_ref": 0.7, **changes})

    @classmethod
    def for_model(cls, model: Model, **changes: Any) -> KVSmooth:
        """What the file asks for: keys kvsmooth.lambda_ref, .half_width, .window, .layers and .target of its metadata; else the preset that
        its name speaks of; else LLaVA-1.5's. Models of less than eight layers are too shallow for "3:-1": there the first
        3/32 of the layers, rounded, and the last one are left out."""
        name = " ".join(str(model.metadata.get(key, "")) for key in ("general.name", "general.basename")).lower().replace("-", "")
        known = {"minigpt4": 0.5, "instructblip": 0.7}
        found: dict[str, Any] = {"lambda_ref": next((value for key, value in known.items() if key in name), 0.9)}
        if model.n_layer < 8:
            found["layers"] = f"{round(3 * model.n_layer / 32)}:{max(1, model.n_layer - 1)}"
        for key in ("lambda_ref", "half_width", "window", "layers", "target"):
            if f"kvsmooth.{key}" in model.metadata:
                found[key] = model.metadata[f"kvsmooth.{key}"]
        return cls(**{**found, **changes})


# The choices of the fields that have them, from their types.
_CHOICES = {name: get_args(kind) for name, kind in get_type_hints(KVSmooth).items() if get_origin(kind) is Literal}
