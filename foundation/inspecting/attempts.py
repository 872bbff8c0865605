"""The attempts of a run: every start of it, how far it came, how it ended, and what was done again."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from foundation.inspecting.lines import sound
from foundation.training.lock import NAME

BEGINS = ("start", "restart")
UNHEARD = ("running", "no word")  # of the newest attempt, when it has not said that it ended
Rows = Sequence[Mapping[str, Any]]


class Attempt(NamedTuple):
    """From a start to its end; positions in samples, times in seconds since 1970.

    `redone` samples had been seen by the attempt before, after the checkpoint that this one began with. `idle_s` is the
    time since that attempt was last heard of.
    """

    number: int
    kind: str
    began: float
    ended: float
    position: int
    reached: int
    status: str
    reason: str
    redone: int
    idle_s: float | None
    world_size: int | None
    engine: str
    host: str
    commit: str


def attempts(events: Rows, rows: Rows, alive: bool) -> list[Attempt]:
    """All attempts, oldest first. `rows` are the lines of the metrics, `alive`: the newest one is known to go on."""
    starts = [n for n, event in enumerate(events) if event["kind"] in BEGINS]
    found: list[Attempt] = []
    for number, (first, end) in enumerate(pairwise([*starts, len(events)]), start=1):
        mine, begin, newest = events[first:end], events[first], end == len(events)
        heard = [*mine, *(row for row in rows[-1:] if newest and row["time"] >= begin["time"])]
        after = 0 if newest else events[end].get("reached", 0)
        stop = next((event for event in reversed(mine) if event["kind"] == "stop"), None)
        unheard = UNHEARD[not alive] if newest else "killed"
        before = found[-1] if found else None
        found.append(
            Attempt(
                number=number,
                kind=str(begin["kind"]),
                began=begin["time"],
                ended=stop["time"] if stop else max(each["time"] for each in heard),
                position=begin["position"],
                reached=max([each["position"] for each in heard] + [after if sound(after) else 0]),
                status=str(stop.get("status", "")).lower() if stop else unheard,
                reason=str(stop.get("reason", "")) if stop else "",
                redone=max(before.reached - begin["position"], 0) if before else 0,
                idle_s=max(begin["time"] - before.ended, 0.0) if before else None,
                world_size=begin.get("world_size"),
                engine=str(begin.get("engine", "")),
                host=str(begin.get("host", "")),
                commit=str(begin.get("commit", ""))[:12],
            )
        )
    return found


def alive(run: Path) -> bool:
    """Whether the process that wrote to the folder last is one of this machine and still there.

    The lock itself is not tried: for that moment a run could not start.
    """
    try:
        owner = re.match(r"process (\d+) on (.*)", (run / NAME).read_text(errors="replace"))
        if owner is None or owner[2].strip() != socket.gethostname():
            return False
        os.kill(int(owner[1]), 0)
    except PermissionError:  # there, and somebody else's
        return True
    except (OSError, OverflowError):
        return False
    return True
