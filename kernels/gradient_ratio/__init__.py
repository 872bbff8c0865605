"""The multi-scale gradient-ratio targets of SAR-JEPA and SARATR-X v2, and the masked loss against them.

`gradient_ratio` gives the maps, `masked_loss` the squared error on masked patches without handing the maps out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.gradient_ratio.backends import BACKENDS, Backend, resolve
from kernels.gradient_ratio.loss import masked_loss
from kernels.gradient_ratio.scales import checked

__all__ = ["BACKENDS", "Backend", "gradient_ratio", "masked_loss", "resolve"]


def gradient_ratio(
    images: Tensor,
    radii: Sequence[int] = (5, 9, 13, 17),
    offset: float = 0.01,
    centre: str = "include",
    backend: str = "auto",
    *,
    blind_spot: bool = False,
    sigmoid: bool = False,
) -> Tensor:
    """sqrt(ln(left/right)² + ln(top/bottom)²) of the four half windows of side 2r+1, one map per radius r.

    images: [B, 1, H, W], float32 or float64 in [0, 1], or uint8/uint16 (read as value / 255 or / 65535). `offset` is
    added to every pixel, reflect-padded; `centre` is "include" (the middle line in both halves) or "exclude".
    `blind_spot` puts a map before the others: ln of the sum of the eight neighbours. `sigmoid` passes the pixels
    (before the offset) and the maps through 1 / (1 + e^-x).

    The defaults are SAR-JEPA's target (arXiv 2311.15153). SARATR-X v2's six scales (arXiv 2607.23238) are radii
    (3, 5, 9, 13, 17), offset 1e-6, centre "exclude", blind_spot and sigmoid: the published code adds 1e-6 to each sum
    instead of each pixel, which changes no value by more than 5e-7.

    Returns float32 [B, maps, H, W] without a gradient, whatever autocast says: the log ratio of two nearly equal sums
    does not survive bf16. Raises ValueError for an unknown backend or one that cannot run here, a radius that reflect
    padding cannot serve, an offset that is not positive, another shape or dtype.
    """
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"gradient_ratio takes [B, 1, H, W], not {tuple(images.shape)}")
    scales = checked(images, radii, offset, centre, blind_spot, sigmoid)
    name = resolve(backend, images.device.type)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        return BACKENDS[name].run(images, scales)
