"""MAE as it is published: the encoder alone, tables of other sizes, and FG-MAE, which predicts histograms."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from published import published_name
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import CheckpointError
from foundation.interchange import import_published, load_encoder
from foundation.models.families import FAMILY
from foundation.models.heads import MaskedImageModel
from foundation.models.position import sincos
from foundation.models.vit import ViT
from foundation.objectives.registry import build
from foundation.training import checkpoint


def source(channels: int, out: int) -> Any:
    torch.manual_seed(0)
    model = MaskedImageModel(ViT(*FAMILY["nano"], 16, channels, positions="sincos"), 32, 2, 16, out)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def state_of(model: nn.Module, side: int = 14) -> dict[str, Tensor]:
    """Under MAE's names, with its fixed tables of side x side patches."""
    state = {published_name(n).replace("encoder_pred", "decoder_embed"): t for n, t in model.state_dict().items()}
    for name, dim in (("pos_embed", 96), ("decoder_pos_embed", 32)):
        state[name] = F.pad(sincos((side, side), dim, torch.device("cpu"), torch.float32), (0, 0, 1, 0))
    return state


def encoder_alone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if not n.startswith(("decoder", "mask_token"))}


def imported(state: dict[str, Tensor], tmp_path: Path) -> Path:
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit_nano.pth")
    return import_published(tmp_path / "mae_pretrain_vit_nano.pth", tmp_path / "run")


@pytest.mark.parametrize("side", [14, 24])
def test_the_encoder_alone_is_imported_and_its_model_is_whole(
    tmp_path: Path, side: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = source(3, 768)
    with caplog.at_level(logging.WARNING):
        folder = imported(encoder_alone(state_of(model, side)), tmp_path)
    assert "holds no decoder: it gets one with initial weights" in caplog.text
    encoder, config = load_encoder(tmp_path / "run")
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(encoder.forward_features(images), model.encoder.forward_features(images))
    assert (config.objective.name, config.model.channels, config.model.positions) == ("mae", 3, "sincos")
    loaded = checkpoint.load(folder)
    assert loaded["fresh_decoder"] is True
    build(config).build_model().load_state_dict({n.removeprefix("model."): t for n, t in loaded["tensors"].items()})


def test_fg_mae_is_known_by_the_width_of_its_predictions(tmp_path: Path) -> None:
    model = source(2, 72)
    folder = imported(state_of(model), tmp_path)
    encoder, config = load_encoder(tmp_path / "run")
    loaded = checkpoint.load(folder)
    assert (config.objective.name, loaded["fresh_decoder"]) == ("fg-mae", False)
    assert torch.equal(loaded["tensors"]["model.decoder.pred.weight"], model.decoder.pred.weight)  # not reordered
    images = torch.rand(1, 2, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder(images), model.encoder(images))
    build(config).build_model().load_state_dict({n.removeprefix("model."): t for n, t in loaded["tensors"].items()})


def test_a_decoder_of_other_predictions_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        imported(state_of(source(2, 50)), tmp_path)
    assert "the decoder predicts 50 values of a patch: MAE 512, FG-MAE 72" in str(caught.value)
    assert "import the encoder alone" in str(caught.value)


def test_an_encoder_with_learnt_positions_and_one_of_an_unknown_family_are_named(tmp_path: Path) -> None:
    state = encoder_alone(state_of(source(3, 768)))
    state["pos_embed"] = state["pos_embed"] + 0.01
    with pytest.raises(CheckpointError, match="pos_embed is not the fixed table of sines and cosines"):
        imported(state, tmp_path)
    with pytest.raises(CheckpointError, match=r"names: SAR-JEPA, LoMaR, MAE and FG-MAE[^\n]*, SARATR-X"):
        imported({"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, tmp_path)
    broken = encoder_alone(state_of(source(3, 768)))
    del broken["norm.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing: encoder\.norm\.bias"):
        imported(broken, tmp_path)
