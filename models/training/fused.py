"""Parts of a layer with a backward pass of their own, which touches each row as few times as it can.

Half of a plain step on a CPU goes into passing over memory between the products of matrices. tests/test_training.py holds each part
against torch's own derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

Turn = tuple[Tensor, Tensor]  # cosines and sines, (rows, size / 2) each


class _Normed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        share = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        y = (x * share).to(dtype)
        ctx.save_for_backward(y, share)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        y, share = ctx.saved_tensors
        along = (g * y).sum(-1, keepdim=True, dtype=share.dtype) / y.shape[-1]
        return torch.addcmul(g, y, along.to(g.dtype), value=-1) * share, None, None


def normed(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x over its root mean square, row by row; the norm's weight is the next product's (blocks.joined)."""
    return _Normed.apply(x, eps, dtype)


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        to_gate, to_up = out.chunk(2, -1)
        torch.mul(F.silu(gate), g, out=to_up)
        torch.ops.aten.silu_backward.grad_input(g * up, gate, grad_input=to_gate)
        return out


def gated(x: Tensor) -> Tensor:
    """silu(gate) * up, where x holds gate and up side by side."""
    return _Gated.apply(x)


def _turn(out: Tensor, x: Tensor, turn: Turn, sign: int) -> None:
    """Pairs are an entry of the first half and one of the second, as transformers keeps them. sign -1 turns back."""
    cos, sin = turn
    (a, b), (to_a, to_b) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin, value=sign)


class _Heads(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, ...]:
        parts = x.unflatten(-1, (3, n, -1)).permute(2, 0, 3, 1, 4)
        out = torch.empty(parts.shape, dtype=x.dtype, device=x.device)
        ctx.turns = _turns(cos, sin, out.shape[-1] ** -0.5)
        for to, part, turn in zip(out, parts, ctx.turns, strict=True):
            _turn(to, part, turn, 1) if isinstance(turn, tuple) else torch.mul(part, turn, out=to)
        return out.unbind(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        batch, n, rows, size = gradients[1].shape
        out = torch.empty((batch, rows, 3, n, size), dtype=gradients[1].dtype, device=gradients[1].device)
        for to, g, turn in zip(out.permute(2, 0, 3, 1, 4), gradients, ctx.turns, strict=True):
            _turn(to, g, turn, -1) if isinstance(turn, tuple) else torch.mul(g, turn, out=to)
        return out.flatten(2), None, None, None


def _turns(cos: Tensor | None, sin: Tensor | None, scale: float) -> list[Turn | float]:
    """What happens to q, k and v."""
    if cos is None or sin is None:
        return [scale, 1.0, 1.0]
    return [(cos * scale, sin * scale), (cos, sin), 1.0]


def heads(x: Tensor, n: int, turn: Turn | None = None) -> tuple[Tensor, ...]:
    """x: (batch, rows, 3 * width), q, k and v side by side. Returns each as (batch, n, rows, width / n), q and k turned by the angles of
    their rows, q over the root of its size."""
    return _Heads.apply(x, n, *(turn or (None, None)))
