"""Where the numbers of a run go: JSON lines always, the terminal, and MLflow from rank 0.

`metrics.jsonl` in the run folder is the record; MLflow is a view of it. A store that cannot be reached costs one line
of text and never the run: one background thread, for which training never waits, sends what the record has and the
store lacks, now or when it answers again.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from foundation.config import Config, config_hash
from foundation.errors import ConfigError, StorageError
from foundation.training.events import Events
from foundation.training.mlflow_sink import CLOSE_SECONDS, MlflowSink
from foundation.training.mlflow_store import METRICS
from foundation.training.standing import Standing
from foundation.training.system import System
from shards.redaction import redact

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """The interface, and what every rank but 0 holds: it records nothing."""

    position: int = 0
    """Of the newest line, or where this attempt began."""
    reached: int = 0
    """The furthest position of the lines that were there when this attempt began."""

    @property
    def run_id(self) -> str | None:
        """What MLflow calls the run; None as long as it does not know it."""
        return None

    def log(self, position: int, metrics: Mapping[str, float]) -> None:
        """Record numbers at a position (samples seen)."""

    def event(self, kind: str, position: int, **facts: Any) -> None:
        """Record that something happened at a position; see `training.events`. From any thread, and it never raises."""

    def standstill(self, position: int, seconds: float, path: Path) -> None:
        """Say that nothing has gone on for so long; from another thread."""
        self.event("standstill", position, seconds=round(seconds, 1))
        self.note(f"no update for {seconds:.0f} s, since sample {position:,}: foundation inspect {path.parents[1]}")

    def artifact(self, path: Path, folder: str = "") -> None:
        """Hand a finished file (a figure, a report) to MLflow, under `folder` of the run's artifacts."""

    def note(self, text: str) -> None:
        """Show one line to the person at the terminal."""

    def rewind(self, position: int) -> None:
        """Take back the numbers beyond a position that will be reached again."""

    def close(self, status: Status = "FINISHED") -> None:
        """End the record; returns within seconds whatever the store does."""


