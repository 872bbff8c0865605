"""The pages and figures of a run, and their copies in MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from foundation.config import from_dict
from foundation.evaluation.report import FIGURES
from foundation.training import checkpoint
from foundation.training.mlflow_sink import MlflowSink


def figures(run: Path) -> list[Path]:
    """All figures that a run has, sorted."""
    return sorted((run / FIGURES).glob("*.png"))


def send(sink: MlflowSink, files: Sequence[Path]) -> None:
    """Queue files for the run's artifacts, figures in a folder of their own."""
    for file in files:
        sink.artifact(file, FIGURES if file.parent.name == FIGURES else "")


def publish_report(run: Path) -> None:
    """Bring report and figures of a run up to date in MLflow, where it has one; a store that is down costs a line."""
    state = checkpoint.load(run, None)
    config = from_dict(state["config"])
    if not state.get("run_id") or not config.tracking.mlflow:
        return
    where = config.model_copy(update={"run_root": str(run.resolve().parent)})
    if sink := MlflowSink.open(where, state["run_id"], print, running=False):
        send(sink, [run / "report.html", *figures(run)])
        sink.close(None)
