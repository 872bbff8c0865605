"""iRPE buckets (Wu et al., "Rethinking and Improving Relative Position Encoding", ICCV 2021, section 3.2).

Keys are assigned to buckets by their offset from the query through a piecewise index function that is exact near the
query and logarithmic further away. Class tokens in front share one extra bucket. Four methods:

product      both axes apart, one bucket for each pair of indices
cross        both axes apart, a bucket of a first table for the rows and one of a second for the columns, added
euclidean    the index of the rounded distance
quantised    the index of the squared distance
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec

import numpy as np
import torch
from torch import Tensor

P = ParamSpec("P")
_KEPT = 64
"""Tensors that each function keeps: grids times devices and dtypes."""


def piecewise_index(offset: int, ratio: float = 1.9) -> int:
    """Bucket of a signed offset along one axis; alpha = ratio, beta = 2 ratio, gamma = 8 ratio."""
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio
    distance = abs(offset)
    if distance <= alpha:
        return offset
    # The order matters for parity: round half to even, clip to the float beta, then truncate.
    index = round(alpha + math.log(distance / alpha) / math.log(gamma / alpha) * (beta - alpha))
    return int(math.copysign(int(min(index, beta)), offset))


def num_buckets(ratio: float = 1.9, cls_tokens: int = 1, method: str = "product") -> int:
    """Columns of the table. With S = 2 int(beta) + 1: S² for product, S for distances, and one more for class tokens.

    cross: the columns of the table of rows, then those of the table of columns, S (and one more) each. Distances are
    never negative and use the upper half of theirs, as published.
    """
    side, extra = 2 * int(2 * ratio) + 1, int(cls_tokens > 0)
    return {"product": side**2 + extra, "cross": 2 * (side + extra)}.get(method, side + extra)


def _patch_ids(height: int, width: int, method: str, ratio: float) -> list[np.ndarray]:
    """Bucket ids of all pairs of patches, [N, N] for each look-up of the method."""
    half = int(2 * ratio)
    y, x = np.divmod(np.arange(height * width), width)
    dy, dx = y[:, None] - y[None], x[:, None] - x[None]
    if method in ("product", "cross"):
        shift = max(height, width) - 1
        lookup = np.array([piecewise_index(d, ratio) for d in range(-shift, shift + 1)]) + half
        rows, columns = lookup[dy + shift], lookup[dx + shift]
        return [rows * (2 * half + 1) + columns] if method == "product" else [rows, columns]
    squared = dy**2 + dx**2
    offsets = squared if method == "quantised" else np.rint(np.sqrt(squared)).astype(int)
    known = np.array([piecewise_index(d, ratio) for d in range(int(offsets.max()) + 1)])
    return [known[offsets] + half]


@lru_cache(maxsize=64)
def _ids(grid: tuple[int, int], cls_tokens: int, method: str, ratio: float) -> np.ndarray:
    patches = _patch_ids(*grid, method, ratio)
    columns = num_buckets(ratio, cls_tokens, method) // len(patches)
    full = np.full((len(patches), *(cls_tokens + grid[0] * grid[1],) * 2), columns - 1, dtype=np.int64)
    full[:, cls_tokens:, cls_tokens:] = patches
    full += np.arange(len(patches))[:, None, None] * columns
    full.flags.writeable = False
    return full


def constant(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Compute a tensor once for each set of arguments; compilers take the result and do not look inside."""
    kept: dict[tuple[object, ...], Tensor] = {}

    @wraps(function)
    def lookup(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        key = (*args, *sorted(kwargs.items()))
        if (found := kept.get(key)) is not None:
            return found
        with torch.inference_mode(False):  # a training may come after an evaluation
            made = function(*args, **kwargs)
        if type(made) is Tensor:  # not what a tracer makes in its place
            if len(kept) >= _KEPT:
                kept.pop(next(iter(kept)), None)
            kept[key] = made
        return made

    return torch.compiler.assume_constant_result(lookup)


@constant
def bucket_ids(
    grid: tuple[int, int],
    cls_tokens: int = 1,
    method: str = "product",
    ratio: float = 1.9,
    device: torch.device | None = None,
) -> Tensor:
    """Columns of the table of every (query, key) pair: int64 [look-ups, L, L], L = cls_tokens + height · width.

    Offsets are query minus key. One look-up; two for cross, whose columns are added.
    """
    return torch.from_numpy(_ids(grid, cls_tokens, method, ratio).copy()).to(device or "cpu")


def product_buckets(
    grid: tuple[int, int], cls_tokens: int = 1, ratio: float = 1.9, device: torch.device | None = None
) -> Tensor:
    """Bucket ids of the product method: int64 [L, L]."""
    return bucket_ids(grid, cls_tokens, "product", ratio, device)[0]
