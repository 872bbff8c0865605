"""HiViT, the encoder of SARATR-X: a stem that works inside each patch, then blocks of attention over the patches.

Zhang et al., HiViT (arXiv 2205.14949); Li et al., SARATR-X (arXiv 2405.09365), which uses HiViT-B without relative
positions. A patch of 16 px is 4 x 4 units of 4 px. Two stages of MLP blocks, each followed by a merge of 2 x 2 units,
make it one token, so no window is shifted and no stage attends but the last; masked patches can be left out as in MAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.models.vit import Block

UNITS = 4
"""Units of a patch along each side."""


class Shape(NamedTuple):
    """Width of the last stage, pairs of MLP blocks in both stages of the stem, blocks of attention, heads."""

    dim: int = 512
    stem: Sequence[int] = (2, 2)
    depth: int = 20
    heads: int = 8
    channels: int = 1
    side: int = 14
    """of the grid that the table of positions was learnt for"""
    patch: int = 16
    ratio: int = 3
    """of the MLPs in the stem; 4 in the blocks"""


class MLPBlock(nn.Module):
    """x + mlp(norm(x)) on every unit by itself."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] → [..., dim]."""
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Merge(nn.Module):
    """Each 2 x 2 units of a patch become one of twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=1e-6)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, u, u, dim] → [B, N, u/2, u/2, 2·dim]; of four units, those of the first column come first."""
        corners = [x[..., row::2, column::2, :] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class UnitEmbed(nn.Module):
    """Units to vectors: [B, C, H, W] → [B, N, 4, 4, dim], patches in raster order."""

    def __init__(self, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch // UNITS, stride=patch // UNITS)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Rows and columns of units inside their patch."""
        units = self.proj(images).unflatten(3, (-1, UNITS)).unflatten(2, (-1, UNITS))  # [B, dim, h, 4, w, 4]
        return self.norm(units.permute(0, 2, 4, 3, 5, 1).flatten(1, 2))


class HiViT(nn.Module):
    """The encoder, with the methods of `ViT` that evaluation and fine-tuning call; there is no class token.

    Positions are a table, learnt for `shape.side` squared patches and resized (bicubic) for any other grid. Images are
    fp32 [B, C, H, W] in [0, 1] with sides divisible by `patch`.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.dim, self.depth, self.heads = shape, shape.dim, shape.depth, shape.heads
        self.patch, self.channels = shape.patch, shape.channels
        self.class_tokens, self.prefix, self.relative = 0, 0, False
        width = shape.dim // UNITS
        self.patch_embed = UnitEmbed(shape.patch, shape.channels, width)
        self.stem = nn.ModuleList()
        for pairs in shape.stem:  # HiViT counts pairs of MLPs as one block
            self.stem.extend(MLPBlock(width, shape.ratio) for _ in range(2 * pairs))
            self.stem.append(Merge(width))
            width *= 2
        self.table = nn.Parameter(torch.zeros(1, shape.side**2, shape.dim))
        self.blocks = nn.ModuleList(
            Block(shape.dim, shape.heads, "auto", relative=False, prefix=0) for _ in range(shape.depth)
        )
        self.norm = nn.LayerNorm(shape.dim, eps=1e-6)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Patches per column and row. Raises ValueError when a side is not divisible by the patch."""
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"image of {height}x{width} px is not divisible into {self.patch}-px patches")
        return height // self.patch, width // self.patch

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The table for a grid: [1, h·w, dim]."""
        side = self.shape.side
        if grid == (side, side):
            return self.table
        square = self.table.transpose(1, 2).unflatten(2, (side, side))
        return F.interpolate(square, grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)

    def embed(self, images: Tensor) -> Tensor:
        """Tokens [B, N, dim] of whole images behind the stem, with their positions."""
        grid = self.grid(images)
        x = self.patch_embed(images)
        for part in self.stem:
            x = part(x)
        return x[:, :, 0, 0] + self.positions(grid).to(x.dtype)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] → [B, N, dim] after all blocks and the final norm."""
        x, grid = self.embed(images), self.grid(images)
        for block in self.blocks:
            x = block(x, grid)
        return self.norm(x)

    def pooled(self, tokens: Tensor) -> Tensor:
        """One vector per image: the mean of its patches."""
        return tokens.mean(1)

    def forward(self, images: Tensor) -> Tensor:
        """`pooled` features: [B, C, H, W] → [B, dim]."""
        return self.pooled(self.forward_features(images))
