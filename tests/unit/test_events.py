"""Everything that happens to a run is in its events, also what a restart has taken out of the metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from processes import MEASURED, interrupted, record

from foundation.config import Config
from foundation.errors import DataError
from foundation.training import run as running
from foundation.training.events import Events
from foundation.training.run import train
from foundation.training.tracking import Tracker, open_tracker

Make = Callable[..., Config]


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def kinds(run: Path) -> list[tuple[str, int]]:
    return [(event["kind"], event["position"]) for event in events(run)]


def test_numbers_that_are_not_finite_become_null_wherever_they_are(tmp_path: Path) -> None:
    facts = {"score": math.nan, "norms": [1.0, math.inf], "limits": {"loss": -math.inf, "n": 3}, "path": tmp_path}
    Events(tmp_path).write("spike", 8, facts)
    (line,) = events(tmp_path)
    time = line.pop("time")
    assert 1.6e9 < time < 1e11
    assert line == {"kind": "spike", "position": 8, "score": None, "norms": [1.0, None],
                    "limits": {"loss": None, "n": 3}, "path": str(tmp_path)}  # fmt: skip


def test_a_line_that_a_kill_has_cut_does_not_take_the_next_one_with_it(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"kind": "start", "posi')
    for _ in range(2):
        Events(tmp_path).write("restart", 0, {})
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert lines[0] == '{"kind": "start", "posi'
    assert [json.loads(line)["kind"] for line in lines[1:]] == ["restart", "restart"]


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    writer = Events(tmp_path)
    threads = [
        Thread(target=lambda n=n: [writer.write("k", n, {"x": "y" * 2000}) for _ in range(20)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(position for _, position in kinds(tmp_path)) == [n for n in range(4) for _ in range(20)]


def test_an_event_that_cannot_be_written_is_said_and_ends_no_run(
    tiny_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config()
    tracker = open_tracker(config)
    (config.run_folder / "events.jsonl").unlink()
    (config.run_folder / "events.jsonl").mkdir()
    tracker.event("collapse", 1000, what="x")
    tracker.close()
    assert "events.jsonl cannot be written: Is a directory (collapse at 1,000 samples)" in capsys.readouterr().err


def test_other_ranks_record_no_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Tracker().event("start", 0)
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_keeps_the_events_of_all_its_attempts(finished: Path, tmp_path: Path) -> None:
    from foundation.config import load

    run = interrupted(finished, tmp_path / "runs" / "tiny", 48)
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[:9]) + rows[9][:20])  # to 72 samples
    train(load(run / "config.yaml", [f"run_root={tmp_path / 'runs'}"]))
    now = events(run)[len(events(finished)) :]
    assert [(e["kind"], e["position"]) for e in now] == [
        ("restart", 48), ("checkpoint", 64), ("checkpoint", 80), ("checkpoint", 96), ("stop", 96)
    ]  # fmt: skip
    assert (now[0]["reached"], now[0]["world_size"], now[0]["engine"]) == (72, 1, "single")
    assert now[-1] == now[-1] | {"status": "finished"}
    assert record(run) == record(finished)


def test_damage_collapse_and_an_error_are_events(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("optim.lr=1e-3", "optim.weight_decay=30_000", "optim.warmup_samples=0", "monitor.every=8")
    met = iter([1, 0, 2, 0])

    def replaced(*_: object) -> int:
        if (count := next(met, None)) is None:
            raise DataError("the disk is gone", do="mount it")
        return count

    monkeypatch.setattr(running, "report_replaced", replaced)
    config = tiny_config(*keys, "train.samples=64")
    with pytest.raises(DataError, match="the disk is gone"):
        train(config)
    found = events(config.run_folder)
    assert [(e["position"], e["samples"]) for e in found if e["kind"] == "damaged"] == [(8, 1), (24, 3)]
    assert "the features of different images are the same" in next(e["what"] for e in found if e["kind"] == "collapse")
    stop = found[-1]
    assert (stop["kind"], stop["position"], stop["status"]) == ("stop", 32, "failed")
    assert stop["reason"] == "DataError: the disk is gone"


def test_lines_of_one_process_compare_none(finished: Path) -> None:
    row = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["window_s"] > 0
    assert not {"slowest_rank", "slowest_ratio", "slowest_wait"} & set(row)
    assert "window_s" in MEASURED
