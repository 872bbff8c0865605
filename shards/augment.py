"""Batched augmentation on the device of the batch; every choice is looked up from (seed, position).

Resampling is Pillow's bicubic (a = -1/2, widened when shrinking) of the cropped image, defined as two matrices per
image: `Wy @ image @ Wxᵀ`. Images are padded to multiples of 64, so that one batched product serves all of similar size.
On a CPU the same sums are taken over the few non-zero weights of each row: equal but for rounding (about 1e-7).
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from shards.addressed import uniform
from shards.errors import DataError
from shards.placing import placed

if TYPE_CHECKING:
    from shards.stream import Batch

_TRIES, _STEP = 10, 64
_CHUNK = 8  # images at a time on a CPU: what is between the steps then stays in its cache


@dataclass(frozen=True)
class Augment:
    """Random resized crop, horizontal flip and contrast jitter: a pure function of (seed, position) and the image.

    `crop_scale` bounds the share of the area, `crop_ratio` width / height, `flip` is a probability, and the contrast
    factor is uniform in [1 - contrast, 1 + contrast].
    """

    size: int = 224
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    contrast: float = 0.5

    @torch.no_grad()
    def __call__(self, batch: Batch, seed: int) -> Tensor:
        """The augmented images, fp32 [B, C, size, size] in [0, 1]."""
        flip = uniform(seed, "flip", batch.position, 1)[:, 0] < self.flip
        low = max(0.0, 1 - self.contrast)
        factor = low + uniform(seed, "contrast", batch.position, 1)[:, :, None, None] * (1 + self.contrast - low)
        return _resample(batch, self.boxes(batch, seed), flip, self.size, factor if self.contrast else None)

    def boxes(self, batch: Batch, seed: int) -> Tensor:
        """Crops as int64 [B, 4] of (top, left, height, width), in pixels of each image.

        Ten candidates are drawn at once and the first that fits is taken; if none fits, the largest central crop whose
        ratio is allowed. Arithmetic is in fp64, so that rounding to whole pixels agrees between devices.
        """
        draws = uniform(seed, "crop", batch.position, 4 * _TRIES).double().view(-1, _TRIES, 4)
        area, ratio, top, left = draws.unbind(-1)
        full = _sizes(batch)
        low, high = self.crop_ratio
        area = full.prod(1)[:, None] * (self.crop_scale[0] + area * (self.crop_scale[1] - self.crop_scale[0]))
        ratio = (math.log(low) + ratio * (math.log(high) - math.log(low))).exp()
        sides = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()], dim=-1)  # [B, 10, 2]
        fits = ((sides >= 1) & (sides <= full[:, None])).all(-1)
        # torchvision draws the corner with randint(0, room), both ends included
        corner = ((full[:, None] - sides + 1) * torch.stack([top, left], dim=-1)).floor()
        first = fits.to(torch.uint8).argmax(1)
        found = torch.cat([corner, sides], dim=-1)[torch.arange(len(first), device=first.device), first]
        height, width = full.unbind(1)
        central = torch.stack([height.minimum((width / low).round()), width.minimum((height * high).round())], dim=1)
        central = torch.cat([((full - central) / 2).floor(), central], dim=1)
        return torch.where(fits.any(1, keepdim=True), found, central).long()


@torch.no_grad()
def resize_center(batch: Batch, size: int, crop: int | None = None) -> Tensor:
    """The central `crop` × `crop` pixels (the whole of a side that is shorter) resized to fp32 [B, C, size, size]."""
    full = _sizes(batch).long()
    sides = full if crop is None else full.clamp(max=crop)
    boxes = torch.cat([(full - sides) // 2, sides], dim=1)
    return _resample(batch, boxes, torch.zeros(len(full), dtype=torch.bool, device=full.device), size)


def values(amplitudes: Tensor, scale: Tensor, decibels: Tensor) -> Tensor:
    """Amplitudes fp32 [G, C, H, W] → values in [0, 1] by the rules [G] of a Batch; overwrites its input."""
    images = amplitudes.div_(scale.float()[:, None, None, None]).clamp_(0, 1)
    if not decibels.is_cuda and not decibels.any():  # asking a GPU would wait for it
        return images
    span = decibels.float()[:, None, None, None]
    return torch.where(span == 0, images, (1 + 20 * images.log10() / span).clamp_(min=0))


def _sizes(batch: Batch) -> Tensor:
    """Height and width of every image, fp64 [B, 2]."""
    return placed([p.shape[-2:] for p in batch.pixels], batch.position.device, torch.float64)


def _resample(batch: Batch, boxes: Tensor, flip: Tensor, size: int, contrast: Tensor | None = None) -> Tensor:
    """Crop, flip, resize, and multiply the contrast by `contrast` [B, 1, 1, 1] → fp32 [B, C, size, size] in [0, 1]."""
    channels = {p.shape[0] for p in batch.pixels}
    if len(channels) != 1:
        raise DataError(
            f"the batch mixes images of {' and '.join(map(str, sorted(channels)))} channels",
            where="augmentation",
            do="train on sources with one channel count, or pack one band of the others",
        )
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, pixels in enumerate(batch.pixels):
        height, width = pixels.shape[-2:]
        groups[-(-height // _STEP) * _STEP, -(-width // _STEP) * _STEP].append(i)
    apply, chunk = (_gather, _CHUNK) if boxes.device.type == "cpu" else (_multiply, len(boxes))
    out = torch.empty(len(boxes), *channels, size, size, device=boxes.device)
    with torch.autocast(boxes.device.type, enabled=False):  # targets are computed from these images: fp32, always
        for padded, group in groups.items():
            members = placed(group, boxes.device)
            top, left, rise, run = boxes[members].unbind(1)
            down = _taps(top, rise, torch.zeros_like(flip[members]), size, padded[0])
            across = _taps(left, run, flip[members], size, padded[1])
            for part in (slice(first, first + chunk) for first in range(0, len(group), chunk)):
                rows = members[part]
                stack = _stack([batch.pixels[i] for i in group[part]], padded)
                stack = values(stack, batch.scale[rows], batch.decibels[rows])
                images = apply(apply(stack.mT, *(t[part] for t in across)).mT, *(t[part] for t in down)).clamp_(0, 1)
                if contrast is not None:
                    factor, mean = contrast[rows], images.mean(dim=(1, 2, 3), keepdim=True)
                    images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)
                out.index_copy_(0, rows, images)
    return out


def _stack(pixels: list[Tensor], padded: tuple[int, int]) -> Tensor:
    """Images of any dtype → fp32 [G, C, *padded]; what pads them gets no weight."""
    if all(p.shape[-2:] == padded and p.dtype == pixels[0].dtype for p in pixels):
        return torch.stack(pixels).float()
    images = torch.zeros(len(pixels), pixels[0].shape[0], *padded, device=pixels[0].device)
    for image, p in zip(images, pixels, strict=True):
        image[:, : p.shape[-2], : p.shape[-1]] = p
    return images


def _taps(start: Tensor, length: Tensor, flip: Tensor, size: int, padded: int) -> tuple[Tensor, Tensor]:
    """Bicubic weights that resize [start, start + length) to `size` pixels: columns and weights [G, size, taps].

    The weights of a row sum to 1. Its window is kept inside the padded image, so that no column occurs twice and the
    scatter into a matrix is deterministic.
    """
    taps = min(padded, 2 * math.ceil(2 * max(1.0, padded / size)) + 1)
    out = torch.arange(size, dtype=torch.float64, device=start.device)
    out = torch.where(flip[:, None], size - 1 - out, out)
    ratio = (length.double() / size)[:, None]
    spread = ratio.clamp(min=1)
    centre = start[:, None] + (out + 0.5) * ratio
    first = (centre - 2 * spread + 0.5).floor().clamp(0, padded - taps)
    index = first.long()[:, :, None] + torch.arange(taps, device=start.device)
    x = ((index + 0.5 - centre[:, :, None]) / spread[:, :, None]).float().abs_()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weight = weight * ((index >= start[:, None, None]) & (index < (start + length)[:, None, None]))
    return index, weight / weight.sum(-1, keepdim=True)


def _multiply(images: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The weights as matrices [G, size, n] @ fp32 [G, C, n, m] → fp32 [G, C, size, m]."""
    matrix = weight.new_zeros(*weight.shape[:2], images.shape[2]).scatter_(2, index, weight)
    return matrix[:, None] @ images


def _gather(images: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """`_multiply` on a CPU: only the weights that are not zero are touched."""
    (count, channels, n, m), (size, taps) = images.shape, index.shape[1:]
    row = index[:, None] + torch.arange(0, count * channels * n, n).view(count, channels, 1, 1)
    weight = weight[:, None].expand(-1, channels, -1, -1).reshape(-1, taps)
    rows = images.contiguous().view(-1, m)  # other strides take a slower path that rounds differently
    out = F.embedding_bag(row.view(-1, taps), rows, per_sample_weights=weight, mode="sum")
    return out.view(count, channels, size, m)
