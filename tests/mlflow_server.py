"""A real MLflow server in a process group of its own, and what it has of a run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

LONG = 600.0  # seconds after which something is stuck
Points = dict[str, list[tuple[int, int, float]]]


def recorded(run: Path) -> Points:
    """name → (position, milliseconds, value) of every number in metrics.jsonl."""
    found: Points = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        at = row.pop("position"), round(row.pop("time") * 1000)
        for name, value in row.items():
            found.setdefault(name, []).append((*at, value))
    return found


def stored(client: Any, run_id: str) -> Points:
    """The same of everything the server has."""
    names = client.get_run(run_id).data.metrics
    return {
        name: sorted((p.step, p.timestamp, p.value) for p in client.get_metric_history(run_id, name)) for name in names
    }


class Server:
    """`mlflow server` on a free port of loopback, with a database and artifacts of its own; it keeps both when down."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri, self.folder = f"http://127.0.0.1:{self.port}", folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers; nothing is done where it does."""
        if self._process:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=quiet, process_group=0)
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            assert self._process.poll() is None, (self.folder / "log").read_text()
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError("the server does not start")

    def kill(self) -> None:
        """Like a machine that fails."""
        if self._process:
            with suppress(ProcessLookupError):  # it has ended by itself, and said why in its log
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
