"""Small parts of a block that a configuration may choose."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Options(NamedTuple):
    """What encoder blocks may have beyond the plain ones; a decoder, which is thrown away, has plain blocks."""

    layer_scale: float | None = None
    """initial value of a learnt gain per channel behind attention and MLP (CaiT, arXiv 2103.17239); None: no gain"""
    mlp: str = "gelu"
    """gelu, or swiglu: (silu(a) * b) of two halves of the first product (Shazeer, arXiv 2002.05202)"""
    qk_norm: bool = False
    """LayerNorm over the head's width of queries and keys before their product (arXiv 2302.05442)"""

    def hidden(self, dim: int) -> int:
        """Width between the two products of the MLP.

        4 dim; of swiglu, which has three matrices instead of two, 2/3 of it, up to the next multiple of 64, so that
        the parameters are about as many.
        """
        return 4 * dim if self.mlp == "gelu" else -(-8 * dim // 192) * 64


PLAIN = Options()


class LayerScale(nn.Module):
    """A learnt gain per channel, at first `initial`: [..., dim] → the same."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """In the precision of `x`, which the residual stream keeps under autocast."""
        return x * self.gamma.to(x.dtype)
