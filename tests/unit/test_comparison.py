"""The compared objectives differ in target or mask alone; each is a row and a YAML, learns, and is planned exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from foundation.config import Config, flatten, from_dict, load
from foundation.errors import ConfigError
from foundation.evaluation.panels import model_panels, reconstruct
from foundation.models.families import flops, parameters, shapes, size, tokens
from foundation.models.initialise import initialise
from foundation.objectives.masks import whole_image
from foundation.objectives.reconstruction import LearnedFusion, gather_masked
from foundation.objectives.registry import OBJECTIVES, build
from foundation.objectives.targets import MeanScale, StructuralScales, patchify
from foundation.planning.activations import batch_bytes
from foundation.training.optim import rules
from shards.catalog import load as open_catalog

FILES = Path(__file__).parents[2] / "configs" / "objectives"
BRIEF = settings(max_examples=20, deadline=None)
V2 = {"name": "saratr-x-v2-target", "radii": (3, 5), "offset": 1e-6, "centre": "exclude"}
LATENT = "i-jepa"
"""The row whose target is not a map: tests/unit/test_latent.py."""
FORMS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in OBJECTIVES if name != LATENT},
    "normalised": {"name": "lomar-sar", "normalise_pixels": True},
    "fg-mae's hog": {"name": "hog", "gaussian_window": 16},
    "small cells": {"name": "hog", "cell": 4, "bins": 5},
    "equal": {**V2, "fusion": "equal"},
    "learned": {**V2, "fusion": "learned"},
    "separate, normalised": {**V2, "normalise_pixels": True},
    "equal, normalised": {**V2, "fusion": "equal", "normalise_pixels": True},
    "learned, normalised": {**V2, "fusion": "learned", "normalise_pixels": True},
}
FIXED = ("mae", "fg-mae")
"""Rows of MAE's frame: fixed positions, an encoder of visible patches."""
OWN_RECIPE = {"lomar", LATENT, *FIXED}
"""Rows whose head, batch and schedule are those of their own paper."""
EACH = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))


def config(form: dict[str, Any], channels: int = 1, **rest: Any) -> Config:
    """A 4x4 grid of 16-pixel patches, windows of 3x3; LoMaR without a decoder."""
    positions = "sincos" if form["name"] in FIXED else "relative"
    decoder = {"width": 32, "depth": 0 if form["name"] == "lomar" else 1, "heads": 2}
    return from_dict(
        {
            "data": {"image_size": 64},
            "model": {"size": "nano", "channels": channels, "positions": positions, "decoder": decoder},
            "objective": {"windows": 2, "window": 3, "radii": (3, 5), **form},
            **rest,
        }
    )


def images(channels: int = 1, count: int = 2) -> Tensor:
    """The same speckle in every run."""
    noise = torch.randn(2, count, channels, 64, 64, generator=torch.Generator().manual_seed(1))
    return (0.2 * noise.square().sum(0).sqrt()).clamp(0, 1)


def prepared(form: dict[str, Any], channels: int = 1) -> tuple[Any, Any, Any]:
    """An objective, its model with initial weights, and the inputs of two images."""
    objective = build(config(form, channels))
    model = objective.build_model()
    initialise(model, 0)
    return objective, model, objective.prepare(images(channels), torch.arange(2))


def test_every_row_of_the_registry_has_a_file_of_its_name_that_loads_and_builds() -> None:
    assert {path.stem for path in FILES.glob("*.yaml")} == set(OBJECTIVES)
    for path in FILES.glob("*.yaml"):
        run = load(path)
        assert (run.name, run.objective.name) == (path.stem, path.stem)
        with torch.device("meta"):
            model = build(run).build_model()
        assert parameters(run).total == sum(p.numel() for p in model.parameters())


def test_the_compared_files_differ_in_nothing_but_their_objective_or_name_a_recipe_of_their_own() -> None:
    first = flatten(load(FILES / "sar-jepa.yaml"))
    for path in FILES.glob("*.yaml"):
        other = flatten(load(path))
        changed = {key for key in first if first[key] != other[key] and not key.startswith("objective.")} - {"name"}
        assert bool(changed) == (path.stem in OWN_RECIPE), path.stem
        assert all(
            key.startswith(("model.decoder.", "model.positions", "model.input_gain", "optim.", "train.", "data.lanes"))
            for key in changed
        ), path.stem


