"""The network is plain PyTorch: any grid, any patch, the published shapes, and maps that explain its own output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published import published_name
from torch import Tensor, nn
from torch._dynamo.utils import counters

from foundation.config import Config, from_dict
from foundation.models.attention import Attention
from foundation.models.families import FAMILY
from foundation.models.heads import MaskedWindowModel
from foundation.models.initialise import Piece, initialise
from foundation.models.vit import ViT
from foundation.objectives.registry import build
from foundation.training.blocks import prepare
from kernels.rpe_attention import BACKENDS
from kernels.rpe_attention.buckets import product_buckets
from kernels.rpe_attention.layout import Layout, Problem

GOLDEN = Path(__file__).parents[1] / "golden" / "vit_base_state_shapes.json"
BRIEF = settings(max_examples=15, deadline=None)
IN_FP32 = Problem("cpu", torch.float32, 2, 16, Layout((5, 7)))


def config(patch: int = 8, radii: tuple[int, ...] = (3, 5), **model: Any) -> Config:
    """Windows of 3x3 patches in a 5x5 grid."""
    return from_dict(
        {
            "data": {"image_size": 5 * patch},
            "model": {"size": "nano", "patch": patch, "decoder": {"width": 32, "depth": 1, "heads": 2}, **model},
            "objective": {"windows": 2, "window": 3, "radii": radii},
        }
    )


def rand(*shape: int) -> Tensor:
    """Images that are the same in every run."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(7))


