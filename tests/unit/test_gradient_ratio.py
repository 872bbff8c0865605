"""The target is exact: every backend gives the published feature, in fp32, whatever surrounds the call."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.gradient_ratio import BACKENDS, gradient_ratio
from kernels.gradient_ratio.reference import reference

GOLDEN = Path(__file__).parents[1] / "golden"
FULL_SCALE = {torch.uint8: 255, torch.uint16: 65535}
BRIEF = settings(max_examples=30, deadline=None)
V2 = {"radii": (3, 5, 9, 13, 17), "offset": 1e-6, "centre": "exclude", "blind_spot": True, "sigmoid": True}
ROWS = {name: pytest.mark.skipif(bool(row.unavailable), reason=row.unavailable) for name, row in BACKENDS.items()}
EACH_BACKEND = pytest.mark.parametrize("backend", [pytest.param(name, marks=mark) for name, mark in ROWS.items()])


def computed(images: Tensor, backend: str, **arguments: Any) -> Tensor:
    """The maps, on the CPU; Triton computes them on a GPU where there is one."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    return gradient_ratio(images.to(device), backend=backend, **arguments).cpu()


def speckle(dtype: torch.dtype, batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Single-look amplitude with dark and saturated places, [B, 1, H, W]."""
    rng = np.random.default_rng(seed)
    amplitude = np.clip(rng.rayleigh(0.25, (batch, 1, height, width)), 0, 1)
    amplitude[..., : height // 3, : width // 3] = 0
    if dtype in FULL_SCALE:
        return torch.from_numpy((amplitude * FULL_SCALE[dtype]).astype(str(dtype).removeprefix("torch.")))
    return torch.from_numpy(amplitude).to(dtype)


def definition(
    images: Tensor, radii: tuple[int, ...], offset: float = 0.01, centre: str = "include", **how: Any
) -> Tensor:
    """The definition in float64."""
    return reference(images.double() / FULL_SCALE.get(images.dtype, 1), radii, offset, centre, **how)


@EACH_BACKEND
@pytest.mark.parametrize("floats", [False, True], ids=["uint8", "float32"])
def test_every_backend_gives_the_published_values(backend: str, floats: bool) -> None:
    with np.load(GOLDEN / "gradient_targets.npz", allow_pickle=False) as golden:
        images, targets = torch.from_numpy(golden["images"]), torch.from_numpy(golden["targets"])
    ours = computed(images.float() / 255 if floats else images, backend)
    assert (ours - targets).abs().max() <= 3e-5


@EACH_BACKEND
@pytest.mark.parametrize("floats", [False, True], ids=["uint8", "float32"])
def test_one_call_gives_the_six_published_scales_of_the_second_version(backend: str, floats: bool) -> None:
    with np.load(GOLDEN / "structural_targets_v2.npz", allow_pickle=False) as golden:
        images, scales = torch.from_numpy(golden["images"]), torch.from_numpy(golden["scales"])
        fused = torch.from_numpy(golden["fused_equal_weights"])
    ours = computed(images.float() / 255 if floats else images, backend, **V2)
    assert ours.shape == scales.shape
    assert (ours - scales).abs().max() <= 1e-5
    assert (ours.mean(1) - fused).abs().max() <= 1e-5


@BRIEF
@given(
    dtype=st.sampled_from([torch.uint8, torch.uint16, torch.float32, torch.float64]),
    batch=st.integers(1, 3),
    sides=st.tuples(st.integers(20, 48), st.integers(20, 48)),
    radii=st.lists(st.integers(1, 19), min_size=1, max_size=4).map(tuple),
    offset=st.sampled_from([1e-3, 0.01, 0.3]),
    centre=st.sampled_from(["include", "exclude"]),
    blind_spot=st.booleans(),
    sigmoid=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sums_are_exact_for_every_size_radius_and_pixel_type(
    dtype: torch.dtype,
    batch: int,
    sides: tuple[int, int],
    radii: tuple[int, ...],
    offset: float,
    centre: str,
    blind_spot: bool,
    sigmoid: bool,
    seed: int,
) -> None:
    images = speckle(dtype, batch, *sides, seed)
    how = {"blind_spot": blind_spot, "sigmoid": sigmoid}
    ours = gradient_ratio(images, radii, offset, centre, backend="integral", **how)
    assert ours.dtype == torch.float32
    assert ours.shape == (batch, blind_spot + len(radii), *sides)
    assert (ours - definition(images, radii, offset, centre, **how)).abs().max() < 1e-6


def test_bright_16_bit_images_do_not_overflow_the_integer_sums() -> None:
    images = torch.full((1, 1, 210, 190), 65535, dtype=torch.uint16)  # the sum of all pixels passes 2^31
    images[..., ::7] = 65535 // 2
    assert images.double().sum() > 2**31
    assert (gradient_ratio(images, (9,)) - definition(images, (9,))).abs().max() < 1e-6


@pytest.mark.parametrize("radius", [140, 185])
@pytest.mark.parametrize("backend", ["integral", pytest.param("triton", marks=ROWS["triton"])])
def test_half_windows_whose_sum_passes_31_or_32_bits_are_exact_too(backend: str, radius: int) -> None:
    line = np.full(190, 65535)
    line[::7] = 0
    images = torch.from_numpy(np.broadcast_to(line, (1, 1, 200, 190)).astype(np.uint16))
    # All rows are alike: top and bottom are equal, left and right are sums over one row.
    padded = np.concatenate([[0.0], np.pad(line / 65535 + 0.01, radius, mode="reflect").cumsum()])
    left = padded[radius + 1 : radius + 191] - padded[:190]
    right = padded[2 * radius + 1 : 2 * radius + 191] - padded[radius : radius + 190]
    ours = computed(images, backend, radii=(radius,))[0, 0]
    assert (ours - torch.from_numpy(np.abs(np.log(left / right)))).abs().max() < 1e-6


@EACH_BACKEND
def test_the_blind_spot_does_not_see_its_own_pixel(backend: str) -> None:
    images = speckle(torch.uint8, 1, 24, 31)
    images[..., 11, 17] = 0
    brighter = images.clone()
    brighter[..., 11, 17] = 255
    changed = computed(images, backend, **V2)[0, 0] != computed(brighter, backend, **V2)[0, 0]
    assert not changed[11, 17]
    assert changed.sum() == 8
    assert changed[10:13, 16:19].sum() == 8


def test_the_float32_definition_loses_digits_that_the_integer_sums_keep() -> None:
    images = speckle(torch.uint8, 2, 96, 96)
    exact = definition(images, (5, 9, 13, 17))
    by_convolution = (gradient_ratio(images, backend="reference") - exact).abs().max()
    assert (gradient_ratio(images, backend="integral") - exact).abs().max() < by_convolution / 4


@BRIEF
@given(gain=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_a_gain_does_not_change_the_ratio_when_the_offset_has_it_too(gain: float, seed: int) -> None:
    images = speckle(torch.float64, 1, 40, 40, seed)
    ours = gradient_ratio(images * gain, offset=0.01 * gain)
    assert (ours - gradient_ratio(images)).abs().max() < 1e-6


def test_the_feature_of_an_ideal_edge_and_of_a_bright_pixel_is_the_published_one() -> None:
    edge = torch.full((1, 1, 96, 96), 0.05)
    edge[..., 48:] = 0.8
    assert gradient_ratio(edge).amax((-2, -1)).min() >= 2.43
    assert gradient_ratio(edge).max() <= 2.55
    without_centre = gradient_ratio(edge, centre="exclude").amax((-2, -1))
    assert torch.allclose(without_centre, torch.tensor(math.log(0.81 / 0.06)), atol=1e-5)
    scatterer = torch.zeros(1, 1, 96, 96)
    scatterer[..., 48:52, 48:52] = 1
    peaks = gradient_ratio(scatterer).amax((-2, -1))[0]
    assert torch.allclose(peaks, torch.tensor([4.57, 3.17, 2.34, 1.79]), atol=0.006)


@pytest.mark.parametrize("radius", [1, 5, 17])
def test_one_bright_pixel_is_seen_in_one_half_of_each_pair(radius: int) -> None:
    image = torch.zeros(1, 1, 40, 40)
    image[..., 20, 20] = 1
    peak = math.sqrt(2) * math.log(1 + 1 / (0.01 * (radius + 1) * (2 * radius + 1)))
    ours = gradient_ratio(image, (radius,))[0, 0]
    assert ours[20, 20] == 0
    assert ours[20 + radius, 20 - 1].item() == pytest.approx(peak, abs=1e-5)
    reached = torch.zeros(40, 40, dtype=torch.bool)
    reached[20 - radius : 21 + radius, 20 - radius : 21 + radius] = True
    assert not ours[~reached].any()


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_constant_image_has_no_gradient_anywhere(backend: str, dtype: torch.dtype) -> None:
    images = torch.full((2, 1, 40, 40), 3, dtype=dtype) / (1 if dtype == torch.uint8 else 7)
    ours = computed(images.to(dtype), backend)
    assert torch.allclose(ours, torch.zeros(()), atol=1e-5 if backend == "reference" else 0)


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_autocast_does_not_change_a_bit(backend: str, dtype: torch.dtype) -> None:
    images = speckle(dtype, 1, 40, 44)
    plain = computed(images, backend)
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16):
        assert torch.equal(computed(images, backend), plain)


@EACH_BACKEND
def test_targets_carry_no_gradient(backend: str) -> None:
    images = speckle(torch.float32, 1, 40, 40).requires_grad_()
    assert not computed(images, backend).requires_grad


def test_an_empty_batch_has_maps_of_no_images() -> None:
    assert gradient_ratio(torch.zeros(0, 1, 40, 52), **V2).shape == (0, 6, 40, 52)


def test_each_image_of_a_batch_is_computed_for_itself() -> None:
    images = speckle(torch.uint8, 3, 40, 52)
    assert torch.equal(gradient_ratio(images)[1:2], gradient_ratio(images[1:2]))


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((2, 40, 40), {}, r"takes \[B, 1, H, W\], not \(2, 40, 40\)"),
        ((2, 3, 40, 40), {}, r"takes \[B, 1, H, W\], not \(2, 3, 40, 40\)"),
        ((1, 1, 40, 17), {}, r"radii \(5, 9, 13, 17\) need 1 <= r < image side, which is 17"),
        ((1, 1, 40, 40), {"radii": (0, 5)}, r"radii \(0, 5\) need 1 <= r"),
        ((1, 1, 40, 40), {"radii": ()}, r"radii \(\) need 1 <= r"),
        ((1, 1, 40, 40), {"radii": (5,), "offset": 0.0}, r"offset 0.0 must be positive and finite"),
        ((1, 1, 40, 40), {"radii": (5,), "offset": math.inf}, r"offset inf must be positive and finite"),
        ((1, 1, 40, 40), {"radii": (5,), "centre": "both"}, r"centre 'both' is neither 'include' nor 'exclude'"),
        ((1, 1, 40, 40), {"backend": "fft"}, r"unknown target backend 'fft': choose auto, reference, integral, triton"),
    ],
)
def test_what_cannot_be_computed_is_said(shape: tuple[int, ...], arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient_ratio(torch.zeros(shape), **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_pixels_that_cannot_be_summed_exactly_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"from uint8, uint16, float32 or float64 images, not {dtype}"):
        gradient_ratio(torch.zeros(1, 1, 40, 40, dtype=dtype))
