"""In front of the patches stand any number of tokens: a class token or none, and registers that nobody reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from foundation.config import Config, from_dict
from foundation.errors import ConfigError
from foundation.evaluation.attention import attention_distances
from foundation.evaluation.features import Listing, extract
from foundation.evaluation.fewshot import RECIPES, Classifier
from foundation.models.families import attention_backends, flops, parameters, tokens
from foundation.models.initialise import initialise
from foundation.models.vit import ViT
from foundation.objectives.registry import build

PREFIXES = [(True, 0), (True, 3), (False, 0), (False, 2)]


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


def vit(class_token: bool, registers: int, positions: str = "relative", attention: str = "auto") -> ViT:
    torch.manual_seed(0)
    made = ViT(24, 2, 3, 4, 1, attention, positions, class_token, registers)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.eval()


def config(name: str, registers: int, depth: int = 1, **objective: Any) -> Config:
    positions = "sincos" if name == "mae" else "relative"
    decoder = {"width": 32, "depth": depth, "heads": 2}
    model = {"size": "nano", "patch": 8, "registers": registers, "positions": positions, "attention": "reference"}
    shape = {"name": name, "windows": 2, "window": 3, "radii": (3, 5), **objective}
    return from_dict({"data": {"image_size": 40}, "model": {**model, "decoder": decoder}, "objective": shape})


@pytest.mark.parametrize("positions", ["relative", "sincos"])
@pytest.mark.parametrize(("class_token", "registers"), PREFIXES)
def test_the_prefix_stands_in_front_and_what_is_read_comes_behind_it(
    class_token: bool, registers: int, positions: str
) -> None:
    encoder = vit(class_token, registers, positions)
    assert encoder.prefix == class_token + registers
    images = rand(2, 1, 12, 20)
    features = encoder.forward_features(images)
    assert features.shape == (2, encoder.prefix + 15, 24)
    pooled = features[:, 0] if class_token else features[:, encoder.prefix :].mean(1)
    assert torch.equal(encoder(images), pooled)
    kept = encoder.without_registers(features)
    assert torch.equal(kept[:, int(class_token) :], features[:, encoder.prefix :])
    assert kept.shape[1] == class_token + 15
    maps = list(encoder.attention_maps(images))
    assert {m.shape for m in maps} == {torch.Size((2, 3, encoder.prefix + 15, encoder.prefix + 15))}
    columns = [b.attn.rpe.table.shape[2] for b in encoder.blocks if b.attn.rpe is not None]  # type: ignore[union-attr]
    assert columns == ([50 if encoder.prefix else 49] * 2 if positions == "relative" else [])
    assert attention_distances(encoder, images).shape == (2, 2, 3)


@pytest.mark.parametrize("attention", ["sdpa", "dense"])
@pytest.mark.parametrize(("class_token", "registers"), PREFIXES)
def test_every_backend_knows_the_prefix(class_token: bool, registers: int, attention: str) -> None:
    images = rand(2, 1, 12, 20)
    with torch.no_grad():
        ours, expected = (vit(class_token, registers, attention=name)(images) for name in (attention, "reference"))
    assert torch.allclose(ours, expected, atol=1e-5)


def test_every_register_is_a_token_of_its_own_that_others_attend_to() -> None:
    encoder, images = vit(True, 2), rand(1, 1, 8, 8)
    before = encoder(images)
    with torch.no_grad():
        assert encoder.register_token is not None
        encoder.register_token[0, 1, 0] += 1
    assert not torch.allclose(encoder(images), before, atol=1e-4)
    assert torch.allclose(next(encoder.attention_maps(images)).sum(-1), torch.ones(1, 3, 7), atol=1e-5)


@pytest.mark.parametrize("name", ["sar-jepa", "lomar", "mae", "pgga"])
def test_decoders_never_see_registers_and_the_formulas_count_them(name: str) -> None:
    run = config(name, 3, depth=0 if name == "lomar" else 1)
    objective = build(run)
    model: Any = objective.build_model()
    initialise(model, 0)
    assert parameters(run).total == sum(p.numel() for p in model.parameters())
    inputs = objective.prepare(rand(2, 1, 40, 40), torch.arange(2))
    seen: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    with FlopCounterMode(display=False) as counted:
        prediction = model(*inputs.model_args)
    assert counted.get_total_flops() == 2 * flops(run).forward
    t = tokens(run)
    assert (t.prefix, t.decoded, t.length) == (4, t.inside + 1, t.inside + 4)
    assert all(length == t.decoded for length in seen)
    loss, _ = objective.loss(prediction, inputs)
    loss.backward()
    assert model.encoder.register_token.grad.abs().max() > 0


def test_without_registers_the_model_has_the_tensors_it_always_had() -> None:
    with torch.device("meta"):
        names = set(build(config("sar-jepa", 0)).build_model().state_dict())
        more = set(build(config("sar-jepa", 2)).build_model().state_dict())
    assert more - names == {"encoder.register_token"}
    assert "encoder.cls_token" in names


def test_backends_are_asked_for_the_lengths_that_there_are() -> None:
    def chosen(registers: int) -> tuple[str, ...]:
        """Of 1024 patches, 250 of them visible; `dense` takes 256 tokens."""
        model = {"registers": registers, "positions": "sincos"}
        objective = {"name": "mae", "mask_ratio": 774 / 1024}
        return attention_backends(
            from_dict({"data": {"image_size": 512}, "model": model, "objective": objective}), "cpu"
        )

    assert chosen(5) == ("dense", "reference")
    assert chosen(6) == ("reference", "reference")


def test_more_registers_than_16_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.registers = 17"):
        config("sar-jepa", 17)


@pytest.mark.parametrize(("class_token", "registers"), PREFIXES)
def test_evaluation_takes_the_class_token_or_the_mean_patch(
    class_token: bool, registers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, images = vit(class_token, registers), rand(3, 1, 8, 8)
    listed = Listing(None, (0, 1, 2), torch.arange(3), ("a", "b", "c"), ("0", "1", "2"), ("x", "y", "z"))  # type: ignore[arg-type]
    monkeypatch.setattr("foundation.evaluation.features.image_batches", lambda *_: iter([images]))
    found = extract(encoder, listed, 8)
    features = encoder.forward_features(images)
    assert torch.equal(found.mean, features[:, encoder.prefix :].mean(1))
    assert torch.equal(found.x, features[:, 0] if class_token else found.mean)
    classifier = Classifier(encoder, 3, 0, RECIPES["published"]["finetune"])
    assert torch.allclose(classifier(images), classifier.head(found.x))
