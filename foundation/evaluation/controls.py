"""Controls: a score is worth what it adds to an untrained encoder, to pixels and to a look at the background alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from foundation.evaluation.features import Listing
from shards.augment import values

PIXELS = "pixels (PCA)"
WINDOW, SIDE = 64, 32  # the pixel control looks at the centre of a chip, where its target is, at half the resolution
CORNER = 40 / 128
NUMBERS = (
    "log mean", "log deviation", "log 10th percentile", "log median", "log 90th percentile", "coefficient of variation",
    "lag-1 correlation along rows", "lag-1 correlation along columns", "lag-2 correlation along rows",
    "lag-2 correlation along columns",
)  # fmt: skip


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of two equal windows over their last two axes; 0 where one of them is constant."""
    a, b = (t - t.mean((-2, -1), keepdim=True) for t in (a, b))
    scale = (a.square().sum((-2, -1)) * b.square().sum((-2, -1))).sqrt()
    return (a * b).sum((-2, -1)) / scale.clamp_min(1e-12)


def background_features(images: Iterable[Tensor]) -> Tensor:
    """Ten texture numbers (`NUMBERS`) of each image's background: amplitudes [C, H, W] in [0, 1] → fp32 [N, 10].

    Only the four corners are looked at, squares of CORNER times the shorter side (at least 4 pixels), so a target in
    the middle is not seen; the numbers are averaged over corners and channels.
    """
    return torch.stack([_texture(image) for image in images])


def _texture(image: Tensor) -> Tensor:
    image = image.double()
    side = min(max(4, round(CORNER * min(image.shape[-2:]))), *image.shape[-2:])
    top, bottom = image[..., :side, :], image[..., -side:, :]
    part = torch.stack([half[..., cut] for half in (top, bottom) for cut in (slice(None, side), slice(-side, None))])
    log = (part + 1 / 255).log()
    flat = log.flatten(-2)
    levels = flat.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=flat.dtype), dim=-1)
    varied = part.std((-2, -1)) / part.mean((-2, -1)).clamp_min(1e-6)
    lags = [_correlation(log[..., :-n, :], log[..., n:, :]) for n in (1, 2)]
    lags += [_correlation(log[..., :, :-n], log[..., :, n:]) for n in (1, 2)]
    numbers = [flat.mean(-1), flat.std(-1), *levels, varied, lags[2], lags[0], lags[3], lags[1]]
    return torch.stack([n.mean() for n in numbers]).float()


def listing_background(samples: Listing, crop: int | None = None) -> Tensor:
    """`background_features` of the samples at native resolution, after the centre crop the encoder gets: fp32 [N, 10].

    The crop is skipped along an axis that is not longer than it.
    """
    return background_features(_native(samples, crop))


def _native(samples: Listing, crop: int | None) -> Iterable[Tensor]:
    """The samples one by one at native resolution, after the centre crop: values in [0, 1] fp32 [C, H, W]."""
    for part in samples.batches(64):
        for pixels, scale, decibels in zip(part.pixels, part.scale, part.decibels, strict=True):
            yield centre(values(pixels.float()[None], scale[None], decibels[None])[0], crop)


def pca_features(train: Listing, test: Listing, crop: int | None, components: int = 100) -> tuple[Tensor, Tensor]:
    """The pixel control of train and test samples: fp32 [N, D] each, D = min(components, N_train, 1024).

    Principal components of `pixel_features`, fitted on TRAIN alone, not whitened.
    """
    seen = pixel_features(train, crop)
    basis = PixelComponents.fit(seen, components)
    return basis.project(seen), basis.project(pixel_features(test, crop))


def pixel_features(samples: Listing, crop: int | None = None) -> Tensor:
    """Logarithms of the middle of each sample: fp32 [N, 1024].

    The centre 64 x 64 pixels of the centre crop (or as many as there are), the mean of the channels, averaged to
    32 x 32; ln(value + 1/255).
    """
    small = [adaptive_avg_pool2d(centre(image, WINDOW), SIDE).mean(0).flatten() for image in _native(samples, crop)]
    return (torch.stack(small) + 1 / 255).log()


@dataclass(frozen=True)
class PixelComponents:
    """Principal axes of the pixels of training samples; the same numbers in every call (full SVD, signs fixed)."""

    fitted: Any

    @classmethod
    def fit(cls, train: Tensor, components: int = 100) -> PixelComponents:
        """Axes of `train` [N, P]: min(components, N, P) of them."""
        from sklearn.decomposition import PCA

        return cls(PCA(min(components, *train.shape), svd_solver="full").fit(train.double().numpy()))

    def project(self, samples: Tensor) -> Tensor:
        """Coordinates of `samples` [M, P] on the axes, relative to the mean of the training samples: fp32 [M, D].

        Axes along which the training samples do not differ give 0: N samples span at most N - 1 directions, and a
        classifier that standardises would blow up what test samples have in the others.
        """
        spread = torch.from_numpy(self.fitted.explained_variance_)
        found = torch.from_numpy(self.fitted.transform(samples.double().numpy()))
        return (found * (spread > 1e-12 * spread.max())).float()


def centre(image: Tensor, crop: int | None) -> Tensor:
    """The centre `crop` × `crop` of an image [C, H, W], or less where it is smaller, clipped to [0, 1]."""
    for axis in (-2, -1):
        length = image.shape[axis]
        if crop is not None and length > crop:
            image = image.narrow(axis, (length - crop) // 2, crop)
    return image.clamp(0, 1)
