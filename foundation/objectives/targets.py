"""What is predicted. A target turns fp32 images into maps that are cut into patches, exactly and without a gradient.

Every target is one class with a row in `objectives.registry`. A map has one value per pixel, or one per square cell of
pixels (histograms); how many numbers a patch has follows from the number of maps and the cell alone, so that a plan
knows the width of a prediction without an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from foundation.config_text import Problem
from foundation.objectives.half_windows import log_ratios
from kernels.gradient_ratio import gradient_ratio

if TYPE_CHECKING:
    from foundation.config import Config


class Target(Protocol):
    """What computes the maps of an image, and how they are called."""

    names: tuple[str, ...]

    def maps(self, images: Tensor) -> Tensor:
        """fp32 [B, C, H, W] → fp32 [B, len(names), H / cell, W / cell], whatever autocast says, without a gradient."""
        ...


class FixedTarget(ABC):
    """A target that is a function of the image: the same maps of every channel, channel after channel.

    `names` are those of all maps, `cell` is the side of the square of pixels that one value of a map stands for.
    """

    cell = 1

    def __init__(self, names: Sequence[str], channels: int = 1) -> None:
        prefix = [""] if channels == 1 else [f"c{c}_" for c in range(channels)]
        self.names = tuple(p + name for p in prefix for name in names)

    def conflicts(self, config: Config) -> Iterator[Problem]:
        """What of a configuration this target cannot serve."""
        yield from ()

    def maps(self, images: Tensor) -> Tensor:
        """Images fp32 [B, C, H, W] in [0, 1] → fp32 [B, len(names), H / cell, W / cell]; no autocast, no gradient."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.of_images(images.detach())

    def of_images(self, images: Tensor) -> Tensor:
        """The maps of whole images; those of one channel know nothing of the others."""
        maps = self.of_channel(images.flatten(0, 1)[:, None])
        return maps.reshape(images.shape[0], -1, *maps.shape[-2:])

    @abstractmethod
    def of_channel(self, image: Tensor) -> Tensor:
        """The maps of single channels: [N, 1, H, W] → [N, maps, H / cell, W / cell]."""


def patchify(maps: Tensor, patch: int) -> Tensor:
    """[B, M, H, W] → [B, N, M · patch²]: per patch the maps one after another, each row by row.

    `patch` in values of the map: pixels, or cells where a value stands for a cell.
    """
    batch, channels, height, width = maps.shape
    cut = maps.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: [B, N, M · patch²] → [B, M, H, W]."""
    batch, (rows, cols) = tokens.shape[0], grid
    cut = tokens.view(batch, rows, cols, -1, patch, patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * patch, cols * patch)


def standardise(maps: Tensor, dims: tuple[int, ...]) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-6) over `dims`, the variance over n - 1 values: MAE (arXiv 2111.06377, 4.1)."""
    variance, mean = torch.var_mean(maps, dim=dims, keepdim=True)
    return (maps - mean) / (variance + 1e-6).sqrt()


def into_patches(maps: Tensor, patch: int) -> Tensor:
    """[B, M, H, W] → [B, M, rows, patch, columns, patch], `patch` in values of the map."""
    return maps.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))


class Pixels(FixedTarget):
    """The image itself, not normalised: LoMaR-SAR of the paper's comparison."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__(("pixel",), channels)

    def of_channel(self, image: Tensor) -> Tensor:
        """[N, 1, H, W] → the same."""
        return image


class NormalisedPixels(Pixels):
    """Pixels less the mean of their patch over its standard deviation, all channels of a patch together.

    MAE (arXiv 2111.06377, section 4.1), LoMaR (arXiv 2206.00790).
    """

    def __init__(self, patch: int, channels: int = 1) -> None:
        super().__init__(channels)
        self.patch = patch

    def of_images(self, images: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]; a patch of equal pixels becomes zero."""
        return standardise(into_patches(images, self.patch), (1, 3, 5)).view_as(images)


class StandardisedPatches(FixedTarget):
    """Another target's maps, each patch of each map less its mean over its standard deviation, as in SARATR-X v2."""

    def __init__(self, target: FixedTarget, patch: int) -> None:
        self.target, self.patch = target, patch // target.cell
        self.names, self.cell = target.names, target.cell

    def conflicts(self, config: Config) -> Iterator[Problem]:
        """Those of the other."""
        yield from self.target.conflicts(config)

    def of_channel(self, image: Tensor) -> Tensor:
        """[N, 1, H, W] → [N, maps, H / cell, W / cell]; a patch of equal values becomes zero."""
        maps = self.target.of_channel(image)
        return standardise(into_patches(maps, self.patch), (3, 5)).view_as(maps)


