"""What an objective changes of the model is trained by every engine as by one process: fusion, frame, head, teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import several_runs
import torch
from groups import group
from processes import TINY, record

from foundation.config import load
from foundation.training import checkpoint
from foundation.training.run import train

OBJECTIVES = {
    "fusion": (
        *("objective.name=saratr-x-v2-target", "objective.fusion=learned", "objective.offset=1e-6"),
        "objective.centre=exclude",
    ),
    "pgga": ("objective.name=pgga",),
    "mae": ("objective.name=mae", "model.positions=sincos"),
    "lomar": ("objective.name=lomar", "model.decoder.depth=0"),
    "i-jepa": (
        *("objective.name=i-jepa", "model.positions=sincos", "model.registers=2", "objective.momentum=[0.9,1.0]"),
        *("optim.reference_batch=8", "optim.lr=2e-3", "optim.final_weight_decay=0.4", "optim.ema_half_life=40"),
    ),
}
LEARNT = [
    *(("fusion", "ddp"), ("fusion", "fsdp2"), ("fusion", "zero3"), ("pgga", "ddp")),
    *(("mae", "fsdp2"), ("mae", "zero3"), ("lomar", "fsdp2")),
    *(("i-jepa", engine) for engine in ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")),
]
HALF = "fsdp2"  # the engine that gathers the parameters themselves in bf16
SHORT = ("train.samples=32", "train.checkpoint_every=32")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, catalog: Path) -> Path:
    """Runs `OBJECTIVE-ENGINE` of four updates in two processes, and `OBJECTIVE-single` in one."""
    root = tmp_path_factory.mktemp("objectives")
    (root / "tiny.yaml").write_text(TINY.format(root=root, catalog=catalog))
    for name, keys in OBJECTIVES.items():
        train(load(root / "tiny.yaml", [*SHORT, *keys, "train.engine=single", f"name={name}-single"]))
    made = [
        (*SHORT, *OBJECTIVES[name], f"train.engine={engine}", f"name={name}-{engine}", "train.micro_batch=2")
        for name, engine in LEARNT
    ]
    made += [(*SHORT, *OBJECTIVES["fusion"], f"train.engine={HALF}", f"name=half-{HALF}", "train.precision=bf16")]
    arguments = [argument for run in made for argument in ("--", *run)][1:]
    code, output = group(2, several_runs.main, root / "tiny.yaml", *arguments)
    assert code == 0, output[-4000:]
    return root / "runs"


@pytest.mark.parametrize(("name", "engine"), LEARNT)
def test_every_engine_learns_what_one_process_learns(runs: Path, name: str, engine: str) -> None:
    rows, expected = record(runs / f"{name}-{engine}"), record(runs / f"{name}-single")
    assert len(rows) == 4
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours.keys() == theirs.keys()
        logged = [key for key in ours if key.startswith(("loss", "fusion"))]
        assert [ours[key] for key in logged] == pytest.approx([theirs[key] for key in logged], abs=1e-6, rel=1e-6)
    ours, theirs = (checkpoint.load(runs / f"{name}-{each}")["tensors"] for each in (engine, "single"))
    assert ours.keys() == theirs.keys()
    if name == "i-jepa":
        teacher = [key for key in theirs if ".teacher." in key]
        assert {key.partition(".")[0] for key in teacher} == {"model"}  # no moments, no average
        for key in teacher:
            assert torch.allclose(ours[key], theirs[key], atol=1e-5), key
            apart = (theirs[key] - theirs[key.replace("teacher", "encoder")]).abs().max()
            assert 0 < apart < 0.05, key  # it follows
    if name == "fusion":
        assert torch.allclose(ours["model.fusion"], theirs["model.fusion"], atol=1e-5)
        assert theirs["model.fusion"].abs().min() > 1e-4


def test_in_bf16_a_fusion_learns_nearly_the_same_weights(runs: Path) -> None:
    rows, expected = record(runs / f"half-{HALF}"), record(runs / "fusion-single")
    for key in ("fusion_blind", "fusion_r3", "fusion_r5"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected], abs=2e-3)
    assert sum(rows[-1][key] for key in rows[-1] if key.startswith("fusion")) == pytest.approx(1, abs=1e-6)
