"""The best checkpoint of a run, by its online probe: a file PIN in it says so, and retention leaves it alone.

Its manifest holds the score of a checkpoint, so that the next best is known when the best one goes. A PIN that the
probe has written holds the score, too; one that somebody else has put there is never touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from foundation.errors import CheckpointError
from foundation.training.committed import PIN, candidates, flaw, manifest, place_of, position_of
from foundation.training.places import Location, Place


class Score(NamedTuple):
    """A measurement, the higher the better; scores compare where `name` is the same."""

    value: float
    name: str

    def facts(self) -> dict[str, Any] | None:
        """As it stands in a manifest; None where it is no number."""
        return {"score": self.value, "name": self.name} if math.isfinite(self.value) else None


def scores(folder: Place) -> dict[str, Score]:
    """The checkpoints that can be used and whose score is known, by name."""
    found = {name: _score(folder / name) for name in candidates(folder) if flaw(folder / name) is None}
    return {name: score for name, score in found.items() if score}


def _score(path: Place) -> Score | None:
    """By the manifest; one of a version that did not write scores there leaves it to the PIN."""
    facts = manifest(path)
    return _parsed(facts["score"]) if "score" in facts else _pin(path)


def pinned(folder: Place) -> dict[str, Score]:
    """The checkpoints that a probe has pinned, by name."""
    found = {name: _pin(folder / name) for name in candidates(folder)}
    return {name: score for name, score in found.items() if score}


def _pin(path: Place) -> Score | None:
    """The score in the PIN of a checkpoint; None without one, and in somebody else's."""
    try:
        return _parsed(json.loads((path / PIN).read())) if PIN in path.names() else None
    except ValueError:
        return None


def _parsed(facts: Any) -> Score | None:
    try:
        return Score(float(facts["score"]), str(facts["name"]))
    except (ValueError, LookupError, TypeError):
        return None


def leader(found: Mapping[str, Score]) -> str | None:
    """The best checkpoint by the probe that scored the newest one, the earliest of equals; None where there is none."""
    newest = max(found, key=position_of, default=None)
    same = {name: score.value for name, score in found.items() if newest and score.name == found[newest].name}
    return max(same, key=lambda name: (same[name], -position_of(name)), default=None)


def is_best(folder: Place, name: str, score: Score) -> bool:
    """Whether a checkpoint `name` of this score is better than all before it whose score is known."""
    return math.isfinite(score.value) and leader({**_until(folder, name), name: score}) == name


def _until(folder: Place, name: str) -> dict[str, Score]:
    """The scores of the checkpoints up to `name`: what is beyond it is trained again."""
    return {other: score for other, score in scores(folder).items() if position_of(other) <= position_of(name)}


def write_pin(path: Place, score: Score) -> None:
    """Into a checkpoint, best before it is committed, so that it appears with its pin."""
    (path / PIN).write([json.dumps(score.facts()).encode()])


def settle(folder: Place, name: str) -> None:
    """After `name` was saved, or gone back to: the best checkpoint up to it has a pin, and no other has one.

    Those of later checkpoints go, too: that part of the run is being trained again.
    """
    found = _until(folder, name)
    best = leader(found)
    if best and PIN not in (folder / best).names():  # first, so that there is always one
        write_pin(folder / best, found[best])
    for other in pinned(folder):
        if other != best:
            (folder / other / PIN).remove()


def best_of(folder: Place) -> str | None:
    """The name of the checkpoint that the probe found best: the pinned one, or the next where that is damaged."""
    found = scores(folder)
    return leader({name: found[name] for name in pinned(folder) if name in found} or found)


def best(location: Path | str) -> Location:
    """`best_of` a run: its folder, or that of its checkpoints, or a URL. Raises CheckpointError when there is none."""
    folder = place_of(location)
    name = best_of(folder)
    if name is None:
        raise CheckpointError(
            "no checkpoint is pinned as the best by a probe",
            where=str(folder),
            do="train with monitor.probe=CATALOG, or take the newest checkpoint",
        )
    return (folder / name).location
