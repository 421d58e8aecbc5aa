"""layers= of the policies: a Python slice as text, or a list of ints."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..checks import integers, shown
from ..errors import PolicyError


def as_slice(policy: str, text: str) -> slice:
    parts = text.split(":")
    if not 2 <= len(parts) <= 3 or not all(re.fullmatch(r"\s*(-?[0-9]{1,18})?\s*", part) for part in parts):
        raise ValueError(f'{policy}: layers {shown(text)} is not a Python slice such as "3:-1"; give a slice or a list of layers')
    numbers = [int(part) if part.strip() else None for part in parts]
    if len(numbers) == 3 and numbers[2] == 0:
        raise ValueError(f"{policy}: layers {text!r}: the step of a slice can't be 0")
    return slice(*numbers)


def check(policy: str, layers: str | Sequence[int]) -> str | tuple[int, ...]:
    """The same, known to be a slice or a tuple. TypeError, ValueError."""
    if isinstance(layers, str):
        as_slice(policy, layers)
        return layers
    return tuple(integers(f"{policy}: layers", layers))


def resolve(policy: str, layers: str | Sequence[int], n_layer: int) -> list[int]:
    """0-based numbers for a model of this depth, rising. PolicyError if none is left or one is out of range."""
    if isinstance(layers, str):
        chosen = sorted(range(n_layer)[as_slice(policy, layers)])
    else:
        for i in layers:
            if not -n_layer <= i < n_layer:
                raise PolicyError(f"{policy}: layers: {shown(i)} is out of range; the model has {n_layer} layers, 0..{n_layer - 1}")
        chosen = sorted({i % n_layer for i in layers})
    if not chosen:
        raise PolicyError(
            f"{policy}: layers {layers!r} selects none of the model's {n_layer} layers; "
            f"give another slice or a list, or take {policy}.for_model(model)"
        )
    return chosen
