"""SARATR-X: its encoder by the facts of its papers, and its published tensors by their names alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import CheckpointError, StorageError
from foundation.interchange import import_published
from foundation.interchange.export import load_export
from foundation.interchange.saratrx import from_saratrx
from foundation.models.hivit import HiViT, Merge, Shape, UnitEmbed
from foundation.training.checkpoint import shapes

NANO = Shape(dim=64, stem=(1, 2), depth=2, heads=1)


def published(shape: Shape = NANO, channels: int = 3, values: bool = True) -> dict[str, Tensor]:
    """A state dict as SARATR-X's pretraining saves it: names and shapes of its code, HiViT-B by default there."""
    quarter, state = shape.dim // 4, dict[str, tuple[int, ...]]()

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        state[f"{name}.weight"] = (outputs, inputs)
        state.update({f"{name}.bias": (outputs,)} if bias else {})

    def norm(name: str, dim: int) -> None:
        state.update({f"{name}.weight": (dim,), f"{name}.bias": (dim,)})

    def block(name: str, dim: int, ratio: int, attends: bool) -> None:
        if attends:
            norm(f"{name}.norm1", dim)
            linear(f"{name}.attn.qkv", dim, 3 * dim)
            linear(f"{name}.attn.proj", dim, dim)
        norm(f"{name}.norm2", dim)
        linear(f"{name}.mlp.fc1", dim, ratio * dim)
        linear(f"{name}.mlp.fc2", ratio * dim, dim)

    state["absolute_pos_embed"] = (1, shape.side**2, shape.dim)
    state["patch_embed.proj.weight"], state["patch_embed.proj.bias"] = (quarter, channels, 4, 4), (quarter,)
    norm("patch_embed.norm", quarter)
    number = 0
    for stage, pairs in enumerate(shape.stem):
        dim = quarter * 2**stage
        for _ in range(2 * pairs):
            block(f"blocks.{number}", dim, 3, attends=False)
            number += 1
        norm(f"blocks.{number}.norm", 4 * dim)
        linear(f"blocks.{number}.reduction", 4 * dim, 2 * dim, bias=False)
        number += 1
    for _ in range(shape.depth):
        block(f"blocks.{number}", shape.dim, 4, attends=True)
        number += 1
    norm("norm", 7 * shape.dim)  # over the three stages
    for radius in (1, 2, 3):
        state[f"sarfeature{radius}.weight_x1"] = (1, 1, 19, 19)
    state["mask_token"], state["decoder_pos_embed"] = (1, 1, 32), (1, shape.side**2, 32)
    linear("decoder_embed", 7 * shape.dim, 32)
    block("decoder_blocks.0", 32, 4, attends=True)
    norm("decoder_norm", 32)
    linear("decoder_pred", 32, 768)
    if not values:
        return {n: torch.empty(s, device="meta") for n, s in state.items()}
    draw = torch.Generator().manual_seed(0)
    return {
        n: 0.3 * torch.randn(s, generator=draw) + (1.0 if n.endswith("norm.weight") else 0.0) for n, s in state.items()
    }


