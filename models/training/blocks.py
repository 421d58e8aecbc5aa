"""Layers of the tower and of the language model for training: the arithmetic of transformers' modules on the modules' own weights.

Residuals and norms are float32, products of matrices are in the compute type. Attention is written out, because torch's fused one has a
backward pass that is several times slower on a CPU. Factors that act on columns are taken into the weights, which are smaller than rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import Turn, gated, heads, normed

QUICK = 1.702  # quick-GELU of x is silu(QUICK x) / QUICK


def compute_type(device: torch.device) -> torch.dtype:
    """bfloat16 where the machine multiplies it in hardware, else float32."""
    if device.type == "cpu":
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def linear(x: Tensor, layer: nn.Linear, factor: float = 1.0) -> Tensor:
    """factor times the layer's product, plus its bias."""
    return F.linear(x, (layer.weight * factor).to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def joined(x: Tensor, layers: list[nn.Linear], norm: nn.Module | None = None) -> Tensor:
    """One product for layers that read the same rows, which norm's weight still has to scale."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers]).to(x.dtype)
    return F.linear(x, (weight if norm is None else weight * norm.weight).to(x.dtype), bias)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(batch, heads, rows, size) each, q scaled; mask is added to the scores. Returns (batch, rows, width)."""
    scores = q @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def tower_block(x: Tensor, layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A CLIPEncoderLayer. x: (batch, rows, width) float32."""
    own, mlp = layer.self_attn, layer.mlp
    qkv = joined(layer_norm(x, layer.layer_norm1).to(dtype), [own.q_proj, own.k_proj, own.v_proj])
    x = x + linear(attend(*heads(qkv, own.num_heads)), own.out_proj)
    h = layer_norm(x, layer.layer_norm2).to(dtype)
    inner = F.linear(h, (mlp.fc1.weight * QUICK).to(dtype), (mlp.fc1.bias * QUICK).to(dtype))
    return x + linear(F.silu(inner), mlp.fc2, 1 / QUICK)


def rms_norm(x: Tensor, norm: nn.Module, dtype: torch.dtype) -> Tensor:
    return normed(x, norm.variance_epsilon, dtype) * norm.weight.to(dtype)


def rotations(n: int, size: int, base: float, device: torch.device, dtype: torch.dtype) -> Turn:
    """Cosines and sines of rotary angles, (n, size / 2) each: a row of the text by a pair of a head."""
    frequencies = base ** (-torch.arange(0, size, 2, device=device) / size)
    angles = torch.arange(n, device=device)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def text_block(x: Tensor, layer: nn.Module, n_head: int, turn: Turn, mask: Tensor, first: int) -> Tensor:
    """A LlamaDecoderLayer. x: (batch, rows, width) float32; returns rows first.. of its output: in the last layer few are needed."""
    dtype, own, mlp = mask.dtype, layer.self_attn, layer.mlp
    h = normed(x, layer.input_layernorm.variance_epsilon, dtype)
    q, k, v = heads(joined(h, [own.q_proj, own.k_proj, own.v_proj], layer.input_layernorm), n_head, turn)
    x = x[:, first:] + linear(attend(q[:, :, first:], k, v, mask[first:]), own.o_proj)
    h = normed(x, layer.post_attention_layernorm.variance_epsilon, dtype)
    return x + linear(gated(joined(h, [mlp.gate_proj, mlp.up_proj], layer.post_attention_layernorm)), mlp.down_proj)
