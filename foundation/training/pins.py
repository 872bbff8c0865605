"""The best checkpoint of a run, by its online probe: a file PIN in it says so, and retention leaves it alone.

A PIN that the probe has written holds its score; one that somebody else has put there is never touched.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from foundation.errors import CheckpointError
from foundation.training.committed import PIN, candidates, flaw, place_of, position_of
from foundation.training.places import Location, Place


class Score(NamedTuple):
    """A measurement, the higher the better; scores compare where `name` is the same."""

    value: float
    name: str


def pinned(folder: Place) -> dict[str, Score]:
    """The checkpoints that a probe has pinned, by name."""
    found = {}
    for name in candidates(folder):
        if PIN in (folder / name).names() and (score := _read(folder / name / PIN)):
            found[name] = score
    return found


def _read(file: Place) -> Score | None:
    """The score in a PIN; None in somebody else's."""
    try:
        facts = json.loads(file.read())
        return Score(float(facts["score"]), str(facts["name"]))
    except (ValueError, LookupError, TypeError):
        return None


def is_best(folder: Place, name: str, score: Score) -> bool:
    """Whether a checkpoint `name` of this score is better than all pinned ones before it."""
    before = {other: each for other, each in pinned(folder).items() if position_of(other) < position_of(name)}
    return math.isfinite(score.value) and all(s.name != score.name or s.value < score.value for s in before.values())


def write_pin(draft: Place, score: Score) -> None:
    """Into a checkpoint that is not committed yet, so that it appears with its pin."""
    (draft / PIN).write([json.dumps({"score": score.value, "name": score.name}).encode()])


def settle(folder: Place, name: str, best: bool) -> None:
    """After `name` was saved, as the best or not: take the pins of all that is no longer the best.

    Those of later checkpoints go, too: that part of the run is being trained again.
    """
    found = pinned(folder)
    before = [other for other in found if position_of(other) < position_of(name)]
    kept = name if best else max(before, key=lambda other: (found[other].value, -position_of(other)), default=None)
    for other in found:
        if other != kept:
            (folder / other / PIN).remove()


def best(location: Path | str) -> Location:
    """The checkpoint of a run (its folder, or that of its checkpoints, or a URL) that its probe has pinned.

    Raises CheckpointError when there is none.
    """
    folder = place_of(location)
    found = {name: score for name, score in pinned(folder).items() if flaw(folder / name) is None}
    if not found:
        raise CheckpointError(
            "no checkpoint is pinned as the best by a probe",
            where=str(folder),
            do="train with monitor.probe=CATALOG, or take the newest checkpoint",
        )
    return (folder / max(found, key=lambda name: found[name].value)).location
