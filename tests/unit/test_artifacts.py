"""After a report is drawn again, the run's MLflow artifacts are what lies in its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foundation.config import from_dict, to_dict
from foundation.evaluation import artifacts
from foundation.evaluation.figures import canvas, save

Command = Callable[..., Any]


class Sink:
    """Takes what would go to MLflow."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.opened: list[Any] = []

    def open(self, config: Any, run_id: str, note: Any, running: bool) -> Sink:
        self.opened.append((config.run_root, run_id, running))
        return self

    def artifact(self, path: Path, folder: str) -> None:
        assert path.is_file()
        self.sent.append((path.name, folder))

    def close(self, status: str | None) -> None:
        self.opened.append(status)


@pytest.mark.parametrize("known", [True, False])
def test_page_and_figures_join_the_run_they_belong_to(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"config": to_dict(from_dict({"name": "r"})), "run_id": "abc" if known else None}
    sink = Sink()
    monkeypatch.setattr(artifacts, "MlflowSink", sink)
    monkeypatch.setattr(artifacts.checkpoint, "load", lambda *_: state)
    (tmp_path / "report.html").write_text("<html>")
    for name in ("b", "a"):
        save(canvas(1, 1)[0], tmp_path / "figures" / f"{name}.png")
    artifacts.publish_report(tmp_path)
    wanted = [("report.html", ""), ("a.png", "figures"), ("b.png", "figures")]
    assert sink.sent == (wanted if known else [])
    assert sink.opened == ([(str(tmp_path.parent), "abc", False), None] if known else [])
