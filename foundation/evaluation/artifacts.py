"""What a run folder holds, and its copy in MLflow: pages, figures, scores, and after an outage everything."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from foundation.config import Config, from_dict, load
from foundation.errors import CheckpointError, ConfigError, StorageError
from foundation.evaluation.child_runs import send_evaluations
from foundation.evaluation.report import FIGURES
from foundation.evaluation.scores import Score, from_rows
from foundation.files import read_json
from foundation.training import checkpoint
from foundation.training.data import last_position
from foundation.training.lock import owned
from foundation.training.mlflow_sink import MlflowSink
from foundation.training.mlflow_store import METRICS, times
from foundation.training.standing import RUNNING, Standing, read
from shards.redaction import redact

PAGES = ("config.yaml", "environment.json", "report.html", "scores.json", "scores.md", "robustness.json")


def figures(run: Path) -> list[Path]:
    """All figures that a run has, sorted."""
    return sorted((run / FIGURES).glob("*.png"))


def send(sink: MlflowSink, files: Sequence[Path]) -> None:
    """Queue files for the run's artifacts, figures in a folder of their own."""
    for file in files:
        sink.artifact(file, FIGURES if file.parent.name == FIGURES else "")


def publish(run: Path, config: Config, run_id: str | None, files: Sequence[Path], scores: Sequence[Score] = ()) -> None:
    """Bring files and evaluations of a run up to date in MLflow, where it has one.

    A store that is down costs a line, and `catch_up` afterwards.
    """
    if not config.tracking.mlflow or not (run_id or read(run)):
        return
    if sink := MlflowSink.open(config, Standing(run, run_id), lambda line: print(redact(line))):
        send(sink, files)
        send_evaluations(sink, run, scores)
        if not sink.close(None):
            print(f"MLflow lacks this; when it answers: foundation track {run}")


def publish_report(run: Path) -> None:
    """The same for report and figures."""
    state = checkpoint.load(run, None)
    publish(run, from_dict(state["config"]), state.get("run_id"), [run / "report.html", *figures(run)])


def catch_up(run: Path, uri: str | None = None) -> str:
    """Send what the store lacks of a run that no process trains any more: lines, files, evaluations and its end.

    `uri` names another store than the run's own. Returns MLflow's id of the run, whose status is then the one that the
    training left, FAILED if it was killed. Raises LaunchError while it goes on, which sends by itself; ConfigError
    without MLflow or run; StorageError for a store that does not answer.
    """
    config = load(run / "config.yaml", [f"tracking.uri={uri}"] if uri else [])
    with owned(run, sender=True):
        standing = Standing(run, None if read(run) else _saved(run))
        files = [file for file in (*(run / name for name in PAGES), *figures(run)) if file.is_file()]
        scores = from_rows(read_json(run / "scores.json")) if (run / "scores.json").exists() else []
        status = _status(run, config, standing.facts.status)
        *_, ended = (None, *times(run / METRICS))
        notes: list[str] = []  # nothing that may fail comes behind this: a sink must not outlive the lock
        sink = MlflowSink.open(config, standing, notes.append, follow=True)
        if sink is None:
            raise ConfigError(notes[0], where="track", do="pip install 'sar-foundation[mlflow]'")
        sink.more()
        send(sink, files)
        send_evaluations(sink, run, scores)
        sent = sink.close(status, ended=ended)
        for line in sink.refused:
            print(redact(line), file=sys.stderr)
        if not sent:
            what = f"the MLflow store does not answer: {sink.failure}"
            raise StorageError(what, where=str(run), do="start it, or name another with --uri; then run this again")
        standing.update(status=status)
    return str(standing.facts.run_id)


def _status(run: Path, config: Config, told: str | None) -> str:
    """What the training said at its end; one that said nothing has ended well if its last checkpoint is the last."""
    if told not in (None, RUNNING):
        return str(told)
    from foundation.training.run import COMMITTED  # which draws reports at its end

    file = run / COMMITTED
    whole = told is None and file.exists() and int(file.read_text()) >= last_position(config)
    return "FINISHED" if whole else "FAILED"


def _saved(run: Path) -> str | None:
    """The id that the newest checkpoint has, if there is one."""
    try:
        found = checkpoint.load(run, None).get("run_id")
        return None if found is None else str(found)
    except CheckpointError:
        return None
