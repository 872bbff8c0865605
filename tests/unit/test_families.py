"""The formulas of a size are those of the model that is built: parameters exactly, operations as a counter sees."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foundation.config import Config, from_dict
from foundation.models.families import FAMILY, flops, parameters, shapes, tokens
from foundation.objectives.registry import build


def config(
    size: str = "nano", patch: int = 16, channels: int = 1, model: dict[str, Any] | None = None, **objective: Any
) -> Config:
    """112 pixels are a multiple of 8, 14 and 16."""
    model = {"size": size, "patch": patch, "channels": channels, "attention": "reference", **(model or {})}
    return from_dict({"data": {"image_size": 112}, "model": model, "objective": {"windows": 1, **objective}})


@pytest.mark.parametrize("size", FAMILY)
def test_the_parameter_formula_is_the_model_that_is_built(size: str) -> None:
    for patch, channels in product((8, 14, 16), (1, 3)):
        run = config(size, patch, channels, radii=(3, 5))
        with torch.device("meta"):
            model: Any = build(run).build_model()
        p = parameters(run)
        assert p.total == sum(t.numel() for t in model.parameters())
        blocks = (model.encoder.blocks[0], model.decoder.blocks[0])
        assert (p.block, p.decoder_block) == tuple(sum(t.numel() for t in b.parameters()) for b in blocks)
        outside = [t.numel() for name, t in model.named_parameters() if ".blocks." not in name]
        assert p.root == sum(outside)


OPTIONS: list[dict[str, Any]] = [
    {"layer_scale": 1e-5},
    {"mlp": "swiglu"},
    {"qk_norm": True},
    {"positions": "learned"},
    {"positions": "learned", "layer_scale": 1e-5, "mlp": "swiglu", "qk_norm": True, "registers": 4, "patch": 14},
]


@pytest.mark.parametrize("size", FAMILY)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_parameter_formula_knows_every_option(size: str, options: dict[str, Any]) -> None:
    for objective in ("pgga", "mae") if options.get("positions") == "learned" else ("pgga", "sar-jepa"):
        run = config(size, name=objective, radii=(3, 5), model=options)
        with torch.device("meta"):
            model: Any = build(run).build_model()
        p = parameters(run)
        assert p.total == sum(t.numel() for t in model.parameters())
        blocks = (model.encoder.blocks[0], model.decoder.blocks[0])
        assert (p.block, p.decoder_block) == tuple(sum(t.numel() for t in b.parameters()) for b in blocks)
        # Pieces are cut by rows, so these count too.
        ours = sorted((each.rows, each.elements) for each in shapes(run).every)
        assert ours == sorted((t.shape[0], t.shape[1:].numel()) for t in model.parameters())


@pytest.mark.parametrize("size", FAMILY)
def test_swiglu_has_about_as_many_parameters(size: str) -> None:
    plain, gated = (parameters(config(size, model={"mlp": mlp}, radii=(3,))).block for mlp in ("gelu", "swiglu"))
    assert gated == pytest.approx(plain, rel=0.04)


@pytest.mark.parametrize(
    ("size", "options"), [*(("nano", each) for each in OPTIONS), *((size, OPTIONS[-1]) for size in FAMILY)], ids=str
)
def test_the_operations_of_a_block_are_those_a_counter_sees_in_every_size(size: str, options: dict[str, Any]) -> None:
    run = config(size, name="pgga", radii=(3,), model=options)
    objective, expected = build(run), flops(run)
    with torch.device("meta"):
        model = objective.build_model()
        masks = objective.masks(torch.arange(1), (side := 112 // run.model.patch, side))
        with FlopCounterMode(display=False) as counter:
            model(torch.rand(1, 1, 112, 112), *masks)
    assert counter.get_total_flops() == expected.forward


@pytest.mark.parametrize(
    ("patch", "channels", "window", "windows", "ratio"), [(16, 1, 7, 1, 0.8), (8, 3, 3, 4, 0.5), (14, 1, 5, 2, 0.8)]
)
def test_the_operations_are_those_a_counter_sees(
    patch: int, channels: int, window: int, windows: int, ratio: float
) -> None:
    run = config("nano", patch, channels, window=window, windows=windows, mask_ratio=ratio, radii=(3,))
    objective = build(run)
    model = objective.build_model()
    inputs = objective.prepare(torch.rand(2, channels, 112, 112), torch.arange(2))
    with FlopCounterMode(display=False) as forward:
        prediction = model(*inputs.model_args)
    expected = flops(run)
    assert forward.get_total_flops() == 2 * expected.forward
    loss, _ = objective.loss(prediction, inputs)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    # Everything twice, but nobody asks for the gradient of the image.
    assert backward.get_total_flops() == 2 * (2 * expected.forward - expected.embed)
    assert expected.training == 3 * expected.forward
    assert prediction.shape[1:] == (windows, tokens(run).masked, tokens(run).values)


def test_operations_per_image_are_the_published_ones() -> None:
    """The recipe's figures to three digits; half a percent for the rounding, and for base, whose source also counts
    the prediction of visible tokens."""
    published = {"small": 19.4, "base": 45.3, "large": 133, "huge": 265, "giant": 395, "gigantic": 654}
    published |= {"7b": 3243, "22b": 8727}
    found = {size: flops(from_dict({"model": {"size": size}})).forward / 1e9 for size in published}
    assert found == pytest.approx(published, rel=5e-3)


def test_bytes_of_state_are_the_published_ones_but_for_their_rounding() -> None:
    published = {"base": 1.8, "large": 5.2, "huge": 10.5, "giant": 15.6, "gigantic": 25.9}
    published |= {"3b": 45.7, "7b": 129, "22b": 348}
    found = {size: 16 * parameters(from_dict({"model": {"size": size}})).total / 1e9 for size in published}
    assert found == pytest.approx(published, rel=0.013)


@pytest.mark.parametrize("size", FAMILY)
def test_heads_divide_the_width_into_sizes_that_kernels_know(size: str) -> None:
    row = FAMILY[size]
    assert row.dim % row.heads == 0
    assert row.dim // row.heads in (32, 64, 80, 88, 104, 128)
