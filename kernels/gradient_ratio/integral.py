"""The gradient ratio through an integral image: constant work per pixel at every radius, exact sums.

Integer images are summed in int32. The integral image may wrap around, but every box sum is a difference modulo 2^32
and fits, so it is exact: half a 35-px window of 16-bit pixels stays below 2^26. Float images are summed in float64,
where the cancellation of an integral image (2.5e-4 in float32) stays near 1e-13.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def _integral_image(images: Tensor, pad: int) -> Tensor:
    """Sums over all pixels above and left: [B, H, W] → [B, H+2p+1, W+2p+1] of the reflect-padded images."""
    if images.is_floating_point():
        padded, dtype = F.pad(images, (pad,) * 4, mode="reflect").to(torch.float64), torch.float64
    else:
        # Padding has no integer kernel everywhere; every integer up to 2^24 is exact in float32.
        padded, dtype = F.pad(images.to(torch.float32), (pad,) * 4, mode="reflect").to(torch.int32), torch.int32
    # Rows first: the column sums then run over contiguous rows.
    summed = padded.cumsum(-1, dtype=dtype).cumsum(-2, dtype=dtype)
    return F.pad(summed, (1, 0, 1, 0))


def _one_chunk(images: Tensor, radii: Sequence[int], offset: float, centre: str, maps: Tensor) -> None:
    height, width = images.shape[-2:]
    pad = max(radii)
    total = _integral_image(images[:, 0], pad)
    halves = maps.new_empty(4, images.shape[0], height, width)
    for slot, radius in enumerate(radii):
        lines = radius + (centre == "include")
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


def integral(images: Tensor, radii: Sequence[int], offset: float, centre: str, unit: float) -> Tensor:
    """[B, 1, H, W] → float32 [B, len(radii), H, W]; `unit` is the pixel value that means 1.0."""
    shape = (images.shape[0], len(radii), *images.shape[-2:])
    maps = torch.empty(shape, dtype=torch.float32, device=images.device)
    # A CPU core keeps one image's sums in its cache; a GPU wants the whole batch at once.
    chunk = 1 if images.device.type == "cpu" else images.shape[0]
    for part, out in zip(images.split(chunk), maps.split(chunk), strict=True):
        _one_chunk(part, radii, offset * unit, centre, out)
    return maps
