"""Published weights come in by the names of their tensors alone, give the same features, and execute nothing."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import published_name, published_state
from torch import Tensor, nn

from foundation.config import from_dict
from foundation.errors import CheckpointError
from foundation.interchange import import_published, load_encoder, random_encoder, rename
from foundation.models.families import FAMILY
from foundation.models.heads import MaskedWindowModel
from foundation.models.vit import ViT
from foundation.objectives.registry import build
from foundation.training import checkpoint

Command = Callable[..., Any]


def model(patch: int = 16, channels: int = 1) -> MaskedWindowModel:
    """A nano encoder with position tables that count."""
    torch.manual_seed(0)
    made = MaskedWindowModel(ViT(*FAMILY["nano"], patch, channels), 40, 2, 5, 4 * patch**2)
    for name, parameter in made.named_parameters():
        if name.endswith(("table", "bias")):
            nn.init.normal_(parameter, std=0.3)
    return made


def published_file(path: Path, state: dict[str, Tensor], **more: Any) -> Path:
    """A checkpoint as the published code writes it: weights, optimiser, epoch, and the command line."""
    args = argparse.Namespace(batch_size=75, blr=1e-3, mask_ratio=0.8, data_path="x", betas=(0.9, 0.95))
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    torch.save(
        {"model": state, "optimizer": optimizer, "epoch": 200, "scaler": {"scale": 65536.0}, "args": args} | more, path
    )
    return path


def message(path: Path, tmp_path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_published(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    return str(caught.value)


@pytest.mark.parametrize(("patch", "channels"), [(16, 1), (8, 1), (14, 2)])
def test_an_imported_encoder_gives_the_features_of_the_published_one(
    tmp_path: Path, command: Command, patch: int, channels: int
) -> None:
    source = model(patch, channels).eval()
    path = published_file(tmp_path / "checkpoint-200.pth", published_state(source))
    outcome = command("import", path, tmp_path / "run")
    assert outcome.code == 0
    assert "checkpoint" in outcome.out
    encoder, config = load_encoder(tmp_path / "run")
    images = torch.rand(2, channels, 4 * patch, 6 * patch)
    with torch.no_grad():
        assert torch.equal(encoder.forward_features(images), source.encoder.forward_features(images))
    assert not encoder.training
    assert (config.name, config.model.size, config.model.patch) == ("checkpoint-200", "nano", patch)
    assert config.model.decoder.model_dump() == {"width": 40, "depth": 2, "heads": 5}


def test_the_whole_model_is_kept_and_fits_what_training_would_build(tmp_path: Path) -> None:
    source = model()
    folder = import_published(published_file(tmp_path / "a.pth", published_state(source)), tmp_path / "run")
    state = checkpoint.load(folder)
    assert state["imported_from"] == "a.pth"
    ours = build(from_dict(state["config"])).build_model()
    weights = {name.removeprefix("model."): tensor for name, tensor in state["tensors"].items()}
    ours.load_state_dict(weights)
    assert all(torch.equal(t, source.state_dict()[name]) for name, t in ours.state_dict().items())
    assert not any("pos_embed" in name for name in weights)


def test_a_bare_state_dict_is_imported_too(tmp_path: Path) -> None:
    path = tmp_path / "bare.pth"
    torch.save(published_state(model()), path)
    assert import_published(path, tmp_path / "run").is_dir()


def test_names_of_a_whole_model_survive_the_way_to_the_published_ones_and_back() -> None:
    names = list(model().state_dict())
    assert [rename(published_name(name)) for name in names] == names
    assert rename("blocks.3.attn.rpe_k.lookup_table_weight") == "encoder.blocks.3.attn.rpe.table"
    assert rename("decoder_blocks.0.mlp.fc1.weight") == "decoder.blocks.0.fc1.weight"
    assert rename("encoder_pred.bias") == "decoder.embed.bias"


class Malicious:
    """An object that runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["beside", "inside args", "alone"])
