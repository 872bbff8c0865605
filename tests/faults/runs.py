"""What a fault is done to: a whole run in a process of its own, and the proof that it left no trace.

The runs are real: signals, threads, files and locks are those of `foundation train`; only the imports are shared.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from forked import ended, forked
from processes import position, record, same_state

from foundation.config import Config
from foundation.training.committed import flaw, place

PATIENCE = 120.0  # seconds


class Trial(NamedTuple):
    """What came of one fault: whether the run reached its end and equals one that nobody disturbed."""

    fault: str
    survived: bool
    lost_samples: int
    """positions that were not learnt from as they should"""
    lost_checkpoints: int
    """committed before the fault, and not valid after it"""
    seconds: float
    """from the next start to the first new line of the record; 0 where the run never ended"""
    note: str = ""


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


class Bench:
    """An undisturbed run, and what disturbed ones are compared with."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.log = config.run_folder.parent / f"{config.name}.log"
        assert ended(forked(config, self.log)) == 0, self.log.read_text()
        self.whole = config.run_folder

    def trial(
        self,
        fault: str,
        config: Config,
        inject: Callable[[int], object],
        goal: int,
        prepare: Callable[[], object] = lambda: None,
        heal: Callable[[], object] = lambda: None,
    ) -> Trial:
        """Start a run, `inject(pid)` past `goal` samples; if it ends early `heal()` and start it again."""
        run, log = config.run_folder, self.log.parent / f"{config.name}.log"  # not on a disk that may be full
        pid = forked(config, log, prepare)
        end = time.monotonic() + PATIENCE
        while position(run) < goal:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return Trial(fault, False, 0, 0, 0.0, f"ended before the fault: {log.read_text()[-300:]}")
            if time.monotonic() > end:
                os.kill(pid, 9)
                return Trial(fault, False, 0, 0, 0.0, "made no progress")
            time.sleep(0.002)
        before = valid(run)
        inject(pid)
        code = ended(pid)
        said = [line for line in log.read_text().splitlines() if "Error: " in line]
        seconds = 0.0
        if code:
            heal()
            seconds = self._again(config, log)
        return self._judge(fault, run, before, code, seconds, said[-1] if said else "")

    def _again(self, config: Config, log: Path) -> float:
        """Start the same command again and wait for its end; seconds until the first new line of the record."""
        file, began = config.run_folder / "metrics.jsonl", time.monotonic()
        size = file.stat().st_mtime_ns if file.exists() else 0
        pid, seconds = forked(config, log), 0.0
        while not seconds:
            if file.exists() and file.stat().st_mtime_ns > size and position(config.run_folder):
                seconds = time.monotonic() - began
            if time.monotonic() > began + PATIENCE:
                os.kill(pid, 9)
                break
            time.sleep(0.002)
        ended(pid)
        return seconds

    def _judge(self, fault: str, run: Path, before: set[str], code: int, seconds: float, said: str) -> Trial:
        same = record(run) == record(self.whole) and same_state(run, self.whole)
        note = said.strip()[:120] or (f"exit code {code}" if code else "went on")
        return Trial(fault, same, *lost(run, self.whole, self.config.train.global_batch, before), seconds, note)
