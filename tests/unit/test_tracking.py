"""The numbers of a run are complete on disk whatever MLflow does, and a resumed run continues one record."""

from __future__ import annotations

import json
import math
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from foundation.config import Config, flatten, from_dict
from foundation.errors import ConfigError
from foundation.training.meters import Throughput, environment
from foundation.training.mlflow_sink import MlflowSink
from foundation.training.tracking import RunTracker, Tracker, open_tracker


def config(root: Path, **tracking: object) -> Config:
    return from_dict({"name": "run", "run_root": str(root), "tracking": tracking})


def lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]


def test_the_record_is_one_json_line_per_entry(tmp_path: Path) -> None:
    tracker = open_tracker(config(tmp_path, mlflow=False))
    tracker.log(300, {"loss": 0.5})
    assert lines(tmp_path)[0]["loss"] == 0.5, "flushed at once"
    tracker.log(600, {"loss": math.nan})
    tracker.close()
    tracker.close()
    assert [(line["position"], line["loss"]) for line in lines(tmp_path)] == [(300, 0.5), (600, None)]
    assert all(line["time"] > 0 for line in lines(tmp_path))


def test_resuming_drops_what_lies_beyond_the_checkpoint_and_what_a_crash_half_wrote(tmp_path: Path) -> None:
    tracker = open_tracker(config(tmp_path, mlflow=False))
    for position in (100, 200, 300):
        tracker.log(position, {"loss": 1.0})
    tracker.close()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"position": 100, "lo')
    tracker = open_tracker(config(tmp_path, mlflow=False), position=200)
    tracker.log(300, {"loss": 2.0})
    tracker.close()
    assert [(line["position"], line["loss"]) for line in lines(tmp_path)] == [(100, 1.0), (200, 1.0), (300, 2.0)]


def test_starting_anew_begins_an_empty_record(tmp_path: Path) -> None:
    for _ in range(2):
        tracker = open_tracker(config(tmp_path, mlflow=False))
        tracker.log(0, {"loss": 1.0})
        tracker.close()
    assert len(lines(tmp_path)) == 1


def test_other_ranks_record_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = open_tracker(config(tmp_path), rank=1)
    tracker.log(1, {"loss": 1.0})
    tracker.artifact(tmp_path / "x")
    tracker.note("hello")
    tracker.close("FAILED")
    assert type(tracker) is Tracker
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match="the run folder cannot be written: File exists"):
        open_tracker(config(tmp_path))


def test_without_a_terminal_progress_is_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = open_tracker(config(tmp_path, mlflow=False))
    tracker.log(30_000, {"loss": 0.25, "images_per_s": 1234.0})
    tracker.log(30_000, {"probe": 0.9})
    tracker.close()
    shown = capsys.readouterr().err
    assert "30,000/28,432,800 samples  loss 0.2500  1,234 images/s" in shown
    assert shown.count("\n") == 1


def test_on_a_terminal_progress_is_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    tracker = open_tracker(config(tmp_path, mlflow=False), position=100)
    assert isinstance(tracker, RunTracker)
    assert tracker._bar is not None
    tracker.log(30_000, {"loss": 0.25, "images_per_s": 1234.0})
    task = tracker._bar[0].tasks[0]
    assert (task.completed, task.total) == (30_000, 28_432_800)
    assert task.fields == {"loss": "loss 0.2500", "speed": "1,234 images/s"}
    tracker.close()


def test_a_dead_server_costs_one_line_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = open_tracker(config(tmp_path, uri="http://127.0.0.1:9"), run_id="kept")
    shown = capsys.readouterr().err
    assert shown.startswith("MLflow is off: http://127.0.0.1:9 cannot be used (")
    assert shown.endswith("metrics.jsonl is complete without it\n")
    assert shown.count("\n") == 1
    tracker.log(300, {"loss": 0.5})
    tracker.artifact(tmp_path / "figure.png")
    tracker.close()
    assert lines(tmp_path)[0]["loss"] == 0.5
    assert tracker.run_id == "kept", "the next checkpoint must not forget the run"


def test_a_password_in_the_address_is_refused_before_it_is_saved_anywhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
        config(tmp_path, uri="https://user:secret@example.org")


def test_missing_mlflow_costs_one_line_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", None)
    tracker = open_tracker(config(tmp_path))
    assert "MLflow is off: import of mlflow.exceptions halted" in capsys.readouterr().err
    tracker.log(300, {"loss": 0.5})
    tracker.close()
    assert tracker.run_id is None
    assert len(lines(tmp_path)) == 1


