"""MLflow behind a thread: it follows metrics.jsonl and sends what is new, so that an outage is only a delay."""

from __future__ import annotations

import importlib
import json
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from foundation.config import Config
from foundation.training.mlflow_store import METRICS, active, address, attach, code, mlflow_client, short, usable
from foundation.training.standing import Standing
from shards.redaction import redact

RETRY_SECONDS = 30.0
CLOSE_SECONDS = 60.0
_BATCH = 1000  # the most metrics that MLflow takes in one request
# HTTP statuses that will be the same the next time, and what helps. All others, and none, are an outage.
_REFUSALS = {
    400: "",
    404: "",
    413: "; raise the limit of the proxy (nginx: client_max_body_size); files go again by: foundation track {run}",
}

Job = Callable[[Any, str], object]
"""What is done with the client and the id of the run."""


class MlflowSink:
    """One MLflow run. Calls return at once; the thread connects, sends, and tries again what could not be sent."""

    def __init__(
        self,
        connect: Callable[[], tuple[Any, str]],
        standing: Standing,
        record: Path | None,
        note: Callable[[str], None],
    ) -> None:
        """`connect` gives the client and the id of the run; `record` is the file to follow, None for jobs alone."""
        self._connect, self._standing, self._record, self._note = connect, standing, record, note
        self._queue: queue.SimpleQueue[tuple[str, Job] | None] = queue.SimpleQueue()
        self._jobs: deque[tuple[str, Job]] = deque()
        self._client: Any = None
        self._run_id = ""
        self._ended = False
        self._status: str | None = None
        self._ended_at: int | None = None
        self._failed_at: float | None = None
        self.failure = ""
        """Why the last attempt failed; empty when nothing is left to be sent."""
        self.refused: list[str] = []
        """What the store will never take, and what helps: a line for each."""
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        config: Config,
        standing: Standing,
        note: Callable[[str], None],
        *,
        follow: bool = False,
        running: bool = False,
    ) -> MlflowSink | None:
        """Start or continue the run of a run folder; None, after one line of text, where MLflow is not installed.

        `follow` sends the lines of metrics.jsonl; without `running` the status of the run is left alone.
        """
        try:
            client_class, _ = mlflow_client()
        except ImportError as error:
            note(f"MLflow is off: {error}; pip install 'sar-foundation[mlflow]'. {METRICS} is complete without it")
            return None
        folder = standing.folder
        uri = address(config, folder)

        def connect() -> tuple[Any, str]:
            try:
                client = client_class(tracking_uri=uri)
                return client, attach(client, uri, config, standing, running)
            except Exception as error:
                raise OSError(f"{redact(uri)}: {short(error)}") from error

        return cls(connect, standing, folder / METRICS if follow else None, note)

    def more(self) -> None:
        """The file that is followed has grown."""
        self._queue.put(_GROWN)

    def job(self, job: Job, what: str = "one entry") -> None:
        """Queue something to be done with the run, after what was queued before; `what` names it if it is refused."""
        self._queue.put((what, job))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Queue a file for the run's artifacts; it must stay where it is until `close`."""
        self.job(lambda client, run_id: client.log_artifact(run_id, str(path), folder or None), path.name)

    def close(self, status: str | None, seconds: float | None = None, ended: int | None = None) -> bool:
        """Send what is left and set the status if one is given; True when the store has all that it takes.

        One last attempt is made, for which a training waits CLOSE_SECONDS and others, with None, as long as it takes.
        `ended` is when the run did, milliseconds since 1970; None: now.
        """
        self._status, self._ended_at = status, ended
        self._queue.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.failure = self.failure or "no answer"
        return not self.failure

    def _work(self) -> None:
        while not self._ended:
            waited = None if self._failed_at is None else RETRY_SECONDS
            try:
                items = [self._queue.get(timeout=waited)]
                while not self._queue.empty():
                    items.append(self._queue.get())
            except queue.Empty:
                items = []
            self._ended = None in items
            self._jobs += [item for item in items if item is not None and item is not _GROWN]
            if self._ended or self._failed_at is None or time.monotonic() - self._failed_at >= RETRY_SECONDS:
                self._send()

    def _send(self) -> None:
        """Send what is missing: lines first. Whatever goes wrong must not end the thread, and never the training."""
        try:
            if self._client is None:
                self._client, self._run_id = self._connect()
            while self._record and not self._follow(self._record):
                pass
            if self._ended and (status := self._status):  # before files, for which the store may have no room
                ended_at = self._ended_at
                self._attempt(f"the status {status}", lambda c, run_id: c.set_terminated(run_id, status, ended_at))
            while self._jobs:
                self._attempt(*self._jobs[0])
                self._jobs.popleft()
            self._failed_at, self.failure = None, ""
        except Exception as error:
            if not self.failure:
                self._note(f"MLflow does not answer ({short(error)}); {METRICS} is complete and will be sent")
            self._failed_at, self.failure = time.monotonic(), short(error)
            self._client = None  # it may come back without the run

    def _follow(self, record: Path) -> bool:
        """Send the lines that the store lacks; False if the run was rewound meanwhile: then they are others."""
        sent, rewound = self._standing.mark()
        for points, end in pending(record, sent):
            self._attempt(f"lines of {METRICS}", partial(_log, points))
            if not self._standing.advance(end, rewound):
                return False
        return True

    def _attempt(self, what: str, job: Job) -> None:
        """Do it; what a store that has the run will never take is dropped with a line: the next may be taken."""
        try:
            job(self._client, self._run_id)
        except Exception as error:
            found = 404 if isinstance(error, FileNotFoundError) else answer(error)
            if found not in _REFUSALS or not active(self._client, self._run_id):
                raise
            do = _REFUSALS[found].format(run=self._standing.folder)
            line = f"MLflow did not take {what} ({short(error)}), left out{do}"
            if line not in self.refused:
                self.refused.append(line)
                self._note(line)


