"""The policies of one session together: which they are, in which order they act, and what they need of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import PolicyError
from .dscr import DSCR
from .kvsmooth import KVSmooth
from .prunehal import PruneHal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..model import Model

Policy: TypeAlias = DSCR | KVSmooth | PruneHal
ORDER: tuple[type[Policy], ...] = (DSCR, KVSmooth, PruneHal)  # in which they act


class Stack:
    """policy= of the public functions: None, one policy, or a list of them in any order; each method at most once.

    Raises TypeError for anything else, PolicyError for policies that exclude each other.
    """

    def __init__(self, policy: Policy | Sequence[Policy] | None) -> None:
        given: list[Any] = [] if policy is None else list(policy) if isinstance(policy, (list, tuple)) else [policy]
        for one in given:
            if not isinstance(one, ORDER):
                names = ", ".join(kind.__name__ for kind in ORDER)
                raise TypeError(f"policy must be None, one of {names}, or a list of them, not {type(policy).__name__}")
        for kind in ORDER:
            if sum(isinstance(one, kind) for one in given) > 1:
                raise PolicyError(f"policy: two {kind.__name__} policies in one session exclude each other; give one")
        self.policies: tuple[Policy, ...] = tuple(sorted(given, key=lambda one: ORDER.index(type(one))))

    def find(self, kind: type[Any]) -> Any:
        """The policy of this kind, or None."""
        return next((one for one in self.policies if isinstance(one, kind)), None)

    @cached_property
    def kvsmooth(self) -> KVSmooth | None:
        found: KVSmooth | None = self.find(KVSmooth)
        return found

    @cached_property
    def dscr(self) -> DSCR | None:
        found: DSCR | None = self.find(DSCR)
        return found

    @cached_property
    def prunehal(self) -> PruneHal | None:
        found: PruneHal | None = self.find(PruneHal)
        return found

    @property
    def as_given(self) -> Policy | tuple[Policy, ...] | None:
        """None, the one policy, or the tuple of several."""
        return self.policies if len(self.policies) > 1 else self.policies[0] if self.policies else None

    def to_native(self, model: Model, params: Any) -> list[Any]:
        """Fills kvs_session_params; returns what must be kept alive beside it. PolicyError for what this model does not have."""
        keep: list[Any] = []
        if self.dscr:
            dscr, kept = self.dscr.to_native(model)
            params.dscr = dscr
            keep += [dscr, kept]
        if self.kvsmooth:
            smooth, lists = self.kvsmooth.to_native(model.n_layer, model.n_vocab)
            params.smooth = smooth
            keep += [smooth, lists]
        if self.prunehal:
            prune, lists = self.prunehal.to_native(model.n_layer)
            params.prune = prune
            keep += [prune, lists]
        return keep

    def telemetry_layers(self, n_layer: int) -> list[int]:
        """The layers over which a token's entropy and strength are means."""
        return self.kvsmooth.resolve_layers(n_layer) if self.kvsmooth else list(range(n_layer))

    def depth_of(self, model: Model, index: int, mode: str) -> Callable[[Any], NDArray[np.float32] | None] | None:
        """What gives the depth of each patch of picture index of a timeline from the PIL picture; None if no policy asks for it.
        PolicyError where depth= has no map for that picture."""
        dscr = self.dscr
        if dscr is None:
            return None
        source = dscr.source(index)
        return lambda picture: dscr.patch_depth(model, source, picture, mode)

    def reusable(self, n_past: int, first_generated: int, first_picture: int, prompt_end: int, new_rows: int, whole: int) -> int:
        """How many of a timeline's n_past rows a new prompt of new_rows rows may keep, as far as policies go: no row that one changed,
        but for pictures refined before anything looked at them: these come out the same again.
        first_generated, first_picture: rows of the first generated token and picture, n_past without one; prompt_end: of the first row
        at which a prompt ended; whole: rows before the first one that pruning dropped for good, n_past without one."""
        if not self.policies:
            return n_past
        limit = min(first_generated, whole)
        if self.dscr and self.dscr.touches_prompt and prompt_end < n_past:
            limit = min(limit, first_picture)
        if self.kvsmooth and self.kvsmooth.touches_prompt:
            limit = min(limit, prompt_end, new_rows - self.kvsmooth.warm_rows)
        return limit