class RunTracker(Tracker):
    """The tracker of rank 0."""

    def __init__(self, config: Config, position: int, run_id: str | None) -> None:
        folder = config.run_folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / METRICS
            same, self.reached = _truncate(self._path, position)
            self._events = Events(folder)
            self._lines = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"the run folder cannot be written: {error.strerror}",
                where=str(folder),
                do="change run_root or name, or correct the permissions",
            ) from error
        self.position, self._total = position, config.train.samples
        self._start = self._last = (position, time.monotonic())
        self._bar: tuple[Progress, TaskID] | None = _bar(self._total, position) if _terminal() else None
        self._system = System(folder)
        self._standing = Standing(folder, run_id)
        left = self._standing.begin(config_hash(config), position, same)
        self._mlflow: MlflowSink | None = None
        if config.tracking.mlflow:
            self._mlflow = MlflowSink.open(config, self._standing, self.note, follow=True, running=True)
        if self._mlflow:
            if left:
                before = f"the end of the run before this one, {left}"  # which another store may have
                self._mlflow.job(lambda client, _: client.set_terminated(left, "FAILED"), before)
            self._mlflow.more()

    @property
    def run_id(self) -> str | None:
        """What MLflow calls the run; None as long as it does not know it."""
        return self._standing.facts.run_id

    def log(self, position: int, metrics: Mapping[str, float]) -> None:
        """Append a line, move the bar, wake MLflow's thread; a number that is not finite is written as null.

        The first line at a position says what the machine does.
        """
        now = time.time()
        numbers = {name: float(value) for name, value in metrics.items()}
        numbers |= self._system.read() if position > self._last[0] else {}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        try:
            self._lines.write(json.dumps({"position": position, "time": round(now, 3), **finite}) + "\n")
            self._lines.flush()
        except OSError as error:
            raise StorageError(
                f"metrics.jsonl cannot be written: {error.strerror}",
                where=self._lines.name,
                do="free space; the run resumes from its last checkpoint by the same command",
            ) from error
        self.position = position
        self._show(position, numbers)
        if self._mlflow:
            self._mlflow.more()

    def event(self, kind: str, position: int, **facts: Any) -> None:
        """Append a line to events.jsonl; where that fails, one at the terminal: the error of a run stays in sight."""
        try:
            self._events.write(kind, position, facts)
        except OSError as error:
            self.note(f"events.jsonl cannot be written: {error.strerror} ({kind} at {position:,} samples)")

    def artifact(self, path: Path, folder: str = "") -> None:
        """Queue a file for MLflow; it must stay where it is until `close`."""
        if self._mlflow:
            self._mlflow.artifact(path, folder)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        print(f"{redact(text)}\n", end="", file=sys.stderr, flush=True)  # one write: MLflow's thread prints as well

    def rewind(self, position: int) -> None:
        """The same on disk; MLflow shows the later ones beside the earlier ones."""
        self._lines.close()
        same, _ = _truncate(self._path, position)
        self._standing.rewind(same)
        self._lines = self._path.open("a", encoding="utf-8")
        self.position = position
        self._start = self._last = (position, time.monotonic())

    def close(self, status: Status = "FINISHED") -> None:
        """Flush everything and set the run's status in MLflow; a second call does nothing."""
        if self._lines.closed:
            return
        with suppress(OSError):  # a full disk: the error that is under way says so
            self._lines.close()
        if self._bar:
            self._bar[0].stop()
        self._standing.update(status=status)
        if self._mlflow and not self._mlflow.close(status, CLOSE_SECONDS):
            self.note(f"MLflow lacks the end of this run; when it answers: foundation track {self._standing.folder}")

    def _show(self, position: int, numbers: Mapping[str, float]) -> None:
        """Move the bar, or print a line where there is no terminal."""
        now = time.monotonic()
        (before, then), self._last = self._last, (position, now)
        if position <= before:  # a second set of numbers at the same position moves nothing
            return
        speed = numbers.get("images_per_s", (position - before) / max(now - then, 1e-9))
        loss = f"loss {numbers['loss']:.4f}" if "loss" in numbers else ""
        if self._bar:
            progress, task = self._bar
            progress.update(task, completed=position, loss=loss, speed=f"{speed:,.0f} images/s")
            return
        overall = (position - self._start[0]) / max(now - self._start[1], 1e-9)
        seconds = round(max(self._total - position, 0) / overall)
        left = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        self.note(f"{position:>12,}/{self._total:,} samples  {loss}  {speed:,.0f} images/s  {left} left")


def open_tracker(config: Config, *, rank: int = 0, position: int = 0, run_id: str | None = None) -> Tracker:
    """The tracker of a rank; `position` and `run_id` come from the checkpoint that is resumed.

    Lines of metrics.jsonl beyond `position` are removed, since those samples will be seen again. Raises ConfigError
    when the run folder cannot be written.
    """
    return RunTracker(config, position, run_id) if rank == 0 else Tracker()


def _truncate(path: Path, position: int) -> tuple[int, int]:
    """Keep the whole lines up to `position`; a half-written one goes as well, and at position 0 all of them.

    Returns how many bytes at the beginning are what they were, and the furthest position of any line, kept or not.
    """
    if not path.exists():
        return 0, 0
    kept, same, reached, whole = [], 0, 0, True
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            at = int(json.loads(line)["position"])
            reached = max(reached, at)
            good = position > 0 and line.endswith(b"\n") and at <= position
        except (ValueError, KeyError, TypeError, OverflowError):
            good = False
        whole = whole and good
        same += len(line) * whole
        kept += [line] * good
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)
    return same, reached


def _terminal() -> bool:
    """Whether stderr can show a line that renews itself."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _bar(total: int, position: int) -> tuple[Progress, TaskID]:
    """A started progress bar on stderr: samples, speed, time left, loss."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.completed:,}/{task.total:,}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    progress = Progress(*columns, console=Console(stderr=True), speed_estimate_period=600)
    progress.start()
    return progress, progress.add_task("train", total=total, completed=position, loss="", speed="")
