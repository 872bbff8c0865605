"""PyTorch's FlexAttention: the products of queries and table are captured, and looked up inside its kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from kernels.rpe_attention.layout import Layout, Problem, bias_kind


def flex_refuses(problem: Problem) -> str:
    """Why FlexAttention does not take a call; '' when it does."""
    if problem.device == "cpu" and problem.trains:
        return "FlexAttention has no backward on a cpu"
    if problem.head_dim & (problem.head_dim - 1):
        return f"head size {problem.head_dim}: powers of two are allowed"
    if problem.dtype == torch.float64 and problem.device == "cuda":
        return "dtype torch.float64: float16, bfloat16 and float32 are allowed"
    return ""


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def flex(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, layout: Layout, qk_scale: float, rpe_scale: float
) -> Tensor:
    """Attention output [B, H, L, d]. The gradient of the table passes through captured products, added atomically."""
    inside = not q.is_cuda or torch.compiler.is_compiling()  # a CPU evaluates it as it stands: compiling takes 24 s
    call: Any = flex_attention if inside else _compiled()
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if table is None:
        return call(q, k, v, scale=qk_scale)
    ids = layout.ids(q.device).to(torch.int32)
    table = table.to(q.dtype) * rpe_scale
    if bias_kind(table) == "contextual":
        columns = torch.matmul(q, table)  # [B, H, L, columns]
    else:
        columns = table[None, :, None].expand(q.shape[0], q.shape[1], q.shape[2], -1).contiguous()
    # A tensor that takes a gradient may be looked up once: each look-up of the method gets a tensor of its own.
    width = layout.columns // len(ids)
    parts = [part.contiguous() for part in columns.split(width, -1)]
    places = [place - slot * width for slot, place in enumerate(ids)]

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        for part, place in zip(parts, places, strict=True):
            score = score + part[b, h, i, place[i, j]]
        return score

    return call(q, k, v, score_mod=biased, scale=qk_scale)
