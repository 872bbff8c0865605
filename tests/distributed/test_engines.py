"""Every engine learns what one process learns, and each goes on where any other has stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import several_runs
import torch
from groups import group
from processes import TINY, record, same_state

from foundation.training import checkpoint

STEPS, BATCH, SAVED = 20, 8, 15
pytestmark = pytest.mark.slow


class Cell(NamedTuple):
    """An engine and how many processes it has."""

    engine: str
    world: int

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.world}"

    @property
    def overrides(self) -> tuple[str, ...]:
        return (f"train.engine={self.engine}", *(["train.shard_size=2"] if self.engine == "hsdp" else []))


ALONE = Cell("single", 1)
PAIRS = [Cell(engine, 2) for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3")]
FOURS = [Cell(engine, 4) for engine in ("fsdp2", "hsdp")]  # the others differ in no line from two processes
CELLS = [ALONE, *PAIRS, *FOURS]
UNSEEN = ("monitor.images=0", "monitor.probe=null")
WAYS = {  # two micro-batches a process, or one
    "whole": "",
    "accumulated": "train.micro_batch={micro}",
    "recomputed": "train.activation_checkpointing=full",
    "both": "train.micro_batch={micro} train.activation_checkpointing=selective",
    "spoilt": "train.micro_batch={micro} guard.window=8 guard.skips=1 train.checkpoint_every=32",
    "unseen": f"train.micro_batch={{micro}} train.activation_checkpointing=selective {' '.join(UNSEEN)}",
}
LEARNT = [
    (cell, way)
    for cell in CELLS
    for way in WAYS
    if way in ("whole", "both", "unseen", "spoilt")
    or (way == "recomputed" and cell.world == 2)
    or cell.engine == "single"
]
FEATURES = ("feature_std", "feature_cosine", "rankme", "target_variance", "prediction_variance")
COMMON = (
    f"train.samples={STEPS * BATCH}",
    f"train.checkpoint_every={SAVED * BATCH}",
    "optim.ema_half_life=40",
    "optim.grad_clip=0.5",  # reached by the first updates
)


def launch(world: int, yaml: Path, runs: list[tuple[str, ...]]) -> None:
    """Train these runs, one after another, in one group of processes."""
    arguments = [argument for run in runs for argument in ("--", *run)][1:]
    code, output = group(world, several_runs.main, yaml, *arguments, seconds=1200)
    assert code == 0, output[-4000:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, catalog: Path) -> Path:
    root = tmp_path_factory.mktemp("engines")
    monitor = f"{{images: 11, every: 40, probe: {catalog}, probe_images: 13}}"
    (root / "tiny.yaml").write_text(TINY.format(root=root, catalog=catalog).replace("{images: 8}", monitor))
    return root


@pytest.fixture(scope="module")
def learnt(root: Path) -> Path:
    """Runs `ENGINE-WORLD-WAY` of 20 updates, each with a checkpoint after 15."""
    for world in (1, 2, 4):
        runs = [
            (*COMMON, *cell.overrides, *WAYS[way].format(micro=4 // cell.world).split(), f"name={cell.name}-{way}")
            for cell, way in LEARNT
            if cell.world == world
        ]
        launch(world, root / "tiny.yaml", runs)
    return root / "runs"


@pytest.fixture(scope="module")
def resumed(root: Path, learnt: Path) -> Path:
    """Runs `WRITER-to-READER`: what every engine and number of processes makes of the checkpoint of every other."""
    out = root / "resumed"
    for world in (1, 2, 4):
        runs = []
        for reader in (cell for cell in CELLS if cell.world == world):
            for writer in CELLS:
                name = f"{writer.name}-to-{reader.name}"
                shutil.copytree(learnt / f"{writer.name}-whole", out / name)
                shutil.rmtree(out / name / "checkpoints" / f"samples-{STEPS * BATCH:012d}")
                runs.append((*COMMON, *UNSEEN, *reader.overrides, f"run_root={out}", f"name={name}"))
        launch(world, root / "tiny.yaml", runs)
    return out


def same(run: Path, other: Path, last: int) -> None:
    """Losses to 1e-6, gradient norms to 1e-5, the same samples in every one of the `last` updates."""
    rows, expected = record(run)[-last:], record(other)[-last:]
    assert [row["position"] for row in rows] == [BATCH * (step + 1) for step in range(STEPS - last, STEPS)]
    assert [row["samples_hash"] for row in rows] == [row["samples_hash"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=1e-6, rel=1e-6)
    norms = [row["grad_norm"] for row in expected]
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_what_one_process_spoils_no_process_learns_and_all_go_back_together(learnt: Path, cell: Cell) -> None:
    """The loss of the last process is NaN in the updates at 32, which is skipped, and at 104 and 112: back to 96."""
    run, alone = learnt / f"{cell.name}-spoilt", learnt / f"{ALONE.name}-spoilt"
    assert json.loads((run / "jumps.json").read_text()) == {"jumps": [[104, 120]]}
    kept = [f"skipped/samples-{at:012d}/rank{rank}.npz" for at in (32, 104, 112) for rank in range(cell.world)]
    assert sorted(str(file.relative_to(run)) for file in run.glob("skipped/*/*.npz")) == kept
    assert [row["position"] for row in record(run) if "loss" not in row] == [112, 120], "passed over"
    ours, theirs = ([row for row in record(each) if "loss" in row] for each in (run, alone))
    losses = [[row["loss"] or 0 for row in rows] for rows in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6, rel=1e-6)
    assert [row["update_norm"] for row in ours] == pytest.approx([row["update_norm"] for row in theirs], rel=1e-3)
    ours, theirs = (checkpoint.load(each)["tensors"] for each in (run, alone))
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=2e-3 if name.endswith("qkv.bias") else 1e-5), name


@pytest.mark.parametrize(
    ("cell", "way"),
    [each for each in LEARNT if each[1] != "spoilt"],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_engine_learns_what_one_process_learns(learnt: Path, cell: Cell, way: str) -> None:
    same(learnt / f"{cell.name}-{way}", learnt / f"{ALONE.name}-whole", STEPS)


@pytest.mark.parametrize("cell", CELLS[1:], ids=lambda cell: cell.name)
def test_weights_and_their_average_are_those_of_one_process(learnt: Path, cell: Cell) -> None:
    ours, theirs = (checkpoint.load(learnt / f"{each.name}-whole")["tensors"] for each in (cell, ALONE))
    assert ours.keys() == theirs.keys()
    assert {name.split(".")[0] for name in ours} == {"model", "ema", "exp_avg", "exp_avg_sq"}
    for name, tensor in theirs.items():
        # The bias of the keys has no gradient but rounding, which AdamW makes as large as any other.
        atol = 2e-3 if name.endswith("qkv.bias") else 1e-5
        assert torch.allclose(ours[name], tensor, atol=atol), name


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_every_engine_looks_at_the_same_features_and_learns_the_same_without_looking(learnt: Path, cell: Cell) -> None:
    """No number of processes divides the 11 images, nor the 26 of the probe among four."""
    seen, alone = ({row["position"]: row for row in record(learnt / f"{each.name}-both")} for each in (cell, ALONE))
    assert [position for position, row in seen.items() if "rankme" in row] == [40, 80, 120, 160]
    for position in (40, 80, 120, 160):
        wanted = [alone[position][name] for name in FEATURES]
        assert [seen[position][name] for name in FEATURES] == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert [position for position, row in seen.items() if "probe_knn" in row] == [120, 160]
    for position in (120, 160):  # one image of 13: two neighbours may be equally near
        assert seen[position]["probe_knn"] == pytest.approx(alone[position]["probe_knn"], abs=0.08)
    for row in record(learnt / f"{cell.name}-unseen"):
        assert row == {name: seen[row["position"]][name] for name in row}
    assert same_state(learnt / f"{cell.name}-both", learnt / f"{cell.name}-unseen")


HALF = [
    *((cell, ("train.micro_batch=2",)) for cell in PAIRS if cell.engine != "zero1"),
    (Cell("zero1", 2), ()),
    (Cell("fsdp2", 2), ("train.offload=true",)),
    (Cell("zero2", 2), ("train.offload=true",)),
    (Cell("zero3", 2), ("train.offload=true",)),
]


@pytest.fixture(scope="module")
def halves(root: Path) -> Path:
    """The same in bf16, and with the state in host memory."""
    runs = [
        (*COMMON, *cell.overrides, *how, "train.precision=bf16", f"run_root={root}/half", f"name=half-{number}")
        for number, (cell, how) in enumerate(HALF)
    ]
    launch(2, root / "tiny.yaml", runs)
    return root / "half"


@pytest.mark.parametrize("number", range(len(HALF)), ids=[f"{cell.name}{how}" for cell, how in HALF])
def test_in_bf16_every_engine_learns_nearly_what_one_process_learns_in_fp32(
    halves: Path, learnt: Path, number: int
) -> None:
    rows, expected = record(halves / f"half-{number}"), record(learnt / f"{ALONE.name}-whole")
    assert [row["samples_hash"] for row in rows] == [row["samples_hash"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=0.1)
    assert [row["loss"] for row in rows] != [row["loss"] for row in expected]


@pytest.mark.parametrize("reader", CELLS, ids=lambda cell: f"to-{cell.name}")
@pytest.mark.parametrize("writer", CELLS, ids=lambda cell: f"from-{cell.name}")
def test_every_engine_goes_on_where_any_other_stopped(resumed: Path, learnt: Path, writer: Cell, reader: Cell) -> None:
    run = resumed / f"{writer.name}-to-{reader.name}"
    same(run, learnt / f"{ALONE.name}-whole", STEPS - SAVED)
    told = json.loads((run / "environment.json").read_text())
    assert (told["engine"], told["world_size"]) == (reader.engine, reader.world)
