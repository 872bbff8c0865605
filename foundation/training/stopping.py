"""Stopping on request: any rank may learn of it, all agree on the update after which they save."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from foundation import signals

STOP_FILE = "stop"  # in the run folder; anybody may make it, whatever the launcher does with signals
_LOOK = 1.0  # seconds between two looks for the file


class Stopped(Exception):
    """The run was stopped on request, and its checkpoint is saved. `position` in samples, `reason` for the log."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"stopped at {position:,} samples ({reason}); the same command goes on")
        self.position, self.reason = position, reason


class Watch:
    """Asks after every update whether somebody, anywhere, wants the run to stop.

    `agree(flag)` begins a maximum over all ranks and returns a function that waits for it. What is asked after one
    update is answered after the next, so that it travels while the devices compute, and all ranks get the same answer
    at the same update.
    """

    def __init__(self, folder: Path, agree: Callable[[bool], Callable[[], bool]]) -> None:
        self.file, self._agree = folder / STOP_FILE, agree
        self._asked: Callable[[], bool] | None = None
        self._looked, self._seen = 0.0, False

    def stop(self) -> bool:
        """Whether to stop after this update. All ranks call it after every update."""
        if self._asked and self._asked():
            return True
        self._asked = self._agree(self.reason() is not None)
        return False

    def reason(self) -> str | None:
        """What this process knows of a request."""
        if found := signals.received():
            return found
        if time.monotonic() > self._looked + _LOOK:
            self._looked, self._seen = time.monotonic(), self.file.exists()
        return f"the file {os.path.relpath(self.file)}" if self._seen else None
