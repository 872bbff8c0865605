"""Positions: the learnt table of iRPE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.rpe_attention.buckets import num_buckets


class RelativePositionTable(nn.Module):
    """Contextual iRPE table on keys, shared by all heads: [1, head_dim, buckets], zero at the start.

    Product method with ratio 1.9: 7 x 7 offset buckets and one for class tokens. Offsets of four patches and more
    share a bucket per direction, so a table learnt in 7 x 7 windows serves any grid.
    """

    def __init__(self, head_dim: int, cls_tokens: int = 1) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, head_dim, num_buckets(cls_tokens=cls_tokens)))

    def forward(self) -> Tensor:
        """The table; a call, so that engines which gather parameters on a module's forward see it."""
        return self.table
