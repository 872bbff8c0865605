"""Our encoders in timm: the same features to the bit, maps for detectors, and an import that costs nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foundation import timm_registry
from foundation.models.families import FAMILY
from foundation.models.vit import ViT
from foundation.timm_registry import PATCHES, name

timm = pytest.importorskip("timm", reason="needs the extra timm")

NANO = name("nano", 16)


def made(**options: Any) -> Any:
    """A nano model in evaluation mode whose position tables count."""
    model = timm.create_model(NANO, **options).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("table"):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def pictures(channels: int = 1, batch: int = 2) -> Tensor:
    return torch.rand(batch, channels, 64, 96, generator=torch.Generator().manual_seed(2))


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=None).stdout


def test_importing_foundation_loads_neither_torch_nor_timm_and_timm_knows_the_family_after_its_own_import() -> None:
    code = (
        "import sys, foundation; print('torch' in sys.modules, 'timm' in sys.modules);"
        "import timm; print(timm.is_model('sar_vit_base_patch16_224'), timm.__spec__.loader is timm.__loader__,"
        "type(timm.__loader__).__name__, any('AfterTimm' in type(f).__name__ for f in sys.meta_path))"
    )
    assert run(code).split() == ["False", "False", "True", "True", "SourceFileLoader", "False"]


def test_looking_for_timm_before_its_import_does_not_lose_the_family() -> None:
    code = (
        "import sys, foundation; from importlib.util import find_spec;"
        "print(find_spec('timm').name, find_spec('timm').name);"
        "import timm; print(timm.is_model('sar_vit_base_patch16_224'), type(timm.__loader__).__name__,"
        "any('AfterTimm' in type(f).__name__ for f in sys.meta_path))"
    )
    assert run(code).split() == ["timm", "timm", "True", "SourceFileLoader", "False"]


def test_timm_that_was_imported_first_knows_the_family_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_registry, "MODELS", "colorsys")  # a module that nobody has imported
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    timm_registry.register()
    assert "colorsys" in sys.modules
    assert len(timm.list_models("sar_vit_*")) == len(FAMILY) * len(PATCHES)


def test_a_second_registration_waits_for_timm_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "timm")
    before = len(sys.meta_path)
    timm_registry.register()
    timm_registry.register()
    assert len(sys.meta_path) == before + 1
    assert sys.meta_path[0].find_spec("timmm", None) is None


@pytest.mark.parametrize("size", FAMILY)
def test_every_size_has_its_width_depth_and_heads_in_timm(size: str) -> None:
    row = FAMILY[size]
    with torch.device("meta"):
        model = timm.create_model(name(size, 14 if size == "huge" else 16))
        ours = ViT(row.dim, row.depth, row.heads, 14 if size == "huge" else 16)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in ours.state_dict().items()}
    assert (model.num_features, model.num_classes, len(model.feature_info)) == (row.dim, 0, row.depth)


@pytest.mark.parametrize("positions", ["relative", "sincos"])
@pytest.mark.parametrize("pool", ["token", "avg", ""])
def test_features_are_those_of_our_encoder_exactly(positions: str, pool: str) -> None:
    model = made(positions=positions, global_pool=pool)
    ours = ViT(*FAMILY["nano"], positions=positions).eval()
    ours.load_state_dict(model.state_dict())
    with torch.no_grad():
        tokens = ours.forward_features(pictures())
        assert torch.equal(model.forward_features(pictures()), tokens)
        expected = {"token": tokens[:, 0], "avg": tokens[:, 1:].mean(1), "": tokens}[pool]
        assert torch.equal(model(pictures()), expected)
        assert torch.equal(model.forward_head(tokens, pre_logits=True), expected)


def test_a_classifier_is_added_replaced_and_removed() -> None:
    model = made(num_classes=7, drop_rate=0.5)
    assert model(pictures()).shape == (2, 7)
    assert model.get_classifier() is model.head
    assert [n for n in model.state_dict() if n.startswith("head")] == ["head.weight", "head.bias"]
    model.reset_classifier(3, "avg")
    assert (model(pictures()).shape, model.num_classes, model.global_pool) == ((2, 3), 3, "avg")
    model.reset_classifier(0)
    assert torch.equal(model(pictures()), model.forward_features(pictures())[:, 1:].mean(1))


def test_maps_for_detectors_are_the_patch_tokens_behind_the_blocks() -> None:
    full = made(in_chans=2)
    maps = timm.create_model(NANO, in_chans=2, features_only=True, out_indices=(0, 2)).eval()
    maps.model.load_state_dict(full.state_dict(), strict=False)
    assert (len(maps.model.blocks), maps.feature_info.channels(), maps.feature_info.reduction()) == (
        3,
        [96] * 2,
        [16] * 2,
    )
    with torch.no_grad():
        first, third = maps(pictures(2))
        _, seen = full.forward_intermediates(pictures(2))
    assert first.shape == third.shape == (2, 96, 4, 6)
    assert torch.equal(first, seen[0])
    assert torch.equal(third, seen[2])
    assert [f.shape for f in timm.create_model(NANO, features_only=True)(pictures())] == [(2, 96, 4, 6)] * 4


def test_intermediates_come_as_timm_describes_them() -> None:
    model = made()
    with torch.no_grad():
        tokens = model.forward_features(pictures())
        final, maps = model.forward_intermediates(pictures(), indices=1, norm=True)
        pairs = model.forward_intermediates(
            pictures(), indices=[-1], return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        early = model.forward_intermediates(pictures(), indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(final, tokens)
    assert torch.equal(maps[0].flatten(2).transpose(1, 2), tokens[:, 1:])
    assert torch.equal(torch.cat(pairs[0][::-1], 1), tokens)
    assert [e.shape for e in early] == [(2, 96, 4, 6)]
    with pytest.raises(ValueError, match="output_fmt 'NHWC' is not possible; allowed: NCHW, NLC"):
        model.forward_intermediates(pictures(), output_fmt="NHWC")


def test_recomputed_blocks_have_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        model = made(seed=3)
        model.set_grad_checkpointing(again)
        model(pictures()).square().sum().backward()
        gradients.append(model.blocks[1].fc1.weight.grad)
    assert torch.equal(*gradients)


def test_parameters_are_grouped_by_depth_and_those_without_decay_are_named() -> None:
    from timm.optim import param_groups_layer_decay

    model = made(num_classes=2)
    assert model.no_weight_decay() == {"cls_token", *(f"blocks.{i}.attn.rpe.table" for i in range(4))}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    found = [
        scale[id(p)] for p in (model.cls_token, model.blocks[0].fc1.weight, model.blocks[3].fc1.weight, model.head.bias)
    ]
    assert found == sorted(found)
    assert len(set(found)) == 4
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize(("have", "want"), [(1, 3), (3, 1), (2, 2), (2, 1)])
def test_pretrained_weights_are_adapted_to_other_channels(have: int, want: int) -> None:
    source = made(in_chans=have)
    cfg = {"state_dict": source.state_dict(), "num_classes": 0, "input_size": (have, 224, 224)}
    model = timm.create_model(NANO, pretrained=True, pretrained_cfg_overlay=cfg, in_chans=want).eval()
    with torch.no_grad():
        x = pictures(1)
        ours = model(x.expand(-1, want, -1, -1))
        theirs = source(x.expand(-1, have, -1, -1))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.equal(model.blocks[0].fc1.weight, source.blocks[0].fc1.weight)


def test_weights_of_two_channels_are_not_turned_into_three() -> None:
    cfg = {"state_dict": made(in_chans=2).state_dict(), "num_classes": 0, "input_size": (2, 224, 224)}
    with pytest.raises(ValueError, match="weights of 2 channels cannot be adapted to in_chans=3: use 2 or 1"):
        timm.create_model(NANO, pretrained=True, pretrained_cfg_overlay=cfg, in_chans=3)


def test_the_input_is_described_as_amplitude_without_mean_and_deviation() -> None:
    from timm.data import resolve_model_data_config

    data = resolve_model_data_config(made())
    assert (data["input_size"], tuple(data["mean"]), tuple(data["std"])) == ((1, 224, 224), (0.0,), (1.0,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "max"}, "global_pool 'max' is not possible; allowed: '', 'token', 'avg'"),
        ({"img_size": 100}, "img_size 100x100 is not divisible into patches of 16 pixels"),
        ({"img_size": (64, 40)}, "img_size 64x40 is not divisible"),
    ],
)
def test_what_no_such_encoder_has_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model(NANO, **options)


def test_initial_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(0)
    first = made(seed=1).patch_embed.proj.weight
    torch.manual_seed(5)
    assert torch.equal(made(seed=1).patch_embed.proj.weight, first)
    assert not torch.equal(made(seed=2).patch_embed.proj.weight, first)
