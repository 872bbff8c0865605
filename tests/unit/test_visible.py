"""MAE's frame: the encoder sees visible patches alone, positions are fixed, and what is hidden depends on nothing else.

Its weights, and LoMaR's, come in by their published names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published import published_name
from torch import Tensor, nn

from foundation.config import Config, from_dict
from foundation.errors import CheckpointError, ConfigError
from foundation.interchange import by_channel, import_published, load_encoder, rename
from foundation.models.families import FAMILY
from foundation.models.heads import MaskedImageModel, MaskedWindowModel
from foundation.models.initialise import initialise
from foundation.models.position import sincos
from foundation.models.vit import ViT
from foundation.objectives.masks import random_patches, visible_patches
from foundation.objectives.registry import build
from foundation.training import checkpoint
from foundation.training.blocks import on_meta, units

BRIEF = settings(max_examples=25, deadline=None)
POSITIONS = st.lists(st.integers(0, 2**40), min_size=1, max_size=6)
CPU = torch.device("cpu")


def config(name: str = "mae", **model: Any) -> Config:
    """A 6x6 grid of 8-pixel patches."""
    decoder = {"width": 32, "depth": 2, "heads": 2, **model.pop("decoder", {})}
    sizes = {"size": "nano", "patch": 8, "positions": "sincos", **model, "decoder": decoder}
    return from_dict({"data": {"image_size": 48}, "model": sizes, "objective": {"name": name, "mask_ratio": 0.75}})


def prepared(**model: Any) -> tuple[Any, Any, Tensor, Any]:
    """The objective, its model with initial weights, two images, and the inputs made of them."""
    objective = build(config(**model))
    made: Any = objective.build_model().eval()
    initialise(made, 0)
    images = torch.rand(2, objective.config.model.channels, 48, 48, generator=torch.Generator().manual_seed(3))
    return objective, made, images, objective.prepare(images, torch.arange(2))


@BRIEF
@given(
    grid=st.tuples(st.integers(2, 16), st.integers(2, 16)),
    ratio=st.floats(0.3, 0.9),
    positions=POSITIONS,
    seed=st.integers(0, 9),
)
def test_hidden_patches_are_distinct_and_depend_on_seed_and_position_alone(
    grid: tuple[int, int], ratio: float, positions: list[int], seed: int
) -> None:
    masks, tokens = random_patches(seed, torch.tensor(positions), grid, ratio), grid[0] * grid[1]
    assert torch.equal(masks.patch_ids, torch.arange(tokens).expand(len(positions), 1, -1))
    assert masks.masked.shape == (len(positions), 1, tokens - int(tokens * (1 - ratio)))
    assert (masks.masked.diff(dim=-1) > 0).all()
    assert ((masks.masked >= 0) & (masks.masked < tokens)).all()
    alone = [random_patches(seed, torch.tensor([p]), grid, ratio).masked[0] for p in positions]
    assert torch.equal(masks.masked, torch.stack(alone))


def test_every_patch_is_hidden_as_often_as_the_others_and_another_seed_hides_others() -> None:
    first, other = (random_patches(seed, torch.arange(4000), (4, 4), 0.75).masked[:, 0] for seed in (0, 1))
    share = first.flatten().bincount(minlength=16) / 4000
    assert (share - 0.75).abs().max() < 0.03
    assert not torch.equal(first, other)


def test_as_many_patches_stay_visible_as_in_the_published_code() -> None:
    assert [visible_patches(196, ratio) for ratio in (0.75, 0.7)] == [49, 58]


@pytest.mark.parametrize(("grid", "dim"), [((3, 5), 12), ((7, 7), 64), ((1, 2), 4)])
def test_positions_are_sines_and_cosines_of_column_and_row(grid: tuple[int, int], dim: int) -> None:
    table, quarter = sincos(grid, dim, CPU, torch.float32), dim // 4
    assert table.shape == (1, grid[0] * grid[1], dim)
    for row in range(grid[0]):
        for column in range(grid[1]):
            waves = [10_000 ** (-i / quarter) for i in range(quarter)]
            expected = [f(at * w) for at in (column, row) for f in (math.sin, math.cos) for w in waves]
            assert table[0, row * grid[1] + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_larger_grid_begins_with_the_positions_of_a_smaller_one() -> None:
    small, large = (sincos((side, side), 16, CPU, torch.float32).view(side, side, 16) for side in (4, 9))
    assert torch.equal(large[:4, :4], small)


@pytest.mark.parametrize("channels", [1, 2])
def test_nothing_of_a_hidden_patch_reaches_a_prediction_and_every_visible_one_does(channels: int) -> None:
    _, model, images, inputs = prepared(channels=channels)
    _, ids, masked = inputs.model_args
    with torch.no_grad():
        before = model(images, ids, masked)
        hidden = torch.zeros(2, 36).scatter(1, masked[:, 0], 1.0).view(2, 1, 6, 6)
        pixels = hidden.repeat_interleave(8, 2).repeat_interleave(8, 3)
        noise = torch.rand_like(images)
        assert torch.equal(model(torch.where(pixels.bool(), noise, images), ids, masked), before)
    leaf = images.clone().requires_grad_()
    model(leaf, ids, masked).square().sum().backward()
    assert leaf.grad is not None
    reached = leaf.grad.abs().amax(1, keepdim=True).unflatten(-1, (6, 8)).unflatten(-3, (6, 8)).amax((-1, -3))
    assert torch.equal(reached > 0, hidden == 0)


def test_predictions_of_masked_patches_are_those_among_all() -> None:
    _, model, images, inputs = prepared()
    _, ids, masked = inputs.model_args
    with torch.no_grad():
        everything, some = model(images, ids, masked, predict_all=True), model(images, ids, masked)
    assert everything.shape == (2, 1, 36, 64)
    assert some.shape == (2, 1, 27, 64)
    chosen = everything.gather(2, masked[..., None].expand(-1, -1, -1, 64))
    assert torch.allclose(some, chosen, atol=1e-6)


def test_the_encoder_is_computed_for_visible_patches_alone() -> None:
    _, model, _, inputs = prepared()
    lengths: list[int] = []
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model(*inputs.model_args)
    assert lengths == [10] * 4 + [37] * 2


def test_models_with_fixed_positions_have_neither_tables_nor_buffers_and_their_blocks_are_units() -> None:
    model = on_meta(build(config()).build_model)
    assert not any("rpe" in name or "pos" in name for name in model.state_dict())
    assert len(list(units(model))) == FAMILY["nano"].depth + 2


@pytest.mark.parametrize("size", [48, 80])
def test_a_frozen_encoder_gives_features_of_whole_images_of_any_size(size: int) -> None:
    _, model, _, _ = prepared()
    images = torch.rand(2, 1, size, size)
    with torch.no_grad():
        features = model.encoder.forward_features(images)
        assert features.shape == (2, 1 + (size // 8) ** 2, FAMILY["nano"].dim)
        assert torch.equal(model.encoder(images), features[:, 0])
        flipped = model.encoder.forward_features(images.flip(3))
        maps = list(model.encoder.attention_maps(images))
    assert not torch.allclose(features[:, 0], flipped[:, 0], atol=1e-4)  # without positions a set has no order
    assert len(maps) == FAMILY["nano"].depth
    assert all(torch.allclose(m.sum(-1), torch.ones(m.shape[:-1]), atol=1e-5) for m in maps)


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("mae", {"positions": "relative"}, "'relative': sincos or learned, which objective.name = 'mae' builds"),
        ("sar-jepa", {}, "model.positions = 'sincos': relative, which objective.name = 'sar-jepa' builds on"),
        ("fg-mae", {"decoder": {"depth": 0}}, "model.decoder.depth = 0: at least 1: what is hidden enters"),
        ("mae", {"decoder": {"width": 30}}, "model.decoder.width = 30: a multiple of 4: sines and cosines of two axes"),
        ("mae", {"positions": "learnt"}, "model.positions = 'learnt': one of relative, sincos"),
    ],
)
def test_a_frame_refuses_a_model_that_it_cannot_use(name: str, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(name, **model)
    assert message in str(caught.value)


def published(source: nn.Module, linear: bool) -> dict[str, Tensor]:
    """The state dict under the names of MAE, or of LoMaR, whose head is one layer, with the table that each stores."""
    state = {published_name(name): tensor for name, tensor in source.state_dict().items()}
    renamed = {"decoder_pred": "encoder_pred"} if linear else {"encoder_pred": "decoder_embed"}
    for old, new in renamed.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    tables = {"pos_embed": state["cls_token"].shape[-1]}
    tables |= {} if linear else {"decoder_pos_embed": state["mask_token"].shape[-1]}
    for name, dim in tables.items():
        state[name] = torch.cat([torch.zeros(1, 1, dim), sincos((14, 14), dim, CPU, torch.float32)], 1)
    return state


def mae_and_lomar(channels: int = 1) -> dict[str, nn.Module]:
    """Models of nano size with noise on every weight; the published decoder has 16 heads."""
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {
        "mae": MaskedImageModel(ViT(*FAMILY["nano"], 16, channels, positions="sincos"), 32, 2, 16, 256 * channels),
        "lomar": MaskedWindowModel(ViT(*FAMILY["nano"], 16, channels), 0, 0, 0, 256 * channels),
    }
    for model in made.values():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    return made


@pytest.mark.parametrize("name", ["mae", "lomar"])
@pytest.mark.parametrize("channels", [1, 3])
def test_published_weights_of_mae_and_lomar_give_the_same_features_and_fit_what_training_builds(
    name: str, channels: int, tmp_path: Path
) -> None:
    source: Any = mae_and_lomar(channels)[name].eval()
    torch.save({"model": published(source, linear=name == "lomar")}, tmp_path / "a.pth")
    folder = import_published(tmp_path / "a.pth", tmp_path / "run")
    encoder, run = load_encoder(tmp_path / "run")
    assert run.objective.name == name
    images = torch.rand(2, channels, 64, 96)
    with torch.no_grad():
        assert torch.equal(encoder.forward_features(images), source.encoder.forward_features(images))
    weights = {n.removeprefix("model."): t for n, t in checkpoint.load(folder)["tensors"].items()}
    build(run).build_model().load_state_dict(weights)
    # Published predictions run pixel by pixel, ours channel by channel.
    assert torch.equal(
        weights["decoder.pred.weight"].view(channels, 256, -1).transpose(0, 1).flatten(0, 1),
        source.decoder.pred.weight,
    )


def test_values_pixel_by_pixel_become_values_channel_by_channel() -> None:
    assert by_channel(torch.tensor([[1, 10, 2, 20, 3, 30]]), 2, -1).tolist() == [[1, 2, 3, 10, 20, 30]]
    assert by_channel(torch.tensor([[1, 2]]).T, 1, 0).tolist() == [[1], [2]]
    assert rename("encoder_pred.bias", linear=True) == "decoder.pred.bias"
    assert rename("decoder_embed.bias") == "decoder.embed.bias"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (
            lambda s: s["pos_embed"].add_(0.01),
            "pos_embed is not the fixed table of sines and cosines that MAE and I-JEPA add",
        ),
        (lambda s: s.update(decoder_pos_embed=torch.zeros(3)), "decoder_pos_embed is not the fixed table"),
        (lambda s: s.pop("decoder_embed.weight"), "'decoder.embed.weight' is missing"),
        (lambda s: s.pop("mask_token"), "1 missing: mask_token"),
        (lambda s: s.update({"blocks.4.norm1.bias": torch.zeros(96)}), "of the family has width 96 and 5 blocks"),
    ],
    ids=["learnt", "shape", "decoder", "token", "size"],
)
def test_what_is_no_mae_checkpoint_is_named(
    edit: Callable[[dict[str, Tensor]], object], reason: str, tmp_path: Path
) -> None:
    state = published(mae_and_lomar()["mae"], linear=False)
    edit(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        import_published(tmp_path / "a.pth", tmp_path / "run")
    assert reason in str(caught.value)