def test_the_store_holds_parameters_metrics_tags_files_and_the_resumed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    setting = config(tmp_path)
    first = open_tracker(setting)
    first.log(300, {"loss": 0.5, "eval/top1": 0.1})
    (tmp_path / "figure.txt").write_text("figure")
    first.artifact(tmp_path / "gone.txt")
    first.artifact(tmp_path / "figure.txt", "figures")
    first.close("KILLED")
    assert "MLflow did not take one entry: " in capsys.readouterr().err
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert first.run_id is not None
    assert client.get_run(first.run_id).info.status == "KILLED"

    second = open_tracker(setting, position=300, run_id=first.run_id)
    second.log(600, {"loss": 0.25})
    second.close()
    assert second.run_id == first.run_id
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {key: str(value) for key, value in flatten(setting).items()}
    assert [(m.step, m.value) for m in client.get_metric_history(first.run_id, "loss")] == [(300, 0.5), (600, 0.25)]
    assert run.data.metrics["eval/top1"] == 0.1
    assert run.data.tags.items() >= environment().items()
    assert [file.path for file in client.list_artifacts(first.run_id, "figures")] == ["figures/figure.txt"]
    assert (tmp_path / "mlartifacts" / first.run_id / "artifacts" / "figures" / "figure.txt").exists()

    moved = open_tracker(setting, position=600, run_id="0" * 32)
    moved.close()
    assert moved.run_id not in (None, first.run_id, "0" * 32), "a run the store does not know is begun anew"


class _Flaky:
    """A store that refuses the first `failures` requests."""

    def __init__(self, failures: int) -> None:
        self.failures, self.points, self.status = failures, list[float](), ""

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.failures -= 1
        if self.failures >= 0:
            raise OSError("connection lost")
        self.points += [metric.value for metric in metrics]

    def set_terminated(self, run_id: str, status: str) -> None:
        self.status = status


@pytest.mark.parametrize("failures", [0, 1])
def test_metrics_of_an_outage_are_sent_afterwards_in_order(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foundation.training.mlflow_sink.RETRY_SECONDS", 0.0)
    notes, noted = list[str](), threading.Event()
    store = _Flaky(failures)

    def note(text: str) -> None:
        notes.append(text)
        noted.set()

    sink = MlflowSink(store, "id", note, (OSError,))
    for position in range(2500):
        sink.metrics(position, 0.0, {"loss": position})
    assert noted.wait(10.0) if failures else True, "the outage is met before the end, whose last attempt ends it"
    sink.metrics(2500, 0.0, {"loss": 2500})
    sink.close("FINISHED")
    assert store.points == list(range(2501))
    assert store.status == "FINISHED"
    assert notes == ["MLflow failed (connection lost); training goes on and metrics.jsonl is complete"] * failures


def test_a_store_that_stays_dead_is_reported_once() -> None:
    notes: list[str] = []
    sink = MlflowSink(_Flaky(10**9), "id", notes.append, (OSError,))
    for position in range(100):
        sink.metrics(position, 0.0, {"loss": 1.0})
    sink.close("FINISHED")
    assert notes == ["MLflow failed (connection lost); training goes on and metrics.jsonl is complete"]


def test_a_store_that_hangs_does_not_hold_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foundation.training.mlflow_sink.CLOSE_SECONDS", 0.05)
    release, notes = threading.Event(), list[str]()
    store = _Flaky(0)
    monkeypatch.setattr(store, "log_batch", lambda *_, **__: release.wait())
    sink = MlflowSink(store, "id", notes.append, (OSError,))
    sink.metrics(1, 0.0, {"loss": 1.0})
    sink.close("FINISHED")
    release.set()
    assert notes == ["MLflow does not answer: the end of the run is missing there; metrics.jsonl is complete"]


def test_throughput_counts_images_and_waiting_from_one_reading_to_the_next() -> None:
    now = [0.0]
    meter = Throughput(lambda: now[0])
    with meter.waiting():
        now[0] += 1.0
    now[0] += 3.0
    meter.update(100)
    meter.update(300)
    first = meter.read()
    assert (first["images_per_s"], first["data_wait"]) == (100.0, 0.25)
    assert first["peak_rss_gb"] > 0.01
    now[0] += 2.0
    meter.update(10)
    second = meter.read()
    assert (second["images_per_s"], second["data_wait"]) == (5.0, 0.0)


def test_the_environment_names_what_computed() -> None:
    found = environment()
    assert {"python", "platform", "torch", "numpy", "device"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())
