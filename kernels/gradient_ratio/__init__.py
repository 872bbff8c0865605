"""The multi-scale gradient-ratio target of SAR-JEPA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gradient_ratio.integral import integral
from kernels.gradient_ratio.reference import reference


class Backend(NamedTuple):
    """A way to compute the operator, and why it cannot run here ('' when it can)."""

    run: Callable[..., Tensor]
    description: str
    unavailable: str = ""


def _definition(images: Tensor, radii: Sequence[int], offset: float, centre: str, unit: float) -> Tensor:
    scaled = images if images.is_floating_point() else images.to(torch.float32) / unit
    return reference(scaled, radii, offset, centre)


BACKENDS = {
    "reference": Backend(_definition, "the definition: dense convolutions in the images' dtype"),
    "integral": Backend(integral, "integral image: int32 sums of integer images, float64 sums of float images"),
}


def gradient_ratio(
    images: Tensor,
    radii: Sequence[int] = (5, 9, 13, 17),
    offset: float = 0.01,
    centre: str = "include",
    backend: str = "auto",
) -> Tensor:
    """sqrt(ln(left/right)² + ln(top/bottom)²) of the four half windows of side 2r+1, one map per radius r.

    images: [B, 1, H, W], float in [0, 1] or uint8/uint16 (read as value / 255 or / 65535). `offset` is added to every
    pixel; `centre` is "include" (the middle line in both halves, as published) or "exclude". Returns float32
    [B, len(radii), H, W] without a gradient, whatever autocast says: the log ratio of two nearly equal sums does not
    survive bf16. Raises ValueError for an unknown backend, a radius that reflect padding cannot serve, another shape.
    """
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"gradient_ratio takes [B, 1, H, W], not {tuple(images.shape)}")
    if max(radii) >= min(images.shape[-2:]) or min(radii) < 1:
        raise ValueError(f"radii {tuple(radii)} need 1 <= r < image side, which is {min(images.shape[-2:])}")
    name = "integral" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"unknown target backend {backend!r}: choose auto, {', '.join(BACKENDS)}")
    unit = 1.0 if images.is_floating_point() else float(torch.iinfo(images.dtype).max)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        if images.is_floating_point() and images.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"targets are computed from float32, float64 or integer images, not {images.dtype}")
        return BACKENDS[name].run(images, radii, offset, centre, unit)
