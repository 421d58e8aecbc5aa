"""A policy at many values of its parameters, beside the baseline and the baseline cut short: a precision-recall curve.

The protocol of figure 4 of arXiv 2602.04268: the baseline's curve comes of its first 1, 2, 3, ... sentences, the policy's of its parameter.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from .captioning import Picture, run
from .controls import sentence_ends, truncated
from .errors import EvaluationError
from .score import Comparison, Report, Truth, compare, score

if TYPE_CHECKING:
    from ..model import Model

MOST_VALUES = 1000


@dataclass(frozen=True)
class Point:
    """One setting of the policy and what it gives. change: against the baseline, on the same pictures."""

    values: dict[str, Any]
    report: Report
    change: Comparison

    @property
    def name(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.values.items())


@dataclass(frozen=True)
class Sweep:
    """cuts: (sentences kept, report) of the baseline's captions, 1 to all. points: in the order of the grid."""

    baseline: Report
    cuts: list[tuple[int, Report]]
    points: list[Point]


def sweep(
    model: Model,
    pictures: Sequence[Picture],
    truth: Truth,
    settings: Sequence[Mapping[str, Any]],
    *,
    parity: bool = False,
    progress: Callable[[str, int, int], Any] | None = None,
    **options: Any,
) -> Sweep:
    """Captions the pictures without a policy and with KVSmooth.for_model(model, **s) for each s in settings, and scores all of it.

    progress(name of the setting, done, all); options: of run(), where out= lets an interrupted sweep go on.
    """
    from ..policies.kvsmooth import KVSmooth

    policies = [KVSmooth.for_model(model, **one) for one in settings]  # so that a bad value is known at once
    for policy in policies:
        policy.resolve_layers(model.n_layer)

    def captions(name: str, policy: KVSmooth | None) -> Any:
        return run(model, pictures, policy=policy, progress=(lambda *at: progress(name, *at)) if progress else None, **options)

    plain = captions("baseline", None)
    baseline = score(plain, truth, parity)
    longest = max(len(sentence_ends(caption.text)) for caption in plain)
    cuts = [(n, score(truncated(plain, n), truth, parity)) for n in range(1, longest + 1)]
    points = []
    for values, policy in zip(settings, policies, strict=True):
        name = ", ".join(f"{name}={value}" for name, value in values.items())
        report = score(captions(name, policy), truth, parity)
        points.append(Point(dict(values), report, compare(report, baseline)))
    return Sweep(baseline, cuts, points)


def grid(texts: Sequence[str]) -> list[dict[str, Any]]:
    """["lambda_ref=0.5:0.9:0.2", "target=k,v"] -> the product of the values, the last name fastest. first:last:step for numbers holds the
    last value, too, where a step reaches it. EvaluationError for what can't be read; whether KVSmooth takes the values is not asked."""
    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("kvsmooth.")
        if not equals or not name.isidentifier():
            raise EvaluationError(f"{text}: write it as lambda_ref=0.5:0.95:0.05 or target=k,v")
        if name in axes:
            raise EvaluationError(f"{name} is there twice")
        axes[name] = _values(name, values)
    product = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(product) > MOST_VALUES:
        raise EvaluationError(f"{len(product)} settings are too many (at most {MOST_VALUES})")
    return product


def _values(name: str, text: str) -> list[Any]:
    from ..policies.kvsmooth import KVSmooth

    field = {field.name: field for field in dataclasses.fields(KVSmooth)}.get(name)
    if field is None:
        raise EvaluationError(f"kvsmooth has no {name!r}; it has {', '.join(f.name for f in dataclasses.fields(KVSmooth))}")
    parts = text.split(":")
    if name != "layers" and len(parts) == 3:  # layers are slices themselves
        return _range(text, parts)
    values = [_value(part) for part in text.split(",")]
    if "" in values:
        raise EvaluationError(f"{name}={text}: a value is missing")
    return values


def _range(text: str, parts: list[str]) -> list[float]:
    """In decimal, so that 0.5:0.95:0.05 ends at 0.95 and has no 0.6500000000000001."""
    try:
        first, last, step = (Decimal(part) for part in parts)
        if not step.is_finite() or step <= 0 or not first <= last or (last - first) / step >= MOST_VALUES:
            raise InvalidOperation
    except InvalidOperation:
        raise EvaluationError(f"{text}: a range is first:last:step, rising, of at most {MOST_VALUES} values") from None
    count = int((last - first) / step) + 1
    return [float(first + i * step) for i in range(count)]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text.strip()
