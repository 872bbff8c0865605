"""What the Triton kernels share: blocks of 8 x 8 patches, and buckets spread over pairs by products on tensor cores.

A sequence is cut into blocks of 64 slots: slot 8 y + x of a block is the patch in its row y and column x. Class tokens
stand in the free rows below the image, in the first block of the last row of blocks, or in a block of their own.

Products of queries and table, T, have S x S columns: bucket (a, b) of rows and columns stands at S a + b, the bucket of
class tokens in all of row a = SIDE. The bias of query (y, x) and key (r, s) is T[(y, x), (a(y, r), b(x, s))]: seen as a
matrix of (y, r) by (x, s), T is multiplied from the left by the 0/1 matrix that says a(y, r), and from the right by the
one that says b(x, s). So buckets are spread over pairs by two products and no gather, and gradients of pairs are summed
to buckets by the transposed products: no atomics, one order, the same bits in every run.

A bias that is one number for all keys of a class token's query does not change its softmax: it is taken as 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def low(tile, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """The operand of a product in the dtype of the inputs; the interpreter rounds to bf16 and goes on in fp32."""
    if UPCAST:
        bits = tile.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    return tile.to(dtype)


@triton.jit
def load(pointer, rows, columns, stride, valid, D: tl.constexpr, UPCAST: tl.constexpr):
    """[rows, columns] of one head, 0 where there is no token or column; fp32 where the interpreter needs it."""
    tile = tl.load(pointer + rows[:, None] * stride + columns[None], mask=valid[:, None] & (columns[None] < D), other=0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def slots(
    block,
    GH: tl.constexpr,
    GW: tl.constexpr,
    CLS: tl.constexpr,
    BX: tl.constexpr,
    LAST: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Of the slots of a block: token, whether it is a patch, whether there is one. Class tokens: slot FIRST of LAST."""
    slot = tl.arange(0, 64)
    y, x = (block // BX) * 8 + slot // 8, (block % BX) * 8 + slot % 8
    patch = (y < GH) & (x < GW)
    number = slot - FIRST
    exists = patch | ((block == LAST) & (number >= 0) & (number < CLS))
    return tl.where(patch, CLS + y * GW + x, number), patch, exists


@triton.jit
def index(offset, HALF: tl.constexpr, STEPS: tl.constexpr):
    """Piecewise index of an offset, from 0 to 2 HALF: byte b of STEPS is the distance where index b + 1 begins."""
    distance = tl.abs(offset)
    number = tl.zeros_like(offset)
    for b in tl.static_range(HALF):
        number += (distance >= ((STEPS >> (8 * b)) & 255)).to(tl.int32)
    return HALF + tl.where(offset < 0, -number, number)


@triton.jit
def selectors(
    query_block,
    key_block,
    GH: tl.constexpr,
    BX: tl.constexpr,
    HALF: tl.constexpr,
    STEPS: tl.constexpr,
    S: tl.constexpr,
    dtype: tl.constexpr,
):
    """The 0/1 matrices [(y, r), (y', a)] and [(x, b), (x', s)] of a pair of blocks."""
    pair, wide = tl.arange(0, 64), tl.arange(0, 8 * S)
    dy, dx = 8 * (query_block // BX - key_block // BX), 8 * (query_block % BX - key_block % BX)
    y, r = pair // 8, pair % 8
    below = (key_block // BX) * 8 + r >= GH
    a = tl.where(below, 2 * HALF + 1, index(dy + y - r, HALF, STEPS))
    rows = (y[:, None] == (wide // S)[None]) & (a[:, None] == (wide % S)[None])
    b = index(dx + y - r, HALF, STEPS)  # of (x', s), which are numbered in the same way
    columns = ((wide // S)[:, None] == y[None]) & ((wide % S)[:, None] == b[None])
    return rows.to(dtype), columns.to(dtype)


@triton.jit
def spread(looked_up, rows, columns, S: tl.constexpr, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """T of every query, [64, S·S] in dtype → the bias of every pair, fp32 [64, 64], exact."""
    swapped = tl.reshape(tl.permute(tl.reshape(looked_up, [8, 8, S, S]), (0, 2, 1, 3)), [8 * S, 8 * S])
    by_row = low(tl.dot(rows, swapped, input_precision="ieee"), dtype, UPCAST)
    pairs = tl.dot(by_row, columns, input_precision="ieee")
    return tl.reshape(tl.permute(tl.reshape(pairs, [8, 8, 8, 8]), (0, 2, 1, 3)), [64, 64])


@triton.jit
def gathered(ds, rows, columns, S: tl.constexpr, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """Gradients of pairs, [64, 64] in dtype, summed over the keys of each bucket: fp32 [64, S·S]."""
    swapped = tl.reshape(tl.permute(tl.reshape(ds, [8, 8, 8, 8]), (0, 2, 1, 3)), [64, 64])
    by_row = low(tl.dot(tl.trans(rows), swapped, input_precision="ieee"), dtype, UPCAST)
    sums = tl.dot(by_row, tl.trans(columns), input_precision="ieee")
    return tl.reshape(tl.permute(tl.reshape(sums, [8, S, 8, S]), (0, 2, 1, 3)), [64, S * S])


@triton.jit
def logits_of(q, k, bias, exists, qk_scale, rpe_scale):
    """Logits [64, 64] in units of the base-2 logarithm, -inf where there is no key."""
    products = tl.dot(q, tl.trans(k), input_precision="ieee")
    return tl.where(exists[None], products * (qk_scale * LOG2E) + bias * (rpe_scale * LOG2E), float("-inf"))


@triton.jit
def table_places(pointer, D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, S: tl.constexpr, CLS: tl.constexpr):
    """Places of the table's columns in the order of T, [DP, S·S], and which exist."""
    SIDE: tl.constexpr = 2 * HALF + 1
    at, d = tl.arange(0, S * S), tl.arange(0, DP)
    a, b = at // S, at % S
    column = tl.where(a < SIDE, a * SIDE + b, SIDE * SIDE)
    exists = (b < SIDE) & ((a < SIDE) | ((a == SIDE) & (CLS > 0)))
    return pointer + d[:, None] * (SIDE * SIDE + (CLS > 0)) + column[None], exists[None] & (d[:, None] < D)


@triton.jit
def look_up(q, r, patch, PLAIN: tl.constexpr, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """T [64, S·S] in dtype: products of queries and table, of a plain table its numbers; 0 for class queries."""
    if PLAIN:
        numbers = tl.sum(r.to(tl.float32), 0)  # one row of it exists
        products = tl.zeros([64, r.shape[1]], tl.float32) + numbers[None]
    else:
        products = tl.dot(q, r, input_precision="ieee")
    return low(tl.where(patch[:, None], products, 0.0), dtype, UPCAST)
