"""One run in an MLflow store: found again by what the run folder knows, made where it is missing; no thread here.

Every function may be called again: a run, a tag or a parameter that is there is not made twice.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from foundation.config import Config, config_hash, flatten
from foundation.training.meters import JOB, environment, job
from foundation.training.standing import Standing
from shards.redaction import redact

KEY = "foundation.key"  # the tag by which a run is found when an answer of the store was lost
PARENT = "mlflow.parentRunId"
METRICS = "metrics.jsonl"
_PARAMETERS, _LONG = 100, 6000  # of one request; characters of one value
# Seconds, not the default minutes, until a dead server is known to be dead; a user's own settings stand.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # after every end of a run
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def mlflow_client() -> tuple[Any, tuple[type[Exception], ...]]:
    """MLflow's client class, quiet and quick to give up, and what its calls raise when a store is down.

    Raises ImportError.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    exceptions = importlib.import_module("mlflow.exceptions")
    client_class = importlib.import_module("mlflow").MlflowClient
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):  # after the import, which sets levels of its own
        logging.getLogger(name).setLevel(logging.ERROR)
    # ImportError: a kind of store whose package is missing.
    return client_class, (exceptions.MlflowException, OSError, ImportError, *_sql_errors())


def address(config: Config, folder: Path) -> str:
    """The store of a run: that of the configuration, of MLFLOW_TRACKING_URI, or a file beside the run folder."""
    beside = f"sqlite:///{folder.resolve().parent / 'mlflow.db'}"
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or beside


def attach(client: Any, uri: str, config: Config, standing: Standing, running: bool) -> str:
    """The id of the run in this store, with its tags up to date; `running` sets its status as well."""
    found = _known(client, standing.facts.run_id) or _by_key(client, config, standing.facts.key)
    if found is None:
        experiment = _experiment(client, uri, config, standing.folder)
        began = next(times(standing.folder / METRICS), None)  # before the store was there, maybe
        found = client.create_run(experiment, began, {KEY: standing.facts.key}, config.name)
    run_id: str = found.info.run_id
    standing.belongs_to(run_id)
    parameters = {name: _text(value) for name, value in flatten(config).items() if name not in found.data.params}
    set_parameters(client, run_id, parameters)
    wanted = tags(config, standing.folder)
    entities = importlib.import_module("mlflow.entities")
    client.log_batch(run_id, tags=[entities.RunTag(name, value) for name, value in wanted.items()])
    for name in JOB.keys() & found.data.tags.keys() - wanted.keys():  # of the job before
        client.delete_tag(run_id, name)
    if running:
        client.update_run(run_id, status="RUNNING")
    return run_id


def tags(config: Config, folder: Path) -> dict[str, str]:
    """What a run is told apart by: code, configuration, data, engine, machine and job, from its environment.json."""
    try:
        facts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = environment() | job()
    found = {name: _text(value) for name, value in facts.items() if not isinstance(value, dict | list)}
    found = {"config_hash": config_hash(config), "mlflow.source.name": "foundation train", **found}
    found["mlflow.source.type"] = "JOB" if "slurm_job_id" in found else "LOCAL"
    if commit := found.get("commit"):
        found |= {
            "mlflow.source.git.commit": commit.removesuffix("-dirty"),
            "git_dirty": str(commit.endswith("-dirty")),
        }
    return found


def child(client: Any, parent: str, key: str, name: str, source: str) -> Any:
    """The run below `parent` that has this key, made where it is missing."""
    experiment = client.get_run(parent).info.experiment_id
    query = f"tags.`{KEY}` = '{key}' AND tags.`{PARENT}` = '{parent}'"
    if found := client.search_runs([experiment], query, max_results=1):
        return found[0]
    labels = {KEY: key, PARENT: parent, "mlflow.source.name": source}
    return client.create_run(experiment, run_name=name, tags=labels)


def set_parameters(client: Any, run_id: str, parameters: Mapping[str, object]) -> None:
    """Record parameters that are not there yet: a store takes each once."""
    entities = importlib.import_module("mlflow.entities")
    listed = [entities.Param(name, _text(value)) for name, value in parameters.items()]
    for i in range(0, len(listed), _PARAMETERS):
        client.log_batch(run_id, params=listed[i : i + _PARAMETERS])


def times(record: Path) -> Iterator[int]:
    """When the lines of metrics.jsonl were written, milliseconds since 1970."""
    if record.exists():
        with record.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                with suppress(ValueError, LookupError, TypeError):
                    yield round(json.loads(line)["time"] * 1000)


def usable(name: str) -> str:
    """A name that MLflow takes for a metric or parameter: one such as one with a comma would lose its whole batch."""
    return re.sub(r"[^\w./ -]", "", name)


def short(error: Exception) -> str:
    """The first line of an error, at most 160 characters, without secrets of addresses."""
    text = redact((str(error).strip() or type(error).__name__).splitlines()[0])
    return text if len(text) <= 160 else text[:157] + "..."


def code(error: Exception) -> str:
    """What MLflow calls an error, if it comes from there."""
    return str(getattr(error, "error_code", ""))


def active(client: Any, run_id: str) -> bool:
    """Whether the store still takes something for a run."""
    return _known(client, run_id) is not None


def _known(client: Any, run_id: str | None) -> Any:
    """A run by its id; None when this store does not have it, or has deleted it."""
    exceptions = importlib.import_module("mlflow.exceptions")
    try:
        found = client.get_run(run_id) if run_id else None
    except exceptions.MlflowException as error:
        if code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return found if found is not None and found.info.lifecycle_stage == "active" else None


def _by_key(client: Any, config: Config, key: str) -> Any:
    """A run by its key; None without one."""
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        return None
    found = client.search_runs([experiment.experiment_id], f"tags.`{KEY}` = '{key}'", max_results=1)
    return found[0] if found else None


def _experiment(client: Any, uri: str, config: Config, folder: Path) -> str:
    """The id of the experiment. Artifacts of a file beside the run folder lie beside it, too."""
    exceptions = importlib.import_module("mlflow.exceptions")
    name = config.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        beside = (folder.resolve().parent / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
        try:
            return str(client.create_experiment(name, beside))
        except exceptions.MlflowException as error:  # another run of the same job array was faster
            if code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)
    return str(found.experiment_id)


def _text(value: object) -> str:
    return redact(str(value))[:_LONG]


def _sql_errors() -> tuple[type[Exception], ...]:
    """What a database store may raise; nothing where only the client half of MLflow is installed."""
    try:
        return (importlib.import_module("sqlalchemy.exc").SQLAlchemyError,)
    except ImportError:
        return ()
