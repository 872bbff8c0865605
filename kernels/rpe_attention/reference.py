"""The definition of attention with a contextual relative-position bias on keys, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.rpe_attention.buckets import product_buckets


def attention_probabilities(
    q: Tensor, k: Tensor, table: Tensor, grid: tuple[int, int], cls_tokens: int, qk_scale: float, rpe_scale: float
) -> Tensor:
    """softmax(qk_scale · q kᵀ + rpe_scale · q·table[bucket(i, j)]): q, k [B, H, L, d] → [B, H, L, L]."""
    ids = product_buckets(grid, cls_tokens, device=q.device)
    looked_up = torch.matmul(q, table.to(q.dtype))  # [B, H, L, buckets]
    bias = looked_up.gather(-1, ids.expand(*looked_up.shape[:2], *ids.shape))
    return torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * qk_scale + bias * rpe_scale, dim=-1)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    grid: tuple[int, int],
    cls_tokens: int,
    qk_scale: float,
    rpe_scale: float,
) -> Tensor:
    """Attention output [B, H, L, d]; every map is materialised, in the order the equations are written."""
    return torch.matmul(attention_probabilities(q, k, table, grid, cls_tokens, qk_scale, rpe_scale), v)