def answer(error: Exception) -> int:
    """The HTTP status of an error, or the one that MLflow's code stands for; 0 where nobody answered."""
    status = getattr(getattr(error, "response", None), "status_code", 0)  # of artifacts
    if not status and (told := re.search(r"failed with error code (\d{3}) != ", str(error))):  # no JSON: of a proxy
        status = int(told[1])
    if not status and code(error):
        status = importlib.import_module("mlflow.exceptions").ERROR_CODE_TO_HTTP_STATUS.get(code(error), 0)
    return int(status)


def pending(record: Path, sent: int) -> Iterator[tuple[list[Any], int]]:
    """MLflow's metrics of the whole lines behind byte `sent`, so many as one request takes, and the byte behind them.

    Sent twice they are the same points: a store keeps one of each name, position, time and value.
    """
    if not record.exists():
        return
    points: list[Any] = []
    with record.open("rb") as file:
        file.seek(sent)
        for line in file:
            if not line.endswith(b"\n"):  # still being written
                break
            new = _points(line)
            if points and len(points) + len(new) > _BATCH:
                yield points, sent
                points = []
            points += new
            sent += len(line)
    if points:
        yield points, sent


def _points(line: bytes) -> list[Any]:
    """The metrics of a line; null, which stands for a number that was not finite, is not a number here."""
    metric = importlib.import_module("mlflow.entities").Metric
    try:
        row = json.loads(line)
        stamp, position = round(row.pop("time") * 1000), row.pop("position")
    except (ValueError, LookupError, TypeError, AttributeError):
        return []
    values = {usable(name): float("nan") if value is None else value for name, value in row.items()}
    return [metric(name, float(v), stamp, position) for name, v in values.items() if isinstance(v, int | float)]


def _log(points: list[Any], client: Any, run_id: str) -> None:
    client.log_batch(run_id, metrics=points)


def _nothing(client: Any, run_id: str) -> None:
    """Of lines that are in the file."""


_GROWN = (METRICS, _nothing)  # stands in the queue for them
