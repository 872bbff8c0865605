"""`foundation curves`: runs by folder or from MLflow on the same axes, and errors that say what to choose."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foundation.config import from_dict
from foundation.evaluation.histories import chosen, from_folders, from_mlflow
from foundation.training.tracking import open_tracker

Command = Callable[..., Any]


def run(root: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    (root / name).mkdir(parents=True)
    (root / name / "metrics.jsonl").write_text("".join(json.dumps({"time": 0.0, **row}) + "\n" for row in rows))
    return root / name


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs in an MLflow store, one of them resumed: written as training writes them."""
    root = tmp_path_factory.mktemp("store")
    for name, losses in (("first", (3.0, 2.0)), ("second", (5.0, 4.0))):
        tracker = open_tracker(from_dict({"name": name, "run_root": str(root)}))
        for i, loss in enumerate(losses, start=1):
            tracker.log(100 * i, {"loss": loss, "rankme": 10.0 * i})
        tracker.close()
    return root


def test_folders_give_their_metrics_by_samples_seen(tmp_path: Path) -> None:
    rows = [{"position": 8, "loss": 1.0, "lr": None}, {"position": 16, "loss": 0.5}]
    first, second = from_folders([run(tmp_path / "a", "r", rows), run(tmp_path / "b", "r", rows[:1])])
    assert (first.name, second.name) == ("r (1)", "r (2)"), "two runs of one name can be told apart"
    assert [(row["samples"], row["loss"]) for row in first.rows] == [(8, 1.0), (16, 0.5)]
    assert first.metrics == {"loss"}


def test_mlflow_gives_the_same_as_the_folders(store: Path) -> None:
    uri = f"sqlite:///{store / 'mlflow.db'}"
    histories = from_mlflow(uri, "foundation")
    assert [h.name for h in histories] == ["first", "second"]
    for kept, sent in zip(from_folders([store / "first", store / "second"]), histories, strict=True):
        wanted = [(row["samples"], row["loss"], row["rankme"]) for row in kept.rows]
        assert [(row["samples"], row["loss"], row["rankme"]) for row in sent.rows] == wanted
    (only,) = from_mlflow(uri, "foundation", ["second"], ["loss"])
    assert only.metrics == {"loss"}


def test_curves_are_drawn_of_folders_and_of_an_experiment(command: Command, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "c.png"
    code, text, err = command("curves", store / "first", store / "second", "--out", out)
    assert code == 0, err
    assert str(out) in text
    by_folder = out.read_bytes()
    code, _, err = command(
        "curves", "--experiment", "foundation", "--uri", f"sqlite:///{store / 'mlflow.db'}", "--out", out
    )
    assert code == 0, err
    assert out.read_bytes() == by_folder, "the record and its view in MLflow are one"


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["{store}/none"], ["there is no such run folder", "none"]),
        (["{empty}"], ["no metrics: metrics.jsonl is missing or empty", "--experiment"]),
        (["{store}/first", "--metric", "rankm"], ["no run has the metric 'rankm'", "did you mean rankme?"]),
        (["--experiment", "foundatio", "--uri", "{uri}"], ["no such MLflow experiment", "did you mean foundation?"]),
        (["secnd", "--experiment", "foundation", "--uri", "{uri}"], ["no run is called 'secnd'", "mean second?"]),
        (["--experiment", "x", "--uri", "sqlite:///{empty}/no.db"], ["there is no MLflow store", "--uri"]),
        (["--experiment", "x", "--uri", "{empty}/no"], ["there is no MLflow store"]),
        (["--experiment", "x", "--uri", "{dead}"], ["the MLflow store does not answer", "//***@127.0.0.1"]),
        ([], ["name run folders, or an MLflow --experiment"]),
    ],
    ids=["folder", "empty", "metric", "experiment", "name", "file", "path", "server", "nothing"],
)  # fmt: skip
def test_what_cannot_be_drawn_is_explained(
    words: list[str], texts: list[str], command: Command, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {
        "store": store,
        "empty": tmp_path,
        "uri": f"sqlite:///{store / 'mlflow.db'}",
        "dead": f"http://me:secret@127.0.0.1:{port}",
    }
    code, _, err = command("curves", *(word.format(**places) for word in words), "--out", tmp_path / "c.png")
    assert code == 2
    assert all(text in err for text in texts), err
    assert "secret" not in err
    assert not (tmp_path / "c.png").exists()
    assert not (tmp_path / "no.db").exists()


def test_by_default_the_loss_and_the_monitors_that_exist_are_drawn(tmp_path: Path) -> None:
    histories = from_folders([run(tmp_path, "r", [{"position": 8, "loss": 1.0, "rankme": 3.0, "lr": 1.0}])])
    assert chosen(histories, [], ("loss", "feature_std", "rankme")) == ["loss", "rankme"]
    assert chosen(histories, ["lr"], ("loss",)) == ["lr"]
