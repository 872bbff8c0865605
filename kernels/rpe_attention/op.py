"""The fused backends as one PyTorch operator: shapes without data, gradients, no break of a compiled graph.

`sar_foundation::rpe_attention` takes the packed projection and gives the output and, for the backward pass, one number
per row (the logarithm of the sum of exponentials). A fused backend is a module with `forward` and `backward`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kernels.rpe_attention.layout import Layout

FUSED = {"triton": "kernels.rpe_attention.fused", "cuda": "kernels.rpe_attention.handwritten"}


@torch.library.custom_op("sar_foundation::rpe_attention", mutates_args=())
def _forward(
    qkv: Tensor,
    table: Tensor,
    height: int,
    width: int,
    cls_tokens: int,
    method: str,
    ratio: float,
    qk_scale: float,
    rpe_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    layout = Layout((height, width), cls_tokens, method, ratio)
    return import_module(FUSED[backend]).forward(qkv, table, layout, qk_scale, rpe_scale)


@_forward.register_fake
def _(qkv: Tensor, table: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, dim = qkv.shape
    return qkv.new_empty(batch, length, heads, dim), qkv.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("sar_foundation::rpe_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    height: int,
    width: int,
    cls_tokens: int,
    method: str,
    ratio: float,
    qk_scale: float,
    rpe_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    layout = Layout((height, width), cls_tokens, method, ratio)
    return import_module(FUSED[backend]).backward(grad, qkv, table, out, lse, layout, qk_scale, rpe_scale)


@_backward.register_fake
def _(grad: Tensor, qkv: Tensor, table: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), table.new_empty(
        table.shape, dtype=torch.float32
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, table, *ctx.rest = inputs
    ctx.save_for_backward(qkv, table, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * (2 + len(ctx.rest))
    qkv, table, out, lse = ctx.saved_tensors
    d_qkv, d_table = _backward(grad, qkv, table, out, lse, *ctx.rest)
    return d_qkv, d_table.to(table.dtype), *(None,) * len(ctx.rest)


_forward.register_autograd(_gradients, setup_context=_keep)


OPERATOR = torch.ops.sar_foundation.rpe_attention.default
"""What selective checkpointing keeps the result of."""


def run_fused(qkv: Tensor, table: Tensor, layout: Layout, qk_scale: float, rpe_scale: float, backend: str) -> Tensor:
    """Attention output [B, L, H, d] of the packed projection qkv [B, L, 3, H, d] by a fused backend."""
    (height, width), *rest = layout
    return _forward(qkv, table, height, width, *rest, qk_scale, rpe_scale, backend)[0]


def pack_and_run(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: Layout, qk_scale: float, rpe_scale: float, backend: str
) -> Tensor:
    """`run_fused` of separate q, k, v [B, H, L, d], which are copied into one buffer: [B, H, L, d]."""
    packed = torch.stack((q, k, v), 2).permute(0, 3, 2, 1, 4)
    return run_fused(packed, table, layout, qk_scale, rpe_scale, backend).transpose(1, 2)
