"""The numbers of a run are complete on disk whatever MLflow does, and a resumed run continues one record."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from foundation.config import Config, config_hash, flatten, from_dict
from foundation.errors import ConfigError
from foundation.training.standing import FILE, Facts, Standing, read
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


def test_a_dead_server_costs_two_lines_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = open_tracker(config(tmp_path, uri="http://127.0.0.1:9"), run_id="kept")
    tracker.log(300, {"loss": 0.5})
    tracker.artifact(tmp_path / "figure.png")
    tracker.close()
    first, last = [line for line in capsys.readouterr().err.splitlines() if "MLflow" in line]
    assert first.startswith("MLflow does not answer (http://127.0.0.1:9: ")
    assert first.endswith("; metrics.jsonl is complete and will be sent")
    assert last == f"MLflow lacks the end of this run; when it answers: foundation track {tmp_path / 'run'}"
    assert lines(tmp_path)[0]["loss"] == 0.5
    assert tracker.run_id == "kept", "the next checkpoint must not forget the run"


@pytest.mark.parametrize(
    "keys",
    [
        {"tracking": {"uri": "https://user:hunter2@example.org"}},
        {"tracking": {"uri": "https://:hunter2@example.org"}},
        {"tracking": {"uri": "postgresql://host/db?password=hunter2"}},
        {"data": {"catalog": ["corpus", "https://me:hunter2@host/corpus"]}},
        {"monitor": {"probe": "https://host/corpus?token=hunter2"}},
        {"model": {"init": "s3://me:hunter2@bucket/run"}},
        {"nonsense": "https://me:hunter2@host"},
    ],
)
def test_a_secret_in_an_address_is_refused_before_it_is_saved_and_is_not_shown(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(keys)
    assert "hunter2" not in str(error.value)
    assert "***" in str(error.value)
    if "nonsense" not in keys:
        assert "a URL without user name or query; credentials come from the environment" in str(error.value)


def test_a_secret_in_the_environment_reaches_no_line_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    tracker = open_tracker(config(tmp_path))
    tracker.close()
    assert "MLflow does not answer (http://***@127.0.0.1:9: " in capsys.readouterr().err
    assert all(b"hunter2" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


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
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = config(tmp_path)
    (tmp_path / "run").mkdir()
    facts = {"commit": "abc-dirty", "engine": "ddp", "world_size": 2, "slurm_job_id": "7", "slurm_array_task_id": "3"}
    (tmp_path / "run" / "environment.json").write_text(json.dumps(facts))
    first = open_tracker(setting)
    first.log(300, {"loss": 0.5, "eval/top1, linear": 0.1, "grad_norm": math.nan})
    (tmp_path / "figure.txt").write_text("figure")
    first.artifact(tmp_path / "gone.txt")
    first.artifact(tmp_path / "figure.txt", "figures")
    first.close("KILLED")
    assert "MLflow did not take gone.txt (" in capsys.readouterr().err
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert first.run_id is not None
    run = client.get_run(first.run_id)
    assert run.info.status == "KILLED"
    assert run.data.params == {key: str(value) for key, value in flatten(setting).items()}
    assert run.data.metrics["eval/top1 linear"] == 0.1
    assert math.isnan(run.data.metrics["grad_norm"])
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 0
    wanted = {name: str(value) for name, value in facts.items()}
    wanted |= {"mlflow.source.git.commit": "abc", "git_dirty": "True", "mlflow.source.type": "JOB"}
    assert run.data.tags.items() >= wanted.items()
    assert run.data.tags["config_hash"] == config_hash(setting)
    assert [file.path for file in client.list_artifacts(first.run_id, "figures")] == ["figures/figure.txt"]
    assert (tmp_path / "mlartifacts" / first.run_id / "artifacts" / "figures" / "figure.txt").exists()

    (tmp_path / "run" / "environment.json").write_text(json.dumps({"commit": "abc", "host": "n1"}))
    second = open_tracker(setting, position=300, run_id=first.run_id)
    second.log(600, {"loss": 0.25})
    second.close()
    assert second.run_id == first.run_id
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags.items() >= {"git_dirty": "False", "host": "n1"}.items()
    assert "slurm_job_id" not in run.data.tags, "the job before is not the one of now"

    (tmp_path / "run" / FILE).unlink()
    lost = open_tracker(setting, position=600, run_id=first.run_id)
    lost.close("FAILED")
    assert lost.run_id == first.run_id, "the checkpoint knows it"
    assert [(m.step, m.value) for m in client.get_metric_history(first.run_id, "loss")] == [(300, 0.5), (600, 0.25)]

    client.delete_run(first.run_id)
    moved = open_tracker(setting, position=600, run_id=first.run_id)
    moved.close()
    assert moved.run_id not in (None, first.run_id), "a run that the store has no more is begun anew"
    assert [(m.step, m.value) for m in client.get_metric_history(moved.run_id, "loss")] == [(300, 0.5), (600, 0.25)]


def test_a_start_anew_goes_on_under_the_same_settings_and_is_another_run_under_others(tmp_path: Path) -> None:
    def begin(config_hash: str, status: str, position: int = 0) -> tuple[Facts, str | None]:
        standing = Standing(tmp_path)
        left = standing.begin(config_hash, position, 10)
        standing.belongs_to(standing.facts.run_id or f"id of {standing.facts.key}")
        standing.update(sent=50, status=status)
        return standing.facts, left

    first, _ = begin("a", "RUNNING")
    again, left = begin("a", "RUNNING")
    assert (again, left) == (first, None)
    other, left = begin("b", "FINISHED")
    assert left == first.run_id, "it was killed, and the store does not know"
    assert (other.key != first.key, other.run_id != first.run_id) == (True, True)
    assert begin("c", "FINISHED", position=8)[0].key == other.key, "a resumed run is the same one"
    assert begin("d", "FINISHED")[1] is None, "the one before has ended"
    (tmp_path / FILE).write_text('{"key"')
    assert read(tmp_path) is None


def test_what_is_sent_begins_where_the_record_was_changed(tmp_path: Path) -> None:
    standing = Standing(tmp_path)
    standing.update(sent=100)
    standing.begin("a", 8, 60)
    assert Standing(tmp_path).facts.sent == 60
    standing.begin("a", 8, 90)
    assert Standing(tmp_path).facts.sent == 60


def test_a_run_that_began_in_another_store_is_whole_in_the_new_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = open_tracker(config(tmp_path, mlflow=False))  # killed before its first checkpoint
    assert isinstance(first, RunTracker)
    first._standing.belongs_to("a" * 32)
    second = open_tracker(config(tmp_path))  # from the beginning, by other settings
    second.log(300, {"loss": 0.5})
    (tmp_path / "figure.txt").write_text("figure")
    second.artifact(tmp_path / "figure.txt")
    second.close()
    err = capsys.readouterr().err
    assert "MLflow does not answer" not in err
    assert f"MLflow did not take the end of the run before this one, {'a' * 32} (" in err
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(second.run_id)
    assert (run.info.status, run.data.metrics["loss"]) == ("FINISHED", 0.5)
    assert [file.path for file in client.list_artifacts(second.run_id)] == ["figure.txt"]
