"""Augmentation: Pillow's pixels, torchvision's crops, and nothing that depends on the rest of the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from shards.augment import Augment, _multiply, _resample, resize_center
from shards.errors import DataError
from shards.stream import Batch

PLAIN = Augment(size=32, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, contrast=0)
sides = st.integers(13, 150)
shapes = st.lists(st.tuples(sides, sides), min_size=1, max_size=5)


def batch(
    images: list[Tensor], positions: list[int] | None = None, scale: float = 255.0, decibels: float = 0.0
) -> Batch:
    count = len(images)
    position = torch.tensor(positions if positions is not None else range(count))
    return Batch(
        pixels=images,
        scale=torch.full((count,), scale),
        decibels=torch.full((count,), decibels),
        label=torch.full((count,), -1),
        position=position,
        sample_id=position,
        replaced=(),
    )


def noise(height: int, width: int, seed: int = 0, dtype: torch.dtype = torch.uint8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, height, width), generator=generator).to(dtype)


def pillow(image: Tensor, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Pillow's bicubic resize of the crop (top, left, height, width), clipped to [0, 1]."""
    top, left, height, width = box
    crop = Image.fromarray(image[0].float().div(255).numpy()).crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.sampled_from([16, 48, 224]), st.booleans(), st.data())
def test_resampling_is_pillows_bicubic(height: int, width: int, size: int, flip: bool, data: st.DataObject) -> None:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = (top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left)))
    image = noise(height, width)
    ours = _resample(batch([image]), torch.tensor([box]), torch.tensor([flip]), size)[0, 0]
    expected = pillow(image, box, size)
    np.testing.assert_allclose(ours, expected[:, ::-1] if flip else expected, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(shapes, st.sampled_from([16, 48, 96, 224]), st.integers(1, 2), st.integers(0, 2**32))
def test_the_few_taps_of_a_cpu_give_what_the_matrices_define(
    forms: list[tuple[int, int]], size: int, channels: int, seed: int
) -> None:
    chips = batch([noise(h, w, i).expand(channels, -1, -1).clone() for i, (h, w) in enumerate(forms)])
    augment = Augment(size=size)
    taps = augment(chips, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.augment._gather", _multiply)
        matrices = augment(chips, seed)
    torch.testing.assert_close(taps, matrices, atol=1e-6, rtol=0)


def test_a_large_scene_shrinks_as_in_pillow() -> None:
    image = noise(800, 700)
    box = (0, 0, 800, 700)
    ours = _resample(batch([image]), torch.tensor([box]), torch.tensor([False]), 56)[0, 0]
    np.testing.assert_allclose(ours, pillow(image, box, 56), atol=1e-4)
    whole = Image.fromarray(image[0].float().div(255).numpy())
    np.testing.assert_allclose(ours, whole.resize((56, 56), Image.Resampling.BICUBIC, box=(0, 0, 700, 800)), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(0, 2**62), st.integers(0, 2**32))
def test_crops_lie_inside_their_image_and_outputs_inside_0_1(
    forms: list[tuple[int, int]], first: int, seed: int
) -> None:
    chips = batch([noise(h, w, i) for i, (h, w) in enumerate(forms)], [first + i for i in range(len(forms))])
    augment = Augment(size=32)
    boxes = augment.boxes(chips, seed)
    assert boxes.dtype == torch.int64
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= torch.tensor(forms)).all()
    out = augment(chips, seed)
    assert out.shape == (len(forms), 1, 32, 32)
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 1


def test_areas_are_uniform_ratios_log_uniform_and_corners_anywhere() -> None:
    image = torch.zeros(1, 200, 200, dtype=torch.uint8)
    boxes = Augment(crop_scale=(0.2, 0.6)).boxes(batch([image] * 4000), seed=1).double()
    area, ratio = boxes[:, 2] * boxes[:, 3] / 200**2, (boxes[:, 3] / boxes[:, 2]).log()
    assert area.min() > 0.19
    assert area.max() < 0.61
    assert area.mean() == pytest.approx(0.4, abs=0.01)
    assert area.std() == pytest.approx(0.4 / math.sqrt(12), abs=0.01)
    assert ratio.abs().max() < math.log(4 / 3) + 0.03
    assert ratio.mean() == pytest.approx(0, abs=0.01)
    assert ratio.std() == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), abs=0.01)
    room = 200 - boxes[:, 2:]
    assert (boxes[:, :2] / room).mean() == pytest.approx(0.5, abs=0.01)
    assert (boxes[:, :2] == 0).any()
    assert (boxes[:, :2] == room).any()


def test_an_image_too_narrow_for_every_try_gets_the_largest_central_crop() -> None:
    augment = Augment(crop_scale=(0.9, 1.0))
    tall, wide = torch.zeros(1, 90, 15), torch.zeros(1, 15, 90)
    assert augment.boxes(batch([tall, wide]), 0).tolist() == [[35, 0, 20, 15], [0, 35, 15, 20]]


@settings(max_examples=20, deadline=None)
@given(shapes, st.randoms(use_true_random=False))
def test_an_image_does_not_depend_on_its_batch(forms: list[tuple[int, int]], random: object) -> None:
    images = [noise(h, w, i, torch.uint16 if i % 2 else torch.uint8) for i, (h, w) in enumerate(forms)]
    positions = [1000 + 7 * i for i in range(len(forms))]
    augment = Augment(size=48)
    together = augment(batch(images, positions), 5)
    for i in reversed(range(len(forms))):
        alone = augment(batch([images[i]], [positions[i]]), 5)
        assert torch.equal(together[i : i + 1], alone)
    assert torch.equal(together, augment(batch(images[::-1], positions[::-1]), 5).flip(0))


