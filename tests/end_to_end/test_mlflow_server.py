"""Against a real MLflow server: it may be absent, die and come back, and in the end it has every number once."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import pyfunc
from mlflow.artifacts import download_artifacts
from mlflow_server import Server, recorded, stored
from processes import finish, position, start, wait

from foundation.config import Config, from_dict, load
from foundation.errors import CheckpointError, ConfigError, StorageError
from foundation.evaluation.histories import from_mlflow
from foundation.evaluation.runs import evaluate_run, read_scores
from foundation.interchange import registration
from foundation.interchange.export import load_export
from foundation.interchange.registration import check, register
from foundation.interchange.source import pooled
from foundation.training import checkpoint, mlflow_sink
from foundation.training.mlflow_store import mlflow_client
from foundation.training.run import train
from foundation.training.standing import FILE, Standing, read
from foundation.training.tracking import open_tracker

Make = Callable[..., Config]
Command = Callable[..., Any]
LONG = 600.0  # seconds after which something is stuck


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Not started: the first test needs it absent."""
    made = Server(tmp_path_factory.mktemp("server"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")  # a busy machine is no outage
        yield made
    made.kill()


@pytest.fixture
def client(server: Server) -> Any:
    return mlflow_client()[0](tracking_uri=server.uri)


@pytest.fixture
def tracked(tiny_yaml: Path, server: Server) -> Path:
    """The tiny configuration, endless, tracked by the server."""
    text = tiny_yaml.read_text().replace("mlflow: false", f"mlflow: true, uri: '{server.uri}'")
    text = text.replace("samples: 96", "samples: 10000000").replace("log_every: 8", "log_every: 400")
    tiny_yaml.write_text(text.replace("checkpoint_every: 16, keep: 100", "checkpoint_every: 4000, keep: 1"))
    return tiny_yaml


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def runs(client: Any, experiment: str = "foundation") -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def test_one_run_goes_on_without_its_server_through_a_stop_and_a_kill(
    tracked: Path, tiny_config: Make, server: Server, client: Any, command: Command
) -> None:
    run = tiny_config().run_folder
    process = start("train", tracked)
    wait(process, lambda: position(run) >= 800, LONG)
    assert (facts := read(run)) is not None
    assert (facts.run_id, facts.sent, facts.status) == (None, 0, "RUNNING")
    server.start()
    (run / "stop").touch()
    code, output = finish(process, LONG)
    assert code == 85, output
    assert output.count(f"MLflow does not answer ({server.uri}: ") == 1, "an outage costs one line"
    (first,) = runs(client)
    assert first.info.status == "KILLED"
    assert stored(client, first.info.run_id) == recorded(run), "what was missed is there, once"
    assert first.data.tags.items() >= {"engine": "single", "world_size": "1"}.items()
    assert first.data.tags["fingerprint"] in json.loads((run / "environment.json").read_text())["data"]

    process = start("train", tracked)
    wait(process, lambda: runs(client)[0].info.status == "RUNNING", LONG)
    code, out, err = command("track", run)
    assert (code, err) == (0, "")
    told = f"passed over   {run}: another run writes to this folder: process {process.pid} on "
    assert out.startswith(told), "it sends by itself"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (killed,) = runs(client)
    assert (killed.info.run_id, killed.info.status) == (first.info.run_id, "RUNNING"), "nobody told the server"
    code, out, err = command("track", run)
    assert (code, err) == (0, "")
    assert first.info.run_id in out
    assert runs(client)[0].info.status == "FAILED"

    state = checkpoint.load(run, None)
    assert state["run_id"] in (None, first.info.run_id), "none where it was saved before the server was there"
    again = open_tracker(load(tracked), position=state["position"], run_id=state["run_id"])
    until(lambda: bool(runs(client)[0].info.status == "RUNNING"))
    again.close("KILLED")
    (last,) = runs(client)
    assert (last.info.run_id, last.info.status) == (first.info.run_id, "KILLED")
    there = stored(client, last.info.run_id)
    assert all(set(points) <= set(there[name]) for name, points in recorded(run).items())
    assert all(len(points) == len(set(points)) for points in there.values())


def test_a_server_that_dies_under_a_run_and_comes_back_gets_what_it_missed_once(
    tmp_path: Path, server: Server, client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.start()
    monkeypatch.setattr(mlflow_sink, "RETRY_SECONDS", 0.5)
    setting = from_dict(
        {"name": "run", "run_root": str(tmp_path), "tracking": {"uri": server.uri, "experiment": "outage"}}
    )
    tracker, run = open_tracker(setting), tmp_path / "run"

    def sent() -> bool:
        return Standing(run).facts.sent == (run / "metrics.jsonl").stat().st_size

    tracker.log(100, {"loss": 1.0})
    until(sent)
    server.kill()
    tracker.log(200, {"loss": 0.5})
    until(lambda: "MLflow does not answer (" in capsys.readouterr().err)
    began = time.monotonic()
    for i in range(300):
        tracker.log(300 + i, {"loss": 0.4})
    assert time.monotonic() - began < 60, "a line waits for no server"
    assert not sent()
    server.start()
    until(sent)
    tracker.log(1000, {"loss": 0.3})
    tracker.close()
    (found,) = runs(client, "outage")
    assert found.info.status == "FINISHED"
    assert stored(client, found.info.run_id) == recorded(run)
    assert len(recorded(run)["loss"]) == 303

    Standing(run).update(sent=0)  # as if the answer, or the file with the mark, had been lost
    again = open_tracker(setting, position=1000)
    again.close("KILLED")
    assert stored(client, found.info.run_id) == recorded(run), "sent twice, there once"
    assert runs(client, "outage")[0].info.status == "KILLED"


@pytest.fixture
def judged(finished: Path, catalog: Path, tmp_path: Path) -> Path:
    """A run without MLflow, and its scores under one protocol."""
    run = tmp_path / "judged"
    shutil.copytree(finished, run)
    evaluate_run(run, str(catalog), "knn", crop=None, report=False)
    assert not (run / "mlflow.db").exists()
    return run


def test_a_run_of_a_node_without_network_is_sent_later_and_its_evaluations_are_runs_below_it(
    judged: Path, server: Server, client: Any, command: Command
) -> None:
    server.start()
    code, out, err = command("track", judged, "--uri", server.uri)
    assert (code, err) == (0, ""), err
    (parent,) = [run for run in runs(client) if run.info.run_id in out]
    moments = sorted(at for points in recorded(judged).values() for _, at, _ in points)
    kept = parent.info
    assert (kept.status, kept.start_time, kept.end_time) == ("FINISHED", moments[0], moments[-1]), "as it was trained"
    assert stored(client, parent.info.run_id) == recorded(judged)
    assert {"config.yaml", "environment.json", "report.html", "figures", "scores.json"} <= {
        file.path for file in client.list_artifacts(parent.info.run_id)
    }

    def children() -> list[Any]:
        return [run for run in runs(client) if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]

    (child,) = children()
    scores = {(s.encoder, s.metric): s for s in read_scores(judged)}
    assert child.data.metrics["pretrained/accuracy"] == scores["pretrained", "accuracy"].mean
    assert child.data.metrics["random-init/accuracy_low"] == scores["random-init", "accuracy"].low
    assert child.data.params.items() >= {"protocol": "knn", "weights": "96 samples", "crop": "None", "k": "20"}.items()
    assert child.info.run_name == f"knn: {scores['pretrained', 'accuracy'].settings['measurement']}"
    files = {file.path for file in client.list_artifacts(child.info.run_id)}
    assert files >= {"scores.json", "predictions"}
    assert len(client.list_artifacts(child.info.run_id, "predictions")) == 4
    assert child.info.status == "FINISHED"

    assert command("track", judged, "--uri", server.uri).code == 0
    (again,) = children()
    assert again.info.run_id == child.info.run_id
    assert stored(client, child.info.run_id) == {n: [p] for n, (p,) in stored(client, child.info.run_id).items()}
    assert stored(client, parent.info.run_id) == recorded(judged)
    assert [h.name for h in from_mlflow(server.uri, "foundation") if "knn" in h.name] == [], "curves are of trainings"


class Proxy(BaseHTTPRequestHandler):
    """Hands requests on to a server, but for those that are too long, as nginx does."""

    server: Limited

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if length > self.server.limit or (self.command == "PUT" and self.server.refused in self.path):
            self._reply(413, "text/html", b"<html>")
            return
        behind = HTTPConnection("127.0.0.1", self.server.behind)
        behind.request(self.command, self.path, body, dict(self.headers))
        response = behind.getresponse()
        self._reply(response.status, response.headers["Content-Type"], response.read())
        behind.close()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def _reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


class Limited(ThreadingHTTPServer):
    """Such a proxy on a free port of loopback."""

    def __init__(self, behind: int, limit: int) -> None:
        super().__init__(("127.0.0.1", 0), Proxy)
        self.behind, self.limit, self.refused = behind, limit, "/predictions/"


def test_a_file_that_a_proxy_refuses_is_named_and_all_behind_it_arrives(
    judged: Path, server: Server, client: Any, command: Command
) -> None:
    server.start()
    (judged / FILE).unlink()  # another run than that of other tests
    proxy = Limited(server.port, (judged / "report.html").stat().st_size - 1)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    track = "track", judged, "--uri", f"http://127.0.0.1:{proxy.server_port}"
    code, out, err = command(*track)
    assert code == 0, err
    line, below = err.splitlines()
    assert line.startswith("MLflow did not take report.html (413 Client Error")
    assert line.endswith(f"(nginx: client_max_body_size); files go again by: foundation track {judged}")
    assert below.startswith("MLflow did not take all of the evaluation knn: ")
    (parent,) = [run for run in runs(client) if run.info.run_id in out]
    assert parent.info.status == "FINISHED"
    assert stored(client, parent.info.run_id) == recorded(judged)
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files >= {"config.yaml", "environment.json", "figures", "scores.json"}
    assert "report.html" not in files
    (child,) = [run for run in runs(client) if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert child.info.status == "FINISHED"
    assert "predictions" not in {file.path for file in client.list_artifacts(child.info.run_id)}

    proxy.limit, proxy.refused = 2 * proxy.limit, "?"
    assert command(*track) == (0, out, "")
    proxy.shutdown()
    assert "report.html" in {file.path for file in client.list_artifacts(parent.info.run_id)}, "sent again"
    assert "predictions" in {file.path for file in client.list_artifacts(child.info.run_id)}


def test_a_training_that_starts_while_its_run_is_being_sent_waits_and_goes_on(
    tiny_yaml: Path, tiny_config: Make, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tiny_config())
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sending = start("track", run, "--uri", f"http://127.0.0.1:{silent.getsockname()[1]}")
        until(lambda: (run / ".lock").read_text().startswith("foundation track, "))
        code, _, err = command("train", tiny_yaml)
    assert code == 0, err
    assert f"{run} is being sent to MLflow by foundation track, process {sending.pid} on " in err
    assert finish(sending, LONG)[0] == 2, "nobody answered"
    assert (facts := read(run)) is not None
    assert (facts.run_id, facts.status) == (None, "FINISHED")


def test_an_export_is_registered_with_signature_and_card_and_gives_the_same_features(
    finished: Path, tmp_path: Path, server: Server, client: Any, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)  # the run names no server
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for form, version in (("torch", 1), ("onnx", 2)):
        code, out, err = command("export", run, tmp_path / form, "--format", form, "--register", "sar")
        assert (code, err) == (0, ""), err
        assert f"models:/sar/{version}, features differ by " in out
    made = client.get_model_version("sar", "1")
    assert made.description.startswith("# tiny: SAR ViT nano/8")
    assert made.tags["samples"] == "96"
    assert client.get_run(made.run_id).info.run_name == "tiny"
    model = pyfunc.load_model(download_artifacts(made.source, dst_path=str(tmp_path), tracking_uri=server.uri))
    (given,), (got,) = model.metadata.signature.inputs.inputs, model.metadata.signature.outputs.inputs
    assert (given.shape, given.type, got.shape) == ((-1, 1, -1, -1), np.dtype("float32"), (-1, 96))
    images = np.random.default_rng(0).random((3, 1, 64, 64), dtype=np.float32)
    encoder, facts = load_export(tmp_path / "torch")
    with torch.no_grad():
        wanted = pooled(encoder, encoder.forward_features(torch.from_numpy(images)), facts["pool"])[0].numpy()
    np.testing.assert_allclose(model.predict(images), wanted, atol=1e-5)
    assert register(run, tmp_path / "torch", "sar").version == "1", "the same bytes are the same version"

    with pytest.raises(ConfigError, match="does not take the format timm-stock"):
        check("timm-stock", "sar")
    with pytest.raises(ConfigError, match="'a/b' is no name of a model"):
        check("torch", "a/b")
    monkeypatch.setattr(registration, "features", lambda *_: (torch.zeros(2, 96),))
    with pytest.raises(CheckpointError, match=r"features of the registered model differ by .*; it was taken back"):
        register(run, tmp_path / "torch", "sar")
    assert [v.version for v in client.search_model_versions("name = 'sar'")] == ["2"]
    server.kill()
    with pytest.raises(StorageError, match="the model was not registered"):
        register(run, tmp_path / "torch", "sar")
    code, _, err = command("track", run)
    assert code == 2
    assert "StorageError: the MLflow store does not answer: " in err
    assert "start it, or name another with --uri; then run this again" in err
