"""Attention of other libraries: xformers and FlashAttention, imported when they are asked for."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from kernels.rpe_attention.layout import Layout, Problem
from kernels.rpe_attention.sdpa import _ALIGNED, dense_bias

HALF = (torch.float16, torch.bfloat16)
_MAP_LIMIT = 4097
"""Longest sequence of which xformers gets a whole map: 34 MB per head and window in bf16."""


def _pair_is_broken() -> bool:
    """FlashAttention 4 alone has a package `flash_attn` without what xformers expects in it, and cannot be imported."""
    return find_spec("flash_attn") is not None and find_spec("flash_attn.flash_attn_interface") is None


def xformers_refuses(problem: Problem) -> str:
    """Why xformers does not take a call; '' when it does."""
    if find_spec("xformers") is None:
        return "xformers is not installed: pip install 'sar-foundation[xformers]'"
    if _pair_is_broken():
        return "FlashAttention 4 stands beside xformers, which cannot be imported then; keep one of the two"
    if problem.device != "cuda":
        return f"it runs on cuda, not {problem.device}"
    if problem.dtype not in (*HALF, torch.float32):
        return f"dtype {problem.dtype}: float16, bfloat16 and float32 are allowed"
    if problem.bias != "none" and problem.layout.length > _MAP_LIMIT:
        return f"{problem.layout.length} tokens: a whole map is made of at most {_MAP_LIMIT}"
    return ""


def xformers(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, layout: Layout, qk_scale: float, rpe_scale: float
) -> Tensor:
    """Attention output [B, H, L, d] of `memory_efficient_attention`; it does not broadcast the bias over B and H."""
    from xformers.ops import memory_efficient_attention

    bias = None
    if table is not None:
        bias = dense_bias(q, table, layout, rpe_scale, _ALIGNED).expand(*q.shape[:3], -1)
    swapped = (t.transpose(1, 2) for t in (q, k, v))
    return memory_efficient_attention(*swapped, attn_bias=bias, scale=qk_scale).transpose(1, 2)


def flash_refuses(problem: Problem) -> str:
    """Why FlashAttention does not take a call; '' when it does."""
    if problem.bias != "none":
        return "FlashAttention has no bias; it serves models without relative positions"
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed: pip install --no-build-isolation flash-attn, or flash-attn-4"
    if problem.device != "cuda":
        return f"it runs on cuda, not {problem.device}"
    if problem.dtype not in HALF:
        return f"dtype {problem.dtype}: float16 and bfloat16 are allowed"
    return ""


def flash(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, layout: Layout, qk_scale: float, rpe_scale: float
) -> Tensor:
    """Attention output [B, H, L, d] of FlashAttention 2, or of 4 where only that is installed."""
    swapped = [t.transpose(1, 2) for t in (q, k, v)]
    if find_spec("flash_attn.flash_attn_interface") is not None:
        from flash_attn import flash_attn_func

        return flash_attn_func(*swapped, softmax_scale=qk_scale).transpose(1, 2)
    from flash_attn.cute import flash_attn_func as flash_attn_4

    out = flash_attn_4(*swapped, softmax_scale=qk_scale)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