@pytest.mark.parametrize(
    ("name", "batch", "lr", "warmup", "epochs"),
    [
        ("mae", 4096, 1.5e-4, 40, 800),
        ("lomar", 4096, 1.5e-4, 40, 400),
        ("fg-mae", 256, 1.5e-4, 10, 100),
        ("sar-jepa", 300, 1e-3, 20, 300),
        ("i-jepa", 2048, 1e-3, 40, 300),
    ],
)
def test_recipes_are_the_published_ones_in_samples_of_94776_images(
    name: str, batch: int, lr: float, warmup: int, epochs: int
) -> None:
    run = load(FILES / f"{name}.yaml")
    reference = batch if name == LATENT else 256
    assert (run.train.global_batch, run.optim.lr, run.optim.reference_batch) == (batch, lr, reference)
    assert (run.optim.warmup_samples, run.train.samples) == (94_776 * warmup, 94_776 * epochs)


@pytest.mark.parametrize(
    ("name", "masked", "values"),
    [
        ("mae", (1, 147), 256),
        ("fg-mae", (1, 138), 36),
        ("i-jepa", (1, 32), 768),
        ("lomar", (4, 39), 256),
        ("lomar-sar", (4, 39), 256),
        ("low-pass", (4, 39), 256),
        ("hog", (4, 39), 36),
        ("sar-hog", (4, 39), 36),
        ("pgga", (1, 196), 1024),
        ("sar-jepa-gaussian", (4, 39), 1024),
        ("sar-jepa", (4, 39), 1024),
        ("saratr-x-v2-target", (4, 39), 256),
    ],
)
def test_predicted_tokens_and_values_are_those_of_the_published_table(
    name: str, masked: tuple[int, int], values: int
) -> None:
    t = tokens(load(FILES / f"{name}.yaml"))
    assert ((t.windows, t.masked), t.values) == (masked, values)


@EACH
@pytest.mark.parametrize("channels", [1, 2])
def test_every_objective_learns_and_its_output_width_follows_from_the_target(
    form: dict[str, Any], channels: int
) -> None:
    objective, model, inputs = prepared(form, channels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(4):
        prediction = model(*inputs.model_args)
        loss, parts = objective.loss(prediction, inputs)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] < float("inf")
    t = tokens(objective.config)
    predicted = prediction[0] if t.fusion else prediction
    assert predicted.shape == (2, t.windows, t.masked, t.values)
    assert inputs.target.shape == (2, t.windows, t.masked, t.target)
    assert list(parts)[: len(objective.names)] == [f"loss_{name}" for name in objective.names]
    mean = sum(parts[f"loss_{name}"] for name in objective.names) / len(objective.names)
    assert mean.item() == pytest.approx(losses[-1], rel=1e-5)
    assert not any(value.requires_grad for value in parts.values())


@EACH
@pytest.mark.parametrize("channels", [1, 3])
def test_parameters_and_operations_are_planned_as_they_are(form: dict[str, Any], channels: int) -> None:
    run = config(form, channels)
    run = run.model_copy(update={"model": run.model.model_copy(update={"attention": "reference"})})
    objective = build(run)
    model: Any = objective.build_model()
    assert size(shapes(run).every) == sum(p.numel() for p in model.parameters())
    inputs = objective.prepare(images(channels), torch.arange(2))
    with FlopCounterMode(display=False) as counted:
        model(*inputs.model_args)
    assert counted.get_total_flops() == 2 * flops(run).forward
    held = (inputs.target, *inputs.model_args)
    assert batch_bytes(run, 2) == sum(t.numel() * t.element_size() for t in held) + extra(inputs)


def extra(inputs: Any) -> int:
    """The formula counts the slots that are asked for; where nothing is hidden no tensor lists them."""
    return 0 if inputs.model_args[2].numel() else 8 * inputs.target[..., 0].numel()


