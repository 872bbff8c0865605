"""`model.init` of something that does not fit: refused, with the keys that would make it fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_initial
import torch
from safetensors.torch import save_file
from test_initial import VARIANTS, a_timm, config, message, saved

from foundation.config import Config
from foundation.models.vit import ViT
from foundation.training import checkpoint
from foundation.training.setup import beginning

published = test_initial.published
Make = Callable[..., Config]


def test_what_is_not_there_or_holds_no_vit_is_refused(tmp_path: Path) -> None:
    assert re.search(
        "there is no such file or folder[\\s\\S]*name a run folder", message(config(tmp_path / "gone.pth"))
    )
    assert "there is no checkpoint" in message(config(tmp_path))
    save_file({"conv1.weight": torch.zeros(4, 3, 7, 7), "fc.bias": torch.zeros(5)}, tmp_path / "resnet.safetensors")
    text = message(config(tmp_path / "resnet.safetensors"))
    assert "this is no ViT: patch_embed.proj.weight of 4 dimensions is missing; it holds conv1.weight, fc.bias" in text
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    assert "cannot read this file" in message(config(tmp_path / "text.safetensors"))
    (tmp_path / "text.pth").write_text("no tensors at all")
    assert "no checkpoint" in message(config(tmp_path / "text.pth"))
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    assert "no state dict found" in message(config(tmp_path / "list.pth"))


WRONG: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({}, {"size": "tiny"}, "width 96, 4 blocks, not width 192, 12 blocks", "set model.size=nano"),
    ({"depth": 3}, {}, "width 96, 3 blocks, not width 96, 4 blocks", "no size of the family has this width"),
    ({"embed_dim": 48}, {}, "width 48, 4 blocks, not width 96, 4 blocks", "no size of the family has this width"),
    ({"patch_size": 16}, {}, "patches 16x16, not patches 8x8", "set model.patch=16"),
    ({}, {"mlp": "swiglu"}, "MLP gelu, not MLP swiglu", "set model.mlp=gelu"),
    (VARIANTS[4][0], {}, "MLP swiglu, not MLP gelu", "set model.mlp=swiglu"),
    ({"init_values": 1.0}, {}, "layer scales, not no layer scales", "set model.layer_scale=1e-5"),
    ({"qk_norm": True}, {}, "norms of queries and keys, not none", "set model.qk_norm=true"),
    ({"reg_tokens": 4}, {}, "4 registers, not 0", "set model.registers=4"),
    ({}, {"positions": "sincos"}, "learnt positions, not positions sincos", "set model.positions=learned"),
    (
        {"patch_size": 16, "init_values": 1.0},
        {},
        "patches 16x16, not patches 8x8; layer scales, not no layer scales",
        "set model.patch=16 model.layer_scale=1e-5",
    ),
    ({"mlp_ratio": 2}, {}, "blocks.0.fc1.weight [192, 96], not [384, 96]", "choose weights of the configured model"),
    ({"img_size": (64, 32)}, {}, "pos_embed [1, 33, 96] are no positions of a square grid", "square images"),
]


@pytest.mark.parametrize(
    ("theirs", "ours", "what", "do"), WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_weights_of_another_model_say_which_keys_make_it_theirs(
    tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any], what: str, do: str
) -> None:
    text = message(config(saved(a_timm(**theirs), tmp_path / "vit.pth"), **{"positions": "learned", **ours}))
    assert what in text
    assert do in text.split("do:")[1]


def test_relative_tables_are_not_dropped_silently(published: dict[str, tuple[Path, ViT]]) -> None:
    text = message(config(published["sar-jepa"][0], positions="learned"))
    assert "tables of relative positions, not positions learned" in text
    assert "set model.positions=relative" in text


def test_no_key_is_advised_that_the_objective_refuses(published: dict[str, tuple[Path, ViT]], tmp_path: Path) -> None:
    relative, learnt = published["sar-jepa"][0], saved(a_timm(), tmp_path / "vit.pth")
    for path, kind in ((relative, "relative"), (learnt, "learned")):
        advice = message(config(path, positions="sincos", objective="i-jepa")).split("do:")[1]
        assert f"choose other weights: {kind} positions do not go with objective.name=i-jepa" in advice
        assert "set model.positions" not in advice


def test_tensors_that_an_encoder_has_no_place_for_are_named(tmp_path: Path) -> None:
    state: Any = a_timm().state_dict()
    save_file({**state, "norm_pre.weight": torch.ones(96)}, tmp_path / "clip.safetensors")
    text = message(config(tmp_path / "clip.safetensors", positions="learned"))
    assert "this encoder has no place for 1 of these tensors: norm_pre.weight" in text


def test_without_the_key_nothing_is_looked_for(tiny_config: Make) -> None:
    run = tiny_config()
    assert run.model.init is None
    assert beginning(run, checkpoint.ALONE, resume=True) == ({}, [])
