"""Layers of the tower and of the language model for training: the arithmetic of transformers' modules on the modules' own weights.

Residuals and norms are float32, products of matrices are in the compute type. Attention is written out, because torch's fused one has a
backward pass that is several times slower on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def compute_type(device: torch.device) -> torch.dtype:
    """bfloat16 where the machine multiplies it in hardware, else float32."""
    if device.type == "cpu":
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def heads(x: Tensor, n: int) -> Tensor:
    """(batch, rows, width) to (batch, n, rows, width / n)."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, heads, rows, size) each; mask is added to the scores. Returns (batch, rows, width)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


def tower_block(x: Tensor, layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A CLIPEncoderLayer. x: (batch, rows, width) float32."""
    own = layer.self_attn
    h = layer_norm(x, layer.layer_norm1).to(dtype)
    q, k, v = (heads(linear(h, part), own.num_heads) for part in (own.q_proj, own.k_proj, own.v_proj))
    x = x + linear(attend(q, k, v, None), own.out_proj)
    h = linear(layer_norm(x, layer.layer_norm2).to(dtype), layer.mlp.fc1)
    return x + linear(h * torch.sigmoid(1.702 * h), layer.mlp.fc2)


def rms_norm(x: Tensor, norm: nn.Module, dtype: torch.dtype) -> Tensor:
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight).to(dtype)


def rotations(n: int, size: int, base: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary angles, (n, 1, size / 2) each: a row of the text by a pair of a head."""
    frequencies = base ** (-torch.arange(0, size, 2, device=device) / size)
    angles = torch.arange(n, device=device)[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """x: (batch, rows, heads, size); pairs are an entry of the first half and one of the second, as transformers keeps them."""
    cos, sin = turn
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def joined(x: Tensor, *layers: nn.Linear) -> Tensor:
    """One product for several layers without bias that read the same rows."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]).to(x.dtype))


def text_block(x: Tensor, layer: nn.Module, n_head: int, turn: tuple[Tensor, Tensor], mask: Tensor, first: int) -> Tensor:
    """A LlamaDecoderLayer. x: (batch, rows, width) float32; returns rows first.. of its output: in the last layer few are needed."""
    dtype, own = mask.dtype, layer.self_attn
    h = rms_norm(x, layer.input_layernorm, dtype)
    q, k, v = joined(h, own.q_proj, own.k_proj, own.v_proj).unflatten(-1, (3 * n_head, -1)).split(n_head, 2)
    q, k = rotate(q, turn)[:, first:], rotate(k, turn)
    x = x[:, first:] + linear(attend(*(part.transpose(1, 2) for part in (q, k, v)), mask[first:]), own.o_proj)
    gate, up = joined(rms_norm(x, layer.post_attention_layernorm, dtype), layer.mlp.gate_proj, layer.mlp.up_proj).chunk(2, -1)
    return x + linear(F.silu(gate) * up, layer.mlp.down_proj)
