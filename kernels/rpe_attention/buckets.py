"""iRPE product-method buckets (Wu et al., "Rethinking and Improving Relative Position Encoding", ICCV 2021, eq. 18-21).

Keys are assigned to buckets by their offset from the query, separately per axis through a piecewise index function that
is exact near the query and logarithmic further away. Class tokens in front share one extra bucket.
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


def piecewise_index(offset: int, ratio: float = 1.9) -> int:
    """Bucket of a signed offset along one axis; alpha = ratio, beta = 2 ratio, gamma = 8 ratio."""
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio
    distance = abs(offset)
    if distance <= alpha:
        return offset
    # The order matters for parity: round half to even, clip to the float beta, then truncate.
    index = round(alpha + math.log(distance / alpha) / math.log(gamma / alpha) * (beta - alpha))
    return int(math.copysign(int(min(index, beta)), offset))


def num_buckets(ratio: float = 1.9, cls_tokens: int = 1) -> int:
    """Columns of the table: (2 int(beta) + 1)² and one more when there are class tokens."""
    return (2 * int(2 * ratio) + 1) ** 2 + (cls_tokens > 0)


@lru_cache(maxsize=64)
def _product_ids(grid: tuple[int, int], cls_tokens: int, ratio: float) -> np.ndarray:
    height, width = grid
    half = int(2 * ratio)
    lookup = np.array([piecewise_index(d, ratio) for d in range(-max(grid) + 1, max(grid))]) + half
    y, x = np.divmod(np.arange(height * width), width)
    shift = max(grid) - 1
    ids = lookup[y[:, None] - y[None] + shift] * (2 * half + 1) + lookup[x[:, None] - x[None] + shift]
    full = np.full((cls_tokens + height * width,) * 2, (2 * half + 1) ** 2, dtype=np.int64)
    full[cls_tokens:, cls_tokens:] = ids
    return full


def constant(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Compute a tensor once for each set of arguments; compilers take the result and do not look inside."""
    kept: dict[tuple[object, ...], Tensor] = {}

    @wraps(function)
    def lookup(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        key = (*args, *sorted(kwargs.items()))
        if (found := kept.get(key)) is not None:
            return found
        made = function(*args, **kwargs)
        if type(made) is Tensor:  # not what a tracer makes in its place
            kept[key] = made
        return made

    return torch.compiler.assume_constant_result(lookup)


@constant
def product_buckets(
    grid: tuple[int, int], cls_tokens: int = 1, ratio: float = 1.9, device: torch.device | None = None
) -> Tensor:
    """Bucket id of every (query, key) pair: int64 [L, L], L = cls_tokens + height · width, offsets query minus key."""
    return torch.from_numpy(_product_ids(grid, cls_tokens, ratio)).to(device or "cpu")
