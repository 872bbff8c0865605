"""Fused attention under an engine: sharded tables, recomputed blocks, and the losses of the definition."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import finish, record, start

from foundation.config import load
from foundation.training import run as running

SCRIPT = Path(__file__).with_name("several_runs.py")
SHORT = ("objective.windows=1", "train.global_batch=2", "train.samples=40", "train.log_every=2", "data.lanes=2")


@pytest.mark.slow
def test_twenty_updates_in_pieces_have_the_losses_of_the_definition(
    tmp_path: Path, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(running, "publish", lambda *_: None)  # pictures take longer than the updates
    running.train(load(tiny_yaml, [*SHORT, "model.attention=reference", "name=reference"]))
    engine = ("train.engine=fsdp2", "train.activation_checkpointing=selective")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    arguments = (*SHORT, *engine, "model.attention=triton", "name=triton")
    code, output = finish(start(SCRIPT, tiny_yaml, *arguments, program=launcher), 300)
    assert code == 0, output
    assert "attention triton" in output
    ours, definition = record(tmp_path / "runs" / "triton"), record(tmp_path / "runs" / "reference")
    assert len(ours) == 20
    assert [row["samples_hash"] for row in ours] == [row["samples_hash"] for row in definition]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in definition], rel=1e-4)
    norms = [row["grad_norm"] for row in definition]
    assert [row["grad_norm"] for row in ours] == pytest.approx(norms, rel=1e-3)
    assert definition[-1]["loss"] < definition[0]["loss"]
