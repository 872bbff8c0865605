"""The fused attention of short windows in Triton: all tokens in one block of 8 x 8 slots, see `blocks.py`.

Programs take every so many-th window of a head and keep its table gradient in registers; each writes one partial.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.rpe_attention.blocks import (
    LOG2E,
    gathered,
    load,
    logits_of,
    look_up,
    low,
    selectors,
    slots,
    spread,
    table_places,
)


@triton.jit(do_not_specialize=["batch"])
def forward_kernel(
    qkv,
    table,
    out,
    lse,
    batch,
    qk_scale,
    rpe_scale,
    stride_b: tl.constexpr,
    stride_l: tl.constexpr,
    stride_3: tl.constexpr,
    stride_h: tl.constexpr,
    table_h: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    GH: tl.constexpr,
    GW: tl.constexpr,
    CLS: tl.constexpr,
    BX: tl.constexpr,
    BLOCKS: tl.constexpr,
    LAST: tl.constexpr,
    FIRST: tl.constexpr,
    HALF: tl.constexpr,
    STEPS: tl.constexpr,
    S: tl.constexpr,
    PLAIN: tl.constexpr,
    DP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out [B, L, H, D] and lse [B, H, L] of every so many-th window of a head."""
    head = tl.program_id(1)
    d = tl.arange(0, DP)
    token, patch, exists = slots(0, GH, GW, CLS, BX, LAST, FIRST)
    dtype: tl.constexpr = qkv.dtype.element_ty
    places, known = table_places(table + head * table_h, 1 if PLAIN else D, DP, HALF, S, CLS)
    r = low(tl.load(places, mask=known, other=0), dtype, UPCAST)
    rows, columns = selectors(0, 0, GH, BX, HALF, STEPS, S, tl.float32 if UPCAST else dtype)
    for b in range(tl.program_id(2), batch, tl.num_programs(2)):
        wide = tl.cast(b, tl.int64)
        start = qkv + wide * stride_b + head * stride_h
        q = load(start, token, d, stride_l, exists, D, UPCAST)
        k = load(start + stride_3, token, d, stride_l, exists, D, UPCAST)
        v = load(start + 2 * stride_3, token, d, stride_l, exists, D, UPCAST)
        bias = spread(look_up(q, r, patch, PLAIN, dtype, UPCAST), rows, columns, S, dtype, UPCAST)
        logits = logits_of(q, k, bias, exists, qk_scale, rpe_scale)
        top = tl.max(logits, 1)
        weights = tl.exp2(logits - top[:, None])
        total = tl.sum(weights, 1)
        mixed = tl.dot(low(weights, dtype, UPCAST), v, input_precision="ieee") * (1 / total)[:, None]
        to = out + (wide * (L * H) + head) * D + token[:, None] * (H * D) + d[None]
        tl.store(to, low(mixed, dtype, UPCAST), mask=exists[:, None] & (d[None] < D))
        tl.store(lse + (wide * H + head) * L + token, (top + tl.log2(total)) / LOG2E, mask=exists)


@triton.jit(do_not_specialize=["batch"])
def backward_kernel(
    grad,
    qkv,
    table,
    d_qkv,
    partials,
    batch,
    qk_scale,
    rpe_scale,
    stride_b: tl.constexpr,
    stride_l: tl.constexpr,
    stride_3: tl.constexpr,
    stride_h: tl.constexpr,
    table_h: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    GH: tl.constexpr,
    GW: tl.constexpr,
    CLS: tl.constexpr,
    BX: tl.constexpr,
    BLOCKS: tl.constexpr,
    LAST: tl.constexpr,
    FIRST: tl.constexpr,
    HALF: tl.constexpr,
    STEPS: tl.constexpr,
    S: tl.constexpr,
    PLAIN: tl.constexpr,
    DP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """All gradients. The whole softmax is computed again, so neither the output nor its lse is read."""
    head = tl.program_id(1)
    d = tl.arange(0, DP)
    token, patch, exists = slots(0, GH, GW, CLS, BX, LAST, FIRST)
    dtype: tl.constexpr = qkv.dtype.element_ty
    places, known = table_places(table + head * table_h, 1 if PLAIN else D, DP, HALF, S, CLS)
    r = low(tl.load(places, mask=known, other=0), dtype, UPCAST)
    rows, columns = selectors(0, 0, GH, BX, HALF, STEPS, S, tl.float32 if UPCAST else dtype)
    written = exists[:, None] & (d[None] < D)
    d_table = tl.zeros([DP, S * S], tl.float32)
    for b in range(tl.program_id(2), batch, tl.num_programs(2)):
        wide = tl.cast(b, tl.int64)
        start = qkv + wide * stride_b + head * stride_h
        q = load(start, token, d, stride_l, exists, D, UPCAST)
        k = load(start + stride_3, token, d, stride_l, exists, D, UPCAST)
        v = load(start + 2 * stride_3, token, d, stride_l, exists, D, UPCAST)
        do = load(grad + (wide * (L * H) + head) * D, token, d, H * D, exists, D, UPCAST)
        bias = spread(look_up(q, r, patch, PLAIN, dtype, UPCAST), rows, columns, S, dtype, UPCAST)
        logits = logits_of(q, k, bias, exists, qk_scale, rpe_scale)
        weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
        p = weights * (1 / tl.sum(weights, 1))[:, None]
        to = d_qkv + (wide * (3 * L * H) + head) * D + token[:, None] * (3 * H * D) + d[None]
        # Slots without a token have do = 0, which ends whatever their rows hold.
        dv = tl.dot(tl.trans(low(p, dtype, UPCAST)), do, input_precision="ieee")
        tl.store(to + 2 * H * D, low(dv, dtype, UPCAST), mask=written)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = low(p * (dp - tl.sum(p * dp, 1)[:, None]), dtype, UPCAST)
        dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * qk_scale
        tl.store(to + H * D, low(dk, dtype, UPCAST), mask=written)
        dt = tl.where(patch[:, None], gathered(ds, rows, columns, S, dtype, UPCAST), 0.0)
        dq = tl.dot(ds, k, input_precision="ieee") * qk_scale
        if PLAIN:
            d_table += tl.where((d == 0)[:, None], tl.sum(dt, 0)[None], 0.0)
        else:
            dt = low(dt, dtype, UPCAST)
            dq += tl.dot(dt, tl.trans(r), input_precision="ieee") * rpe_scale
            d_table = tl.dot(tl.trans(q), dt, d_table, input_precision="ieee")
        tl.store(to, low(dq, dtype, UPCAST), mask=written)
    slot = tl.cast(tl.program_id(2) * tl.num_programs(1) + head, tl.int64) * (DP * S * S)
    at = tl.arange(0, DP)[:, None] * (S * S) + tl.arange(0, S * S)[None]
    tl.store(partials + slot + at, d_table * rpe_scale)