def shaken(model: nn.Module) -> Any:
    """Noise on every parameter, so that nothing is zero or one by initialisation."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def small_vit(backend: str = "auto", patch: int = 4) -> Any:
    torch.manual_seed(0)
    return shaken(ViT(24, 2, 3, patch, 1, backend))


@pytest.mark.parametrize("patch", [16, 14, 8])
@pytest.mark.parametrize("radii", [(3, 5, 7, 9), (3,)], ids=len)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_patch_size_learns_and_the_output_width_follows(
    patch: int, radii: tuple[int, ...], channels: int
) -> None:
    objective = build(config(patch, radii, channels=channels))
    model = objective.build_model()
    initialise(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images = rand(3, channels, 5 * patch, 5 * patch)
    inputs = objective.prepare(images, torch.arange(3))
    losses = []
    for _ in range(3):
        prediction = model(*inputs.model_args)
        assert prediction.shape == (3, 2, 7, channels * len(radii) * patch**2)
        loss, _ = objective.loss(prediction, inputs)
        optimizer.zero_grad()
        loss.backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] < float("inf")


def test_the_default_model_has_every_tensor_of_a_published_base_checkpoint() -> None:
    with torch.device("meta"):
        ours = {published_name(n): list(t.shape) for n, t in build(Config()).build_model().state_dict().items()}
    published = json.loads(GOLDEN.read_text())
    published.pop("pos_embed")  # never added to anything upstream
    assert ours == published


def test_the_size_table_is_the_published_one() -> None:
    published = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}
    published |= {"large": (1024, 24, 16), "huge": (1280, 32, 16)}
    published |= {"giant": (1408, 40, 16), "gigantic": (1664, 48, 16), "3b": (2560, 36, 20)}
    published |= {"7b": (4096, 40, 32), "22b": (6144, 48, 48)}
    assert {name: tuple(row) for name, row in FAMILY.items() if name != "nano"} == published


@pytest.mark.parametrize("size", FAMILY)
def test_a_row_of_the_size_table_is_what_is_built(size: str) -> None:
    with torch.device("meta"):
        encoder: Any = build(config(size=size)).build_model().encoder
    assert (encoder.dim, len(encoder.blocks), encoder.blocks[0].attn.heads) == FAMILY[size]
    assert encoder.blocks[-1].fc1.out_features == 4 * encoder.dim


@BRIEF
@given(grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), batch=st.integers(1, 3))
def test_the_encoder_takes_images_of_any_grid(grid: tuple[int, int], batch: int) -> None:
    images = rand(batch, 1, 4 * grid[0], 4 * grid[1])
    vit = small_vit()
    with torch.no_grad():
        tokens = vit.forward_features(images)
        assert tokens.shape == (batch, 1 + grid[0] * grid[1], 24)
        assert torch.equal(vit(images), tokens[:, 0])
        alone = vit.forward_features(images[-1:])
    assert torch.allclose(alone, tokens[-1:], atol=1e-5)


@BRIEF
@given(grid=st.tuples(st.integers(1, 8), st.integers(1, 8)))
def test_rows_and_columns_of_a_grid_are_never_confused(grid: tuple[int, int]) -> None:
    vit, turned = small_vit(), small_vit()
    swap = torch.full((50,), 49)
    swap[:49] = torch.arange(49).view(7, 7).T.flatten()  # the buckets of transposed offsets
    with torch.no_grad():
        turned.patch_embed.proj.weight.copy_(vit.patch_embed.proj.weight.mT)
        for ours, theirs in zip(turned.blocks, vit.blocks, strict=True):
            ours.attn.rpe.table.copy_(theirs.attn.rpe.table[..., swap])
        images = rand(1, 1, 4 * grid[0], 4 * grid[1])
        tokens, transposed = vit.forward_features(images), turned.forward_features(images.mT.contiguous())
    assert torch.allclose(tokens[:, 0], transposed[:, 0], atol=1e-4)
    expected = tokens[:, 1:].unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    assert torch.allclose(transposed[:, 1:], expected, atol=1e-4)


def test_an_image_that_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="image of 32x30 px is not divisible into 4-px patches"):
        small_vit().forward_features(rand(1, 1, 32, 30))


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width 25 is not divisible by 3 heads"):
        ViT(25, 1, 3)


@pytest.mark.parametrize("backend", [n for n, b in BACKENDS.items() if not b.refuses(IN_FP32)])
def test_a_backend_never_changes_what_the_encoder_says(backend: str) -> None:
    images = rand(2, 1, 20, 28)
    with torch.no_grad():
        ours, definition = (small_vit(b).forward_features(images) for b in (backend, "reference"))
    assert torch.allclose(ours, definition, atol=2e-5)


def initialised(seed: int) -> nn.Module:
    model = build(config()).build_model()
    initialise(model, seed)
    return model


def test_initial_weights_follow_from_the_seed_and_the_names_alone() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        return initialised(seed).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    same = {name.rsplit(".", 1)[-1] for name in first if torch.equal(first[name], other[name])}
    assert same == {"bias", "weight", "table"}
    assert all(torch.equal(first[n], other[n]) == ("norm" in n) for n in first if n.endswith("weight"))


@BRIEF
@given(cut=st.integers(0, 96 * 64), seed=st.integers(0, 2**40))
def test_a_piece_of_a_parameter_gets_the_values_that_it_has_in_the_whole(cut: int, seed: int) -> None:
    whole, pieces = nn.Linear(64, 96), nn.Linear(64, 96)
    initialise(whole, seed)
    for first, last in ((cut, None), (0, cut)):
        initialise(
            pieces,
            seed,
            lambda p, first=first, last=last: Piece(p.detach().view(-1)[first:last], first, p.shape),  # type: ignore[misc]
        )
    assert torch.equal(pieces.weight, whole.weight)


def test_initial_values_are_those_of_their_distributions() -> None:
    model: Any = initialised(3)
    weight = model.encoder.blocks[0].fc1.weight
    bound = (6 / sum(weight.shape)) ** 0.5
    assert 0.999 * bound < weight.abs().max() <= bound
    assert abs(weight.mean()) < 0.01 * bound
    tokens = torch.cat([model.encoder.cls_token.flatten(), model.mask_token.flatten()])
    assert 0.015 < tokens.std() < 0.025


def test_a_parameter_without_a_rule_is_an_error_and_not_left_to_chance() -> None:
    with pytest.raises(TypeError, match="no rule for the initial value of scale, a parameter of Odd"):
        initialise(Odd(), 0)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))


def test_tables_and_biases_start_at_zero_and_norms_at_one() -> None:
    for name, tensor in initialised(0).state_dict().items():
        if name.endswith(("bias", "table")):
            assert not tensor.any(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name


def test_attention_maps_are_probabilities_and_reproduce_the_forward_pass() -> None:
    vit, images = small_vit("dense"), rand(2, 1, 12, 20)
    seen: list[tuple[Tensor, Tensor]] = []
    for block in vit.blocks:
        assert isinstance(block.attn, Attention)
        block.attn.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        vit.forward_features(images)
        recorded = list(seen)
        maps = list(vit.attention_maps(images))
        assert len(maps) == len(recorded) == 2
        for block, attention, (x, out) in zip(vit.blocks, maps, recorded, strict=True):
            assert attention.shape == (2, 3, 16, 16)
            assert (attention >= 0).all()
            assert torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-6)
            value = block.attn.qkv(x).unflatten(-1, (3, 3, 8))[:, :, 2].transpose(1, 2)
            again = block.attn.proj((attention @ value).transpose(1, 2).flatten(2))
            assert torch.allclose(again, out, atol=1e-5)


def windows_of(model: MaskedWindowModel, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.tensor([[[0, 1, 5, 6], [12, 13, 17, 18]]]).expand(len(images), -1, -1)
    return images, ids.contiguous(), torch.tensor([[[0, 3], [1, 2]]]).expand(len(images), -1, -1).contiguous()


def test_predictions_of_masked_slots_are_those_of_all_slots_in_the_order_asked() -> None:
    model = shaken(MaskedWindowModel(small_vit(), 16, 1, 2, 10))
    args = windows_of(model, rand(2, 1, 20, 20))
    with torch.no_grad():
        some, every = model(*args), model(*args, predict_all=True)
    assert torch.allclose(some, every.gather(2, args[2][..., None].expand(-1, -1, -1, 10)), atol=1e-6)


def test_the_content_of_masked_patches_and_of_the_image_outside_a_window_never_reaches_its_prediction() -> None:
    model = shaken(MaskedWindowModel(small_vit(), 16, 1, 2, 10))
    images, ids, masked = windows_of(model, rand(1, 1, 20, 20))
    changed = images.unfold(2, 4, 4).unfold(3, 4, 4).clone().flatten(2, 3)  # [1, 1, 25, 4, 4]
    visible = ids[0, 0][[1, 2]]
    outside = torch.ones(25, dtype=torch.bool)
    outside[visible] = False
    changed[:, :, outside] += 1
    changed = changed.unflatten(2, (5, 5)).transpose(3, 4).reshape(1, 1, 20, 20)
    with torch.no_grad():
        before, after = model(images, ids, masked), model(changed, ids, masked)
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_a_table_learnt_in_windows_serves_full_images() -> None:
    window, image = product_buckets((7, 7)), product_buckets((14, 14))
    assert set(window.unique().tolist()) == set(image.unique().tolist()) == set(range(50))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("attention", ["dense", "sdpa", "triton"])
def test_all_blocks_of_one_width_share_one_compiled_graph_without_breaks(
    attention: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attention == "triton":
        pytest.importorskip("triton")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: real(forward, backend="aot_eager"))  # the graph, no code
    torch._dynamo.reset()
    counters.clear()
    tiny = config(attention=attention, decoder={"width": 48, "depth": 2, "heads": 3})
    train = tiny.train.model_copy(update={"compile": True, "activation_checkpointing": checkpointing})
    objective = build(tiny)
    model = prepare(objective.build_model(), train)
    initialise(model, 0)
    for batch in (1, 1):
        inputs = objective.prepare(rand(batch, 1, 40, 40), torch.arange(batch))
        objective.loss(model(*inputs.model_args), inputs)[0].backward()
    assert counters["stats"]["unique_graphs"] == 2  # encoder, decoder
    assert not counters["graph_break"]
    assert counters["frames"]["total"] == counters["frames"]["ok"] == 2
    torch._dynamo.reset()
