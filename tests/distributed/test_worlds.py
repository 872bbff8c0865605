"""The number of processes is not part of a run: 1, 2 and 4 see the same samples and go on where another stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import close, finish, hashes, interrupted, record, start

from foundation.config import load
from foundation.inspecting.inspection import inspect
from foundation.training.run import train

SCRIPT = Path(__file__).with_name("several_runs.py")
WORLDS = (2, 4)


def torchrun(world: int, *arguments: object) -> tuple[int, str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}")
    return finish(start(*arguments, program=launcher))


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """The folder of runs by 2 and by 4 processes: from the start (`whole-N`), and from the middle of the
    run of one process (`resumed-N`)."""
    root = tmp_path_factory.mktemp("worlds")
    tiny = finished.parents[1] / "tiny.yaml"
    for world, workers in zip(WORLDS, (1, 0), strict=True):
        interrupted(finished, root / f"resumed-{world}", 48)
        whole = (f"run_root={root}", f"name=whole-{world}", f"data.workers={workers}")
        resumed = (f"run_root={root}", f"name=resumed-{world}", f"data.workers={2 - workers}")
        stuck = (f"run_root={root}", f"name=stuck-{world}", "train.samples=40", "train.patience=5")
        code, output = torchrun(world, SCRIPT, tiny, *whole, "--", *resumed, "--", *stuck)
        assert code == 0, output
        assert f"engine: ddp, {world} process(es)" in output
        assert "resumed from samples-000000000048" in output
    return root


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["whole", "resumed"])
def test_every_global_batch_is_the_one_of_a_single_process(
    launched: Path, finished: Path, kind: str, world: int
) -> None:
    run = launched / f"{kind}-{world}"
    assert len(record(run)) == 12
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["slowest_rank"] in range(world)
    assert line["slowest_ratio"] >= 1
    assert hashes(run) == hashes(finished)
    close(run, finished)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_all_replicas_end_with_the_same_weights(launched: Path, world: int) -> None:
    for kind in ("whole", "resumed"):
        digests = [(launched / f"{kind}-{world}" / f"rank-{rank}.sha256").read_text() for rank in range(world)]
        assert len(set(digests)) == 1


@pytest.mark.parametrize("world", WORLDS)
def test_a_run_that_stands_still_names_the_process_that_all_others_wait_for(launched: Path, world: int) -> None:
    found = inspect(launched / f"stuck-{world}")
    assert found.state == "complete", "the notice ends nothing"
    assert [event["position"] for event in found.events if event["kind"] == "standstill"] == [24]
    assert found.standstill
    assert [each.rank for each in found.standstill.processes] == list(range(world))
    assert "several_runs.py" in found.standstill.processes[-1].where
    assert found.standstill.verdict.startswith(f"all wait for rank {world - 1}: not in gloo:all")


def test_a_single_process_goes_on_where_four_stopped(launched: Path, finished: Path) -> None:
    interrupted(launched / "whole-4", launched / "back", 64)
    train(load(finished.parents[1] / "tiny.yaml", [f"run_root={launched}", "name=back", "data.workers=2"]))
    assert hashes(launched / "back") == hashes(finished)
    close(launched / "back", finished)


def test_two_seeds_do_not_share_a_global_batch(tmp_path: Path, tiny_config: Callable[..., Any], finished: Path) -> None:
    other = train(tiny_config("seed=1", "train.samples=48"))
    assert not set(hashes(other)) & set(hashes(finished))


def test_processes_that_do_not_divide_the_lanes_are_refused_before_any_update(tiny_yaml: Path, tmp_path: Path) -> None:
    code, output = torchrun(3, "-m", "foundation", "train", tiny_yaml, "train.global_batch=24")
    assert code != 0
    assert "8 lanes cannot be shared evenly by 3 processes" in output
    assert not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()