class LowPass(FixedTarget):
    """The image without its frequencies above `cutoff` cycles per pixel: an ideal, circular low-pass filter.

    The SAR-JEPA paper names a low-pass target and neither its kind nor its cut-off. This is the filter of PixMIM (arXiv
    2303.02416), which keeps a radius of 40 in the spectrum of 224 pixels. As there, the image is taken to be periodic.
    """

    def __init__(self, cutoff: float, channels: int = 1) -> None:
        super().__init__(("pixel",), channels)
        self.cutoff = cutoff

    def of_channel(self, image: Tensor) -> Tensor:
        """[N, 1, H, W] → the same."""
        height, width = image.shape[-2:]
        down = torch.fft.fftfreq(height, device=image.device)
        across = torch.fft.rfftfreq(width, device=image.device)
        kept = down[:, None].square() + across.square() <= self.cutoff**2
        return torch.fft.irfft2(torch.fft.rfft2(image) * kept, s=(height, width))


class RatioTarget(FixedTarget):
    """What the targets of half windows share: radii in pixels, the offset of every pixel, the centre line."""

    def __init__(
        self, radii: Sequence[int], offset: float, centre: str, channels: int = 1, names: Sequence[str] | None = None
    ) -> None:
        self.radii, self.offset, self.centre = tuple(radii), offset, centre
        super().__init__([f"r{r}" for r in self.radii] if names is None else names, channels)

    def conflicts(self, config: Config) -> Iterator[Problem]:
        """Reflect padding serves radii below the side of the image."""
        side = config.data.image_size
        if max(self.radii) >= side:
            text = f"radii below data.image_size = {side} (reflect padding)"
            yield Problem("objective.radii", list(self.radii), text, others=("data.image_size",))


class GradientRatio(RatioTarget):
    """SAR-JEPA's target (arXiv 2311.15153): the gradient-ratio magnitude at several radii, not normalised."""

    def of_channel(self, image: Tensor) -> Tensor:
        """[N, 1, H, W] → [N, len(radii), H, W]."""
        return gradient_ratio(image, self.radii, self.offset, self.centre)


class GaussianRatio(RatioTarget):
    """The gradient ratio with half windows weighted by a Gaussian, SAR-JEPA's other kernel (arXiv 2311.15153).

    The weight of a pixel i rows and j columns away is exp(-(i² + j²) / 2s²) with s = 0.3 (r - 1) + 0.8 pixels. The
    published code leaves the centre line out of both halves; its box kernel has it in both.
    """

    def of_channel(self, image: Tensor) -> Tensor:
        """[N, 1, H, W] → [N, len(radii), H, W]."""
        spreads = [0.3 * (r - 1) + 0.8 for r in self.radii]
        ratios = zip(self.radii, spreads, strict=True)
        return torch.cat([torch.hypot(*log_ratios(image, r, self.offset, self.centre, s)) for r, s in ratios], dim=1)


class StructuralScales(RatioTarget):
    """SARATR-X v2's scales (arXiv 2607.23238): a 3x3 blind spot and half windows between two sigmoids.

    Its values are radii (3, 5, 9, 13, 17), offset 1e-6 and the centre line excluded.
    """

    def __init__(self, radii: Sequence[int], offset: float, centre: str, channels: int = 1) -> None:
        super().__init__(radii, offset, centre, channels, ("blind", *(f"r{r}" for r in radii)))

    def of_channel(self, image: Tensor) -> Tensor:
        """[N, 1, H, W] → [N, 1 + len(radii), H, W]."""
        return gradient_ratio(image, self.radii, self.offset, self.centre, blind_spot=True, sigmoid=True)


class MeanScale(RatioTarget):
    """The mean of SARATR-X v2's scales, one map: their fusion by a softmax of equal weights."""

    def __init__(self, radii: Sequence[int], offset: float, centre: str, channels: int = 1) -> None:
        super().__init__(radii, offset, centre, channels, ("fused",))
        self.scales = StructuralScales(radii, offset, centre)

    def of_channel(self, image: Tensor) -> Tensor:
        """[N, 1, H, W] → the same."""
        return self.scales.of_channel(image).mean(1, keepdim=True)
