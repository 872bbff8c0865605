"""What is hidden is a pure function of (seed, position), what is asked for is exact, and the loss is a plain mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foundation.config import Config, from_dict
from foundation.errors import ConfigError
from foundation.objectives.masks import Masks, local_windows, window_patch_ids
from foundation.objectives.reconstruction import gather_masked
from foundation.objectives.registry import OBJECTIVES, build
from foundation.objectives.targets import GradientRatio, patchify, unpatchify
from kernels.gradient_ratio import gradient_ratio

BRIEF = settings(max_examples=30, deadline=None)
POSITIONS = st.lists(st.integers(0, 2**40), min_size=1, max_size=8)


def config(objective: dict[str, Any] | None = None, **train: Any) -> Config:
    return from_dict(
        {
            "data": {"image_size": 48, "lanes": 2},
            "model": {"size": "nano", "patch": 8},
            "objective": {"windows": 3, "window": 3, "radii": (3, 5), **(objective or {})},
            "train": {"global_batch": 4, **train},
        }
    )


def corners(masks: Masks, width: int) -> tuple[Tensor, Tensor]:
    """Top rows and left columns of the windows, int64 [B, W]."""
    first = masks.patch_ids[..., 0]
    return first // width, first % width


@BRIEF
@given(
    grid=st.tuples(st.integers(7, 20), st.integers(7, 20)),
    window=st.integers(1, 7),
    count=st.integers(1, 6),
    ratio=st.floats(0.05, 0.95),
    positions=POSITIONS,
    seed=st.integers(0, 9),
)
def test_windows_are_squares_inside_the_grid_in_distinct_rows_and_columns(
    grid: tuple[int, int], window: int, count: int, ratio: float, positions: list[int], seed: int
) -> None:
    count = min(count, min(grid) - window + 1)
    masks = local_windows(seed, torch.tensor(positions), grid, window, count, ratio)
    tops, lefts = corners(masks, grid[1])
    for row in [*tops.tolist(), *lefts.tolist()]:
        assert len(set(row)) == count
    assert (tops + window <= grid[0]).all()
    assert (lefts + window <= grid[1]).all()
    steps = torch.arange(window)
    expected = (tops[..., None, None] + steps[:, None]) * grid[1] + lefts[..., None, None] + steps
    assert torch.equal(masks.patch_ids, expected.flatten(2))
    assert masks.masked.shape == (len(positions), count, int(window**2 * ratio))
    assert (masks.masked.diff(dim=-1) > 0).all()
    assert ((masks.masked >= 0) & (masks.masked < window**2)).all()


def test_the_published_setting_hides_39_of_49_tokens_in_four_windows() -> None:
    masks = build(Config()).masks(torch.arange(5), (14, 14))
    assert masks.patch_ids.shape == (5, 4, 49)
    assert masks.masked.shape == (5, 4, 39)


def test_window_ids_run_row_by_row() -> None:
    assert window_patch_ids(torch.tensor([[1]]), torch.tensor([[2]]), 2, 10).tolist() == [[[12, 13, 22, 23]]]


@BRIEF
@given(positions=POSITIONS, seed=st.integers(0, 9), draw=st.sampled_from(["per_image", "shared"]))
def test_a_mask_depends_on_seed_and_position_and_not_on_its_batch(positions: list[int], seed: int, draw: str) -> None:
    objective = build(config({"draw": draw}).model_copy(update={"seed": seed}))
    together = objective.masks(torch.tensor(positions), (6, 6))
    torch.rand(3)  # the global generator plays no part
    for row, position in enumerate(positions):
        alone = objective.masks(torch.tensor([position]), (6, 6))
        assert torch.equal(alone.patch_ids[0], together.patch_ids[row])
        assert torch.equal(alone.masked[0], together.masked[row])


def test_seed_and_position_change_windows_and_masks() -> None:
    positions = torch.arange(64)
    first, other = (local_windows(seed, positions, (14, 14), 7, 4, 0.8) for seed in (0, 1))
    for ours, theirs in zip(first, other, strict=True):
        assert not (ours.flatten(1) == theirs.flatten(1)).all(1).any()
        assert len(ours.flatten(1).unique(dim=0)) == 64


def test_rows_and_columns_of_windows_are_independent_and_every_place_is_used() -> None:
    tops, lefts = corners(local_windows(0, torch.arange(4000), (14, 14), 7, 4, 0.8), 14)
    for places in (tops, lefts):
        share = torch.bincount(places.flatten(), minlength=8) / places.numel()
        assert torch.allclose(share, torch.full((8,), 1 / 8), atol=0.01)
    together = torch.stack([tops.flatten(), lefts.flatten()]).double()
    assert torch.corrcoef(together)[0, 1].abs() < 0.04


def test_shared_windows_are_equal_inside_a_global_batch_and_differ_between_batches() -> None:
    objective = build(config({"draw": "shared"}))
    masks = objective.masks(torch.arange(40), (6, 6))
    batches = masks.patch_ids.view(10, 4, 3, 9)
    assert (batches == batches[:, :1]).all()
    assert len(batches[:, 0].flatten(1).unique(dim=0)) > 5
    assert len(masks.masked[:4].flatten(1).unique(dim=0)) == 4
    assert all(len(row.unique(dim=0)) == 3 for row in masks.patch_ids)  # every image sees all windows


def test_masks_differ_between_the_windows_of_an_image() -> None:
    masked = local_windows(0, torch.arange(100), (14, 14), 7, 4, 0.8).masked
    assert all(len(row.unique(dim=0)) == 4 for row in masked)


def test_every_token_is_hidden_equally_often() -> None:
    masked = local_windows(0, torch.arange(2000), (14, 14), 7, 4, 0.8).masked
    share = torch.bincount(masked.flatten(), minlength=49) / (2000 * 4)
    assert torch.allclose(share, torch.full((49,), 39 / 49), atol=0.025)


def test_patches_are_read_map_by_map_and_row_by_row() -> None:
    maps = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    tokens = patchify(maps, 2)
    assert tokens.shape == (1, 6, 8)
    assert tokens[0, 0].tolist() == [0, 1, 6, 7, 24, 25, 30, 31]
    assert tokens[0, 4].tolist() == [14, 15, 20, 21, 38, 39, 44, 45]  # second row of patches, second column


@BRIEF
@given(grid=st.tuples(st.integers(1, 5), st.integers(1, 5)), patch=st.integers(1, 5), maps=st.integers(1, 4))
def test_unpatchify_inverts_patchify(grid: tuple[int, int], patch: int, maps: int) -> None:
    images = torch.rand(2, maps, grid[0] * patch, grid[1] * patch)
    assert torch.equal(unpatchify(patchify(images, patch), patch, grid), images)


def prepared(objective: dict[str, Any] | None = None) -> tuple[Any, Any, Tensor]:
    built = build(config(objective))
    images = torch.rand(4, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    return built, built.prepare(images, torch.arange(4)), images


def test_the_target_of_a_masked_slot_is_the_map_under_its_patch() -> None:
    _, inputs, images = prepared()
    maps = gradient_ratio(images, (3, 5))
    same, ids, masked = inputs.model_args
    assert same is images
    assert inputs.target.shape == (4, 3, 7, 2 * 64)
    for b, w, m in torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(7)).tolist():
        row, col = divmod(int(ids[b, w, masked[b, w, m]]), 6)
        under = maps[b, :, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8]
        assert torch.equal(inputs.target[b, w, m], under.flatten())


def test_the_loss_is_the_mean_over_masked_tokens_of_the_mean_squared_error() -> None:
    objective, inputs, _ = prepared()
    prediction = torch.randn(inputs.target.shape, generator=torch.Generator().manual_seed(1))
    loss, parts = objective.loss(prediction, inputs)
    per_token = [
        sum((p - t) ** 2 for p, t in zip(ours.tolist(), theirs.tolist(), strict=True)) / len(ours)
        for ours, theirs in zip(prediction.flatten(0, 2), inputs.target.flatten(0, 2), strict=True)
    ]
    assert len(per_token) == 4 * 3 * 7
    assert loss.item() == pytest.approx(sum(per_token) / len(per_token), rel=1e-5)
    assert list(parts) == ["loss_r3", "loss_r5"]
    assert sum(parts.values()).item() / 2 == pytest.approx(loss.item(), rel=1e-6)
    first = (prediction[..., :64] - inputs.target[..., :64]).square().mean()
    assert parts["loss_r3"].item() == pytest.approx(first.item(), rel=1e-5)
    assert not any(value.requires_grad for value in parts.values())


def test_the_loss_is_fp32_and_zero_for_a_perfect_prediction() -> None:
    objective, inputs, _ = prepared()
    assert objective.loss(inputs.target, inputs)[0] == 0
    half = inputs.target.bfloat16().requires_grad_()
    loss, _ = objective.loss(half, inputs)
    assert loss.dtype == torch.float32
    loss.backward()
    assert half.grad is not None


def test_targets_do_not_feel_autocast_and_carry_no_gradient() -> None:
    objective, inputs, images = prepared()
    with torch.autocast("cpu", torch.bfloat16):
        again = objective.prepare(images.clone().requires_grad_(), torch.arange(4))
    assert torch.equal(again.target, inputs.target)
    assert not again.target.requires_grad


def test_every_channel_has_maps_of_its_own() -> None:
    images = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    target = GradientRatio((3, 5), 0.01, "include", channels=3)
    maps = target.maps(images)
    assert target.names == ("c0_r3", "c0_r5", "c1_r3", "c1_r5", "c2_r3", "c2_r5")
    assert torch.equal(maps[:, 4:6], gradient_ratio(images[:, 2:3], (3, 5)))


def test_offset_and_centre_line_of_the_configuration_reach_the_target() -> None:
    targets = [prepared(o)[1].target for o in ({}, {"offset": 0.1}, {"centre": "exclude"})]
    images = prepared()[2]
    for ours, (offset, centre) in zip(targets, [(0.01, "include"), (0.1, "include"), (0.01, "exclude")], strict=True):
        masks = Masks(*prepared()[1].model_args[1:])
        assert torch.equal(ours, gather_masked(patchify(gradient_ratio(images, (3, 5), offset, centre), 8), masks))


def test_the_default_objective_is_registered_with_a_description() -> None:
    assert Config().objective.name in OBJECTIVES
    assert all(row.description for row in OBJECTIVES.values())


def test_an_unknown_objective_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        config({"name": "sarjepa"})
    assert "objective.name = 'sarjepa': one of mae, lomar, i-jepa, fg-mae, " in str(caught.value)
    assert "(did you mean sar-jepa?)" in str(caught.value)
