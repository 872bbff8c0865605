"""The gradient ratio through an integral image: constant work per pixel at every radius, exact sums.

Integer images are summed in int32. The integral image may wrap around, but every box sum is a difference modulo 2^32
and fits, so it is exact: half a 35-px window of 16-bit pixels stays below 2^26. Float images, and the few integer ones
whose half windows pass 2^31, are summed in float64, where the cancellation of an integral image (2.5e-4 in float32)
stays near 1e-13 and integers stay exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.gradient_ratio.scales import FULL_SCALE, Scales


def _integral_image(images: Tensor, pad: int, dtype: torch.dtype) -> Tensor:
    """Sums over all pixels above and left: [B, H, W] → [B, H+2p+1, W+2p+1] of the reflect-padded images."""
    # Padding has no integer kernel everywhere; 16-bit integers are exact in float32.
    floats = images if images.is_floating_point() else images.to(torch.float32)
    padded = F.pad(floats, (pad,) * 4, mode="reflect").to(dtype)
    # Rows first: the column sums then run over contiguous rows.
    summed = padded.cumsum(-1, dtype=dtype).cumsum(-2, dtype=dtype)
    return F.pad(summed, (1, 0, 1, 0))


def _log_neighbours(total: Tensor, pad: int, offset: float, unit: float, out: Tensor) -> None:
    """ln of the sum of the eight neighbours from the integral image: the 3x3 box without its centre."""
    height, width = out.shape[-2:]

    def box(radius: int) -> Tensor:
        a, b = pad - radius, pad + radius + 1
        rows = total[:, b : b + height] - total[:, a : a + height]
        return rows[:, :, b : b + width] - rows[:, :, a : a + width]

    out.copy_(box(1) - box(0)).add_(8 * offset).div_(unit).log_()


def _one_chunk(images: Tensor, scales: Scales, unit: float, maps: Tensor) -> None:
    height, width = images.shape[-2:]
    pad, offset = scales.reach, scales.offset * unit
    dtype = torch.int32 if scales.sums_fit(images.dtype, 31) else torch.float64
    total = _integral_image(images[:, 0], pad, dtype)
    halves = maps.new_empty(4, images.shape[0], height, width)
    if scales.blind_spot:
        _log_neighbours(total, pad, offset, unit, maps[:, 0])
    for slot, radius in enumerate(scales.radii, start=int(scales.blind_spot)):
        lines = scales.lines(radius)
        side, a = 2 * radius + 1, pad - radius  # a, b: integral-image lines at both ends of pixel 0's window
        b = a + side
        # Sums over `side` whole rows (columns) once; two differences each then give the halves, rounded to float32.
        rows = total[:, b : b + height] - total[:, a : a + height]
        cols = total[:, :, b : b + width] - total[:, :, a : a + width]
        halves[0] = rows[:, :, a + lines : a + lines + width] - rows[:, :, a : a + width]
        halves[1] = rows[:, :, b : b + width] - rows[:, :, b - lines : b - lines + width]
        halves[2] = cols[:, a + lines : a + lines + height] - cols[:, a : a + height]
        halves[3] = cols[:, b : b + height] - cols[:, b - lines : b - lines + height]
        halves += offset * lines * side
        ratio = (halves[0::2] / halves[1::2]).log_().square_()
        torch.sqrt(ratio[0].add_(ratio[1]), out=maps[:, slot])
    if scales.sigmoid:
        maps.sigmoid_()


def integral(images: Tensor, scales: Scales) -> Tensor:
    """[B, 1, H, W] of a type in FULL_SCALE → float32 [B, maps, H, W]."""
    unit = FULL_SCALE[images.dtype]
    if scales.sigmoid:
        images, unit = (images if images.is_floating_point() else images.to(torch.float32) / unit).sigmoid(), 1.0
    shape = (images.shape[0], scales.maps, *images.shape[-2:])
    maps = torch.empty(shape, dtype=torch.float32, device=images.device)
    if not images.shape[0]:
        return maps  # padding refuses an empty batch
    # A CPU core keeps one image's sums in its cache; a GPU wants the whole batch at once.
    chunk = 1 if images.device.type == "cpu" else images.shape[0]
    for part, out in zip(images.split(chunk), maps.split(chunk), strict=True):
        _one_chunk(part, scales, unit, out)
    return maps
