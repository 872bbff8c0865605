"""Corruptions of test images: speckle, resolution, rotation, gain; every one a function of (seed, image, level).

They change amplitudes at native resolution, as another sensor would, before amplitude rule, crop and resizing:

- `speckle`: intensities times unit-mean Gamma variates of L looks (variance 1/L), independent from pixel to pixel. The
  images have speckle already; this is added to it.
- `resolution`: intensities averaged by a Gaussian so that a point of one pixel (full width at half maximum) becomes
  `factor` pixels wide. Detected images hold no phase: this is the loss of a multi-look product, whose speckle is
  averaged too.
- `rotation`: the image turned about its centre, bilinear, borders reflected. Stands for aspects that were not learnt:
  it needs no metadata, and few corpora say the aspect of a chip. Unlike another aspect it turns shadow and layover too,
  and between multiples of 90 degrees it smooths.
- `gain`: intensities times a factor; what passes full scale is clipped by the amplitude rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.evaluation.features import Listing
from shards.addressed import uniform
from shards.stream import Batch

FULL_WIDTH = math.sqrt(8 * math.log(2))  # of a Gaussian at half maximum, in standard deviations
_SLOTS = 1 << 22  # uniform numbers in memory at a time
_FACTORS = 32  # multiples of 2^-24, so many of which make no product that fp64 rounds to 0


def speckle(amplitude: Tensor, looks: float, seed: int, image: int) -> Tensor:
    """Amplitudes fp32 [C, H, W] times independent L-look speckle: intensities times Gamma(L) / L.

    A function of (seed, image, place) alone; `image` is any 64-bit number of the image. `looks` is a whole number, or
    infinite, which changes nothing.
    """
    if math.isinf(looks):
        return amplitude
    looks, pixels = int(looks), amplitude.numel()
    draws, step = [], max(1, min(_FACTORS, _SLOTS // pixels))
    for first in range(0, looks, step):  # a Gamma variate of L looks is the sum of L exponential ones
        position = torch.tensor([image], dtype=torch.int64)
        count = min(step, looks - first)
        purpose = f"evaluation/speckle/{looks}/{first}"
        chances = 1 - uniform(seed, purpose, position, count * pixels).double()
        draws.append(-chances.view(count, -1).prod(0).log())  # one logarithm for the sum of them all
    gamma = torch.stack(draws).sum(0) / looks
    return amplitude * gamma.sqrt().view_as(amplitude).to(amplitude)


def coarsen(amplitude: Tensor, factor: float) -> Tensor:
    """Amplitudes [C, H, W] whose intensity is averaged by a Gaussian: a point of one pixel becomes `factor` wide."""
    if factor == 1:
        return amplitude
    from scipy.special import ive  # comes with scikit-learn

    variance = (factor**2 - 1) / FULL_WIDTH**2
    reach = min(math.ceil(5 * math.sqrt(variance)), *(side - 1 for side in amplitude.shape[-2:]))
    # The discrete Gaussian (Lindeberg, PAMI 1990): samples of the continuous one are too narrow below a pixel.
    kernel = torch.from_numpy(ive(torch.arange(-reach, reach + 1).abs().numpy(), variance))
    kernel = (kernel / kernel.sum()).to(amplitude)
    intensity = F.pad(amplitude.square()[:, None], (reach,) * 4, mode="reflect")
    blurred = F.conv2d(F.conv2d(intensity, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return blurred[:, 0].sqrt()


def turn(amplitude: Tensor, degrees: float) -> Tensor:
    """Amplitudes [C, H, W] turned counter-clockwise about the centre, bilinear; what is outside is reflected."""
    if degrees == 0:
        return amplitude
    height, width = amplitude.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]], dtype=torch.float64)
    grid = F.affine_grid(matrix[None], [1, 1, height, width], align_corners=False)
    turned = F.grid_sample(amplitude.double()[None], grid, "bilinear", "reflection", align_corners=False)
    return turned[0].to(amplitude)


def amplify(amplitude: Tensor, gain: float) -> Tensor:
    """Amplitudes whose intensity is `gain` times as high."""
    return amplitude if gain == 1 else amplitude * math.sqrt(gain)


class Corruption(NamedTuple):
    """What is done to an amplitude fp32 [C, H, W] at a level: (amplitude, level, seed, image) → amplitude."""

    apply: Callable[[Tensor, float, int, int], Tensor]
    levels: tuple[float, ...]
    unit: str


CORRUPTIONS = {
    "speckle": Corruption(speckle, (math.inf, 16, 8, 4, 2, 1), "looks of added speckle"),
    "resolution": Corruption(lambda a, level, *_: coarsen(a, level), (1, 1.5, 2, 3, 4), "width of a pixel, pixels"),
    "rotation": Corruption(lambda a, level, *_: turn(a, level), (0, 5, 10, 20, 45, 90), "rotation, degrees"),
    "gain": Corruption(lambda a, level, *_: amplify(a, level), (1, 0.25, 0.5, 2, 4), "gain of the intensity"),
}
"""The first level of each changes nothing, bit for bit."""


def address(content_hash: str) -> int:
    """A 63-bit number of an image, from the hash of its pixels."""
    return int(content_hash[:16], 16) >> 1


def corrupted(batch: Batch, hashes: Sequence[str], kind: str, level: float, seed: int) -> Batch:
    """A batch on the CPU whose amplitudes, as shares of full scale, are corrupted; nothing is clipped yet."""
    apply = CORRUPTIONS[kind].apply
    shares = [p.float() / scale for p, scale in zip(batch.pixels, batch.scale, strict=True)]
    pixels = [apply(a, level, seed, address(name)) for a, name in zip(shares, hashes, strict=True)]
    return replace(batch, pixels=pixels, scale=torch.ones_like(batch.scale))


@dataclass(frozen=True)
class Corrupted(Listing):
    """A listing whose images are corrupted; what a sample looks like depends on it and `seed`, not on its batch."""

    kind: str = "gain"
    level: float = 1
    seed: int = 0

    @classmethod
    def of(cls, samples: Listing, kind: str, level: float, seed: int) -> Corrupted:
        """The samples of a listing, corrupted."""
        fields = {name: getattr(samples, name) for name in ("reader", "ids", "y", "classes", "keys", "hashes")}
        return cls(**fields, kind=kind, level=level, seed=seed)

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of at most `size` samples in order, amplitudes as shares of full scale."""
        for number, batch in enumerate(super().batches(size)):
            hashes = self.hashes[number * size : number * size + len(batch)]
            yield corrupted(batch, hashes, self.kind, self.level, self.seed)
