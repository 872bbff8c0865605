"""The definition of the gradient-ratio feature by dense convolution.

SAR-JEPA (arXiv 2311.15153, section 3): half windows with the centre line. SARATR-X v2 (arXiv 2607.23238): a 3x3 blind
spot and half windows without the centre line, a sigmoid before and after.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def half_windows(radius: int, centre: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The 0/1 masks left, right, top, bottom: [4, 1, 2r+1, 2r+1]; `centre` puts the middle line in both or none."""
    lines = radius + (centre == "include")
    left = torch.zeros(2 * radius + 1, 2 * radius + 1, device=device, dtype=dtype)
    left[:, :lines] = 1
    return torch.stack([left, left.flip(1), left.T, left.T.flip(0)])[:, None]


def log_neighbours(images: Tensor, offset: float) -> Tensor:
    """ln of the sum of the eight neighbours, each plus `offset`: [B, 1, H, W] → [B, H, W]."""
    ring = images.new_ones(1, 1, 3, 3)
    ring[..., 1, 1] = 0
    return F.conv2d(F.pad(images, (1,) * 4, mode="reflect") + offset, ring)[:, 0].log()


def reference(
    images: Tensor,
    radii: Sequence[int],
    offset: float,
    centre: str,
    blind_spot: bool = False,
    sigmoid: bool = False,
) -> Tensor:
    """sqrt(ln(left/right)² + ln(top/bottom)²): float [B, 1, H, W] → [B, maps, H, W], in the images' dtype."""
    images = images.sigmoid() if sigmoid else images
    maps = [log_neighbours(images, offset)] if blind_spot else []
    for radius in radii:
        padded = F.pad(images, (radius,) * 4, mode="reflect") + offset
        left, right, top, bottom = F.conv2d(padded, half_windows(radius, centre, images.device, images.dtype)).unbind(1)
        maps.append(torch.sqrt(torch.log(left / right) ** 2 + torch.log(top / bottom) ** 2))
    stacked = torch.stack(maps, dim=1)
    return stacked.sigmoid() if sigmoid else stacked
