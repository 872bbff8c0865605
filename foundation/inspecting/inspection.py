"""All facts about a run that its folder holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from foundation.config import Config, load
from foundation.errors import DataError
from foundation.files import read_json
from foundation.inspecting.attempts import UNHEARD, Attempt, alive, attempts
from foundation.inspecting.checkpoints import Checkpoints, checkpoints
from foundation.inspecting.coverage import Coverage, coverage
from foundation.inspecting.lines import read_lines, sound
from foundation.inspecting.standing import Standstill, standstill
from foundation.inspecting.timing import Speed, Spent, Window, speed, spent, windows
from foundation.training.data import last_position
from foundation.training.events import FILE
from foundation.training.setup import ENVIRONMENT

METRICS = "metrics.jsonl"
MARKS = ("config.yaml", METRICS, FILE, "checkpoints")  # a folder with one of them is a run


class Slow(NamedTuple):
    """A process that was the slowest in `lines` of the record: need over the median of all, share of data waiting."""

    rank: int
    lines: int
    ratio: float
    worst: float
    wait: float


@dataclass(frozen=True)
class Inspection:
    """A run at one moment. `rows` are the lines of its metrics, `damaged` counts lines that could not be read."""

    run: str
    state: str
    position: int
    samples: int | None
    rows: list[dict[str, Any]]
    damaged: dict[str, int]
    windows: list[Window]
    speed: Speed | None
    spent: Spent | None
    events: list[dict[str, Any]]
    attempts: list[Attempt]
    checkpoints: Checkpoints
    coverage: Coverage | None
    stragglers: list[Slow]
    standstill: Standstill | None
    environment: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The same for machines: tuples with names become mappings; windows, which rows hold, are left out."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self) if each.name != "windows"}


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def inspect(run: Path, data: bool = True) -> Inspection:
    """Read a run folder, also of a run that goes on; with `data` its catalog is opened to count what was seen.

    Raises DataError for what is no run folder, ConfigError and StorageError for files that cannot be read.
    """
    if not run.is_dir() or not any((run / mark).exists() for mark in MARKS):
        what = "this folder holds no run" if run.is_dir() else "there is no such run folder"
        raise DataError(what, where=str(run), do="name a run folder: RUN_ROOT/NAME of its configuration")
    config: Config | None = load(run / "config.yaml") if (run / "config.yaml").exists() else None
    record = read_json(run / ENVIRONMENT) if (run / ENVIRONMENT).exists() else {}
    metrics, events = read_lines(run / METRICS), read_lines(run / FILE)
    happened = [event for event in events.rows if isinstance(event.get("kind"), str)]
    unnamed = len(events.rows) - len(happened)
    tried = attempts(happened, metrics.rows, alive(run))
    kept = checkpoints(run, happened)
    known = [metrics.rows[-1]["position"]] if metrics.rows else [each.position for each in kept.kept if not each.flaw]
    position, end = int(max(known, default=0)), last_position(config) if config else None
    found, word = windows(metrics.rows), state(tried, position, end)
    if word == "complete" and tried and tried[-1].status in UNHEARD:
        tried[-1] = tried[-1]._replace(status=word)  # it writes its report, or was killed while it did
    return Inspection(
        run=str(run),
        state=word,
        position=position,
        samples=end,
        rows=metrics.rows,
        damaged={METRICS: metrics.damaged, FILE: events.damaged + unnamed},
        windows=found,
        speed=speed(found, metrics.rows, config, record),
        spent=spent(found),
        events=happened,
        attempts=tried,
        checkpoints=kept,
        coverage=coverage(run, config, record, position) if data else None,
        stragglers=stragglers(metrics.rows),
        standstill=standstill(run, record.get("world_size")),
        environment=record,
    )


def state(tried: Sequence[Attempt], position: int, end: int | None) -> str:
    """One word or two: how the newest attempt ended, or that all samples were seen."""
    if end is not None and position >= end:
        return "complete"
    if tried:
        return tried[-1].status
    return "unknown" if position else "not started"


def stragglers(rows: Sequence[Mapping[str, Any]]) -> list[Slow]:
    """The processes that were ever the slowest, the most frequent first; none where there was one process."""
    by_rank: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        values = [row.get(key) for key in ("slowest_rank", "slowest_ratio", "slowest_wait")]
        if all(map(sound, values)):
            rank, ratio, wait = map(float, values)  # type: ignore[arg-type]  # `sound` has looked
            by_rank.setdefault(int(rank), []).append((ratio, wait))
    found = []
    for rank, lines in by_rank.items():
        ratios, waits = zip(*lines, strict=True)
        found.append(Slow(rank, len(lines), fmean(ratios), max(ratios), fmean(waits)))
    return sorted(found, key=lambda slow: (-slow.lines, slow.rank))