def test_a_file_with_an_object_in_it_is_refused_and_nothing_is_executed(
    tmp_path: Path, legacy: bool, place: str
) -> None:
    trap, path = tmp_path / "executed", tmp_path / "a.pth"
    values = {
        "beside": {"model": published_state(model()), "extra": Malicious(trap)},
        "inside args": {"model": published_state(model()), "args": argparse.Namespace(x=Malicious(trap))},
        "alone": Malicious(trap),
    }[place]
    torch.save(values, path, _use_new_zipfile_serialization=not legacy)
    text = message(path, tmp_path)
    assert "holds more than tensors and plain values: it is not loaded" in text
    assert f"where: {path}" in text
    assert "save it again with torch.save({'model': state_dict}, path)" in text
    assert not trap.exists()
    torch.load(path, weights_only=False)  # the trap was live
    assert trap.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot read this file as a checkpoint: EOFError"),
        (b"hello, this is a text\n", "cannot read this file as a checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "this file is no checkpoint"),
        (b"\x80\x02]q\x00(K\x01K\x02e.", "cannot read this file as a checkpoint"),
    ],
    ids=["empty", "text", "png", "pickle"],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    text = message(path, tmp_path)
    assert reason in text
    assert f"where: {path}" in text


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    path = published_file(tmp_path / "a.pth", published_state(model()))
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cannot read this file as a checkpoint" in message(path, tmp_path)


def test_an_absent_file_is_an_error_of_the_command_line_without_a_traceback(tmp_path: Path, command: Command) -> None:
    outcome = command("import", tmp_path / "absent.pth", tmp_path / "run")
    assert outcome.code == 2
    assert "CheckpointError: cannot read this file as a checkpoint" in outcome.err
    assert "absent.pth" in outcome.err


@pytest.mark.parametrize(
    "values",
    [[1, 2], {"model": {"a": 1}}, {"model": {1: torch.zeros(1)}}, torch.zeros(3)],
    ids=["list", "n", "key", "t"],
)
def test_a_file_without_a_state_dict_is_named(tmp_path: Path, values: object) -> None:
    torch.save(values, tmp_path / "a.pth")
    assert "no state dict found" in message(tmp_path / "a.pth", tmp_path)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda s: s.clear(), "not a SAR-JEPA, LoMaR or MAE model: 'encoder.patch_embed.proj.weight' is missing"),
        (lambda s: s.pop("blocks.0.attn.rpe_k.lookup_table_weight"), "'encoder.blocks.0.attn.rpe.table' is missing"),
        (lambda s: s.update({"patch_embed.proj.weight": torch.zeros(96, 256)}), "not a SAR-JEPA, LoMaR or MAE model"),
        (lambda s: s.pop("blocks.3.norm1.weight"), "1 missing: encoder.blocks.3.norm1.weight"),
        (lambda s: s.pop("mask_token"), "1 missing: mask_token"),
        (lambda s: s.update({"head.weight": torch.zeros(10, 96)}), "1 unexpected: head.weight"),
        (lambda s: s.update({"norm.bias": torch.zeros(95)}), "encoder.norm.bias [95], not [96]"),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_are_named(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], reason: str
) -> None:
    state = published_state(model())
    edit(state)
    path = published_file(tmp_path / "a.pth", state)
    text = message(path, tmp_path)
    assert reason in text
    assert f"where: {path}" in text
    assert "do:" in text


def test_a_network_of_no_size_in_the_family_is_named(tmp_path: Path) -> None:
    state = published_state(MaskedWindowModel(ViT(48, 1, 3, 16), 40, 1, 5, 1024))
    text = message(published_file(tmp_path / "a.pth", state), tmp_path)
    assert "no size of the family has width 48, 1 blocks and 3 heads" in text
    assert "add a row to foundation/models/families.py" in text


def test_weights_of_another_configuration_are_not_loaded_into_an_encoder(tmp_path: Path) -> None:
    folder = import_published(published_file(tmp_path / "a.pth", published_state(model())), tmp_path / "run")
    state = checkpoint.load(folder)
    state["config"]["model"]["size"] = "tiny"
    checkpoint.save(tmp_path / "other" / "checkpoints", state.pop("tensors"), state, position=0)
    missing = 13 * (FAMILY["tiny"].depth - FAMILY["nano"].depth)  # tensors of the blocks that are not there
    with pytest.raises(CheckpointError, match=f"the checkpoint is of another model; {missing} missing"):
        load_encoder(tmp_path / "other")


def test_the_untrained_control_follows_its_seed_and_leaves_the_global_generator_alone() -> None:
    config = from_dict({"model": {"size": "nano"}})
    before = torch.get_rng_state()
    first, again, other = (random_encoder(config, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.patch_embed.proj.weight, again.patch_embed.proj.weight)
    assert not torch.equal(first.patch_embed.proj.weight, other.patch_embed.proj.weight)


def test_an_average_that_no_run_kept_is_not_replaced_by_the_weights(tmp_path: Path) -> None:
    import_published(published_file(tmp_path / "a.pth", published_state(model())), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"no average of the weights[\s\S]*optim.ema_half_life"):
        load_encoder(tmp_path / "run", averaged=True)
