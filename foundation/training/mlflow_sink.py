"""MLflow behind a queue: one background thread talks to the store, and only a person notices when it is down."""

from __future__ import annotations

import importlib
import logging
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from foundation.config import Config, config_hash, flatten
from foundation.training.meters import environment

RETRY_SECONDS = 30.0
CLOSE_SECONDS = 30.0
_BATCH = 1000  # the most metrics that MLflow takes in one request
# Seconds, not the default minutes, until a dead server is known to be dead; a user's own settings stand.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


class MlflowSink:
    """One MLflow run. Calls only enqueue; the thread sends, keeps what failed and tries again later."""

    def __init__(
        self, client: Any, run_id: str, note: Callable[[str], None], errors: tuple[type[Exception], ...]
    ) -> None:
        self.run_id = run_id
        self._client, self._note, self._errors = client, note, errors
        self._queue: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._jobs: deque[Callable[[], None]] = deque()
        self._failed_at: float | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls, config: Config, run_id: str | None, note: Callable[[str], None], running: bool = True
    ) -> MlflowSink | None:
        """Start or continue the run; None, after one line of text, when the store cannot be used.

        `running=False` adds to a run and leaves its status alone; end with `close(None)`.
        """
        uri = config.tracking.uri or f"sqlite:///{Path(config.run_root).resolve() / 'mlflow.db'}"
        try:
            client_class, errors = mlflow_client()
        except ImportError as error:
            note(f"MLflow is off: {error}; metrics.jsonl is complete without it")
            return None
        try:
            client = client_class(tracking_uri=uri)
            return cls(client, _run(client, config, run_id, running), note, errors)
        except (*errors, ImportError) as error:
            note(
                f"MLflow is off: {_hidden(uri)} cannot be used ({_short(error)}); metrics.jsonl is complete without it"
            )
            return None

    def metrics(self, position: int, seconds: float, numbers: Mapping[str, float]) -> None:
        """Queue numbers at a position; `seconds` since 1970."""
        self._queue.put(("metrics", (position, round(seconds * 1000), dict(numbers))))

    def artifact(self, path: Path, folder: str) -> None:
        """Queue a file."""
        self._queue.put(("artifact", (str(path), folder or None)))

    def close(self, status: str | None) -> None:
        """Send what is left, set the status if one is given; gives up after CLOSE_SECONDS."""
        self._queue.put(("end", status))
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._note("MLflow does not answer: the end of the run is missing there; metrics.jsonl is complete")

    def _work(self) -> None:
        """Take everything that is queued, then send it in as few requests as possible."""
        from mlflow.entities import Metric

        ended = False
        while not ended:
            items = [self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get())
            points = [
                Metric(name, value, stamp, position)
                for kind, item in items
                if kind == "metrics"
                for position, stamp, numbers in [item]
                for name, value in numbers.items()
            ]
            for i in range(0, len(points), _BATCH):
                self._jobs.append(partial(self._client.log_batch, self.run_id, metrics=points[i : i + _BATCH]))
            for kind, item in items:
                if kind == "artifact":
                    self._jobs.append(partial(self._client.log_artifact, self.run_id, *item))
                elif kind == "end":
                    if item is not None:
                        self._jobs.append(partial(self._client.set_terminated, self.run_id, item))
                    ended = True
            if ended or self._failed_at is None or time.monotonic() - self._failed_at >= RETRY_SECONDS:
                self._send()

    def _send(self) -> None:
        """Send what is pending; what the store could not take stays pending, what it never will is dropped."""
        while self._jobs:
            try:
                self._jobs[0]()
            except self._errors as error:
                if isinstance(error, FileNotFoundError) or _code(error) == "INVALID_PARAMETER_VALUE":
                    self._note(f"MLflow did not take one entry: {_short(error)}")
                else:
                    if self._failed_at is None:
                        self._note(f"MLflow failed ({_short(error)}); training goes on and metrics.jsonl is complete")
                    self._failed_at = time.monotonic()
                    return
            self._jobs.popleft()
        self._failed_at = None


def mlflow_client() -> tuple[Any, Any]:
    """MLflow's client class, quiet and quick to give up, and what its calls raise when a store is down."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    exceptions = importlib.import_module("mlflow.exceptions")
    client_class = importlib.import_module("mlflow").MlflowClient
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):  # after the import, which sets levels of its own
        logging.getLogger(name).setLevel(logging.ERROR)
    return client_class, (exceptions.MlflowException, OSError, *_sql_errors())


def _run(client: Any, config: Config, run_id: str | None, running: bool) -> str:
    """The id of the run to write to: the resumed one when the store knows it, else a new one."""
    exceptions = importlib.import_module("mlflow.exceptions")
    if run_id:
        try:
            if running:
                client.update_run(run_id, status="RUNNING")
            else:
                client.get_run(run_id)
            return run_id
        except exceptions.MlflowException as error:
            if _code(error) != "RESOURCE_DOES_NOT_EXIST":
                raise
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        local = (config.tracking.uri or "sqlite:").startswith("sqlite:")
        place = (Path(config.run_root).resolve() / "mlartifacts").as_uri() if local else None
        try:
            client.create_experiment(config.tracking.experiment, artifact_location=place)
        except exceptions.MlflowException as error:  # another run of the same job array was faster
            if _code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(config.tracking.experiment)
    tags = {**environment(), "config_hash": config_hash(config)}
    created: str = client.create_run(experiment.experiment_id, run_name=config.name, tags=tags).info.run_id
    entities = importlib.import_module("mlflow.entities")
    parameters = [entities.Param(name, str(value)) for name, value in flatten(config).items()]
    client.log_batch(created, params=parameters)
    return created


def _sql_errors() -> tuple[type[Exception], ...]:
    """What a database store may raise; nothing where only the client half of MLflow is installed."""
    try:
        return (importlib.import_module("sqlalchemy.exc").SQLAlchemyError,)
    except ImportError:
        return ()


def _short(error: Exception) -> str:
    """The first line of an error, at most 160 characters, without what stands before the @ of an address."""
    text = _hidden((str(error).strip() or type(error).__name__).splitlines()[0])
    return text if len(text) <= 160 else text[:157] + "..."


def _hidden(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def _code(error: Exception) -> str:
    return str(getattr(error, "error_code", ""))
