"""What happened to a run, beside its numbers: `events.jsonl` in the run folder, a line each, never taken away.

A line has `kind`, `position` (samples seen) and `time` (seconds since 1970), and facts of its kind: `start` and
`restart` have engine, world_size, host, commit and `reached`, the furthest position that was logged before;
`checkpoint` bytes and seconds; `damaged` how many samples; `collapse` what; `stop` status and reason. Readers take any
other kind as it is. What is done again after a restart stays in this file, unlike in metrics.jsonl.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.files import read_json
from foundation.training.meters import job
from foundation.training.stopping import Stopped
from shards.redaction import redact

if TYPE_CHECKING:
    from foundation.training.tracking import Status, Tracker

FILE = "events.jsonl"
SHOWN = 300  # characters of the reason of an end
WORDS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}


class Events:
    """The writer, which one process has. Raises OSError where the file cannot be opened."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        with self.path.open("a+b", buffering=0) as file:
            if size := file.seek(0, os.SEEK_END):
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a kill has cut the last line: the next one must not join it
                    file.write(b"\n")

    def write(self, kind: str, position: int, facts: Mapping[str, Any]) -> None:
        """Append a line by one write, so that threads do not mix theirs; numbers that are not finite become null."""
        line = {"kind": kind, "position": position, "time": round(time.time(), 3), **plain(facts)}
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(line, default=lambda other: redact(str(other)), allow_nan=False).encode() + b"\n")


def plain(value: Any) -> Any:
    """The same for JSON, in lists and mappings too: null for numbers that are not finite, text without secrets."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def began(tracker: Tracker, environment: Path, position: int, resumed: bool) -> None:
    """The event of an attempt's begin, with what `environment` (its environment.json) says of it. On rank 0."""
    record = read_json(environment)
    facts = {key: record[key] for key in ("engine", "world_size", "device", "torch", "commit") if key in record}
    facts |= {**job(), "process": os.getpid(), "reached": tracker.reached}
    tracker.event("restart" if resumed else "start", position, **facts)


def ended(tracker: Tracker, status: Status) -> None:
    """The event of an attempt's end, with the reason: the error that is under way."""
    error = sys.exception()
    facts, position = {"status": WORDS[status]}, tracker.position
    if isinstance(error, Stopped):
        facts["reason"], position = error.reason, error.position
    elif error is not None:
        facts["reason"] = redact(f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": "))[:SHOWN]
    tracker.event("stop", position, **facts)
