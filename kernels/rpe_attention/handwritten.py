"""The hand-written CUDA kernel of short windows (`cuda.py`, `csrc/`) behind the operator: which calls it takes."""

from __future__ import annotations

import os
import shutil

import torch
from torch import Tensor

from kernels.rpe_attention.building import PREBUILT
from kernels.rpe_attention.fused import blocks
from kernels.rpe_attention.layout import Layout, Problem

MAX_LENGTH = 64
HEADS = (32, 64)
_HOME = os.environ.get("CUDA_HOME") or None
BUILT = PREBUILT.exists() or bool(shutil.which("nvcc", path=_HOME and f"{_HOME}/bin"))
"""The library is there, or a compiler that makes it on first use."""


def cuda_refuses(problem: Problem) -> str:
    """Why the CUDA kernel does not take a call; '' when it does."""
    layout = problem.layout
    if problem.device != "cuda":
        return f"it runs on cuda, not {problem.device}"
    if not BUILT:
        return "it is not built and there is no nvcc: set CUDA_HOME, python -m kernels.rpe_attention.building build"
    if problem.dtype != torch.bfloat16:
        return f"dtype {problem.dtype}: bfloat16 is allowed"
    if problem.bias != "contextual":
        return "it takes a contextual table [1 or H, d, columns] only"
    if problem.head_dim not in HEADS:
        return f"head size {problem.head_dim}: {' and '.join(map(str, HEADS))} are allowed"
    if layout.length > MAX_LENGTH:
        return f"{layout.length} tokens: at most {MAX_LENGTH} are allowed"
    if layout.method != "product" or int(2 * layout.ratio) != 3:
        return f"method {layout.method} with ratio {layout.ratio}: product with 7 x 7 buckets is allowed"
    return ""


def _thresholds(layout: Layout) -> tuple[int, int, int]:
    """Distances at which the indices 1, 2, 3 begin."""
    steps = blocks(layout).STEPS
    return steps & 255, (steps >> 8) & 255, (steps >> 16) & 255


def forward(qkv: Tensor, table: Tensor, layout: Layout, qk_scale: float, rpe_scale: float) -> tuple[Tensor, Tensor]:
    """qkv bf16 [B, L, 3, H, d], table [1 or H, d, columns] → out [B, L, H, d], lse fp32 [B, H, L]."""
    from kernels.rpe_attention import cuda

    batch, length, _, heads, dim = qkv.shape
    if not batch:
        return qkv.new_empty(0, length, heads, dim), qkv.new_empty(0, heads, length, dtype=torch.float32)
    return cuda.forward(qkv, table.float(), layout.grid, layout.cls_tokens, _thresholds(layout), qk_scale, rpe_scale)


def backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    qk_scale: float,
    rpe_scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv, contiguous in its dtype, and of the table, fp32 in its shape; the same bits in every run."""
    from kernels.rpe_attention import cuda

    if not len(qkv):
        return qkv.new_empty(qkv.shape), torch.zeros_like(table, dtype=torch.float32)
    place = layout.grid, layout.cls_tokens, _thresholds(layout)
    return cuda.backward(grad, qkv, table.float(), out, lse, *place, qk_scale, rpe_scale)