def by_the_book(state: dict[str, Tensor], x: Tensor, shape: Shape) -> Tensor:
    """The features by loops over patches and units, from the published names: [B, N, dim] before any final norm."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def mlp(x: Tensor, name: str) -> Tensor:
        return x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")

    rows = []
    for top in range(0, x.shape[2], 16):
        for left in range(0, x.shape[3], 16):
            patch = F.conv2d(
                x[:, :, top : top + 16, left : left + 16],
                state["patch_embed.proj.weight"],
                state["patch_embed.proj.bias"],
                4,
            )
            units = {(r, c): norm(patch[:, :, r, c], "patch_embed.norm") for r in range(4) for c in range(4)}
            number, side = 0, 4
            for pairs in shape.stem:
                for _ in range(2 * pairs):
                    units = {at: mlp(u, f"blocks.{number}") for at, u in units.items()}
                    number += 1
                side //= 2
                order = ((0, 0), (1, 0), (0, 1), (1, 1))
                four = {
                    (r, c): torch.cat([units[2 * r + dr, 2 * c + dc] for dr, dc in order], -1)
                    for r in range(side)
                    for c in range(side)
                }
                units = {
                    at: linear(norm(u, f"blocks.{number}.norm"), f"blocks.{number}.reduction") for at, u in four.items()
                }
                number += 1
            rows.append(units[0, 0])
    x = torch.stack(rows, 1) + state["absolute_pos_embed"]
    for block in range(number, number + shape.depth):
        name = f"blocks.{block}"
        q, k, v = (
            linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
            .unflatten(2, (3, shape.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        x = mlp(x, name)
    return x


def test_published_weights_give_the_features_of_the_definition(tmp_path: Path) -> None:
    shape = NANO._replace(side=3)
    state = published(shape)
    torch.save({"model": state, "epoch": 800}, tmp_path / "checkpoint-799.pth")
    out = import_published(tmp_path / "checkpoint-799.pth", tmp_path / "out")
    encoder, facts = load_export(out)
    assert (encoder.shape._replace(stem=tuple(encoder.shape.stem)), facts["pool"]) == (shape, "avg")
    x = torch.rand(2, 1, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = encoder.forward_features(x)
        theirs = F.layer_norm(by_the_book(state, x.expand(-1, 3, -1, -1), shape), (64,), eps=1e-6)
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert torch.equal(encoder(x), ours.mean(1))
    assert not encoder.training


def test_the_published_names_and_shapes_of_base_fit_our_encoder() -> None:
    state = published(Shape(), values=False)
    state["patch_embed.proj.weight"] = torch.zeros(128, 3, 4, 4)
    ours, shape = from_saratrx(state)
    assert shape._replace(stem=tuple(shape.stem)) == Shape(512, (2, 2), 20, 8, 1, 14, 16, 3)
    with torch.device("meta"):
        assert shapes(ours) == shapes(HiViT(shape).state_dict())
        assert 65e6 < sum(p.numel() for p in HiViT(shape).parameters()) < 67e6  # HiViT-B has 66 M


def test_an_import_overwrites_nothing(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "a.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(StorageError, match="an import is written into a new folder"):
        import_published(tmp_path / "a.pth", tmp_path / "out")
    assert [p.read_text() for p in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("size", [(224, 224), (64, 96), (16, 16)])
def test_images_of_any_size_run_and_can_be_tuned(size: tuple[int, int]) -> None:
    encoder = HiViT(NANO)
    tokens = encoder.forward_features(torch.rand(2, 1, *size))
    assert tokens.shape == (2, size[0] // 16 * (size[1] // 16), 64)
    assert (encoder.class_tokens, encoder.prefix) == (0, 0)
    encoder.pooled(tokens).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_positions_of_another_grid_are_resized_and_those_of_their_own_are_not() -> None:
    encoder = HiViT(NANO._replace(side=4))
    nn.init.normal_(encoder.table, generator=torch.Generator().manual_seed(0))
    assert encoder.positions((4, 4)) is encoder.table
    assert encoder.positions((2, 6)).shape == (1, 12, 64)
    nn.init.constant_(encoder.table, 0.5)
    assert torch.allclose(encoder.positions((3, 5)), torch.tensor(0.5))


def test_units_keep_their_place_in_their_patch() -> None:
    embed, merge = UnitEmbed(16, 1, 8), Merge(8)
    x = torch.rand(1, 1, 32, 48)
    units = embed(x)
    assert units.shape == (1, 6, 4, 4, 8)
    assert torch.allclose(units[:, 4], embed(x[:, :, 16:, 16:32])[:, 0], atol=1e-6)  # second row, second column
    assert merge(units).shape == (1, 6, 2, 2, 16)
    with pytest.raises(ValueError, match="image of 40x32 px is not divisible into 16-px patches"):
        HiViT(NANO).forward_features(torch.rand(1, 1, 40, 32))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("absolute_pos_embed"), "this is not the HiViT of SARATR-X: 'absolute_pos_embed' is missing"),
        (lambda s: s.pop("blocks.9.norm1.bias"), "1 missing: blocks.1.norm1.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (
            lambda s: s.update({"blocks.8.attn.relative_position_bias_table": torch.zeros(729, 1)}),
            "this HiViT has tables of relative positions; SARATR-X has none",
        ),
    ],
)
def test_what_is_not_saratr_x_is_named(edit: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path) -> None:
    state = published()
    edit(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        import_published(tmp_path / "a.pth", tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
