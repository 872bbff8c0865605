"""Targets that are histograms of gradient directions: HOG, and SAR-HOG, whose gradients are ratios.

A pixel adds the magnitude of its gradient to one of `bins` bins of undirected angle, bins are summed over square cells
and every cell is divided by its Euclidean norm. Maps are bins, one value per cell: a 16-pixel patch of 8-pixel cells
and 9 bins has 36 values, bin by bin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.config_text import Problem
from foundation.objectives.half_windows import log_ratios, published_log_ratios
from foundation.objectives.targets import FixedTarget, RatioTarget

if TYPE_CHECKING:
    from foundation.config import Config


def histogram(across: Tensor, down: Tensor, bins: int, cell: int, weight: Tensor | None = None) -> Tensor:
    """Bins of gradients: fp32 [N, 1, H, W] twice → [N, bins, H / cell, W / cell], of norm 1 in every cell.

    The bin of a gradient is floor(bins · atan2(across, down) / π) mod bins; `weight` [H, W] multiplies magnitudes. A
    cell without any gradient is zero.
    """
    size = torch.hypot(across, down)
    size = size if weight is None else size * weight
    angle = torch.atan2(across, down) / math.pi * bins
    chosen = angle.floor().long() % bins
    # One value per pixel: nothing is added in an order that a GPU would choose.
    spread = size.new_zeros(size.shape[0], bins, *size.shape[2:]).scatter_(1, chosen, size)
    cells = spread.unflatten(-1, (-1, cell)).unflatten(-3, (-1, cell)).sum((-1, -3))
    return F.normalize(cells, dim=1, eps=1e-12)


def sobel(image: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel gradients, left less right and top less bottom: fp32 [N, 1, H, W] twice, from reflect-padded images.

    Terms are added one by one, row after row. Gradients of 8-bit images often point along the edge of a bin, and which
    side they fall on depends on the last bit; written out, it is the same on all devices and as published.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image, (1,) * 4, mode="reflect")

    def at(row: int, column: int) -> Tensor:
        return padded[..., row : row + height, column : column + width]

    across = at(0, 0) - at(0, 2) + 2 * at(1, 0) - 2 * at(1, 2) + at(2, 0) - at(2, 2)
    down = at(0, 0) + 2 * at(0, 1) + at(0, 2) - at(2, 0) - 2 * at(2, 1) - at(2, 2)
    return across, down


def gaussian_window(side: int, height: int, width: int, device: torch.device) -> Tensor:
    """Gaussian of standard deviation side / 2 pixels and sum 1 over a square of `side`, repeated: fp32 [H, W]."""
    steps = (torch.arange(side, device=device) - (side - 1) / 2) / (side // 2)
    profile = torch.exp(-0.5 * steps.square())
    square = profile[:, None] * profile
    return (square / square.sum()).repeat(height // side, width // side)


def cell_conflicts(cell: int, config: Config) -> Iterator[Problem]:
    """Whole cells must make up a patch."""
    if config.model.patch % cell:
        text = f"a divisor of model.patch = {config.model.patch}"
        yield Problem("objective.cell", cell, text, others=("model.patch",))


class HOG(FixedTarget):
    """Histograms of oriented gradients: MaskFeat (arXiv 2112.09133); with a Gaussian window FG-MAE (arXiv 2310.18653).

    `window` is the side in pixels of the Gaussian that weights magnitudes (FG-MAE: 16), None weights all alike.
    """

    def __init__(self, cell: int, bins: int, window: int | None = None, channels: int = 1) -> None:
        super().__init__([f"bin{b}" for b in range(bins)], channels)
        self.cell, self.bins, self.window = cell, bins, window

    def conflicts(self, config: Config) -> Iterator[Problem]:
        """Cells must make up a patch, Gaussian windows the image."""
        yield from cell_conflicts(self.cell, config)
        side = config.data.image_size
        if self.window and side % self.window:
            text = f"a divisor of data.image_size = {side}"
            yield Problem("objective.gaussian_window", self.window, text, others=("data.image_size",))

    def of_channel(self, image: Tensor) -> Tensor:
        """[N, 1, H, W] → [N, bins, H / cell, W / cell]."""
        height, width = image.shape[-2:]
        weight = gaussian_window(self.window, height, width, image.device) if self.window else None
        return histogram(*sobel(image), self.bins, self.cell, weight)


class SARHOG(RatioTarget):
    """Histograms of the gradient ratio: HOG whose gradients are ln(left / right) and ln(top / bottom) of half windows.

    Stands in the published SAR-JEPA code (arXiv 2311.15153), which does not say at which radius; bins of several radii
    follow each other. `exact` False computes ratios by the published convolutions, whose rounding decides where both
    halves are equal: a gradient along the edge between the last and the first bin.
    """

    def __init__(
        self,
        radii: Sequence[int],
        offset: float,
        centre: str,
        cell: int,
        bins: int,
        channels: int = 1,
        exact: bool = True,
    ) -> None:
        super().__init__(radii, offset, centre, channels, [f"r{r}_bin{b}" for r in radii for b in range(bins)])
        self.cell, self.bins, self.ratios = cell, bins, log_ratios if exact else published_log_ratios

    def conflicts(self, config: Config) -> Iterator[Problem]:
        """Radii must fit the image, cells the patch."""
        yield from super().conflicts(config)
        yield from cell_conflicts(self.cell, config)

    def of_channel(self, image: Tensor) -> Tensor:
        """[N, 1, H, W] → [N, len(radii) · bins, H / cell, W / cell]."""
        ratios = [self.ratios(image, r, self.offset, self.centre) for r in self.radii]
        return torch.cat([histogram(*each, self.bins, self.cell) for each in ratios], dim=1)
