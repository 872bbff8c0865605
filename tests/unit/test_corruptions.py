"""A corrupted image is a function of its pixels, the seed and the level; the mildest level changes no bit."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foundation.errors import ConfigError, DataError
from foundation.evaluation.controls import PIXELS
from foundation.evaluation.corruptions import CORRUPTIONS, Corrupted, amplify, coarsen, speckle, turn
from foundation.evaluation.features import Listing, images, listing
from foundation.evaluation.protocols import RANDOM, Task
from foundation.evaluation.robustness import Row, intervals, robustness, to_table
from foundation.evaluation.robustness_figure import robustness_figure
from foundation.evaluation.scores import bootstrap
from shards.augment import resize_center

KINDS = tuple(CORRUPTIONS)
SLOW = settings(max_examples=20, deadline=None)


def chips(count: int, seed: int = 0, decibels: float = 0.0, size: int = 24) -> Listing:
    """Chips of two classes: a bright bar that stands or lies, in speckle."""
    rng, samples = np.random.default_rng(seed), []
    for i in range(count):
        pixels = (40 * rng.rayleigh(0.8, (1, size, size))).clip(0, 255)
        bar = pixels[0] if i % 2 else pixels[0].T
        bar[8:16, 4:20] = 200
        rule = {"scale": 255.0, "decibels": decibels}
        samples.append(SimpleNamespace(pixels=pixels.astype(np.uint8), **rule, label=i % 2, key=f"k{i}", source="toy"))
    return listing(samples, ("lies", "stands"))


def scene(channels: int = 1, size: int = 32) -> Tensor:
    return torch.rand(channels, size, size, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.1


class Pooled(nn.Module):
    """An encoder without weights worth the name: rows and columns of the image."""

    dim, patch, prefix = 32, 1, 1

    def pooled(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]

    def forward_features(self, x: Tensor) -> Tensor:
        token = torch.cat([x[:, 0].mean(1), x[:, 0].mean(2)], 1)
        return torch.stack([token, token], 1)


@pytest.mark.parametrize("looks", [1, 2, 4, 16])
def test_speckle_keeps_the_mean_intensity_and_has_the_variance_of_its_looks(looks: int) -> None:
    factor = speckle(torch.ones(2, 256, 256), looks, 3, 77).double().square()
    count = factor.numel()
    assert abs(factor.mean().item() - 1) < 5 / math.sqrt(looks * count)
    fourth = (3 + 6 / looks) / looks**2  # central moment of a Gamma variate over its looks
    assert abs(factor.var().item() - 1 / looks) < 5 * math.sqrt((fourth - 1 / looks**2) / count)
    neighbours = torch.corrcoef(torch.stack([factor[0, :, 1:].flatten(), factor[0, :, :-1].flatten()]))[0, 1]
    assert abs(neighbours.item()) < 5 / math.sqrt(256 * 255)


def test_speckle_is_another_for_another_seed_image_or_number_of_looks() -> None:
    image = scene()
    found = [speckle(image, *address) for address in ((4, 0, 1), (4, 1, 1), (4, 0, 2), (2, 0, 1))]
    for i, first in enumerate(found):
        assert torch.equal(first, speckle(image, *((4, 0, 1), (4, 1, 1), (4, 0, 2), (2, 0, 1))[i]))
        assert all(not torch.equal(first, other) for other in found[i + 1 :])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decibels", [0.0, 40.0])
def test_the_mildest_level_shows_the_encoder_the_clean_image_bit_for_bit(kind: str, decibels: float) -> None:
    samples = chips(4, decibels=decibels)
    clean = images(samples, 16, 20)
    level, *others = CORRUPTIONS[kind].levels
    assert torch.equal(images(Corrupted.of(samples, kind, level, 0), 16, 20), clean)
    for other in others:
        found = images(Corrupted.of(samples, kind, other, 0), 16, 20)
        assert not torch.equal(found, clean)
        assert found.min() >= 0
        assert found.max() <= 1


@SLOW
@given(st.permutations(range(5)), st.integers(1, 5), st.sampled_from(KINDS), st.integers(0, 2**31))
def test_an_image_is_corrupted_alike_in_every_order_and_batch(
    order: list[int], size: int, kind: str, seed: int
) -> None:
    samples, level = chips(5), CORRUPTIONS[kind].levels[-1]
    whole = [p for part in Corrupted.of(samples, kind, level, seed).batches(5) for p in part.pixels]
    mixed = Corrupted.of(samples.take(torch.tensor(order)), kind, level, seed)
    for at, pixels in zip(order, (p for part in mixed.batches(size) for p in part.pixels), strict=True):
        assert torch.equal(pixels, whole[at])


def test_a_coarser_resolution_keeps_flat_areas_and_widens_a_point_to_its_factor() -> None:
    torch.testing.assert_close(coarsen(torch.full((2, 20, 30), 0.3), 4), torch.full((2, 20, 30), 0.3))
    point = torch.zeros(1, 65, 65)
    point[0, 32, 32] = 1
    for factor in (1.5, 2, 3, 4):
        intensity = coarsen(point, factor)[0].double().square()
        assert intensity.sum().item() == pytest.approx(1, abs=1e-5)
        spread = ((torch.arange(65) - 32).square() * intensity.sum(0)).sum().sqrt().item()
        assert 2.3548 * spread == pytest.approx(math.sqrt(factor**2 - 1), rel=1e-3)
    assert coarsen(torch.rand(1, 3, 5), 4).shape == (1, 3, 5)  # smaller than the kernel would be


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 17, 17), (1, 12, 20)])
def test_a_turn_is_about_the_centre_and_counter_clockwise(shape: tuple[int, ...]) -> None:
    image = torch.rand(shape)
    torch.testing.assert_close(turn(image, 180), image.flip(-2, -1))
    if shape[1] == shape[2]:
        torch.testing.assert_close(turn(image, 90), torch.rot90(image, 1, (-2, -1)))
    torch.testing.assert_close(turn(torch.full(shape, 0.4), 33), torch.full(shape, 0.4))


def test_a_gain_is_one_of_the_intensity_and_is_clipped_where_the_rule_is_applied() -> None:
    torch.testing.assert_close(amplify(scene(), 4), 2 * scene())
    (batch,) = Corrupted.of(chips(2), "gain", 4, 0).batches(2)
    assert batch.pixels[0].max() > 1
    assert resize_center(batch, 24).max() == 1


def test_every_encoder_and_the_pixels_are_scored_at_every_level_by_one_probe() -> None:
    task = Task(chips(40), chips(30, 1), 16)
    rows = robustness({"pretrained": Pooled(), RANDOM: Pooled()}, task)
    levels = sum(len(c.levels) for c in CORRUPTIONS.values())
    assert len(rows) == 3 * levels
    assert {row.encoder for row in rows} == {"pretrained", RANDOM, PIXELS}
    for encoder in ("pretrained", PIXELS):
        mine = [row for row in rows if row.encoder == encoder]
        clean = [row for row in mine if row.level == CORRUPTIONS[row.corruption].levels[0] or row.level is None]
        assert {row.accuracy for row in clean} == {1.0}
        turned = next(row for row in mine if (row.corruption, row.level) == ("rotation", 90))
        assert turned.accuracy == 0  # a bar that stands lies after a quarter turn
        assert all(row.low <= row.accuracy <= row.high and row.n_test == 30 for row in mine)
    again = robustness({"pretrained": Pooled()}, task, ["speckle"])
    assert again == [row for row in rows if row.corruption == "speckle" and row.encoder != RANDOM]


def test_intervals_are_those_of_every_other_score() -> None:
    right = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.1], [0.6], [1.0]])
    expected = [bootstrap(torch.ones(50), row, "accuracy") for row in right.float()]
    torch.testing.assert_close(torch.tensor(intervals(right.double())).T, torch.tensor(expected))


def test_what_cannot_be_measured_is_refused_by_name() -> None:
    task = Task(chips(4), chips(4, 1), 16)
    with pytest.raises(ConfigError, match="fog is no corruption") as caught:
        robustness({}, task, ["speckle", "fog"])
    assert "speckle, resolution, rotation, gain" in caught.value.do
    with pytest.raises(DataError, match="4 of 4 training samples are also among"):
        robustness({}, replace(task, test=task.train))


def test_rows_become_a_table_and_a_figure(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rows = [
        Row(name, kind, None if math.isinf(level) else level, 0.5, 0.4, 0.6, 30, 0)
        for name in ("pretrained", PIXELS)
        for kind in KINDS
        for level in CORRUPTIONS[kind].levels
    ]
    assert json.loads(json.dumps([asdict(row) for row in rows], allow_nan=False))[0]["level"] is None
    table = to_table(rows)
    assert table.row_count == len(rows) // 2
    assert [column.header for column in table.columns] == ["corruption", "level", "pretrained", PIXELS]
    assert robustness_figure(rows, tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
