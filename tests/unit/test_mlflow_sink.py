"""Nothing that a store can take is lost, whatever it refuses and however long it is away; nothing else is kept."""

from __future__ import annotations

import json
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.exceptions import RESOURCE_DOES_NOT_EXIST, MlflowException
from mlflow.utils.rest_utils import verify_rest_response

from foundation.config import from_dict
from foundation.training.mlflow_sink import MlflowSink, pending
from foundation.training.standing import Standing
from foundation.training.tracking import RunTracker, open_tracker


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 700), max_size=5), st.integers(0, 5), st.booleans())
def test_every_whole_line_is_sent_once_in_requests_that_a_store_takes(sizes: list[int], cut: int, half: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "metrics.jsonl"
        rows = [{"position": i, "time": 1.5, **{f"m{j}": j for j in range(n)}} for i, n in enumerate(sizes)]
        whole = [json.dumps(row) + "\n" for row in rows]
        record.write_text("".join(whole) + '{"position": 99, "ti' * half)
        skipped = whole[:cut]
        requests = list(pending(record, len("".join(skipped))))
    points = [(p.step, p.key, p.value, p.timestamp) for metrics, _ in requests for p in metrics]
    assert points == [(i, f"m{j}", j, 1500) for i, n in enumerate(sizes) if i >= cut for j in range(n)]
    assert all(0 < len(metrics) <= 1000 for metrics, _ in requests)
    assert not requests or requests[-1][1] == len("".join(whole))


class _Flaky:
    """A store that refuses the first `failures` requests."""

    def __init__(self, failures: int) -> None:
        self.failures, self.points, self.status = failures, list[float](), ""

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.failures -= 1
        if self.failures >= 0:
            raise OSError("connection lost")
        self.points += [metric.value for metric in metrics]

    def set_terminated(self, run_id: str, status: str, end_time: int | None) -> None:
        self.status = status


def sink_of(store: Any, root: Path, note: Any) -> MlflowSink:
    """A sink that follows `root/metrics.jsonl`, of 2500 lines."""
    record = root / "metrics.jsonl"
    record.write_text("".join(f'{{"position": {i}, "time": 0, "loss": {i}}}\n' for i in range(2500)))
    return MlflowSink(lambda: (store, "id"), Standing(root), record, note)


OUTAGE = "MLflow does not answer (connection lost); metrics.jsonl is complete and will be sent"


@pytest.mark.parametrize("failures", [0, 1])
def test_metrics_of_an_outage_are_sent_afterwards_in_order(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foundation.training.mlflow_sink.RETRY_SECONDS", 0.01)
    notes, noted = list[str](), threading.Event()
    store = _Flaky(failures)

    def note(text: str) -> None:
        notes.append(text)
        noted.set()

    sink = sink_of(store, tmp_path, note)
    sink.more()
    assert noted.wait(10.0) if failures else True, "the outage is met before the end, whose last attempt ends it"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"position": 2500, "time": 0, "loss": 2500}\n')
    assert sink.close("FINISHED")
    assert store.points == list(range(2501))
    assert store.status == "FINISHED"
    assert notes == [OUTAGE] * failures
    assert Standing(tmp_path).facts.sent == (tmp_path / "metrics.jsonl").stat().st_size


def test_a_store_that_stays_dead_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foundation.training.mlflow_sink.RETRY_SECONDS", 0.0)
    notes: list[str] = []
    sink = sink_of(_Flaky(10**9), tmp_path, notes.append)
    for _ in range(100):
        sink.more()
    assert not sink.close("FINISHED")
    assert sink.failure == "connection lost"
    assert notes == [OUTAGE]
    assert Standing(tmp_path).facts.sent == 0


def test_lines_that_follow_a_rewind_during_a_request_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked, go_on = _Flaky(0), threading.Event(), threading.Event()
    log_batch = store.log_batch

    def slow(run_id: str, metrics: list[Any]) -> None:
        asked.set()
        assert go_on.wait(60.0)
        log_batch(run_id, metrics)

    monkeypatch.setattr(store, "log_batch", slow)
    monkeypatch.setattr(MlflowSink, "open", lambda *_, **__: None)
    tracker = open_tracker(from_dict({"name": "run", "run_root": str(tmp_path)}))
    assert isinstance(tracker, RunTracker)
    record, standing = tmp_path / "run" / "metrics.jsonl", tracker._standing
    for position in (100, 200, 300, 400):
        tracker.log(position, {"loss": position})
    sent = record.stat().st_size
    tracker._mlflow = sink = MlflowSink(lambda: (store, "id"), standing, record, print)
    sink.more()
    assert asked.wait(60.0)
    tracker.rewind(100)
    tracker.log(200, {"loss": -200})
    assert record.stat().st_size < sent, "the new line lies before the end of what is being sent"
    go_on.set()
    tracker.close()
    assert sink.failure == ""
    assert -200 in store.points
    assert Standing(tmp_path / "run").facts.sent == record.stat().st_size


def test_a_store_that_hangs_does_not_hold_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, store = threading.Event(), _Flaky(0)
    monkeypatch.setattr(store, "log_batch", lambda *_, **__: release.wait())
    sink = sink_of(store, tmp_path, print)
    sink.more()
    assert not sink.close("FINISHED", 0.05)
    assert sink.failure == "no answer"
    release.set()


class _Strict:
    """A store that answers one kind of request with an error, and has or lacks the run."""

    def __init__(self, name: str, error: Exception, there: bool = True) -> None:
        self.name, self.error, self.there, self.done = name, error, there, list[str]()

    def __getattr__(self, name: str) -> Any:
        def answer(*arguments: object, **_: object) -> None:
            if name == self.name:
                raise self.error
            self.done.append(name)

        return answer

    def get_run(self, run_id: str) -> Any:
        if not self.there:
            raise MlflowException("Run not found", RESOURCE_DOES_NOT_EXIST)
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active"))


def http(status: int) -> Exception:
    """What MLflow makes of an answer to an upload."""
    response = requests.Response()
    response.status_code, response.reason = status, "Refused"
    try:
        response.raise_for_status()
    except requests.HTTPError as error:
        return error
    raise AssertionError(status)


def proxied(status: int) -> Exception:
    """What MLflow makes of a page of HTML that answers any other request."""
    response = requests.Response()
    response.status_code, response._content = status, b"<html>"
    try:
        verify_rest_response(response, "/api/2.0/mlflow/runs/log-batch")
    except MlflowException as error:
        return error
    raise AssertionError(status)


@pytest.mark.parametrize("name", ["log_artifact", "log_batch", "set_terminated"])
@pytest.mark.parametrize(
    "error",
    [http(400), http(404), http(413), proxied(413), MlflowException("no such thing", RESOURCE_DOES_NOT_EXIST)],
    ids=["400", "404", "413", "413 of a proxy", "unknown"],
)
def test_what_the_server_refuses_for_good_costs_a_line_and_all_behind_it_goes_on(
    name: str, error: Exception, tmp_path: Path
) -> None:
    notes, store = list[str](), _Strict(name, error)
    sink = sink_of(store, tmp_path, notes.append)
    sink.artifact(tmp_path / "report.html")
    sink.job(lambda client, run_id: client.log_text(run_id, "behind it"))
    assert sink.close("FINISHED")
    assert store.done[-1] == "log_text"
    assert {"log_artifact", "log_batch", "set_terminated"} - set(store.done) == {name}
    assert sink.refused == notes
    (line,) = notes
    what = {"log_artifact": "report.html", "log_batch": "lines of metrics.jsonl"}.get(name, "the status FINISHED")
    assert line.startswith(f"MLflow did not take {what} ({str(error)[:100]}")
    helps = f"(nginx: client_max_body_size); files go again by: foundation track {tmp_path}"
    assert line.endswith(helps) == ("413" in str(error))


@pytest.mark.parametrize(
    ("error", "there"),
    [
        *((http(status), True) for status in (401, 403, 429, 500, 502, 503)),
        *((proxied(status), True) for status in (401, 403, 502)),
        (ConnectionResetError("by peer"), True),
        (http(404), False),  # the run itself is gone: another one is made, with all that this one had
    ],
)
def test_what_the_server_may_take_later_is_kept(error: Exception, there: bool, tmp_path: Path) -> None:
    store = _Strict("log_artifact", error, there)
    sink = sink_of(store, tmp_path, lambda _: None)
    sink.artifact(tmp_path / "report.html")
    sink.job(lambda client, run_id: client.log_text(run_id, "behind it"))
    assert not sink.close("FINISHED")
    assert (sink.refused, "log_text" in store.done) == ([], False)


def test_a_file_that_finds_no_room_does_not_keep_the_end_of_the_run_from_the_store(tmp_path: Path) -> None:
    store = _Flaky(0)
    notes: list[str] = []
    sink = sink_of(store, tmp_path, notes.append)
    sink.artifact(tmp_path / "x")  # this store takes none at all
    assert not sink.close("FINISHED")
    assert (store.status, len(store.points)) == ("FINISHED", 2500)
    assert "has no attribute 'log_artifact'" in notes[0]
