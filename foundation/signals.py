"""Requests to stop that come as signals. Installed before torch is imported, which takes seconds; needs nothing itself.

SIGTERM is what launchers and schedulers send at the end, SIGUSR2 what a scheduler can send in time. SIGUSR1 is left
alone: NCCL takes it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
STOPPED = 85  # exit code: stopped on request after a save; start the same command again
_received: list[str] = []
_at_once = False


class Requested(BaseException):
    """A request to stop came while there was nothing to save; no error, so that nobody handles it as one."""


def listen() -> None:
    """From now on these signals are noted instead of ending the process. Main thread only."""
    for number in SIGNALS:
        signal.signal(number, _note)


def received() -> str | None:
    """The name of the first signal that asked to stop."""
    return _received[0] if _received else None


@contextmanager
def at_once() -> Iterator[None]:
    """Within, a request that is listened for, or came before, raises Requested; work that saves nothing starts anew."""
    global _at_once
    _at_once = True
    try:
        if name := received():
            raise Requested(name)
        yield
    finally:
        _at_once = False


def forget() -> None:
    """Start over, for a process that trains more than once."""
    _received.clear()


def _note(number: int, _: FrameType | None) -> None:
    global _at_once
    _received.append(signal.Signals(number).name)
    if _at_once:
        _at_once = False  # launchers repeat themselves; what cleans up after the first is left to do so
        raise Requested(_received[-1])
