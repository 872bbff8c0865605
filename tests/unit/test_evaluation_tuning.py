"""Layers learn at the rates of the table, recipes do what their fields say, and the probe is multi-head attention."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foundation.errors import ConfigError, NumericsError
from foundation.evaluation import attentive, features, fewshot
from foundation.evaluation.layer_decay import layer, scales
from foundation.evaluation.tuning import Recipe, augment, learn, parameter_groups
from foundation.models.vit import ViT
from shards.errors import DataError


def test_layers_are_numbered_from_the_pixels_to_the_head() -> None:
    table = {
        "encoder.cls_token": 0,
        "encoder.register_token": 0,
        "encoder.patch_embed.proj.weight": 0,
        "encoder.blocks.0.attn.qkv.weight": 1,
        "encoder.blocks.0.attn.rpe.table": 1,
        "encoder.blocks.1.norm1.bias": 2,
        "blocks.2.fc2.weight": 3,
        "encoder.norm.weight": 4,
        "head.weight": 4,
        "standard.weight": 4,
    }
    assert {name: layer(name, 3) for name in table} == table
    found = scales(table, 3, 0.5)
    assert found["encoder.cls_token"] == 0.0625
    assert [found[n] for n in ("blocks.2.fc2.weight", "encoder.norm.weight", "head.weight")] == [0.5, 1, 1]
    with pytest.raises(ValueError, match="block 3 of an encoder with 3 blocks"):
        layer("encoder.blocks.3.fc1.weight", 3)


def test_groups_hold_every_parameter_once_at_the_rate_of_its_layer() -> None:
    model = fewshot.Classifier(ViT(32, 2, 2, 8), 3, 0, fewshot.RECIPES["improved"]["finetune"])
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, Recipe(layer_decay=0.5, weight_decay=0.1))
    seen = {names[id(p)]: (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert seen.keys() == set(names.values())
    assert seen["encoder.patch_embed.proj.weight"] == (0.125, 0.1)
    assert seen["encoder.blocks.1.fc1.weight"] == (0.5, 0.1)
    assert seen["encoder.blocks.0.fc1.bias"] == (0.25, 0.0)
    assert seen["head.weight"] == (1, 0.1)
    (one,) = parameter_groups(model, Recipe())
    assert len(one["params"]) == len(names)


def test_the_published_recipe_is_the_published_table() -> None:
    recipe = asdict(fewshot.recipe_of("published", "finetune"))
    published = {"lr": 1e-3, "warmup_lr": 1e-5, "weight_decay": 5e-4, "epochs": 40, "warmup_epochs": 2, "batch": 50}
    nothing = {"layer_decay": 1, "smoothing": 0, "shift": 0, "flip": 0, "speckle": 0, "batch_norm": False}
    assert recipe == {"name": "published", "pool": "token", **published, **nothing}
    assert fewshot.recipe_of("improved", "finetune").layer_decay < 1
    with pytest.raises(ConfigError, match="recipe «best» with mode «linear» is not known"):
        fewshot.recipe_of("best", "linear")


def test_augmentation_is_addressed_by_seed_and_step_and_published_recipes_have_none() -> None:
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(shift=1 / 8, flip=0.5, speckle=0.1)
    state = torch.get_rng_state()
    first = augment(images, recipe, 0, 3)
    assert first.shape == images.shape
    assert (first >= 0).all()
    assert (first <= 1).all()
    assert torch.equal(first, augment(images, recipe, 0, 3))
    assert not torch.equal(first, augment(images, recipe, 0, 4))
    assert not torch.equal(first, augment(images, recipe, 1, 3))
    assert torch.equal(augment(images, Recipe(flip=1.0), 0, 0), images.flip(-1))
    assert augment(images, Recipe(), 0, 0) is images
    assert torch.equal(state, torch.get_rng_state())


def test_a_moved_image_is_the_image_elsewhere() -> None:
    images = torch.arange(64.0).view(1, 1, 8, 8) / 64
    moved = {tuple(augment(images, Recipe(shift=1 / 8), 0, step)[0, 0, 3, 3:5].mul(64).tolist()) for step in range(40)}
    assert moved == {(27.0 + 8 * dy + dx, 28.0 + 8 * dy + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}


def test_the_learning_rate_of_a_layer_follows_the_schedule() -> None:
    model = nn.Sequential()
    model.add_module("patch_embed", nn.Linear(2, 2))
    model.add_module("head", nn.Linear(2, 2))
    before = [p.clone() for p in model.parameters()]
    x, y = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1])
    steps: list[tuple[int, int]] = []
    recipe = Recipe(epochs=1, warmup_epochs=0, lr=0.1, layer_decay=0.01, weight_decay=0, batch=4)
    learn(model, lambda pick: x[pick], y, 0, recipe, lambda done, total: steps.append((done, total)))
    moved = [(p - q).abs().max().item() for p, q in zip(model.parameters(), before, strict=True)]
    assert moved[0] == pytest.approx(0.001, rel=1e-3)  # AdamW's first step is the learning rate
    assert moved[2] == pytest.approx(0.1, rel=1e-3)
    assert steps == [(1, 1)]


def test_the_improved_recipe_learns_and_leaves_the_encoder_alone() -> None:
    from foundation.models.initialise import initialise

    encoder = ViT(32, 2, 2, 8)
    initialise(encoder, 0)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(24) % 2
    images = torch.rand(24, 1, 16, 16, generator=draw) * 0.3
    images[y == 1, :, 4:12, 4:12] += 0.6
    recipe = replace(fewshot.RECIPES["improved"]["finetune"], epochs=15, warmup_epochs=1)
    tune = lambda: fewshot.finetune(encoder, images, y, [images], 2, 0, recipe=recipe)  # noqa: E731
    found = tune()
    assert (found.argmax(1) == y).double().mean() > 0.9
    assert torch.equal(found, tune())
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    torch.testing.assert_close(found, fewshot.finetune(encoder, lambda i: images[i], y, [images], 2, 0, recipe=recipe))


def test_one_query_is_multi_head_attention() -> None:
    dim, heads = 128, 2
    probe = attentive.Probe(dim, 3, 0, torch.zeros(dim), torch.ones(dim))
    nn.init.normal_(probe.value.bias)
    tokens = torch.randn(5, 7, dim, generator=torch.Generator().manual_seed(1))
    split = lambda t: t.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
    query = probe.query.view(1, 1, dim).expand(5, 1, dim)
    keys, values = tokens @ probe.key.weight.T, probe.value(tokens)
    expected = F.scaled_dot_product_attention(split(query), split(keys), split(values))
    torch.testing.assert_close(probe.attend(tokens), expected.transpose(1, 2).flatten(1), atol=1e-4, rtol=1e-4)


def test_the_attentive_probe_finds_the_one_patch_that_tells() -> None:
    draw = torch.Generator().manual_seed(0)
    y, place = torch.arange(240) % 3, torch.randint(9, (240,), generator=draw)
    tokens = 0.3 * torch.randn(240, 9, 16, generator=draw)
    tokens[torch.arange(240), place] += 3 * torch.eye(3, 16)[y]
    tokens[:, :, 8:] += 1
    state, seen = torch.get_rng_state(), []

    def probe() -> tuple[torch.Tensor, dict[str, object]]:
        told = lambda done, total: seen.append((done, total))  # noqa: E731
        return attentive.predict(tokens[:180].half(), y[:180], tokens[180:].half(), 4, progress=told)

    found, chosen = probe()
    assert found.shape == (60, 4)
    assert (found.argmax(1) == y[180:]).double().mean() > 0.9
    assert chosen["held_out_accuracy"] > 0.9
    assert (chosen["lr"] in attentive.RATES, chosen["weight_decay"] in attentive.DECAYS) == (True, True)
    assert seen == [(i, 5) for i in range(1, 6)]
    assert torch.equal(found, probe()[0])
    assert torch.equal(state, torch.get_rng_state())


def test_patch_tokens_are_standardised_by_all_columns_and_the_epochs_that_were_made_are_kept() -> None:
    # As many tokens as make every 4th the step of a strided sample, and it meets column 0 alone.
    columns = torch.arange(4.0).repeat(attentive.SAMPLED)[:, None]
    sample = attentive._sample(columns, 0)
    assert len(sample) == attentive.SAMPLED
    assert sample.mean().item() == pytest.approx(1.5, abs=0.02)
    assert torch.equal(sample, attentive._sample(columns, 0))
    assert torch.equal(attentive._sample(columns[:10], 0), columns[:10])
    assert [attentive.Setting(1e-3, 0).made(n) for n in (8, 128, 255, 1280, 100_000)] == [150, 150, 150, 20, 20]
    y = torch.arange(8) % 2
    chosen = attentive.predict(torch.eye(8)[:, None], y, torch.eye(8)[:1, None], 2)[1]
    assert chosen["epochs"] == 150


def test_tokens_that_are_not_finite_stop_the_probe() -> None:
    with pytest.raises(NumericsError, match="the attentive probe loss is nan") as caught:
        attentive.predict(torch.full((8, 2, 4), torch.inf), torch.arange(8) % 2, torch.zeros(1, 2, 4), 2)
    assert "fp16" in str(caught.value)


def test_patch_tokens_beyond_the_limit_are_refused_before_they_are_held() -> None:
    with pytest.raises(DataError, match=r"100,000,000 images \(196 tokens of 768 numbers in fp16\).* at most 8 GiB"):
        features.room(100_000_000, torch.Size((64, 196, 768)))
    assert features.room(3, torch.Size((2, 4, 8))).shape == (3, 4, 8)
