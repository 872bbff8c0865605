"""How many samples of each source a run has seen: counted from the order, so exact at any position."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from foundation.config import Config
from foundation.errors import ConfigError, DataError
from foundation.files import read_json
from foundation.inspecting.lines import read_lines, sound
from foundation.training.data import REPLACED, last_position, order_of, training_catalog
from foundation.training.rewinding import JUMPS
from shards.catalog import Catalog


class Seen(NamedTuple):
    """A source: its samples, how many were seen (again and again), now and at the end, and how many were damaged."""

    source: str
    samples: int
    seen: int
    share: float
    passes: float
    passes_at_end: float
    damaged: int


class Coverage(NamedTuple):
    """The sources of a run at a position (samples), or why nothing is known of them."""

    position: int
    sources: list[Seen]
    problem: str = ""


def coverage(run: Path, config: Config | None, record: Mapping[str, Any], position: int) -> Coverage:
    """Of the first `position` samples of a run, without those it passed over; `record` is what environment.json says.

    Damaged samples, which the next ones of their blocks replaced, count for their own source.
    """
    if config is None:
        return Coverage(position, [], "there is no config.yaml")
    try:
        catalog = training_catalog(config)
        mixture = order_of(config, catalog)
    except (ConfigError, DataError) as error:
        return Coverage(position, [], f"the catalog cannot be opened: {error.what}")
    if "fingerprint" in (then := str(record.get("data", ""))) and catalog.fingerprint not in then:
        return Coverage(position, [], "the catalog is not the one of the run any more: its fingerprint differs")
    seen, planned, damaged = mixture.taken(position), mixture.taken(last_position(config)), _damaged(run, catalog)
    for begin, end in spans(run, position):
        before, after = mixture.taken(begin), mixture.taken(end)
        seen = {name: count - (after[name] - before[name]) for name, count in seen.items()}
    found = []
    for source in catalog.sources:
        now, end, size = seen.get(source.name, 0), planned.get(source.name, 0), max(source.samples, 1)
        share = now / max(sum(seen.values()), 1)
        found.append(Seen(source.name, source.samples, now, share, now / size, end / size, damaged[source.name]))
    return Coverage(position, found)


def spans(run: Path, position: int) -> list[tuple[int, int]]:
    """What a run passed over after it went back, up to a position: spans [begin, end) that do not overlap."""
    file = run / JUMPS
    found: list[tuple[int, int]] = []
    for begin, end in sorted(map(tuple, read_json(file)["jumps"])) if file.exists() else ():
        begin = max(begin, found[-1][1] if found else 0)
        if begin < (end := min(end, position)):
            found.append((begin, end))
    return found


def _damaged(run: Path, catalog: Catalog) -> dict[str, int]:
    """Damaged samples that were met, by source, each position once."""
    ends = np.cumsum([source.samples for source in catalog.sources])
    found = {source.name: 0 for source in catalog.sources}
    rows = read_lines(run / REPLACED, ("position", "corrupt")).rows
    for sample in {row["position"]: int(row["corrupt"]) for row in rows}.values():
        if 0 <= sample < ends[-1] and sound(sample):
            found[catalog.sources[int(ends.searchsorted(sample, side="right"))].name] += 1
    return found
