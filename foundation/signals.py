"""Requests to stop that come as signals. Installed before torch is imported, which takes seconds; needs nothing itself.

SIGTERM is what launchers and schedulers send at the end, SIGUSR2 what a scheduler can send in time. SIGUSR1 is left
alone: NCCL takes it.
"""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
STOPPED = 85  # exit code: stopped on request after a save; start the same command again
_received: list[str] = []


def listen() -> None:
    """From now on these signals are noted instead of ending the process. Main thread only."""
    for number in SIGNALS:
        signal.signal(number, _note)


def received() -> str | None:
    """The name of the first signal that asked to stop."""
    return _received[0] if _received else None


def forget() -> None:
    """Start over, for a process that trains more than once."""
    _received.clear()


def _note(number: int, _: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)
