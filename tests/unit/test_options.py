"""Layer scale, swiglu, norms of queries and keys, learnt positions: what each adds, and that none is the default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.config import Config, from_dict
from foundation.errors import ConfigError
from foundation.models.initialise import initialise
from foundation.models.layers import Options
from foundation.models.position import LearnedPositions, resized
from foundation.models.vit import Block, ViT
from foundation.objectives.reconstruction import build_encoder
from foundation.objectives.registry import build

BRIEF = settings(max_examples=25, deadline=None)
KINDS = ("relative", "sincos", "learned")


def vit(
    positions: str = "relative", options: Options | None = None, grid: tuple[int, int] = (4, 4), patch: int = 4
) -> ViT:
    torch.manual_seed(0)
    made = ViT(24, 2, 3, patch, 1, positions=positions, options=options or Options(), grid=grid)
    for name, parameter in made.named_parameters():
        if not name.endswith("weight"):
            nn.init.normal_(parameter, std=0.3)
    return made.eval()


def config(pixels: int = 64, patch: int = 16, objective: str = "pgga", **model: Any) -> Config:
    tree: dict[str, Any] = {"size": "nano", "patch": patch, "attention": "reference", **model}
    return from_dict({"data": {"image_size": pixels}, "model": tree, "objective": {"name": objective, "radii": (3,)}})


def test_swiglu_is_the_gated_product_of_its_paper() -> None:
    block = vit(options=Options(mlp="swiglu")).blocks[0]
    assert isinstance(block, Block)
    x = torch.rand(2, 5, 24)
    gate, value = (F.linear(x, w, b) for w, b in zip(block.fc1.weight.chunk(2), block.fc1.bias.chunk(2), strict=True))
    expected = F.linear(gate * torch.sigmoid(gate) * value, block.fc2.weight, block.fc2.bias)
    assert torch.allclose(block.fc2(block.activation(block.fc1(x))), expected, atol=1e-5)


@pytest.mark.parametrize(("dim", "hidden"), [(1536, 4096), (1408, 3776), (4096, 10944), (96, 256), (1024, 2752)])
def test_swiglu_is_two_thirds_as_wide_in_multiples_of_64(dim: int, hidden: int) -> None:
    assert Options(mlp="swiglu").hidden(dim) == hidden
    assert hidden % 64 == 0
    assert 0 <= hidden - 8 * dim / 3 < 64
    assert Options().hidden(dim) == 4 * dim


def test_layer_scale_multiplies_both_branches_and_one_is_none() -> None:
    plain, scaled = vit(), vit(options=Options(layer_scale=1.0))
    initialise(scaled, 0)
    initialise(plain, 0)
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(plain.forward_features(images), scaled.forward_features(images))
    with torch.no_grad():
        for name, parameter in scaled.named_parameters():
            if name.endswith("gamma"):
                assert torch.equal(parameter, torch.ones(24))
                parameter.zero_()
    x = torch.rand(2, 17, 24)
    assert torch.equal(scaled.blocks[0](x, (4, 4)), x)


def test_layer_scales_start_at_the_value_of_the_configuration_and_keep_the_precision_of_the_stream() -> None:
    model = build_encoder(config(layer_scale=1e-5))
    initialise(model, 0)
    gammas = [p for name, p in model.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 2 * 4
    assert all(torch.equal(p, torch.full((96,), 1e-5)) for p in gammas)
    block: Any = model.blocks[0]
    assert block.ls1(torch.rand(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("positions", KINDS)
def test_normalised_queries_and_keys_bound_attention_whatever_the_projection(positions: str) -> None:
    model = vit(positions, Options(qk_norm=True))
    attention: Any = model.blocks[0].attn
    x = torch.rand(2, 17, 24)
    before = attention.probabilities(x, (4, 4))
    q, k, v = attention._packed(x).unbind(2)
    raw = attention.qkv(x).view(2, 17, 3, 3, 8)
    for norm, ours, plain in ((attention.q_norm, q, raw[:, :, 0]), (attention.k_norm, k, raw[:, :, 1])):
        assert torch.allclose(ours, F.layer_norm(plain, (8,), norm.weight, norm.bias, 1e-6), atol=1e-6)
    assert torch.equal(v, raw[:, :, 2])
    with torch.no_grad():
        attention.qkv.weight *= 1e3
        attention.qkv.bias *= 1e3
    # The table takes the normalised query too: nothing sees how long the projection has grown.
    assert torch.allclose(attention.probabilities(x, (4, 4)), before, atol=1e-5)


@pytest.mark.parametrize("backend", ["dense", "sdpa", "reference"])
def test_every_backend_takes_normalised_queries(backend: str) -> None:
    images, outputs = torch.rand(1, 1, 16, 16), []
    for name in (backend, "reference"):
        model = vit("relative", Options(qk_norm=True))
        for block in model.blocks:
            block.attn.backend = name  # type: ignore[union-attr]
        outputs.append(model.forward_features(images))
    assert torch.allclose(*outputs, atol=2e-5)


def test_defaults_add_no_parameter_and_options_only_theirs() -> None:
    def names(**model: Any) -> set[str]:
        return {name.replace("encoder.", "") for name, _ in build_encoder(config(**model)).named_parameters()}

    plain = names()
    assert not any(part in name for name in plain for part in ("ls1", "q_norm", "pos_embed"))
    assert {n for n in names(layer_scale=0.1, qk_norm=True) - plain if n.startswith("blocks.0.")} == {
        *(f"blocks.0.ls{i}.gamma" for i in (1, 2)),
        *(f"blocks.0.attn.{x}_norm.{leaf}" for x in "qk" for leaf in ("weight", "bias")),
    }
    assert names(positions="learned") - names(positions="sincos") == {"pos_embed.embedding"}
    assert names(mlp="swiglu") == plain


def test_a_decoder_has_plain_blocks() -> None:
    model: Any = build(config(layer_scale=0.1, qk_norm=True, mlp="swiglu")).build_model()
    for name, _ in model.decoder.named_parameters():
        assert not any(part in name for part in ("ls1", "q_norm")), name
    assert model.decoder.blocks[0].fc1.out_features == 4 * model.decoder.embed.out_features


@BRIEF
@given(positions=st.sampled_from(KINDS), sides=st.tuples(st.integers(8, 128), st.integers(8, 128)))
def test_images_of_64_to_1024_pixels_have_finite_tokens_whatever_size_was_trained(
    positions: str, sides: tuple[int, int]
) -> None:
    model = ViT(8, 1, 2, 8, 1, "reference", positions, grid=(14, 14))
    initialise(model, 0)
    sides = (sides[0], 8) if sides[0] * sides[1] > 1500 else sides  # 128 x 8 is 1024 x 64 pixels
    tables = {name: p.clone() for name, p in model.named_parameters() if "table" in name or "embedding" in name}
    assert len(tables) == (positions != "sincos")
    with torch.no_grad():
        tokens = model.forward_features(torch.rand(1, 1, 8 * sides[0], 8 * sides[1]))
    assert tokens.shape == (1, 1 + sides[0] * sides[1], 8)
    assert tokens.isfinite().all()
    assert all(torch.equal(dict(model.named_parameters())[name], table) for name, table in tables.items())


@pytest.mark.parametrize("size", [64, 128, 512, 1024])
@pytest.mark.parametrize("positions", KINDS)
def test_a_run_of_any_size_builds_an_encoder_for_all(positions: str, size: int) -> None:
    encoder = build_encoder(config(size, 64, positions=positions))
    initialise(encoder, 0)
    if positions == "learned":
        assert isinstance(encoder.pos_embed, LearnedPositions)
        assert encoder.pos_embed.embedding.shape == (1, (size // 64) ** 2, 96)
    with torch.no_grad():
        for side in (64, 256, 1024):
            assert encoder.forward_features(torch.rand(1, 1, side, side)).isfinite().all()


def test_learnt_positions_are_those_of_timm_on_their_grid_and_on_others() -> None:
    pytest.importorskip("timm")
    from timm.layers import resample_abs_pos_embed

    table = torch.rand(1, 20, 8)
    assert resized(table, (4, 5), (4, 5)) is table
    for wanted in ((4, 4), (5, 4), (9, 13), (2, 2)):
        theirs = resample_abs_pos_embed(table, list(wanted), [4, 5], num_prefix_tokens=0)
        assert torch.equal(resized(table, (4, 5), wanted), theirs)


@BRIEF
@given(sides=st.tuples(*4 * [st.integers(1, 9)]), level=st.floats(-2, 2))
def test_resizing_keeps_what_is_the_same_everywhere(sides: tuple[int, int, int, int], level: float) -> None:
    table = torch.full((1, sides[0] * sides[1], 3), level)
    found: Tensor = resized(table, sides[:2], sides[2:])
    assert torch.allclose(found, torch.full((1, sides[2] * sides[3], 3), level), atol=1e-5)


@pytest.mark.parametrize("objective", ["pgga", "mae", "fg-mae"])
def test_learnt_positions_train_where_a_frame_sees_whole_images(objective: str) -> None:
    run = config(128, positions="learned", objective=objective, decoder={"width": 32, "depth": 1, "heads": 2})
    task = build(run)
    model = task.build_model()
    initialise(model, 0)
    inputs = task.prepare(torch.rand(2, 1, 128, 128), torch.arange(2))
    task.loss(model(*inputs.model_args), inputs)[0].backward()
    assert isinstance(model.encoder.pos_embed, LearnedPositions)
    gradient = model.encoder.pos_embed.embedding.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    embedding = model.encoder.pos_embed.embedding
    assert 0.015 < embedding.std() < 0.025


@pytest.mark.parametrize("positions", ["sincos", "learned"])
@pytest.mark.parametrize("objective", ["sar-jepa", "lomar", "saratr-x-v2-target"])
def test_windows_refuse_positions_of_the_image(objective: str, positions: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(224, positions=positions, objective=objective)
    text = f"relative, which objective.name = '{objective}' builds on: its windows know nothing of their place"
    assert f"model.positions = '{positions}': {text}" in str(caught.value)


def test_what_a_row_of_the_table_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"(?s)model.layer_scale[\s\S]*model.mlp = 'relu': one of gelu, swiglu"):
        config(mlp="relu", layer_scale=0.0)


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_patches_of_14_train_at_224(positions: str) -> None:
    run = config(224, 14, "mae", positions=positions, decoder={"width": 16, "depth": 1, "heads": 2})
    task = build(run)
    model = task.build_model()
    initialise(model, 0)
    assert model.encoder.grid(torch.rand(1, 1, 224, 224)) == (16, 16)
    inputs = task.prepare(torch.rand(1, 1, 224, 224), torch.arange(1))
    loss, _ = task.loss(model(*inputs.model_args), inputs)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
