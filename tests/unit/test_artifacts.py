"""After a report is drawn again, or scores are added, the run's MLflow artifacts are what lies in its folder."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foundation.config import from_dict, to_dict
from foundation.errors import ConfigError, ExplainedError
from foundation.evaluation import artifacts
from foundation.evaluation.child_runs import metrics, parameters
from foundation.evaluation.figures import canvas, save
from foundation.evaluation.scores import Score
from foundation.training.lock import owned
from foundation.training.standing import Standing, read


class Sink:
    """Takes what would go to MLflow."""

    def __init__(self, answers: bool = True) -> None:
        self.sent: list[tuple[str, str]] = []
        self.opened: list[Any] = []
        self.answers = answers

    def open(self, config: Any, standing: Standing, note: Any) -> Sink:
        self.opened.append((standing.folder, standing.facts.run_id))
        return self

    def artifact(self, path: Path, folder: str) -> None:
        assert path.is_file()
        self.sent.append((path.name, folder))

    def close(self, status: str | None) -> bool:
        self.opened.append(status)
        return self.answers


@pytest.mark.parametrize("known", ["checkpoint", "folder", ""])
@pytest.mark.parametrize("answers", [True, False])
def test_page_and_figures_join_the_run_they_belong_to(
    known: str, answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"config": to_dict(from_dict({"name": "r"})), "run_id": "abc" if known == "checkpoint" else None}
    if known == "folder":
        Standing(tmp_path, "abc").update(sent=1)
    sink = Sink(answers)
    monkeypatch.setattr(artifacts, "MlflowSink", sink)
    monkeypatch.setattr(artifacts.checkpoint, "load", lambda *_: state)
    (tmp_path / "report.html").write_text("<html>")
    for name in ("b", "a"):
        save(canvas(1, 1)[0], tmp_path / "figures" / f"{name}.png")
    artifacts.publish_report(tmp_path)
    wanted = [("report.html", ""), ("a.png", "figures"), ("b.png", "figures")]
    assert sink.sent == (wanted if known else [])
    assert sink.opened == ([(tmp_path, "abc"), None] if known else [])
    told = f"MLflow lacks this; when it answers: foundation track {tmp_path}\n"
    assert capsys.readouterr().out == (told if known and not answers else "")


def test_an_evaluation_is_its_scores_with_intervals_and_its_settings_without_results() -> None:
    settings = {"k": 20, "weights": "8 samples", "draws": {"0": "ab"}, "paired": {"difference": 0.1, "p": 0.5}}
    scores = [
        Score("pretrained", "10-shot linear, improved", "accuracy", 0.5, 0.4, 0.6, (0, 1), (0.4, 0.6), 9, settings),
        Score("random-init", "10-shot linear, improved", "accuracy", 0.25, 0.25, 0.25, (0,), (0.25,), 9),
    ]
    assert metrics(scores) == {
        "pretrained/accuracy": 0.5,
        "pretrained/accuracy_low": 0.4,
        "pretrained/accuracy_high": 0.6,
        "pretrained/accuracy_gain": 0.1,
        "pretrained/accuracy_gain_p": 0.5,
        "random-init/accuracy": 0.25,
        "random-init/accuracy_low": 0.25,
        "random-init/accuracy_high": 0.25,
    }
    assert parameters(scores[0]) == {
        "protocol": "10-shot linear, improved",
        "seeds": (0, 1),
        "test_images": 9,
        "k": 20,
        "weights": "8 samples",
    }


def test_what_is_no_run_cannot_be_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read \(No such file or directory\)"):
        artifacts.catch_up(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def folder(root: Path, name: str, text: str) -> Path:
    """A run folder that holds a configuration, and nothing else."""
    (root / name).mkdir(parents=True)
    (root / name / "config.yaml").write_text(text)
    return root / name


def test_all_that_a_glob_names_is_sent_whatever_lies_among_it(tmp_path: Path, command: Callable[..., Any]) -> None:
    root = tmp_path / "runs"
    broken = folder(root, "a-broken", "nonsense: 1\n")
    live, killed = folder(root, "b-live", "name: b\n"), folder(root, "c-killed", "name: c\n")
    (root / "mlartifacts").mkdir()
    (root / "mlflow.log").touch()
    with owned(live):
        code, out, err = command("track", *sorted(root.glob("*")))
    assert code == 2, "one could not be sent"
    assert err.startswith(f"ConfigError: Found 1 error in {broken / 'config.yaml'}")
    assert err.count("ConfigError") == 1
    facts = read(killed)
    assert facts is not None
    assert facts.status == "FAILED"
    passed, sent, *others = out.splitlines()
    assert passed.startswith(f"passed over   {live}: another run writes to this folder: process ")
    assert sent == f"MLflow run    {facts.run_id}  {killed}"
    assert others == [f"no run        {root / 'mlartifacts'}", f"no run        {root / 'mlflow.log'}"]
    assert read(live) is None

    with owned(live):
        again = command("track", live, killed, root / "mlartifacts")
    assert (again.code, again.err) == (0, ""), "a run that sends by itself is no failure"
    for asked in ([root / "mlartifacts"], [killed, root / "mistyped"]):
        code, _, err = command("track", *asked)
        assert code == 2
        assert f"  {asked[-1] / 'config.yaml'}: cannot be read (" in err


def test_a_run_that_cannot_be_sent_leaves_nothing_behind_that_still_sends(tmp_path: Path) -> None:
    run = folder(tmp_path, "run", "name: run\n")
    (run / "scores.json").write_text("{")
    with pytest.raises(ExplainedError):
        artifacts.catch_up(run)
    assert "mlflow" not in {thread.name for thread in threading.enumerate()}
    with owned(run, sender=True):
        pass
