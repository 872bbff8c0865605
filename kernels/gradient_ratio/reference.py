"""The definition of the gradient-ratio feature by dense convolution (SAR-JEPA, arXiv 2311.15153, section 3)."""

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


def reference(images: Tensor, radii: Sequence[int], offset: float, centre: str) -> Tensor:
    """sqrt(ln(left/right)² + ln(top/bottom)²): [B, 1, H, W] → [B, len(radii), H, W], in the images' dtype."""
    maps = []
    for radius in radii:
        padded = F.pad(images, (radius,) * 4, mode="reflect") + offset
        left, right, top, bottom = F.conv2d(padded, half_windows(radius, centre, images.device, images.dtype)).unbind(1)
        maps.append(torch.sqrt(torch.log(left / right) ** 2 + torch.log(top / bottom) ** 2))
    return torch.stack(maps, dim=1)
