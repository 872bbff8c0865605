"""Targets are exact: published values where there are some, their definition everywhere, and nothing of autocast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from foundation.objectives.half_windows import correlate, log_ratios, published_log_ratios
from foundation.objectives.histograms import HOG, SARHOG, gaussian_window, histogram, sobel
from foundation.objectives.targets import (
    FixedTarget,
    GaussianRatio,
    GradientRatio,
    LowPass,
    MeanScale,
    NormalisedPixels,
    Pixels,
    StructuralScales,
    patchify,
)

GOLDEN = Path(__file__).parents[1] / "golden"
BRIEF = settings(max_examples=12, deadline=None)
RADII = (5, 9, 13, 17)
V2 = ((3, 5, 9, 13, 17), 1e-6, "exclude")
EVERY: dict[str, Callable[[int], FixedTarget]] = {
    "pixels": Pixels,
    "normalised pixels": lambda channels: NormalisedPixels(16, channels),
    "low pass": lambda channels: LowPass(0.2, channels),
    "box": lambda channels: GradientRatio(RADII, 0.01, "include", channels),
    "gaussian": lambda channels: GaussianRatio(RADII, 0.01, "exclude", channels),
    "v2": lambda channels: StructuralScales(*V2, channels),
    "v2 mean": lambda channels: MeanScale(*V2, channels),
    "hog": lambda channels: HOG(8, 9, None, channels),
    "hog weighted": lambda channels: HOG(8, 9, 16, channels),
    "sar-hog": lambda channels: SARHOG((5, 9), 0.01, "include", 8, 9, channels),
}


def golden(file: str) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Images in [0, 1], and the values of a reference file."""
    with np.load(GOLDEN / file, allow_pickle=False) as values:
        arrays = dict(values.items())
    return torch.from_numpy(arrays["images"]).float() / 255, arrays


def speckle(*shape: int, seed: int = 0) -> Tensor:
    """One-look amplitudes in [0, 1], where no two halves of a window are equal by chance."""
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    return (0.2 * noise.square().sum(0).sqrt()).clamp(0, 1)


def test_gaussian_half_windows_are_the_published_ones() -> None:
    images, values = golden("target_variants.npz")
    ours = GaussianRatio(RADII, 0.01, "exclude").maps(images)
    np.testing.assert_allclose(ours.numpy(), values["gaussian"], rtol=0, atol=3e-5)


