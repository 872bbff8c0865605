"""The definition of attention with a relative-position bias on keys, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.rpe_attention.layout import Layout, bias_kind


def position_bias(q: Tensor, table: Tensor, layout: Layout) -> Tensor:
    """q·table[column(i, j)], summed over look-ups, or table[column(i, j)] of a plain table: [B or 1, H or 1, L, L]."""
    kind, table = bias_kind(table), table.to(q.dtype)
    # One number per query and column: [B, H, L, columns], of a plain table [1, 1 or H, L, columns].
    columns = torch.matmul(q, table) if kind == "contextual" else table[None, :, None].expand(-1, -1, q.shape[2], -1)
    found = [columns.gather(-1, ids.expand(*columns.shape[:2], *ids.shape)) for ids in layout.ids(q.device)]
    return found[0] if len(found) == 1 else found[0] + found[1]


def attention_probabilities(
    q: Tensor, k: Tensor, table: Tensor | None, layout: Layout, qk_scale: float, rpe_scale: float
) -> Tensor:
    """softmax(qk_scale · q kᵀ + rpe_scale · position bias): q, k [B, H, L, d] → [B, H, L, L]."""
    logits = torch.matmul(q, k.transpose(-1, -2)) * qk_scale
    if table is not None:
        logits = logits + position_bias(q, table, layout) * rpe_scale
    return torch.softmax(logits, dim=-1)


def reference(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, layout: Layout, qk_scale: float, rpe_scale: float
) -> Tensor:
    """Attention output [B, H, L, d]; every map is materialised, in the order the equations are written."""
    return torch.matmul(attention_probabilities(q, k, table, layout, qk_scale, rpe_scale), v)
