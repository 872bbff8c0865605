"""Attention of other libraries: xformers and FlashAttention, imported when they are asked for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from kernels.rpe_attention.layout import Layout, Problem
from kernels.rpe_attention.sdpa import _ALIGNED, dense_bias

HALF = (torch.float16, torch.bfloat16)
_MAP_LIMIT = 4097
"""Longest sequence of which xformers gets a whole map: 34 MB per head and window in bf16."""


def _flash_version() -> int:
    """0, 2 or 4: the fourth alone brings a package `flash_attn` without the second's interface. Imports neither."""
    found = find_spec("flash_attn")
    if found is None or not found.submodule_search_locations:  # what is left of an uninstalled one may be a bare folder
        return 0
    folders = [Path(folder) for folder in found.submodule_search_locations]
    if any((folder / "flash_attn_interface.py").exists() for folder in folders):
        return 2
    return 4 if any((folder / "cute").is_dir() for folder in folders) else 0


XFORMERS = find_spec("xformers") is not None
FLASH = _flash_version()
"""What is installed; looked up once, since compilers trace the refusals."""


def xformers_refuses(problem: Problem) -> str:
    """Why xformers does not take a call; '' when it does."""
    if not XFORMERS:
        return "xformers is not installed: pip install 'sar-foundation[xformers]'"
    if FLASH == 4:
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
    if not FLASH:
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
    if FLASH == 2:
        from flash_attn import flash_attn_func

        return flash_attn_func(*swapped, softmax_scale=qk_scale).transpose(1, 2)
    from flash_attn.cute import flash_attn_func as flash_attn_4

    out = flash_attn_4(*swapped, softmax_scale=qk_scale)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