@pytest.mark.parametrize(("window", "name"), [(None, "no_gaussian_window"), (16, "gaussian_window_16")])
def test_hog_has_the_published_cells_and_36_values_per_patch_to_the_last_bits(window: int | None, name: str) -> None:
    images, values = golden("hog_targets.npz")
    cells = HOG(8, 9, window).maps(images)
    np.testing.assert_allclose(cells.numpy(), values[f"{name}_cells"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(patchify(cells, 2).numpy(), values[f"{name}_patches"], rtol=0, atol=1e-6)


def test_sar_hog_by_published_sums_has_the_published_values() -> None:
    images, values = golden("target_variants.npz")
    cells = SARHOG(RADII, 0.01, "include", 8, 9, exact=False).maps(images)
    ours = patchify(cells, 2).unflatten(-1, (4, 36)).transpose(1, 2)
    errors = np.abs(ours.numpy() - values["sar_hog_patches"])
    assert (errors > 1e-4).mean() <= 1e-3


def test_six_scales_and_their_mean_are_the_published_ones() -> None:
    images, values = golden("structural_targets_v2.npz")
    scales, mean = StructuralScales(*V2), MeanScale(*V2)
    assert scales.names == ("blind", "r3", "r5", "r9", "r13", "r17")
    np.testing.assert_allclose(scales.maps(images).numpy(), values["scales"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(mean.maps(images)[:, 0].numpy(), values["fused_equal_weights"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("channels", [1, 2])
def test_maps_have_names_cells_and_channels_and_do_not_feel_autocast(name: str, channels: int) -> None:
    target, images = EVERY[name](channels), speckle(3, channels, 48, 64)
    maps = target.maps(images)
    assert maps.dtype == torch.float32
    assert maps.shape == (3, len(target.names), 48 // target.cell, 64 // target.cell)
    assert len(set(target.names)) == len(target.names)
    assert torch.isfinite(maps).all()
    with torch.autocast("cpu", torch.bfloat16):
        again = target.maps(images.clone().requires_grad_())
    assert torch.equal(again, maps)
    assert not again.requires_grad
    if channels == 2 and name != "normalised pixels":
        alone = EVERY[name](1)
        assert [n[:3] for n in target.names] == ["c0_"] * len(alone.names) + ["c1_"] * len(alone.names)
        assert torch.equal(maps[:, len(alone.names) :], alone.maps(images[:, 1:]))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_an_image_without_structure_has_a_finite_target(name: str, level: float) -> None:
    maps = EVERY[name](1).maps(torch.full((1, 1, 48, 48), level))
    assert torch.isfinite(maps).all()
    flat = {"pixels": level, "low pass": level, "normalised pixels": 0.0, "v2": None, "v2 mean": None}.get(name, 0.0)
    if flat is not None:
        assert torch.allclose(maps, torch.full_like(maps, flat), atol=1e-6)


def dense(image: Tensor, radius: int, centre: str, spread: float) -> Tensor:
    """The magnitude of Gaussian half windows as the definition says, in float64."""
    steps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weight = torch.exp(-(steps[:, None] ** 2 + steps**2) / (2 * spread**2))
    left = (weight * (steps <= 0 if centre == "include" else steps < 0)).expand(2 * radius + 1, -1)
    halves = torch.stack([left, left.flip(1), left.T, left.T.flip(0)])[:, None]
    sums = F.conv2d(F.pad(image, (radius,) * 4, mode="reflect").double() + 0.01, halves)
    across, down = (sums[:, 0] / sums[:, 1]).log(), (sums[:, 2] / sums[:, 3]).log()
    return (across**2 + down**2).sqrt()


@BRIEF
@given(radius=st.integers(1, 12), centre=st.sampled_from(["include", "exclude"]), seed=st.integers(0, 99))
def test_gaussian_half_windows_are_their_definition_with_either_centre(radius: int, centre: str, seed: int) -> None:
    image = speckle(1, 1, 20, 27, seed=seed)
    ours = GaussianRatio((radius,), 0.01, centre).maps(image)
    assert torch.allclose(ours[:, 0].double(), dense(image, radius, centre, 0.3 * (radius - 1) + 0.8), atol=1e-6)


@BRIEF
@given(radius=st.integers(1, 12), centre=st.sampled_from(["include", "exclude"]), seed=st.integers(0, 99))
def test_both_ways_to_sum_half_windows_agree_and_have_the_magnitude_of_the_kernel(
    radius: int, centre: str, seed: int
) -> None:
    image = speckle(2, 1, 20, 27, seed=seed)
    exact, published = log_ratios(image, radius, 0.01, centre), published_log_ratios(image, radius, 0.01, centre)
    for ours, theirs in zip(exact, published, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(torch.hypot(*exact), GradientRatio((radius,), 0.01, centre).maps(image), atol=1e-5)


@BRIEF
@given(length=st.integers(1, 100), taps=st.integers(1, 40), kinds=st.integers(1, 3))
def test_lines_are_correlated_with_every_profile_at_any_length(length: int, taps: int, kinds: int) -> None:
    generator = torch.Generator().manual_seed(length)
    lines = torch.rand(2, 3, length + taps - 1, generator=generator, dtype=torch.float64)
    profiles = torch.rand(kinds, taps, generator=generator, dtype=torch.float64)
    expected = F.conv1d(lines.flatten(0, 1)[:, None], profiles[:, None]).unflatten(0, (2, 3))
    assert torch.allclose(correlate(lines, profiles), expected.movedim(2, 0), atol=1e-12)


def test_halves_that_mirror_each_other_have_no_gradient_at_all() -> None:
    across, down = log_ratios(speckle(2, 1, 40, 40), 9, 0.01, "include")
    assert not across[..., [0, -1]].any()
    assert not down[..., [0, -1], :].any()


@BRIEF
@given(
    bins=st.integers(1, 12), turn=st.floats(0, 2 * np.pi, exclude_max=True), cell=st.sampled_from([1, 2, 4]),
    size=st.floats(0.1, 10),
)  # fmt: skip
def test_a_gradient_falls_into_the_bin_of_its_undirected_angle(bins: int, turn: float, cell: int, size: float) -> None:
    across, down = (torch.full((1, 1, 4, 8), float(size * f(turn))) for f in (np.sin, np.cos))
    cells = histogram(across, down, bins, cell)
    assert cells.shape == (1, bins, 4 // cell, 8 // cell)
    assert torch.allclose(cells.square().sum(1), torch.ones(()), atol=1e-5)
    place = bins * (turn % np.pi) / np.pi
    if min(place % 1, 1 - place % 1) > 1e-3:
        assert (cells[:, int(place)] > 0.999).all()


def test_a_cell_adds_the_magnitudes_of_its_own_pixels_and_its_norm_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    across, down = torch.randn(2, 2, 1, 8, 12, generator=generator).unbind(0)
    cells = histogram(across, down, 9, 4)
    sums = torch.zeros(2, 9, 2, 3, dtype=torch.float64)
    for n, row, column in np.ndindex(2, 8, 12):
        a, d = float(across[n, 0, row, column]), float(down[n, 0, row, column])
        sums[n, int(np.floor(np.arctan2(a, d) / np.pi * 9)) % 9, row // 4, column // 4] += np.hypot(a, d)
    assert torch.allclose(cells.double(), sums / sums.norm(dim=1, keepdim=True), atol=1e-6)


def test_sobel_gradients_are_the_convolutions_of_the_definition() -> None:
    image = speckle(2, 1, 9, 14)
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    expected = F.conv2d(F.pad(image, (1,) * 4, mode="reflect"), torch.stack([kernel, kernel.T])[:, None])
    assert torch.allclose(torch.cat(sobel(image), dim=1), expected, atol=1e-6)


def test_a_gaussian_window_repeats_with_sum_one_and_deviation_of_half_its_side() -> None:
    weight = gaussian_window(16, 32, 48, torch.device("cpu"))
    assert torch.equal(weight[:16, :16], weight[16:, 32:])
    assert weight[:16, :16].sum().item() == pytest.approx(1, abs=1e-6)
    assert (weight[0, 0] / weight[0, 7]).item() == pytest.approx(np.exp(-(7.5**2 - 0.5**2) / 2 / 8**2), rel=1e-5)


def test_sar_hog_is_blind_to_gain_where_hog_of_ratios_should_be() -> None:
    target = SARHOG((5,), 1e-9, "include", 8, 9)
    image = speckle(1, 1, 32, 32) + 0.01
    assert torch.allclose(target.maps(image), target.maps(4 * image), atol=1e-4)


@BRIEF
@given(patch=st.sampled_from([2, 4, 8]), channels=st.integers(1, 3), seed=st.integers(0, 99))
def test_normalised_pixels_are_those_of_mae_for_any_number_of_channels(patch: int, channels: int, seed: int) -> None:
    images = speckle(2, channels, 16, 24, seed=seed)
    ours = patchify(NormalisedPixels(patch, channels).maps(images), patch)
    plain = patchify(images, patch)
    expected = (plain - plain.mean(-1, keepdim=True)) / (plain.var(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(ours, expected, atol=1e-4)


@BRIEF
@given(rows=st.integers(0, 20), columns=st.integers(0, 20), cutoff=st.floats(0.05, 0.5))
def test_a_low_pass_keeps_a_wave_below_its_cutoff_whole_and_leaves_nothing_of_one_above(
    rows: int, columns: int, cutoff: float
) -> None:
    frequency = np.hypot(rows / 40, columns / 48)
    if abs(frequency - cutoff) < 1e-6:
        return
    down, across = torch.arange(40, dtype=torch.float64)[:, None] / 40, torch.arange(48, dtype=torch.float64) / 48
    wave = torch.cos(2 * np.pi * (rows * down + columns * across) + 0.3).float()[None, None]
    expected = wave if frequency < cutoff else torch.zeros_like(wave)
    assert torch.allclose(LowPass(cutoff).maps(wave), expected, atol=1e-5)


def test_the_default_cutoff_keeps_a_radius_of_40_of_224_frequencies() -> None:
    from foundation.config import ObjectiveConfig

    noise = speckle(1, 1, 224, 224)
    kept: Any = torch.fft.fft2(LowPass(ObjectiveConfig().cutoff).maps(noise)[0, 0]).abs() > 1e-3
    across = torch.fft.fftfreq(224) * 224
    inside = across[:, None] ** 2 + across**2 <= 40**2 + 1e-3
    assert (kept == inside).float().mean() > 0.999
