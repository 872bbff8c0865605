"""What breaks around a real run costs no work: it stops with a message and status 2, or goes on with a warning."""

from __future__ import annotations

import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import finish, interrupted, position, record, same_state, start, wait

from foundation.config import Config
from foundation.training import run as runs_module
from foundation.training.checkpoint import latest
from foundation.training.run import train
from shards.pack import Record, SourceSpec, pack

Make = Callable[..., Config]
Command = Callable[..., Any]
ENDLESS = ("train.samples=80000", "train.checkpoint_every=80000")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user could reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


def packed(out: Path, shard_bytes: int) -> Path:
    """600 small random chips."""
    rng = np.random.default_rng(0)
    chips = (Record(rng.integers(1, 200, (16, 16), np.uint8), f"{i}.png", None) for i in range(600))
    pack(out, [SourceSpec("chips", records=chips)], shard_bytes=shard_bytes)
    return out


def test_a_disk_that_fills_up_stops_the_run_and_loses_nothing(
    tiny_config: Make, tiny_yaml: Path, finished: Path
) -> None:
    run = interrupted(finished, tiny_config().run_folder, 16)
    process = start("train", tiny_yaml)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # small files only from now on
    code, output = finish(process)
    assert code == 2, output
    assert "CheckpointError: the checkpoint at " in output
    assert "samples could not be written: File too large" in output
    assert "free space or correct the permissions, then resume; earlier checkpoints are untouched" in output
    assert "Traceback" not in output
    kept, skipped = latest(run)
    assert kept is not None
    assert not skipped
    train(tiny_config())
    assert record(run) == record(finished)
    assert same_state(run, finished)


@pytest.mark.usefixtures("finished")  # a whole run has imported everything: another user may not read the packages
def test_a_run_folder_that_may_not_be_written_is_named(
    catalog: Path, open_folder: Path, command: Command, tiny_yaml: Path
) -> None:
    shutil.copytree(catalog, open_folder / "catalog")
    (open_folder / "catalog").chmod(0o755)
    shutil.copy(tiny_yaml, open_folder / "tiny.yaml")
    overrides = [f"data.catalog={open_folder / 'catalog'}", f"run_root={open_folder}"]
    open_folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:  # permissions do not bind root
        os.seteuid(65534)
    try:
        code, _, err = command("train", open_folder / "tiny.yaml", *overrides)
    finally:
        if root:
            os.seteuid(0)
    assert code == 2
    assert "cannot be written: Permission denied" in err
    assert f"where: {open_folder / 'tiny'}" in err
    assert "correct the permissions, or change run_root or name" in err


def test_a_file_in_the_place_of_the_run_folder_is_named(command: Command, tiny_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = command("train", tiny_yaml, f"run_root={tmp_path / 'file'}")
    assert code == 2
    assert "cannot be written: Not a directory" in err


def test_a_dead_tracking_server_costs_two_lines_and_no_number(tiny_yaml: Path, tmp_path: Path, finished: Path) -> None:
    code, output = finish(start("train", tiny_yaml, "tracking.mlflow=true", "tracking.uri=http://127.0.0.1:9"))
    assert code == 0, output
    first, last = [line for line in output.splitlines() if re.search("mlflow|retry|retries", line, re.IGNORECASE)]
    assert first.startswith("MLflow does not answer (http://127.0.0.1:9: ")
    assert first.endswith("metrics.jsonl is complete and will be sent")
    run = tmp_path / "runs" / "tiny"
    assert last == f"MLflow lacks the end of this run; when it answers: foundation track {run}"
    assert record(run) == record(finished)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_shard_that_breaks_during_training_stops_the_run_with_its_name(
    tiny_config: Make, tiny_yaml: Path, tmp_path: Path, damage: str, workers: int
) -> None:
    # The one shard is open when it is cut; of the hundred, most are not when they vanish.
    data = packed(tmp_path / "data", {"cut": 1 << 30, "missing": 4_000}[damage])
    process = start("train", tiny_yaml, f"data.catalog={data}", f"data.workers={workers}", *ENDLESS)
    wait(process, lambda: position(tiny_config().run_folder) >= 16)
    for shard in data.glob("*.tar"):
        if damage == "cut":
            os.truncate(shard, shard.stat().st_size // 2)
        else:
            shard.unlink()
    code, output = finish(process)
    assert code == 2, output
    what = {"cut": "the shard was cut off while it was read: ", "missing": "no such file"}[damage]
    assert f"DataError: {what}" in output
    assert f"where: {data}/chips-" in output
    assert {"cut": "restore the file or pack the source again", "missing": "complete the catalog"}[damage] in output
    assert "Traceback" not in output


def test_a_shard_that_is_broken_before_the_start_is_named_before_any_update(
    command: Command, tiny_yaml: Path, tmp_path: Path
) -> None:
    data = packed(tmp_path / "data", 100_000)
    first, second, *_ = sorted(data.glob("*.tar"))
    os.truncate(first, 700)
    second.unlink()
    code, _, err = command("train", tiny_yaml, f"data.catalog={data}")
    assert code == 2
    assert f"DataError: shard {first.name} is cut off: 700 of " in err
    assert f"missing shard {second.name}" in err
    assert not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()


def test_a_gradient_that_is_not_finite_leaves_the_checkpoints_before_it(
    tiny_config: Make, finished: Path, command: Command, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = interrupted(finished, tiny_config().run_folder, 48)
    step = runs_module.train_step

    def fail_at_64(learner: Any, batches: Any, at: int, limit: float) -> Any:
        values = step(learner, batches, at, limit)
        return {**values, "grad_norm": torch.tensor(float("nan"))} if at == 64 else values

    monkeypatch.setattr(runs_module, "train_step", fail_at_64)
    code, _, err = command("train", tiny_yaml, "guard.skips=0", "guard.rewinds=0")
    assert code == 2
    assert "NumericsError: 1 of the last 128 updates were spoilt, the last one skipped (loss" in err
    assert "where: sample 64" in err
    assert latest(run)[0] == run / "checkpoints" / "samples-000000000064"
    monkeypatch.undo()
    train(tiny_config())
    assert record(run) == record(finished)
    assert same_state(run, finished)