def test_every_position_and_seed_gets_its_own_crop_flip_and_contrast() -> None:
    image = noise(64, 64)
    same = batch([image] * 200)
    boxes = Augment().boxes(same, 0)
    assert len(boxes.unique(dim=0)) > 190
    assert not torch.equal(boxes, Augment().boxes(same, 1))
    straight = PLAIN(batch([image]), 0)[0]
    flips = Augment(size=32, crop_scale=(1, 1), crop_ratio=(1, 1), contrast=0)(same, 0)
    mirrored = ((flips - straight.flip(-1)).abs() < 1e-5).flatten(1).all(1)
    assert (mirrored != ((flips - straight).abs() < 1e-5).flatten(1).all(1)).all()
    assert 0.35 < mirrored.float().mean() < 0.65


def test_contrast_spreads_the_pixels_about_the_mean_of_the_image() -> None:
    image = (100 + noise(64, 64) / 8).to(torch.uint8)  # far from both ends, so that nothing is clipped
    same = batch([image] * 400)
    plain = PLAIN(same, 0)
    jittered = Augment(size=32, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, contrast=0.5)(same, 0)
    factor = jittered.std(dim=(1, 2, 3)) / plain.std(dim=(1, 2, 3))
    torch.testing.assert_close(jittered.mean(dim=(1, 2, 3)), plain.mean(dim=(1, 2, 3)), atol=1e-5, rtol=0)
    assert 0.5 <= factor.min() < 0.52
    assert 1.48 < factor.max() <= 1.5001
    assert factor.mean() == pytest.approx(1, abs=0.05)


@settings(max_examples=20, deadline=None)
@given(sides, sides, st.integers(0, 255), st.integers(0, 10**9))
def test_a_constant_image_stays_constant(height: int, width: int, value: int, position: int) -> None:
    image = torch.full((1, height, width), value, dtype=torch.uint8)
    out = Augment(size=40)(batch([image], [position]), 3)
    torch.testing.assert_close(out, torch.full_like(out, value / 255), atol=2e-6, rtol=0)


def test_every_dtype_is_divided_by_its_own_scale_and_clipped_before_resampling() -> None:
    eight = noise(60, 64)
    images = [eight, eight.to(torch.uint16) * 16, eight.float() * 0.01]
    mixed = batch(images)
    mixed.scale[:] = torch.tensor([255.0, 4080.0, 2.55])
    out = resize_center(mixed, 50)
    torch.testing.assert_close(out[1], out[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[2], out[0], atol=1e-5, rtol=0)
    capped = resize_center(batch([eight], scale=100.0), 50)
    torch.testing.assert_close(capped, resize_center(batch([eight.clamp(max=100)], scale=100.0), 50))


@settings(max_examples=25, deadline=None)
@given(st.floats(5, 60), st.floats(1, 1e4), st.sampled_from([torch.uint8, torch.uint16, torch.float32]))
def test_decibels_map_a_span_below_the_scale_to_0_1(decibels: float, scale: float, dtype: torch.dtype) -> None:
    image = noise(40, 40, dtype=dtype)  # holds zeros: minus infinity decibels is black
    with np.errstate(divide="ignore"):
        level = 20 * np.log10(image[0].double().numpy() / np.float64(np.float32(scale)))
    expected = (1 + level / np.float64(np.float32(decibels))).clip(0, 1)
    out = resize_center(batch([image], scale=scale, decibels=decibels), 40)
    np.testing.assert_allclose(out[0, 0], expected, atol=1e-5)


def test_linear_and_logarithmic_images_mix_and_are_mapped_before_resampling() -> None:
    image = noise(64, 64, dtype=torch.float32)
    mixed = batch([image, image])
    mixed.decibels[1] = 25.0
    out = resize_center(mixed, 30)
    assert torch.equal(out[0], resize_center(batch([image]), 30)[0])
    mapped = (1 + 20 * (image / 255).log10() / 25).clamp(0, 1)
    torch.testing.assert_close(out[1:], resize_center(batch([mapped], scale=1.0), 30), atol=1e-5, rtol=0)


def test_evaluation_takes_the_central_crop_and_smaller_images_whole() -> None:
    large, small, long = noise(130, 128), noise(50, 40), noise(54, 200)
    out = resize_center(batch([large, small, long]), 96, crop=100)
    boxes = [(15, 14, 100, 100), (0, 0, 50, 40), (0, 50, 54, 100)]
    for ours, image, box in zip(out, (large, small, long), boxes, strict=True):
        np.testing.assert_allclose(ours[0], pillow(image, box, 96), atol=1e-4)
    np.testing.assert_allclose(resize_center(batch([large]), 96)[0, 0], pillow(large, (0, 0, 130, 128), 96), atol=1e-4)


def test_channels_are_treated_alike() -> None:
    two = torch.cat([noise(40, 70, 1), noise(40, 70, 2)])
    augment = Augment(size=24, contrast=0)
    out = augment(batch([two]), 0)
    assert out.shape == (1, 2, 24, 24)
    torch.testing.assert_close(out[:, 1:], augment(batch([two[1:]]), 0), atol=1e-5, rtol=0)


def test_autocast_does_not_reach_the_images() -> None:
    chips = batch([noise(64, 64)])
    expected = Augment(size=32)(chips, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Augment(size=32)(chips, 0), expected)


def test_a_batch_of_mixed_channel_counts_is_refused() -> None:
    with pytest.raises(DataError, match="mixes images of 1 and 2 channels") as error:
        Augment()(batch([torch.zeros(1, 30, 30), torch.zeros(2, 30, 30)]), 0)
    assert "pack one band of the others" in str(error.value)
