"""What a call asks for besides its tensors, in the form that every backend takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.rpe_attention.buckets import bucket_ids, num_buckets

METHODS = ("product", "cross", "euclidean", "quantised")


class Layout(NamedTuple):
    """Where tokens stand (class tokens, then patches in raster order) and how offsets become columns of the table."""

    grid: tuple[int, int]
    """height, width in patches"""
    cls_tokens: int = 1
    method: str = "product"
    ratio: float = 1.9

    @property
    def length(self) -> int:
        """Tokens of a sequence, L."""
        return self.cls_tokens + self.grid[0] * self.grid[1]

    @property
    def columns(self) -> int:
        """Columns of a table."""
        return num_buckets(self.ratio, self.cls_tokens, self.method)

    def ids(self, device: torch.device) -> Tensor:
        """Columns of every (query, key) pair: int64 [1, L, L], for cross [2, L, L]."""
        return bucket_ids(self.grid, self.cls_tokens, self.method, self.ratio, device)


class Problem(NamedTuple):
    """Everything by which a backend decides whether it takes a call."""

    device: str
    dtype: torch.dtype
    heads: int
    head_dim: int
    layout: Layout
    bias: str = "contextual"
    """contextual: a table [1 or H, d, columns]; plain: a table [1 or H, columns]; none: no table"""
    trains: bool = False
    """a gradient is asked for"""
    shared: int = 0
    """bytes of shared memory that a block of the GPU can have; 0: not known"""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def shared_memory(device: str) -> int:
    """Bytes of shared memory that a block of the present GPU can have, 0 without one."""
    if device != "cuda" or not torch.cuda.is_available():
        return 0
    return int(getattr(torch.cuda.get_device_properties(), "shared_memory_per_block_optin", 0))


def bias_kind(table: Tensor | None) -> str:
    """contextual, plain or none: see `Problem.bias`."""
    return "none" if table is None else "contextual" if table.ndim == 3 else "plain"
