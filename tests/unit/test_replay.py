"""A skipped update can be made again, alone, and shows what was at fault."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foundation.config import Config
from foundation.errors import ConfigError
from foundation.replay import kept, replay
from foundation.training import checkpoint
from foundation.training.run import train

Make = Callable[..., Config]
Command = Callable[..., tuple[int, str, str]]
WILD = ("optim.lr=3", "optim.warmup_samples=0", "guard.window=8", "guard.loss_score=0.5", "guard.skips=100")


@pytest.fixture
def wild(tiny_config: Make) -> Path:
    """A run at a high rate under a narrow limit, some of whose updates were skipped."""
    return train(tiny_config(*WILD, "train.samples=160", "train.checkpoint_every=32", "train.micro_batch=4"))


def test_the_last_skipped_update_comes_out_as_it_was(wild: Path) -> None:
    at = kept(wild)[-1]
    recorded = json.loads((wild / "skipped" / f"samples-{at:012d}" / "rank0.json").read_text())
    before = {file: file.read_bytes() for file in wild.rglob("*") if file.is_file()}
    result = replay(wild)
    assert result.position == at
    assert result.loss == pytest.approx(recorded["numbers"]["loss"], rel=1e-6)
    assert result.limit == pytest.approx(recorded["numbers"]["limit"], rel=1e-6)
    assert result.loss > result.limit
    assert result.same_batch
    assert result.begun <= at
    assert sum(s["loss"] for s in result.samples) / 8 == pytest.approx(result.loss, rel=1e-4)
    assert sorted(s["position"] for s in result.samples) == list(range(at, at + 8))
    assert [s["loss"] for s in result.samples] == sorted((s["loss"] for s in result.samples), reverse=True)
    shown = {(s["position"], s["source"], s["key"]) for s in recorded["samples"]}
    assert {(s["position"], s["source"], s["key"]) for s in result.samples} == shown
    assert not result.modules
    after = {file: file.read_bytes() for file in wild.rglob("*") if file.is_file()}
    assert {file.name for file in after.keys() - before.keys()} == {"replay.json", "replay.png"}
    assert all(after[file] == content for file, content in before.items())


def test_weights_that_are_not_finite_are_found_where_they_are(wild: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = checkpoint.read

    def broken(location: Any, tensors: dict[str, torch.Tensor], *rest: Any) -> None:
        read(location, tensors, *rest)
        tensors["model.encoder.blocks.1.fc1.bias"][3] = math.nan

    monkeypatch.setattr(checkpoint, "read", broken)
    result = replay(wild, 32)
    assert result.modules[0] == "encoder.blocks.1.fc1"
    assert math.isnan(result.loss)
    assert math.isnan(result.samples[0]["loss"])
    assert {name: bad for name, _, bad in result.parameters}["encoder.blocks.1.fc1.weight"] > 0
    assert json.loads((wild / "skipped" / "samples-000000000032" / "replay.json").read_text())["loss"] == "nan"


def test_what_was_kept_of_another_batch_is_noticed(wild: Path) -> None:
    first, last = kept(wild)[0], kept(wild)[-1]
    assert first != last
    for folder in (wild / "skipped").glob(f"*{last}"):
        (wild / "skipped" / f"samples-{first:012d}" / "rank0.npz").replace(folder / "rank0.npz")
    assert replay(wild, last).same_batch is False


def test_the_command_shows_samples_and_gradients(wild: Path, command: Command) -> None:
    code, out, _ = command("replay", wild, "--rows", "3")
    assert code == 0
    assert "above the limit of" in out
    assert "images and masks are those that were kept" in out
    assert "every module gives finite outputs" in out
    assert "gradient norm" in out
    assert str(wild / "skipped" / f"samples-{kept(wild)[-1]:012d}") in out


def test_wrong_runs_and_positions_are_explained(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"this is no run folder: it holds no config\.yaml"):
        replay(tmp_path)
    with pytest.raises(ConfigError, match="no update of this run was skipped") as caught:
        replay(finished)
    assert "--at SAMPLES" in str(caught.value)
    with pytest.raises(ConfigError, match="no update begins at 13 samples: they begin at multiples of 8") as caught:
        replay(finished, 13)
    assert "do:    --at 8" in str(caught.value)
    with pytest.raises(ConfigError, match="no update begins at 960 samples") as caught:
        replay(finished, 960)
    assert "--at 88" in str(caught.value)
