"""A copy of a chip is recognised whatever was done to its contrast or orientation, another chip is not."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards import likeness
from shards.likeness import BYTES, THRESHOLD, descriptor, pairs


def scene(seed: int, side: int = 96) -> np.ndarray:
    """Expected amplitude of a bright target with scatterers and a shadow on ground, float64 [side, side]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side - 0.5
    ground = 30 * np.exp(0.3 * np.sin(8 * x + rng.uniform(0, 6)))
    ground[(abs(x) < 0.12) & (y < -0.05) & (y > -0.3)] = 5
    for dy, dx in rng.normal(0, 0.08, (12, 2)):
        ground += 400 * np.exp(-((y - dy) ** 2 + (x - dx) ** 2) / 2e-4)
    return ground


def chip(seed: int, target: int | None = None, side: int = 96) -> np.ndarray:
    """One look at a target in single-look speckle, uint16 [side, side]."""
    speckle = np.random.default_rng(seed).rayleigh(0.8, (side, side))
    return np.minimum(scene(seed if target is None else target, side) * speckle * 8, 65535).astype(np.uint16)


def eight_bits(image: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.sqrt(np.minimum(image / np.quantile(image, 0.999), 1))).astype(np.uint8)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(eight_bits(image)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def resized(image: np.ndarray, factor: float) -> np.ndarray:
    side = round(len(image) * factor)
    return np.asarray(Image.fromarray(eight_bits(image)).resize((side, side), Image.Resampling.BILINEAR))


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gain": lambda a: (a * 0.37).astype(np.float32),
    "gamma": lambda a: (a.astype(np.float32) / 7000) ** 0.4,
    "clipping": lambda a: np.minimum(a, int(np.quantile(a, 0.9))),
    "8 bits": eight_bits,
    "5 bits": lambda a: eight_bits(a) >> 3,
    "decibels": lambda a: np.clip(20 * np.log10(np.maximum(a, 1) / 10), 0, 60).astype(np.uint8),
    "JPEG 75": lambda a: jpeg(a, 75),
    "JPEG 90": lambda a: jpeg(a, 90),
    "smaller": lambda a: resized(a, 0.85),
    "larger": lambda a: resized(a, 1.2),
}
TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda a: a,
    "left to right": lambda a: a[:, ::-1],
    "upside down": lambda a: a[::-1],
    "turned 180": lambda a: a[::-1, ::-1],
    "transposed": lambda a: a.T,
    "turned 90": np.rot90,
    "turned 270": lambda a: np.rot90(a, 3),
    "transposed across": lambda a: a[::-1, ::-1].T,
}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("turn", TURNS)
def test_a_planted_copy_is_the_only_pair(copy: str, turn: str) -> None:
    chips = [chip(seed) for seed in range(12)]
    chips.append(COPIES[copy](TURNS[turn](chips[7])))
    assert [(i, j) for i, j, _ in pairs([descriptor(c) for c in chips])] == [(7, 12)]


def test_two_looks_at_one_target_are_no_copies() -> None:
    """The same expected amplitude under other speckle: more alike than two passes over a real target are."""
    looks = [descriptor(chip(seed, target=5)) for seed in range(40)]
    assert pairs(looks) == []


def test_speckle_alone_is_no_copy_of_other_speckle() -> None:
    rng = np.random.default_rng(0)
    for side in (16, 40, 128):
        assert pairs([descriptor(rng.rayleigh(30, (side, side)).astype(np.uint8)) for _ in range(200)]) == []


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), steps=st.lists(st.integers(1, 200), min_size=256, max_size=256))
def test_a_strictly_rising_curve_leaves_the_descriptor_as_it_is(seed: int, steps: list[int]) -> None:
    image = eight_bits(chip(seed, side=32))
    curve = np.cumsum(steps).astype(np.uint16)
    assert descriptor(curve[image]) == descriptor(image)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), height=st.integers(8, 70), width=st.integers(8, 70))
def test_flips_and_turns_are_at_distance_zero(seed: int, height: int, width: int) -> None:
    image = chip(seed, side=70)[:height, :width]
    for turn in TURNS.values():
        ((i, j, distance),) = pairs([descriptor(image), descriptor(turn(image))])
        assert (i, j) == (0, 1)
        assert distance < 0.01  # a coefficient on the border of two codes may change its code with its sign


def test_a_negative_zero_is_as_dark_as_zero() -> None:
    image = np.where(chip(0) < 100, 0, chip(0)).astype(np.float32)
    assert descriptor(np.where(image == 0, np.float32(-0.0), image)) == descriptor(image)


def test_the_first_channel_counts() -> None:
    first, second = chip(0), chip(1)
    assert descriptor(np.stack([first, second])) == descriptor(first)


@pytest.mark.parametrize("image", [np.zeros((64, 64), np.uint8), np.full((64, 64), 3.5, np.float32), chip(0)[:7, :90]])
def test_chips_without_a_picture_are_alike_to_nothing(image: np.ndarray) -> None:
    assert descriptor(image) == bytes(BYTES)
    assert pairs([descriptor(image)] * 3) == []


def test_no_or_one_descriptor_has_no_pairs() -> None:
    assert pairs([]) == []
    assert pairs([descriptor(chip(0))]) == []


def random_descriptors(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random descriptors of whose last tenth each is a noisy, flipped and transposed copy of one of the first tenth."""
    rng = np.random.default_rng(seed)
    coefficients = rng.normal(size=(count, 16, 16))
    copies = count // 10
    noisy = coefficients[:copies] + rng.uniform(0, 0.35, (copies, 1, 1)) * rng.normal(size=(copies, 16, 16))
    coefficients[-copies:] = noisy.transpose(0, 2, 1) * (1 - 2 * (np.arange(16) % 2))
    codes = np.clip(np.floor(coefficients * 4), -8, 7).astype(np.int8).reshape(count, -1)
    return ((codes[:, ::2] & 15) << 4 | (codes[:, 1::2] & 15)).astype(np.uint8), coefficients


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99))
def test_hashing_finds_what_comparing_all_pairs_finds(seed: int) -> None:
    packed, _ = random_descriptors(300, seed)
    codes = likeness._unpack(packed)
    first, second = np.triu_indices(300, 1)
    distance = likeness._distances(codes[first], codes[second])
    expected = {(i, j) for i, j, d in zip(first, second, distance, strict=True) if d <= THRESHOLD}
    found = pairs(packed)
    assert {(i, j) for i, j, _ in found} == expected
    assert len(expected) >= 15
    assert [d for *_, d in found] == sorted(d for *_, d in found)


def test_copies_are_found_among_many() -> None:
    packed, _ = random_descriptors(20_000, 1)
    found = {(i, j) for i, j, _ in pairs(packed)}
    codes = likeness._unpack(packed)
    close = np.flatnonzero(likeness._distances(codes[:2000], codes[-2000:]) <= THRESHOLD)
    assert found <= {(i, i + 18_000) for i in close}
    assert len(found) >= 0.99 * len(close) > 1000


def test_many_copies_of_one_chip_are_linked_together() -> None:
    same = [descriptor(chip(3))] * 200
    linked = {0}
    for i, j, distance in sorted(pairs([*same, descriptor(chip(4))])):
        assert distance == 0
        if linked & {i, j}:
            linked |= {i, j}
    assert linked == set(range(200))
