"""Metrics of runs over samples seen: from run folders, or from the experiment of an MLflow store."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from foundation.errors import ConfigError, DataError, StorageError
from foundation.evaluation.panels import read_metrics
from foundation.training.mlflow_store import PARENT, mlflow_client
from shards.redaction import redact

# Of every line, and nothing to draw.
UNDRAWN = frozenset(("position", "samples", "time", "samples_hash"))


@dataclass(frozen=True)
class History:
    """The metrics of one run: `rows` of `samples` (seen so far) and any of the metrics."""

    name: str
    rows: Sequence[Mapping[str, Any]]

    @property
    def metrics(self) -> set[str]:
        """Names of what was ever measured."""
        return {key for row in self.rows for key, value in row.items() if value is not None} - UNDRAWN


def from_folders(runs: Iterable[Path]) -> list[History]:
    """One history per run folder, named like it. Raises DataError for a folder without metrics."""
    found = []
    for run in runs:
        rows = [{**row, "samples": row.get("position")} for row in read_metrics(run)]
        if not rows:
            raise DataError(
                "no metrics: metrics.jsonl is missing or empty" if run.is_dir() else "there is no such run folder",
                where=str(run),
                do="name the folder of a run that was trained here, or an MLflow --experiment",
            )
        found.append(History(run.resolve().name, rows))
    return _distinct(found)


def from_mlflow(uri: str, experiment: str, names: Sequence[str] = (), keys: Sequence[str] = ()) -> list[History]:
    """The runs of an experiment, oldest first: all of them, or those called one of `names`.

    Of each the metrics `keys` are read, or all that it has. Raises StorageError when the store does not answer,
    ConfigError when it does not know the experiment or a name, DataError when no run has metrics.
    """
    _must_exist(uri)
    client_class, errors = mlflow_client()
    where = f"experiment {experiment!r} of {uri}"
    try:
        client = client_class(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            known = [e.name for e in client.search_experiments()]
            raise ConfigError("there is no such MLflow experiment", where=where, do=_choose(experiment, known))
        runs = _pages(client, found.experiment_id)
        known = [run.info.run_name for run in runs]
        for name in names:
            if name not in known:
                raise ConfigError(f"no run is called {name!r}", where=where, do=_choose(name, known))
        histories = [_history(client, run, keys) for run in runs if not names or run.info.run_name in names]
    except errors as error:
        raise _silent(uri, error) from error
    if not (histories := [h for h in histories if h.rows]):
        raise DataError("no run has metrics", where=where, do="train with tracking.mlflow=true, or name run folders")
    return _distinct(histories)


def chosen(histories: Sequence[History], wanted: Sequence[str], default: Sequence[str]) -> list[str]:
    """The metrics to draw: those `wanted`, which some run must have, or those of `default` that some run has.

    Raises ConfigError that names near ones, DataError when no run has a default one.
    """
    known = sorted(set().union(*(h.metrics for h in histories)))
    for key in wanted:
        if key not in known:
            raise ConfigError(f"no run has the metric {key!r}", where="--metric", do=_choose(key, known))
    keys = list(wanted) or [key for key in default if key in known]
    if not keys:
        raise DataError("no run has a loss", where="--metric", do=_choose("loss", known))
    return keys


def _choose(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    listed = ", ".join(dict.fromkeys(known)) or "nothing is there"
    return (f"did you mean {near[0]}? " if near else "") + f"choose from {listed}"


def _must_exist(uri: str) -> None:
    """Raise StorageError for a local store that is not there: MLflow would make an empty one."""
    parts = urlsplit(uri)
    local = {"sqlite": uri.removeprefix("sqlite:///"), "": uri, "file": parts.path}.get(parts.scheme)
    if local is not None and not Path(local).exists():
        raise StorageError("there is no MLflow store", where=uri, do="give its address with --uri")


def _silent(uri: str, error: Exception) -> StorageError:
    text = redact((str(error).strip() or type(error).__name__).splitlines()[0])
    return StorageError(
        f"the MLflow store does not answer: {text[:160]}",
        where=uri,
        do="start it or correct --uri; without it, name run folders",
    )


def _pages(client: Any, experiment: str) -> list[Any]:
    """All runs of an experiment, oldest first, without those of evaluations below them."""
    runs, token = [], None
    while True:
        page = client.search_runs([experiment], order_by=["attributes.start_time ASC"], page_token=token)
        runs += [run for run in page if PARENT not in run.data.tags]
        if not (token := page.token):
            return runs


def _history(client: Any, run: Any, keys: Sequence[str]) -> History:
    """Rows by samples seen; of a metric that was logged twice at one position, as after a resume, the last one."""
    rows: dict[int, dict[str, Any]] = {}
    for key in keys or run.data.metrics:
        if key in run.data.metrics and key not in UNDRAWN:
            for point in sorted(client.get_metric_history(run.info.run_id, key), key=lambda p: p.timestamp):
                rows.setdefault(point.step, {"samples": point.step})[key] = point.value
    return History(run.info.run_name, [rows[step] for step in sorted(rows)])


def _distinct(histories: list[History]) -> list[History]:
    """The same with numbers behind names that occur more than once."""
    names, seen = [h.name for h in histories], dict[str, int]()
    found = []
    for history in histories:
        seen[history.name] = number = seen.get(history.name, 0) + 1
        twice = names.count(history.name) > 1
        found.append(History(f"{history.name} ({number})" if twice else history.name, history.rows))
    return found
