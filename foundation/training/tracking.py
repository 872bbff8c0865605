"""Where the numbers of a run go: JSON lines always, the terminal, and MLflow from rank 0.

`metrics.jsonl` in the run folder is the record; MLflow is a view of it. A store that cannot be reached costs one line
of text and never the run: everything sent to MLflow goes through one background thread, for which training never waits.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from foundation.config import Config
from foundation.errors import ConfigError, StorageError
from foundation.training.events import Events
from foundation.training.mlflow_sink import MlflowSink

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """The interface, and what every rank but 0 holds: it records nothing."""

    run_id: str | None = None
    position: int = 0
    """Of the newest line, or where this attempt began."""
    reached: int = 0
    """The furthest position of the lines that were there when this attempt began."""

    def log(self, position: int, metrics: Mapping[str, float]) -> None:
        """Record numbers at a position (samples seen)."""

    def event(self, kind: str, position: int, **facts: Any) -> None:
        """Record that something happened at a position; see `training.events`. From any thread, and it never raises."""

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
            self.path = folder / "metrics.jsonl"
            self.reached = _truncate(self.path, position)
            self._events = Events(folder)
            self._lines = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"the run folder cannot be written: {error.strerror}",
                where=str(folder),
                do="change run_root or name, or correct the permissions",
            ) from error
        self.position, self._total = position, config.train.samples
        self._start = self._last = (position, time.monotonic())
        self._bar: tuple[Progress, TaskID] | None = _bar(self._total, position) if sys.stderr.isatty() else None
        self._mlflow = MlflowSink.open(config, run_id, self.note) if config.tracking.mlflow else None
        self.run_id = self._mlflow.run_id if self._mlflow else run_id

    def log(self, position: int, metrics: Mapping[str, float]) -> None:
        """Append a line, move the bar, queue for MLflow; a number that is not finite is written as null."""
        now = time.time()
        numbers = {name: float(value) for name, value in metrics.items()}
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
            self._mlflow.metrics(position, now, numbers)

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
        print(text, file=sys.stderr, flush=True)

    def rewind(self, position: int) -> None:
        """The same on disk; MLflow shows the later ones beside the earlier ones."""
        self._lines.close()
        _truncate(self.path, position)
        self._lines = self.path.open("a", encoding="utf-8")
        self.position = position
        self._start = self._last = (position, time.monotonic())

    def close(self, status: Status = "FINISHED") -> None:
        """Flush everything and set the run's status in MLflow; a second call does nothing."""
        if self._lines.closed:
            return
        self._lines.close()
        if self._bar:
            self._bar[0].stop()
        if self._mlflow:
            self._mlflow.close(status)

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


def _truncate(path: Path, position: int) -> int:
    """Keep the whole lines up to `position`; a half-written one goes as well, and at position 0 all of them.

    Returns the furthest position of any line, kept or not.
    """
    if not path.exists():
        return 0
    kept, reached = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            at = int(json.loads(line)["position"])
            reached = max(reached, at)
            if position and line.endswith("\n") and at <= position:
                kept.append(line)
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
    return reached


def _bar(total: int, position: int) -> tuple[Progress, TaskID]:
    """A started progress bar on stderr: samples, speed, time left, loss."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    progress = Progress(*columns, console=Console(stderr=True), speed_estimate_period=600)
    progress.start()
    return progress, progress.add_task("train", total=total, completed=position, loss="", speed="")