@EACH
def test_a_figure_shows_the_maps_under_the_predictions(form: dict[str, Any]) -> None:
    objective, model, inputs = prepared(form)
    with torch.no_grad():
        state, targets, predictions = reconstruct(objective, model, images())
    side = 64 // objective.fixed.cell
    assert targets.shape == predictions.shape == (2, len(objective.names), side, side)
    hidden = form["name"] != "pgga"
    assert bool((state == 1).any()) == hidden
    seen = ~predictions.isnan().any(1)
    assert torch.equal(seen, ((state == 1) if hidden else (state == 0)).repeat_interleave(side // 4, 1)
                       .repeat_interleave(side // 4, 2))  # fmt: skip
    cut = objective.config.model.patch // objective.fixed.cell
    masks = objective.masks(torch.arange(2), (4, 4))
    if not isinstance(objective, LearnedFusion):
        assert torch.equal(gather_masked(patchify(targets, cut), masks), inputs.target)


@pytest.mark.parametrize(
    ("form", "captions"),
    [
        ({"name": "sar-hog"}, ["Target per map (images of {}, 9 of 18 maps)", "Reconstruction of masked patches"]),
        (FORMS["learned"], ["Target per map (images of {})", "Reconstruction of masked patches"]),
        ({"name": "pgga"}, ["Target per map (images of {})", "Prediction of all patches"]),
        ({"name": "mae"}, ["Target per map (images of {})", "Reconstruction of masked patches"]),
    ],
    ids=["cells", "fusion", "unmasked", "visible"],
)
def test_the_report_draws_coarse_fused_and_unmasked_targets(
    form: dict[str, Any], captions: list[str], catalog: Path, tmp_path: Path
) -> None:
    run, opened = config(form), open_catalog(catalog)
    _, model, _ = prepared(form)
    panels = model_panels(run, model.state_dict(), opened, tmp_path, count=1)
    names = ", ".join(source.name for source in opened.sources)
    assert list(panels)[:2] == [caption.format(names) for caption in captions]
    assert (tmp_path / "targets.png").stat().st_size > 1000
    assert (tmp_path / "reconstructions.png").stat().st_size > 1000


@BRIEF
@given(grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), batch=st.integers(1, 4))
def test_without_masking_every_sample_has_one_window_that_is_the_image(grid: tuple[int, int], batch: int) -> None:
    masks = whole_image(torch.arange(batch), grid)
    assert torch.equal(masks.patch_ids, torch.arange(grid[0] * grid[1]).expand(batch, 1, -1))
    assert masks.masked.shape == (batch, 1, 0)
    assert torch.equal(masks.asked, masks.patch_ids)


def test_pgga_predicts_all_patches_from_an_image_that_lacks_none() -> None:
    objective, model, inputs = prepared({"name": "pgga"})
    every = patchify(objective.target.maps(images()), 16)
    assert torch.equal(inputs.target[:, 0], every)
    before = model(*inputs.model_args)
    with torch.no_grad():
        model.mask_token += 1.0
    assert torch.equal(model(*inputs.model_args), before)
    guess = torch.rand_like(before)
    assert objective.loss(guess, inputs)[0].item() == pytest.approx((guess[:, 0] - every).square().mean().item())


def test_a_fusion_starts_as_the_mean_and_its_weights_are_logged() -> None:
    objective, model, inputs = prepared(FORMS["learned"])
    prediction = model(*inputs.model_args)
    loss, parts = objective.loss(prediction, inputs)
    mean, _, with_mean = prepared(FORMS["equal"])
    assert torch.equal(with_mean.model_args[1], inputs.model_args[1])
    assert loss.item() == pytest.approx(mean.loss(prediction[0], with_mean)[0].item(), rel=1e-5)
    assert list(parts) == ["loss_fused", "fusion_blind", "fusion_r3", "fusion_r5"]
    assert [parts[name].item() for name in list(parts)[1:]] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_fusion_weighs_the_scales_of_each_channel_and_learns_through_the_target(channels: int) -> None:
    objective, model, inputs = prepared(FORMS["learned"], channels)
    with torch.no_grad():
        model.fusion.copy_(torch.tensor([0.3, -0.2, 0.8]))
    predicted, weights = model(*inputs.model_args)
    assert torch.allclose(weights, torch.tensor([0.3, -0.2, 0.8]).softmax(0))
    scales = StructuralScales((3, 5), 1e-6, "exclude", channels).maps(images(channels)).unflatten(1, (channels, 3))
    masks = objective.masks(torch.arange(2), (4, 4))
    by_scale = [gather_masked(patchify(scales[:, :, k], 16), masks) for k in range(3)]
    fused = sum(w * t for w, t in zip(weights.detach(), by_scale, strict=True))
    loss, parts = objective.loss((predicted, weights), inputs)
    assert loss.item() == pytest.approx((predicted - fused).square().mean().item(), rel=1e-5)
    assert [n for n in parts if n.startswith("loss")] == [f"loss_{n}" for n in objective.names]
    (by_weight,) = torch.autograd.grad(loss, weights, retain_graph=True)
    expected = [(2 * (fused - predicted) * t).mean().item() for t in by_scale]
    assert by_weight.tolist() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert model.fusion.grad.abs().min() > 0
    maps, _ = objective.predict(model, images(channels), masks)
    weighted = (scales * weights.detach().view(3, 1, 1)).sum(2)
    assert torch.allclose(maps, weighted, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2])
def test_patches_of_a_fused_target_have_mean_0_and_variance_1_and_the_weights_learn_through_that(channels: int) -> None:
    plain, _, raw = prepared(FORMS["learned"], channels)
    objective, model, inputs = prepared(FORMS["learned, normalised"], channels)
    weights = torch.tensor([0.5, 0.2, 0.3], requires_grad=True)
    fused = objective.fuse(inputs.target, weights).unflatten(-1, (channels, 256))
    by_hand = plain.fuse(raw.target, weights).detach().double().unflatten(-1, (channels, 256))
    by_hand = (by_hand - by_hand.mean(-1, keepdim=True)) / (by_hand.var(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(fused.double(), by_hand, atol=1e-4)
    (gradient,) = torch.autograd.grad((fused - fused.detach().roll(1, -1)).square().sum(), weights)
    assert gradient.abs().min() > 0
    masks = objective.masks(torch.arange(2), (4, 4))
    maps, _ = objective.predict(model, images(channels), masks)
    shown = objective.fuse(inputs.target, torch.full((3,), 1 / 3))
    assert torch.allclose(gather_masked(patchify(maps, 16), masks), shown, atol=1e-6)


def test_normalised_scales_are_the_scales_patch_by_patch() -> None:
    plain, _, raw = prepared(V2)
    objective, _, inputs = prepared(FORMS["separate, normalised"])
    cut = raw.target.unflatten(-1, (len(plain.names), 256)).double()
    by_hand = (cut - cut.mean(-1, keepdim=True)) / (cut.var(-1, keepdim=True) + 1e-6).sqrt()
    assert objective.names == plain.names
    assert torch.allclose(inputs.target.double(), by_hand.flatten(-2), atol=1e-4)


def test_fusion_weights_are_kept_by_checkpoints_and_do_not_decay() -> None:
    model = build(config(FORMS["learned"])).build_model()
    initialise(model, 0)
    assert torch.equal(model.state_dict()["fusion"], torch.zeros(3))
    assert [rule.weight_decay for rule in rules(model, 0.05) if "fusion" in rule.names] == [0.0]


def test_a_target_without_fusion_has_no_weights() -> None:
    for fusion, kind in (("separate", StructuralScales), ("equal", MeanScale)):
        objective = build(config({**V2, "fusion": fusion}))
        assert isinstance(objective.target, kind)
        assert "fusion" not in objective.build_model().state_dict()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"name": "sar-hog", "radii": (64,)}, "objective.radii = [64]: radii below data.image_size = 64"),
        ({"name": "sar-jepa-gaussian", "radii": (64,)}, "objective.radii = [64]: radii below data.image_size = 64"),
        ({"name": "pgga", "radii": (64,)}, "objective.radii = [64]: radii below data.image_size = 64"),
        ({**V2, "radii": (64,), "fusion": "learned"}, "objective.radii = [64]: radii below data.image_size = 64"),
        ({**V2, "radii": (64,), "fusion": "equal"}, "objective.radii = [64]: radii below data.image_size = 64"),
        ({"name": "hog", "cell": 5}, "objective.cell = 5: a divisor of model.patch = 16"),
        ({"name": "sar-hog", "cell": 32}, "objective.cell = 32: a divisor of model.patch = 16"),
        ({"name": "hog", "gaussian_window": 24}, "objective.gaussian_window = 24: a divisor of data.image_size = 64"),
        ({"name": "low-pass", "cutoff": 0.6}, "objective.cutoff = 0.6: number > 0 and <= 0.5"),
        ({"name": "low-pass", "window": 5}, "objective.window = 5: at most the token grid's side 4"),
        ({"name": "hog", "mask_ratio": 0.01}, "objective.mask_ratio = 0.01: a share that masks at least one of 9"),
        (
            {"name": "mae", "mask_ratio": 0.99},
            "objective.mask_ratio = 0.99: a share that hides at least one of 16 patch",
        ),
        ({"name": "hog", "bins": 10**9}, "objective.bins = 1000000000: whole number >= 1 and <= 1024"),
        ({"name": "fg-mae", "cell": 5}, "objective.cell = 5: a divisor of model.patch = 16"),
        ({**V2, "fusion": "learnt"}, "objective.fusion = 'learnt': one of separate, equal, learned"),
    ],
)
def test_what_a_target_or_mask_cannot_serve_is_refused_before_anything_starts(
    form: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(form)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "form",
    [
        {"name": "lomar-sar", "radii": (64,), "cell": 5},
        {"name": "low-pass", "radii": (64,), "gaussian_window": 24},
        {"name": "hog", "radii": (64,)},
        {"name": "pgga", "window": 99, "windows": 99, "mask_ratio": 0.01},
        {"name": "sar-jepa", "cell": 5},
        {"name": "mae", "window": 99, "windows": 99, "radii": (64,), "cell": 5},
    ],
    ids=lambda form: form["name"],
)
def test_keys_that_an_objective_does_not_read_do_not_stop_it(form: dict[str, Any]) -> None:
    assert build(config(form)).values > 0
