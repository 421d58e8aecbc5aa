"""A policy at many values of its parameters, beside the baseline and the baseline cut short: a precision-recall curve.

The protocol of figure 4 of arXiv 2602.04268: the baseline's curve comes of its first 1, 2, 3, ... sentences, the policy's of its parameter.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from ..policies import kind
from .captioning import Picture, run
from .controls import sentence_ends, truncated
from .errors import EvaluationError
from .score import Comparison, Report, Truth, compare, score

if TYPE_CHECKING:
    from ..model import Model
    from ..policies.stack import Policy

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
    policies: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
    **options: Any,
) -> Sweep:
    """Captions the pictures without a policy and with each setting of grid(), and scores all of it.

    policies: which are on, by name, and what each gets besides, as in {"kvsmooth": {}, "prunehal": {"keep": 0.5}} (default: KVSmooth);
    what nobody says is as the model asks for. progress(name of the setting, done, all); options: of run(), where out= lets an
    interrupted sweep go on.
    """
    fixed = {"kvsmooth": {}} if policies is None else policies
    stacks = [_stack(model, fixed, one) for one in settings]  # so that a bad value is known at once

    def captions(name: str, policy: Policy | Sequence[Policy] | None) -> Any:
        return run(model, pictures, policy=policy, progress=(lambda *at: progress(name, *at)) if progress else None, **options)

    plain = captions("baseline", None)
    baseline = score(plain, truth, parity)
    longest = max(len(sentence_ends(caption.text)) for caption in plain)
    cuts = [(n, score(truncated(plain, n), truth, parity)) for n in range(1, longest + 1)]
    points = []
    for values, policy in zip(settings, stacks, strict=True):
        name = ", ".join(f"{name}={value}" for name, value in values.items())
        report = score(captions(name, policy), truth, parity)
        points.append(Point(dict(values), report, compare(report, baseline)))
    return Sweep(baseline, cuts, points)


def changed(values: Mapping[str, Any], policies: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each of the policies gets: what is given beside the grid, and a setting of grid()."""
    found = {policy: dict(given) for policy, given in policies.items()}
    for key, value in values.items():
        policy, name = _owner(key, policies)
        found[policy][name] = value
    return found


def _stack(model: Model, policies: Mapping[str, Mapping[str, Any]], values: Mapping[str, Any]) -> Policy | list[Policy]:
    made: list[Policy] = [kind(policy).for_model(model, **given) for policy, given in changed(values, policies).items()]
    for policy in made:
        policy.resolve_layers(model.n_layer)
    return made if len(made) > 1 else made[0]


def grid(texts: Sequence[str], policies: Collection[str] = ("kvsmooth",)) -> list[dict[str, Any]]:
    """["lambda_ref=0.5:0.9:0.2", "target=k,v"] -> the product of the values, the last name fastest. first:last:step for numbers holds the
    last value, too, where a step reaches it. With several policies a name says whose it is: "prunehal.keep=0.3:0.9:0.2".
    EvaluationError for what can't be read; whether the policy takes the values is not asked."""
    axes: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals:
            raise EvaluationError(f"{text}: write it as lambda_ref=0.5:0.95:0.05 or target=k,v")
        policy, name = _owner(key.strip(), policies)
        key = f"{policy}.{name}" if len(policies) > 1 else name
        if key in axes:
            raise EvaluationError(f"{key} is there twice")
        axes[key] = _values(policy, name, values)
    product = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(product) > MOST_VALUES:
        raise EvaluationError(f"{len(product)} settings are too many (at most {MOST_VALUES})")
    return product


def _owner(key: str, policies: Collection[str]) -> tuple[str, str]:
    """ "prunehal.keep" -> ("prunehal", "keep"). Where one policy is on, its name may be missing."""
    policy, dot, name = key.rpartition(".")
    if not dot and len(policies) == 1:
        (policy,) = policies
    if policy not in policies:
        what = f"the policy {policy!r} is not on" if dot else f"say whose parameter it is, as in {next(iter(policies), 'kvsmooth')}.NAME"
        raise EvaluationError(f"{key}: {what}; on are {', '.join(policies)}")
    return policy, name


def _values(policy: str, name: str, text: str) -> list[Any]:
    names = [field.name for field in dataclasses.fields(kind(policy))]
    if name not in names:
        raise EvaluationError(f"{policy} has no {name!r}; it has {', '.join(names)}")
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
