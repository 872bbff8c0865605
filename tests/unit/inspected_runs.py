"""Run folders written by hand, for tests of what is read from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGAN = 1_700_000_000.0


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metric(position: int, time: float, **numbers: Any) -> dict[str, Any]:
    """A line of ten seconds, two of them waiting for data."""
    measured = {"loss": 100 / position, "images_per_s": 10.0, "data_wait": 0.2, "window_s": 10.0}
    return {"position": position, "time": BEGAN + time, **measured, **numbers}


def event(kind: str, position: int, time: float, **facts: Any) -> dict[str, Any]:
    return {"kind": kind, "position": position, "time": BEGAN + time, **facts}


def run_of_three_attempts(run: Path) -> Path:
    """Killed at 300 samples, stopped on request at 400, failed at 500; a checkpoint every 200."""
    rows = [metric(100 * n, 10.0 * n) for n in (1, 2)]
    rows += [metric(300, 110, checkpoint_stall_s=3.0), metric(400, 120, monitor_s=1.0)]
    rows += [metric(500, 230, slowest_rank=3.0, slowest_ratio=1.5, slowest_wait=0.25)]
    lines(run / "metrics.jsonl", rows)
    begin = {"engine": "ddp", "host": "node1", "commit": "0123456789abcdef"}
    events = [
        event("start", 0, 0, world_size=2, reached=0, **begin),
        event("checkpoint", 200, 21, seconds=0.5, bytes=1000),
        event("restart", 200, 100, world_size=4, reached=300, **begin),
        event("damaged", 300, 110, samples=2),
        event("checkpoint", 400, 121, seconds=0.7, bytes=1000),
        event("stop", 400, 122, status="stopped", reason="SIGTERM"),
        event("restart", 400, 200, world_size=4, reached=400, **begin),
        event("spike", 500, 229, score=9.5, loss=None),
        event("stop", 500, 231, status="failed", reason="NumericsError: the gradient norm is nan"),
    ]
    lines(run / "events.jsonl", events)
    return run
