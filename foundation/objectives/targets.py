"""What is predicted. A target turns fp32 images into per-patch vectors, exactly and without a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels.gradient_ratio import gradient_ratio


class Target(Protocol):
    """A fixed target: maps of the image, and how many there are."""

    names: tuple[str, ...]

    def maps(self, images: Tensor) -> Tensor:
        """fp32 [B, C, H, W] → fp32 [B, len(names), H, W]."""
        ...


def patchify(maps: Tensor, patch: int) -> Tensor:
    """[B, M, H, W] → [B, N, M · patch²]: per patch the maps one after another, each row by row."""
    batch, channels, height, width = maps.shape
    cut = maps.view(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: [B, N, M · patch²] → [B, M, H, W]."""
    batch, (rows, cols) = tokens.shape[0], grid
    cut = tokens.view(batch, rows, cols, -1, patch, patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * patch, cols * patch)


class GradientRatio:
    """SAR-JEPA's target: the gradient-ratio magnitude at several radii, per channel, not normalised."""

    def __init__(self, radii: Sequence[int], offset: float, centre: str, channels: int = 1) -> None:
        self.radii, self.offset, self.centre = tuple(radii), offset, centre
        prefix = [""] if channels == 1 else [f"c{c}_" for c in range(channels)]
        self.names = tuple(f"{p}r{r}" for p in prefix for r in self.radii)

    def maps(self, images: Tensor) -> Tensor:
        """fp32 [B, C, H, W] in [0, 1] → fp32 [B, C · len(radii), H, W]."""
        batch, channels, height, width = images.shape
        flat = images.reshape(batch * channels, 1, height, width)
        with torch.no_grad():
            return gradient_ratio(flat, self.radii, self.offset, self.centre).view(batch, -1, height, width)
