"""The fused attention of longer sequences in Triton: block by block of 8 x 8 patches, see `blocks.py`.

Where two blocks are so far apart on both axes that one bucket holds all their pairs, the bias is a column of T.

Programs: (block, head, first problem). Each adds the table gradients of its problems in memory of its own.
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


@triton.jit
def _corner(query_block, key_block, BX: tl.constexpr, HALF: tl.constexpr, S: tl.constexpr):
    """The column of T of two blocks far apart."""
    a = tl.where(query_block // BX > key_block // BX, 2 * HALF, 0)
    return a * S + tl.where(query_block % BX > key_block % BX, 2 * HALF, 0)


@triton.jit
def _far(
    query_block,
    key_block,
    BX: tl.constexpr,
    CLS: tl.constexpr,
    LAST: tl.constexpr,
    HALF: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Whether one bucket holds all pairs of two blocks: the last index has begun on both axes, without class keys."""
    begins: tl.constexpr = (STEPS >> (8 * HALF - 8)) & 255 if HALF > 0 else 1
    dy, dx = tl.abs(query_block // BX - key_block // BX), tl.abs(query_block % BX - key_block % BX)
    return (8 * tl.minimum(dy, dx) - 7 >= begins) & ((key_block != LAST) | (CLS == 0))


@triton.jit
def _bias(
    looked_up,
    query_block,
    key_block,
    GH: tl.constexpr,
    BX: tl.constexpr,
    CLS: tl.constexpr,
    LAST: tl.constexpr,
    HALF: tl.constexpr,
    STEPS: tl.constexpr,
    S: tl.constexpr,
    dtype: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The bias of the pairs of two blocks, fp32 [64, 64]."""
    if _far(query_block, key_block, BX, CLS, LAST, HALF, STEPS):
        column = (tl.arange(0, S * S) == _corner(query_block, key_block, BX, HALF, S))[None]
        one = tl.sum(tl.where(column, looked_up.to(tl.float32), 0.0), 1)
        bias = tl.zeros([64, 64], tl.float32) + one[:, None]
    else:
        rows, columns = selectors(query_block, key_block, GH, BX, HALF, STEPS, S, tl.float32 if UPCAST else dtype)
        bias = spread(looked_up, rows, columns, S, dtype, UPCAST)
    return bias


@triton.jit
def _add_sums(
    dt,
    ds,
    query_block,
    key_block,
    GH: tl.constexpr,
    BX: tl.constexpr,
    CLS: tl.constexpr,
    LAST: tl.constexpr,
    HALF: tl.constexpr,
    STEPS: tl.constexpr,
    S: tl.constexpr,
    dtype: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dT with the gradients of the pairs of two blocks, fp32 [64, S·S]."""
    if _far(query_block, key_block, BX, CLS, LAST, HALF, STEPS):
        column = (tl.arange(0, S * S) == _corner(query_block, key_block, BX, HALF, S))[None]
        dt += tl.where(column, tl.sum(ds.to(tl.float32), 1)[:, None], 0.0)
    else:
        rows, columns = selectors(query_block, key_block, GH, BX, HALF, STEPS, S, tl.float32 if UPCAST else dtype)
        dt += gathered(ds, rows, columns, S, dtype, UPCAST)
    return dt


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
    """out [B, L, H, D] and lse [B, H, L] of a block of queries of one head, for every so many-th sequence."""
    block, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, DP)
    token, patch, asked = slots(block, GH, GW, CLS, BX, LAST, FIRST)
    places, known = table_places(table + head * table_h, 1 if PLAIN else D, DP, HALF, S, CLS)
    dtype: tl.constexpr = qkv.dtype.element_ty
    for b in range(tl.program_id(2), batch, tl.num_programs(2)):
        wide = tl.cast(b, tl.int64)
        start = qkv + wide * stride_b + head * stride_h
        q = load(start, token, d, stride_l, asked, D, UPCAST)
        r = low(tl.load(places, mask=known, other=0), dtype, UPCAST)
        looked_up = look_up(q, r, patch, PLAIN, dtype, UPCAST)
        top = tl.full([64], float("-inf"), tl.float32)
        total = tl.zeros([64], tl.float32)
        sums = tl.zeros([64, DP], tl.float32)
        for other in range(BLOCKS):
            key, _, exists = slots(other, GH, GW, CLS, BX, LAST, FIRST)
            k = load(start + stride_3, key, d, stride_l, exists, D, UPCAST)
            v = load(start + 2 * stride_3, key, d, stride_l, exists, D, UPCAST)
            bias = _bias(looked_up, block, other, GH, BX, CLS, LAST, HALF, STEPS, S, dtype, UPCAST)
            logits = logits_of(q, k, bias, exists, qk_scale, rpe_scale)
            higher = tl.maximum(top, tl.max(logits, 1))
            weights = tl.exp2(logits - higher[:, None])
            fade = tl.exp2(top - higher)
            total = total * fade + tl.sum(weights, 1)
            sums = sums * fade[:, None] + tl.dot(low(weights, dtype, UPCAST), v, input_precision="ieee")
            top = higher
        to = out + (wide * (L * H) + head) * D + token[:, None] * (H * D) + d[None]
        tl.store(to, low(sums * (1 / total)[:, None], dtype, UPCAST), mask=asked[:, None] & (d[None] < D))
        tl.store(lse + (wide * H + head) * L + token, (top + tl.log2(total)) / LOG2E, mask=asked)


@triton.jit(do_not_specialize=["batch"])
def query_backward_kernel(
    grad,
    qkv,
    table,
    out,
    lse,
    delta,
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
    """Gradients of a block of queries and of the table; delta [B, H, L], the products of grad and out, for the keys."""
    block, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, DP)
    token, patch, asked = slots(block, GH, GW, CLS, BX, LAST, FIRST)
    places, known = table_places(table + head * table_h, 1 if PLAIN else D, DP, HALF, S, CLS)
    dtype: tl.constexpr = qkv.dtype.element_ty
    slot = (tl.program_id(2) * tl.num_programs(0) + block) * H + head
    at = tl.arange(0, DP)[:, None] * (S * S) + tl.arange(0, S * S)[None]
    mine = partials + tl.cast(slot, tl.int64) * (DP * S * S) + at
    for b in range(tl.program_id(2), batch, tl.num_programs(2)):
        wide = tl.cast(b, tl.int64)
        start = qkv + wide * stride_b + head * stride_h
        q = load(start, token, d, stride_l, asked, D, UPCAST)
        beside = (wide * (L * H) + head) * D
        do = load(grad + beside, token, d, H * D, asked, D, UPCAST)
        o = load(out + beside, token, d, H * D, asked, D, UPCAST)
        r = low(tl.load(places, mask=known, other=0), dtype, UPCAST)
        looked_up = look_up(q, r, patch, PLAIN, dtype, UPCAST)
        line = (wide * H + head) * L + token
        level = tl.load(lse + line, mask=asked, other=float("inf")) * LOG2E
        product = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(delta + line, product, mask=asked)
        dq = tl.zeros([64, DP], tl.float32)
        dt = tl.zeros([64, S * S], tl.float32)
        for other in range(BLOCKS):
            key, _, exists = slots(other, GH, GW, CLS, BX, LAST, FIRST)
            k = load(start + stride_3, key, d, stride_l, exists, D, UPCAST)
            v = load(start + 2 * stride_3, key, d, stride_l, exists, D, UPCAST)
            bias = _bias(looked_up, block, other, GH, BX, CLS, LAST, HALF, STEPS, S, dtype, UPCAST)
            logits = logits_of(q, k, bias, exists, qk_scale, rpe_scale)
            p = tl.exp2(logits - level[:, None])
            ds = low(p * (tl.dot(do, tl.trans(v), input_precision="ieee") - product[:, None]), dtype, UPCAST)
            dq = tl.dot(ds, k, dq, input_precision="ieee")
            dt = _add_sums(dt, ds, block, other, GH, BX, CLS, LAST, HALF, STEPS, S, dtype, UPCAST)
        dq *= qk_scale
        dt = tl.where(patch[:, None], dt, 0.0)
        if PLAIN:
            d_table = tl.where((d == 0)[:, None], tl.sum(dt, 0)[None], 0.0)
        else:
            dt = low(dt, dtype, UPCAST)
            dq += tl.dot(dt, tl.trans(r), input_precision="ieee") * rpe_scale
            d_table = tl.dot(tl.trans(q), dt, input_precision="ieee")
        to = d_qkv + (wide * (3 * L * H) + head) * D + token[:, None] * (3 * H * D) + d[None]
        tl.store(to, low(dq, dtype, UPCAST), mask=asked[:, None] & (d[None] < D))
        tl.store(mine, tl.load(mine) + d_table * rpe_scale)
        tl.debug_barrier()  # other threads may load what these have stored


@triton.jit(do_not_specialize=["batch"])
def key_backward_kernel(
    grad,
    qkv,
    table,
    lse,
    delta,
    d_qkv,
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
    """Gradients of a block of keys and values."""
    block, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, DP)
    key, _, exists = slots(block, GH, GW, CLS, BX, LAST, FIRST)
    places, known = table_places(table + head * table_h, 1 if PLAIN else D, DP, HALF, S, CLS)
    dtype: tl.constexpr = qkv.dtype.element_ty
    for b in range(tl.program_id(2), batch, tl.num_programs(2)):
        wide = tl.cast(b, tl.int64)
        start = qkv + wide * stride_b + head * stride_h
        k = load(start + stride_3, key, d, stride_l, exists, D, UPCAST)
        v = load(start + 2 * stride_3, key, d, stride_l, exists, D, UPCAST)
        r = low(tl.load(places, mask=known, other=0), dtype, UPCAST)
        dk = tl.zeros([64, DP], tl.float32)
        dv = tl.zeros([64, DP], tl.float32)
        for other in range(BLOCKS):
            token, patch, asked = slots(other, GH, GW, CLS, BX, LAST, FIRST)
            q = load(start, token, d, stride_l, asked, D, UPCAST)
            do = load(grad + (wide * (L * H) + head) * D, token, d, H * D, asked, D, UPCAST)
            line = (wide * H + head) * L + token
            level = tl.load(lse + line, mask=asked, other=float("inf")) * LOG2E
            product = tl.load(delta + line, mask=asked, other=0)
            looked_up = look_up(q, r, patch, PLAIN, dtype, UPCAST)
            bias = _bias(looked_up, other, block, GH, BX, CLS, LAST, HALF, STEPS, S, dtype, UPCAST)
            logits = logits_of(q, k, bias, exists, qk_scale, rpe_scale)
            p = tl.exp2(logits - level[:, None])
            dv = tl.dot(tl.trans(low(p, dtype, UPCAST)), do, dv, input_precision="ieee")
            ds = low(p * (tl.dot(do, tl.trans(v), input_precision="ieee") - product[:, None]), dtype, UPCAST)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
        to = d_qkv + (wide * (3 * L * H) + head) * D + key[:, None] * (3 * H * D) + d[None]
        written = exists[:, None] & (d[None] < D)
        tl.store(to + H * D, low(dk * qk_scale, dtype, UPCAST), mask=written)
        tl.store(to + 2 * H * D, low(dv, dtype, UPCAST), mask=written)
