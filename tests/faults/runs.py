"""What a fault is done to: a whole run in a process of its own, and the proof that it struck and left no trace.

The runs are real: signals, threads, files and locks are those of `foundation train`; only the imports are shared.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from forked import forked
from processes import position, record, same_state

from foundation.config import Config
from foundation.training.committed import flaw
from foundation.training.places import place

PATIENCE = 120.0  # seconds that a run may take


class Child:
    """A run in a process of its own, which does not outlive the block."""

    def __init__(self, config: Config, log: Path, prepare: Callable[[], object] = lambda: None) -> None:
        self.log, self.code = log, 0
        self._pid: int | None = forked(config, log, prepare)
        self._last = time.monotonic() + PATIENCE

    def over(self) -> bool:
        """Whether it has ended, and `code` is known; one that hangs is killed."""
        if self._pid and time.monotonic() > self._last:
            self.send(signal.SIGKILL)
        if self._pid:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._pid, self.code = None, os.waitstatus_to_exitcode(status)
        return self._pid is None

    def until(self, condition: Callable[[], object]) -> bool:
        """Wait for it; False when the run has ended before."""
        while not condition():
            if self.over():
                return False
            time.sleep(0.002)
        return True

    def send(self, number: int) -> None:
        """A signal, to nobody else once it has ended."""
        if self._pid:
            os.kill(self._pid, number)

    def end(self) -> int:
        """Its exit code, negative for a signal."""
        self.until(lambda: False)
        return self.code

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL)
        self.end()


class Fault(NamedTuple):
    """What is done to a run, and what shows that it was done."""

    name: str
    inject: Callable[[Child, Path], object]
    """with a run that is past its goal, and its folder"""
    code: int
    """exit code of a run that was struck"""
    found: Callable[[Path, str], str]
    """evidence in what a run with that code left, its folder and what it printed; empty: it was not struck"""
    prepare: Callable[[], object] = lambda: None
    """done in the process of the run, at first"""
    heal: Callable[[], object] = lambda: None
    """done when the run has ended, struck or not"""
    kept: Callable[[Path], bool] = lambda _: True
    """what else the run folder has to show in the end"""


class Trial(NamedTuple):
    """What came of one fault: whether it struck, and the run reached its end and equals one that nobody disturbed."""

    fault: str
    code: int
    struck: bool
    survived: bool
    lost_samples: int
    """positions that were not learnt from as they should"""
    lost_checkpoints: int
    """committed before the fault, and not valid after it"""
    seconds: float | None
    """from the next start to the first new line of the record; None where there was no such start, or nothing to do"""
    note: str
    late: int = 0
    """trials before this one in which the run was faster than the fault"""

    @property
    def missed(self) -> bool:
        """Whether the run ended well before the fault could touch it, which proves nothing."""
        return not self.struck and self.code == 0 and self.survived

    @property
    def good(self) -> bool:
        """Whether it was struck, and nothing was lost."""
        return self.struck and self.survived and not self.lost_samples and not self.lost_checkpoints


def lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a record or of events, with all that clocks and meters gave."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def valid(run: Path) -> set[str]:
    """Names of the checkpoints that are whole."""
    folder = place(run / "checkpoints")
    return {name for name in folder.names() if name.startswith("samples-") and flaw(folder / name) is None}


def lost(run: Path, whole: Path, stride: int, before: set[str] | None = None) -> tuple[int, int]:
    """Samples that were not read as in the `whole` run, in updates of `stride`, and checkpoints that are gone.

    Those of `before` (default: of the whole run) have to be there and whole.
    """
    seen = {row["position"]: row.get("samples_hash") for row in record(run)}
    missing = [row for row in record(whole) if seen.get(row["position"]) != row["samples_hash"]]
    return stride * len(missing), len((valid(whole) if before is None else before) - valid(run))


def _end_of(printed: str) -> str:
    return " ".join(printed[-300:].split())


class Bench:
    """An undisturbed run, and what disturbed ones are compared with."""

    def __init__(self, config: Config) -> None:
        self.config, self.whole = config, config.run_folder
        with Child(config, self._log(config)) as child:
            assert child.end() == 0, child.log.read_text()

    def trial(self, fault: Fault, config: Config, goal: int) -> Trial:
        """Start a run, do it past `goal` samples, heal; where the run has stopped start it again."""
        run, log, before = config.run_folder, self._log(config), set[str]()
        with Child(config, log, fault.prepare) as child:
            if reached := child.until(lambda: position(run) >= goal):
                before = valid(run)
                fault.inject(child, run)
            code = child.end()
        printed = log.read_text()
        evidence = fault.found(run, printed) if reached and code == fault.code else ""
        fault.heal()
        again, seconds = self._again(config) if code else (0, None)
        note = evidence or f"not struck: exit code {code}, {_end_of(printed)}"
        if again:
            note += f"; then exit code {again}, {_end_of(log.read_text())}"
            return Trial(fault.name, code, bool(evidence), False, 0, 0, None, note)
        same = record(run) == record(self.whole) and same_state(run, self.whole) and fault.kept(run)
        gone = lost(run, self.whole, self.config.train.global_batch, before)
        return Trial(fault.name, code, bool(evidence), same, *gone, seconds, note)

    def _log(self, config: Config) -> Path:
        return self.whole.parent / f"{config.name}.log"  # not on a disk that may be full

    def _again(self, config: Config) -> tuple[int, float | None]:
        """Start the same command again: its exit code, and the seconds until its first new line.

        Lines that a resume keeps are older than the start. A run that was killed after its last save has no new one.
        """
        began = time.time()
        with Child(config, self._log(config)) as child:
            code = child.end()
        if code:
            return code, None
        new = [row["time"] for row in lines(config.run_folder / "metrics.jsonl") if row["time"] > began]
        return code, min(new) - began if new else None
