"""The pixel control is fitted on training samples alone and gives the same numbers in every call."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foundation.evaluation.controls import pca_features, pixel_features
from foundation.evaluation.features import Listing, listing


def chips(count: int, seed: int, size: int = 80, channels: int = 1, bright: int = 255) -> Listing:
    rng = np.random.default_rng(seed)
    samples = [
        SimpleNamespace(
            pixels=rng.integers(0, bright, (channels, size, size), dtype=np.uint8),
            scale=255.0,
            decibels=0.0,
            label=i % 2,
            key=f"k{i}",
            source="toy",
        )
        for i in range(count)
    ]
    return listing(samples, ("a", "b"))


def test_test_samples_change_nothing_that_is_learnt_and_nothing_of_each_other() -> None:
    train = chips(12, 0)
    x, z = pca_features(train, chips(6, 1), None, 5)
    other, _ = pca_features(train, chips(9, 2, bright=30), None, 5)
    assert torch.equal(x, other)
    _, alone = pca_features(train, chips(6, 1).take(torch.tensor([4])), None, 5)
    torch.testing.assert_close(alone[0], z[4])
    assert x.dtype == z.dtype == torch.float32
    torch.testing.assert_close(x.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    assert torch.equal(pca_features(train, chips(6, 1), None, 5)[1], z)


@pytest.mark.parametrize(("count", "asked", "expected"), [(12, 5, 5), (12, 100, 12)])
def test_there_are_as_many_components_as_samples_allow(count: int, asked: int, expected: int) -> None:
    x, z = pca_features(chips(count, 0), chips(3, 1), None, asked)
    assert (x.shape, z.shape) == ((count, expected), (3, expected))


def test_a_direction_that_no_training_sample_has_is_not_seen_in_test_samples() -> None:
    x, z = pca_features(chips(12, 0), chips(3, 1), None)
    assert (x[:, 11] == 0).all()  # twelve samples and their mean: eleven directions
    assert (z[:, 11] == 0).all()
    assert (z[:, :11] != 0).all()


def test_only_the_middle_of_the_crop_is_seen_at_half_resolution() -> None:
    samples = chips(2, 0)
    pixels = torch.from_numpy(samples.reader[0].pixels).float() / 255
    middle = pixels[0, 8:72, 8:72].unflatten(1, (32, 2)).unflatten(0, (32, 2)).mean((1, 3))
    torch.testing.assert_close(pixel_features(samples)[0], (middle + 1 / 255).log().flatten())
    assert torch.equal(pixel_features(samples, 70), pixel_features(samples))
    small = pixel_features(samples, 32)[0].view(32, 32).exp() - 1 / 255
    torch.testing.assert_close(small, pixels[0, 24:56, 24:56])
    assert pixel_features(chips(2, 0, size=20)).shape == (2, 1024)


def test_channels_are_averaged() -> None:
    samples = chips(1, 0, channels=2)
    mean = torch.from_numpy(samples.reader[0].pixels).float().mean(0, keepdim=True) / 255
    middle = mean[0, 8:72, 8:72].unflatten(1, (32, 2)).unflatten(0, (32, 2)).mean((1, 3))
    torch.testing.assert_close(pixel_features(samples)[0], (middle + 1 / 255).log().flatten())
