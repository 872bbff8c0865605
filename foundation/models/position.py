"""Positions: the learnt table of iRPE, fixed sines and cosines, and a learnt vector per patch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.rpe_attention.buckets import constant, num_buckets


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


class LearnedPositions(nn.Module):
    """A learnt vector per patch of `grid`, added once: [1, h·w, dim]; any other grid has the vectors resized.

    Tokens in front of the patches have none: it would be a second constant beside the learnt token itself.
    """

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.embedding = nn.Parameter(torch.zeros(1, grid[0] * grid[1], dim))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Positions of the patches of `grid`, [1, h·w, dim]; a call for the same reason as above."""
        return resized(self.embedding, self.grid, grid)


def resized(embedding: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """[1, h·w, dim] of one grid as those of another: bicubic, antialiased, in fp32, as timm resizes them."""
    if grid == wanted:
        return embedding
    picture = embedding.float().unflatten(1, grid).permute(0, 3, 1, 2)
    with torch.autocast(embedding.device.type, enabled=False):
        picture = F.interpolate(picture, wanted, mode="bicubic", antialias=True)
    return picture.permute(0, 2, 3, 1).flatten(1, 2)


@constant
def sincos(grid: tuple[int, int], dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Fixed positions of patches in raster order, [1, h·w, dim]; `dim` is a multiple of 4.

    As in MAE (arXiv 2111.06377): sines, then cosines of the column times 10000^(-4i / dim), then those of the row.
    Coordinates count patches, so that a patch of a larger grid has the positions of the smaller one and new ones.
    """
    ids = torch.arange(grid[0] * grid[1], device=device)
    frequencies = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))
    angles = [at[:, None] * frequencies for at in (ids % grid[1], ids // grid[1])]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)[None].to(dtype)
