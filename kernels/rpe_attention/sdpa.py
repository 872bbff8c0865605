"""The bias as a dense map, made of matrix products: for PyTorch's scaled-dot-product attention, or all by hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.rpe_attention.buckets import constant, product_buckets

# Above this many (query, key) pairs the one-hot matrix costs more than an index.
_ONE_HOT_PAIRS = 64 * 1024


@constant
def _one_hot(grid: tuple[int, int], cls_tokens: int, buckets: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    ids = product_buckets(grid, cls_tokens, device=device)
    return F.one_hot(ids.reshape(-1), buckets).to(dtype).T.contiguous()  # [buckets, L·L]


def dense_bias(q: Tensor, table: Tensor, grid: tuple[int, int], cls_tokens: int, rpe_scale: float) -> Tensor:
    """rpe_scale · q·table[bucket(i, j)] as a dense [B, H, L, L].

    The table is spread over all pairs first ([d, L, L], independent of the batch) and then multiplied with the queries
    query position by query position. Both steps and their gradients are matrix products, so the table gradient is
    deterministic and there is neither a gather nor a scatter over the batch.
    """
    batch, heads, length, dim = q.shape
    table = table.to(q.dtype)
    if rpe_scale != 1:  # Inductor loses the table of a recomputed block when it removes a product with 1
        table = table * rpe_scale
    buckets = table.shape[-1]
    if length * length <= _ONE_HOT_PAIRS:
        spread = table @ _one_hot(grid, cls_tokens, buckets, q.device, q.dtype)
    else:
        spread = table.index_select(-1, product_buckets(grid, cls_tokens, device=q.device).reshape(-1))
    spread = spread.view(table.shape[0], dim, length, length)
    if table.shape[0] == 1:
        queries = q.permute(2, 0, 1, 3).reshape(length, batch * heads, dim)
        bias = torch.bmm(queries, spread[0].permute(1, 0, 2))  # [L, B·H, L]
        return bias.view(length, batch, heads, length).permute(1, 2, 0, 3)
    return torch.einsum("bhid,hdij->bhij", q, spread)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    grid: tuple[int, int],
    cls_tokens: int,
    qk_scale: float,
    rpe_scale: float,
) -> Tensor:
    """Attention output [B, H, L, d] through `scaled_dot_product_attention` with the bias as a float mask."""
    bias = dense_bias(q, table, grid, cls_tokens, rpe_scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=qk_scale)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    grid: tuple[int, int],
    cls_tokens: int,
    qk_scale: float,
    rpe_scale: float,
) -> Tensor:
    """Attention output [B, H, L, d] by batched products alone.

    On a CPU this is faster than `sdpa`, whose mask that needs a gradient takes a path with several passes over the map.
    """
    batch, heads, length, dim = q.shape
    bias = dense_bias(q, table, grid, cls_tokens, rpe_scale).reshape(-1, length, length)
    queries, keys = q.reshape(-1, length, dim), k.reshape(-1, length, dim)
    probabilities = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=qk_scale).softmax(-1)
    out = torch.bmm(probabilities.to(v.dtype), v.reshape(-1, length, dim))
    return out.view(batch, heads, length, dim)
