"""DSCR (ICLR 2026, openreview FHTt9ipAra) as a policy of a session: its parameters, checked, their native form, and the depth of a picture.

K and V of a picture's patches become weighted sums of those of its other patches, k_j <- (1 - gamma) k_j + gamma sum_i w_ij k_i, V
likewise. w_ij comes from proximity in depth, f_d = exp(-(d_i - d_j)^2 / 2 sigma_d^2), and in the plane, f_s = exp(-|s_i - s_j|^2 /
2 sigma_s^2): f_d^alpha + f_s^beta (the paper) or f_d^alpha f_s^beta, the diagonal 0, each column divided by its sum.

Without depth f_d is 1 everywhere, exactly as with a depth that is the same everywhere: the spatial term alone decides, over the uniform
floor that the paper's sum then has.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from .. import depth as maps
from .._native import ffi, lib
from ..checks import choice, integer, real, shown
from ..errors import ImageError, PolicyError
from . import layers
from .parameters import Parameters

if TYPE_CHECKING:
    from PIL import Image

    from ..limits import Limits
    from ..model import Model

DepthSource = str | os.PathLike[str] | NDArray[Any] | Callable[[Any], Any]

_TARGETS = {"kv": lib.KVS_TARGET_K | lib.KVS_TARGET_V, "k": lib.KVS_TARGET_K, "v": lib.KVS_TARGET_V}
_KERNELS = {"sum": lib.KVS_DSCR_SUM, "product": lib.KVS_DSCR_PRODUCT}
_PHASES = {
    "before_question": lib.KVS_DSCR_BEFORE_QUESTION,
    "after_prefill": lib.KVS_DSCR_AFTER_PREFILL,
    "in_layer": lib.KVS_DSCR_IN_LAYER,
}
_log = logging.getLogger("pykvsmooth")


class DepthMap:
    """An array given as depth=: checked, read-only, compared by value."""

    def __init__(self, values: Any) -> None:
        self.values = maps.check_map("DSCR: depth", values)
        self.values.flags.writeable = False
        self._digest = hashlib.blake2b(repr(self.values.shape).encode() + self.values.tobytes(), digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DepthMap) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        return f"<array {self.values.shape[0]} x {self.values.shape[1]}, {self._digest.hex()[:12]}>"


@cache
def _say_no_depth() -> None:
    _log.warning("DSCR has no depth: the spatial term alone decides; give depth= a map, a list of maps or OnnxDepth(file)")


@dataclass(frozen=True, kw_only=True, repr=False)
class DSCR(Parameters):
    """Parameters of DSCR. Instances are immutable, compare by value, and belong to no model until a session is made.

    depth: a gray PNG (8 or 16 bits) or .npy file, an array (height, width) of the picture's proportions, a list of these (one for each
    picture of the timeline, in order; None = unknown), or a callable that gets each picture (PIL, upright, RGB) and gives its map, such as
    OnnxDepth; None: the spatial term alone. Near may be large or small, only differences count; invert=True takes 1 / depth, for maps of
    distances where the paper has disparities. depth_norm: "minmax" and "percentile" (2nd to 98th) to [0, 1], "zscore", or "metric", as it
    is. depth_pool: of a patch's pixels. sigma_d, sigma_s, alpha, beta, kernel: see the module. coord_norm: coordinates of patches are
    within [0, 1] ("unit") or [-1, 1] ("signed"), or count patches or pixels. layers: a Python slice as text ("10:") or a list of ints,
    negative as in Python. gamma: blend, 0 changes nothing. rope_mode "pre": keys are mixed without their positions and turned back to them.
    phase: "before_question" (what follows a picture sees it refined), "after_prefill" (once behind the prompt), "in_layer" (before the
    attention of each layer, so that deeper layers change too). mask_padding: padding is neither source nor target; otherwise it is a
    surface as far as the least value of the map. grid: (width, height) of the patches, where they are no square. cut: as much of a
    column's weight, at most, is left out where weights vanish; a refined row is off by less than 2 cut times the largest row.

    Raises TypeError, ValueError and ImageError (an array that is no depth map); layers and grid are compared with the model
    (PolicyError) when a session is made, maps with their pictures (ImageError) when these are read.
    """

    depth: DepthSource | Sequence[DepthSource | None] | DepthMap | None = None
    sigma_d: float = 0.6
    sigma_s: float = 0.6
    alpha: float = 0.6
    beta: float = 0.8
    layers: str | Sequence[int] = "10:"
    kernel: Literal["sum", "product"] = "sum"
    gamma: float = 1.0
    rope_mode: Literal["post", "pre"] = "post"
    phase: Literal["before_question", "after_prefill", "in_layer"] = "before_question"
    coord_norm: Literal["unit", "signed", "patch", "pixel"] = "unit"
    depth_norm: Literal["minmax", "percentile", "zscore", "metric"] = "minmax"
    target: Literal["kv", "k", "v"] = "kv"
    depth_pool: Literal["mean", "median", "center"] = "mean"
    mask_padding: bool = True
    invert: bool = False
    grid: tuple[int, int] | str | None = None
    cut: float = 1e-6

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            choice(f"DSCR: {name}", getattr(self, name), choices)
        for name in ("sigma_d", "sigma_s"):
            self._set(name, real(f"DSCR: {name}", getattr(self, name), 0.0, open_low=True))
        for name in ("alpha", "beta"):
            self._set(name, real(f"DSCR: {name}", getattr(self, name), 0.0))
        self._set("gamma", real("DSCR: gamma", self.gamma, 0.0, 1.0))
        self._set("cut", real("DSCR: cut", self.cut, 0.0, 0.5))
        for name in ("mask_padding", "invert"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise TypeError(f"DSCR: {name} must be True or False, not {type(getattr(self, name)).__name__}")
            self._set(name, bool(getattr(self, name)))
        self._set("layers", layers.check("DSCR", self.layers))
        self._set("grid", _grid(self.grid))
        self._set("depth", _sources(self.depth))

    @property
    def touches_prompt(self) -> bool:
        """Does the end of a prompt change the pictures in it?"""
        return self.phase == "after_prefill" and self.gamma > 0

    def resolve_layers(self, n_layer: int) -> list[int]:
        """The layers as 0-based numbers for a model of this depth, rising. PolicyError if none is left or one is out of range."""
        return layers.resolve("DSCR", self.layers, n_layer)

    def resolve_grid(self, n_image: int) -> tuple[int, int]:
        """(width, height) of the patches of a picture of n_image rows. PolicyError where they are no square and grid= does not say."""
        if not n_image:
            raise PolicyError("DSCR refines pictures, and this model is text only; load the pair with Model(path, mmproj=...)")
        if self.grid is not None:
            width, height = _grid(self.grid) or (0, 0)
            if width * height != n_image:
                raise PolicyError(f"DSCR: grid {width} x {height} has {width * height} patches, a picture of this model {n_image}")
            return width, height
        side = round(n_image**0.5)
        if side * side != n_image:
            raise PolicyError(f"DSCR: {n_image} rows of a picture are no square of patches; say with grid=(width, height) how they lie")
        return side, side

    def _steps(self, grid: tuple[int, int], size: int) -> list[float]:
        """How far neighbours are apart, across and down."""
        if self.coord_norm in ("unit", "signed"):
            return [(1.0 if self.coord_norm == "unit" else 2.0) / max(n - 1, 1) for n in grid]
        return [1.0 if self.coord_norm == "patch" else size / n for n in grid]

    def to_native(self, model: Model) -> tuple[Any, list[Any]]:
        """(kvs_dscr_params *, what must be kept alive beside it). PolicyError for what this model does not have."""
        grid, chosen = self.resolve_grid(model.n_image), self.resolve_layers(model.n_layer)
        layer_list = ffi.new("int32_t[]", chosen)
        params = ffi.new("kvs_dscr_params *")
        params.struct_size = ffi.sizeof("kvs_dscr_params")
        for name in ("sigma_d", "sigma_s", "alpha", "beta", "gamma", "cut"):
            setattr(params, name, getattr(self, name))
        params.kernel, params.phase, params.target = _KERNELS[self.kernel], _PHASES[self.phase], _TARGETS[self.target]
        params.rope_pre = self.rope_mode == "pre"
        params.grid_w, params.grid_h = grid
        params.step_x, params.step_y = self._steps(grid, int(model._info.image_size))
        params.n_layers, params.layers = len(chosen), layer_list
        if self.depth is None:
            _say_no_depth()
        return params, [layer_list]

    # ---- depth of a picture ----

    def source(self, index: int) -> Any:
        """What depth= says of picture index of a timeline. PolicyError where it says nothing."""
        if isinstance(self.depth, tuple):
            if index >= len(self.depth):
                raise PolicyError(
                    f"DSCR: depth has {len(self.depth)} maps, and this is picture {index + 1} of the timeline; give one for each"
                )
            return self.depth[index]
        if self.depth is None or callable(self.depth) or not index:
            return self.depth
        raise PolicyError(f"DSCR: depth is one map, and this is picture {index + 1} of the timeline; give a list, one for each picture")

    def patch_depth(self, model: Model, source: Any, picture: Image.Image | None, mode: str) -> NDArray[np.float32] | None:
        """(n_image,) float32 of a source of depth, NaN for padding; None where nothing is known and nothing is padding.

        picture: upright RGB, laid on the model's square by mode; None: the map is one of the whole square, and a callable can't give it.
        ImageError for a bad map.
        """
        values = self._map(source, picture, model.limits)
        if picture is None:
            width, height, mode = 1, 1, "stretch"
        else:
            width, height = picture.size
        square = maps.on_square(
            np.zeros((1, 1), np.float32) if values is None else values, width, height, int(model._info.image_size), mode
        )
        padding = np.isnan(square)
        if values is None and (not self.mask_padding or not padding.any()):
            return None
        if not self.mask_padding:
            square[padding] = np.nanmin(square)
        return maps.pool(maps.normalise(square, self.depth_norm), self.resolve_grid(model.n_image), self.depth_pool)

    def _map(self, source: Any, picture: Image.Image | None, limits: Limits) -> NDArray[np.float32] | None:
        """(height, width) of the picture's proportions."""
        if callable(source):
            source = None if picture is None else maps.check_map("depth of the callable", source(picture))
        if source is None:
            return None
        values = source.values if isinstance(source, DepthMap) else maps.read_map(source, limits)
        limits.check_pixels("DSCR: depth", values.shape[1], values.shape[0])
        if picture is not None:
            maps.check_proportions(values, *picture.size)
        return self._inverted(values)

    def _inverted(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        if not self.invert:
            return values
        if values.min() <= 0:
            raise ImageError(f"depth: invert=True takes 1 / depth, and the least value is {values.min():g}; fill the holes first")
        return 1.0 / values

    # ---- presets: docs/methods.md ----

    @classmethod
    def paper(cls, **changes: Any) -> DSCR:
        """What the paper says: the sum of both proximities, full replacement, keys as they are in the cache."""
        return cls(**changes)

    @classmethod
    def bilateral(cls, **changes: Any) -> DSCR:
        """A filter that keeps edges: the product over patches, blended in by 0.3, keys mixed without their positions."""
        return cls(**{"kernel": "product", "coord_norm": "patch", "gamma": 0.3, "rope_mode": "pre", **changes})

    @classmethod
    def for_model(cls, model: Model, **changes: Any) -> DSCR:
        """The paper's setting. Models of up to ten layers are too shallow for "10:": there all but the first quarter is refined."""
        found = {"layers": f"{round(model.n_layer / 4)}:"} if model.n_layer <= 10 else {}
        return cls(**{**found, **changes})


def _grid(grid: Any) -> tuple[int, int] | None:
    """(width, height), or "WIDTHxHEIGHT"."""
    if grid is None:
        return None
    if isinstance(grid, str):
        match = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", grid)
        if not match:
            raise ValueError(f'DSCR: grid must be (width, height) or a text such as "24x24", not {shown(grid)}')
        grid = int(match[1]), int(match[2])
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"DSCR: grid must be (width, height), not {shown(grid)}")
    width, height = (integer("DSCR: grid", n, 1, 4096) for n in grid)
    return width, height


def _sources(depth: Any) -> Any:
    """depth= as None, a source, or a tuple of them."""
    if isinstance(depth, (list, tuple)):
        if depth and all(isinstance(row, (list, tuple, int, float)) for row in depth):
            return DepthMap(depth)  # nested lists of numbers
        return tuple(_source(f"DSCR: depth[{i}]", one) for i, one in enumerate(depth))
    return _source("DSCR: depth", depth)


def _source(name: str, one: Any) -> Any:
    if one is None or callable(one) or isinstance(one, DepthMap):
        return one
    if isinstance(one, (str, os.PathLike)):
        return os.fsdecode(one)
    if hasattr(one, "__array__"):
        return DepthMap(one)
    raise TypeError(f"{name} must be a path, an array, a list of these, or a callable that gives an array, not {type(one).__name__}")


# The choices of the fields that have them, from their types.
_CHOICES = {name: get_args(kind) for name, kind in get_type_hints(DSCR).items() if get_origin(kind) is Literal}
