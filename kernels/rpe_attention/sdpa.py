"""The bias as a dense map, made of matrix products, for the attentions of PyTorch and xformers, or all by hand."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.rpe_attention.buckets import bucket_ids, constant
from kernels.rpe_attention.layout import Layout, Problem, bias_kind

# Above this many (query, key) pairs the one-hot matrix costs more than an index.
_ONE_HOT_PAIRS = 64 * 1024
_ALIGNED = 8
"""Fused attentions read the bias in rows whose distance is a multiple of this."""


@constant
def _one_hot(
    grid: tuple[int, int],
    cls_tokens: int,
    method: str,
    ratio: float,
    row: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """1 where a pair looks a column up: [columns, L · row], rows of L keys filled up with zeros."""
    layout = Layout(grid, cls_tokens, method, ratio)
    ids = bucket_ids(*layout, device)
    hot = F.pad(F.one_hot(ids, layout.columns).sum(0), (0, 0, 0, row - layout.length))
    return hot.view(-1, layout.columns).to(dtype).T.contiguous()


def _spread(table: Tensor, layout: Layout, row: int) -> Tensor:
    """The table at every pair: [..., columns] → [..., L, row], rows of L keys filled up to `row`."""
    length = layout.length
    if length * length <= _ONE_HOT_PAIRS:
        hot = _one_hot(*layout, row, table.device, table.dtype)
        return (table @ hot).view(*table.shape[:-1], length, row)
    parts = [table.index_select(-1, ids.reshape(-1)) for ids in layout.ids(table.device)]
    return F.pad(torch.stack(parts).sum(0).view(*table.shape[:-1], length, length), (0, row - length))


def dense_bias(q: Tensor, table: Tensor, layout: Layout, rpe_scale: float, aligned: int = 1) -> Tensor:
    """rpe_scale · position bias as a dense [B or 1, H or 1, L, L]; rows lie a multiple of `aligned` elements apart.

    The table is spread over all pairs first ([d, L, L], independent of the batch) and then multiplied with the queries
    query position by query position. Both steps and their gradients are matrix products, so the table gradient is
    deterministic and there is neither a gather nor a scatter over the batch.
    """
    batch, heads, length, dim = q.shape
    table = table.to(q.dtype)
    if rpe_scale != 1:  # Inductor loses the table of a recomputed block when it removes a product with 1
        table = table * rpe_scale
    row = -(-length // aligned) * aligned
    spread = _spread(table, layout, row)  # [1 or H, d, L, row]
    if bias_kind(table) == "plain":
        bias = spread[None]
    elif table.shape[0] == 1:
        queries = q.permute(2, 0, 1, 3).reshape(length, batch * heads, dim)
        product = torch.bmm(queries, spread[0].permute(1, 0, 2))  # [L, B·H, row]
        bias = product.view(length, batch, heads, row).permute(1, 2, 0, 3)
    else:
        bias = torch.einsum("bhid,hdij->bhij", q, spread)
    return bias if row == length else bias[..., :length]


def sdpa_refuses(problem: Problem) -> str:
    """Why the kernel pinned on CUDA does not take a call; '' when it does."""
    step = 4 if problem.dtype == torch.float32 else 8
    if problem.device == "cuda" and problem.dtype != torch.float64 and problem.head_dim % step:
        return f"head size {problem.head_dim}: multiples of {step} are allowed in {problem.dtype}"
    return ""


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, layout: Layout, qk_scale: float, rpe_scale: float
) -> Tensor:
    """Attention output [B, H, L, d] through `scaled_dot_product_attention` with the bias as a float mask.

    On CUDA the kernel is named, so that PyTorch does not choose: cuDNN's has no gradient for the mask, misreads one of
    another dtype (pytorch#191612) and gives NaN at some lengths (pytorch#196678).
    """
    if table is None:
        choice = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(choice) if q.is_cuda else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, scale=qk_scale)
    bias = dense_bias(q, table, layout, rpe_scale, _ALIGNED if q.is_cuda else 1)
    pinned = SDPBackend.MATH if q.dtype == torch.float64 else SDPBackend.EFFICIENT_ATTENTION
    with sdpa_kernel(pinned) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(*q.shape[:3], -1), scale=qk_scale)


def dense(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, layout: Layout, qk_scale: float, rpe_scale: float
) -> Tensor:
    """Attention output [B, H, L, d] by batched products alone.

    On a CPU this is faster than `sdpa`, whose mask that needs a gradient takes a path with several passes over the map.
    """
    batch, heads, length, dim = q.shape
    queries, keys = q.reshape(-1, length, dim), k.reshape(-1, length, dim)
    if table is None:
        logits = torch.bmm(queries * qk_scale, keys.transpose(1, 2))
    else:
        bias = dense_bias(q, table, layout, rpe_scale).expand(batch, heads, -1, -1).reshape(-1, length, length)
        logits = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=qk_scale)
    out = torch.bmm(logits.softmax(-1).to(v.dtype), v.reshape(-1, length, dim))
    return out.view(batch, heads, length, dim)
