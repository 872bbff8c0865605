"""Fused attention under an engine: sharded tables, recomputed blocks, and the losses of the definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import several_runs
from groups import group
from processes import record

from foundation.config import load
from foundation.training.run import train

SHORT = ("objective.windows=1", "train.global_batch=2", "train.samples=40", "train.log_every=2", "data.lanes=2")
SHORT += ("monitor.images=0",)


@pytest.mark.slow
def test_twenty_updates_in_pieces_have_the_losses_of_the_definition(tmp_path: Path, tiny_yaml: Path) -> None:
    pytest.importorskip("triton")
    train(load(tiny_yaml, [*SHORT, "model.attention=reference", "name=reference"]))
    engine = ("train.engine=fsdp2", "train.activation_checkpointing=selective")
    arguments = (*SHORT, *engine, "model.attention=triton", "name=triton")
    code, output = group(2, several_runs.main, tiny_yaml, *arguments, seconds=300)
    assert code == 0, output
    assert "attention triton" in output
    ours, definition = record(tmp_path / "runs" / "triton"), record(tmp_path / "runs" / "reference")
    assert len(ours) == 20
    assert [row["samples_hash"] for row in ours] == [row["samples_hash"] for row in definition]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in definition], rel=1e-4)
    norms = [row["grad_norm"] for row in definition]
    assert [row["grad_norm"] for row in ours] == pytest.approx(norms, rel=1e-3)
    assert definition[-1]["loss"] < definition[0]["loss"]
