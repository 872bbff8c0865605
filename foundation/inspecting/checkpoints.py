"""The checkpoints of a run, where they are now, and those that have been."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from foundation.training.committed import (
    PIN,
    Failure,
    candidates,
    flaw,
    manifest,
    place_of,
    position_of,
    said,
)
from foundation.training.pins import best_of, pinned
from foundation.training.places import Folder, Place


class Kept(NamedTuple):
    """A checkpoint that is there. `when` is seconds since 1970, `seconds` the writing; `flaw` why it cannot be used."""

    name: str
    position: int
    bytes: int
    when: float | None
    seconds: float | None
    pin: str
    flaw: str
    newest: bool
    best: bool


class Checkpoints(NamedTuple):
    """Those in a folder or store, newest first, how many others have been written, and why the list is none."""

    where: str
    kept: list[Kept]
    gone: int
    problem: str


def checkpoints(run: Path, events: Sequence[Mapping[str, Any]]) -> Checkpoints:
    """What the place of a run's checkpoints holds; the content of their tensors is not read."""
    saved = {event["position"]: event for event in events if event["kind"] == "checkpoint"}
    folder = place_of(run)
    if isinstance(folder, Folder) and folder.path == run:  # a run without any
        return Checkpoints(str(run / "checkpoints"), [], len(saved), "")
    try:
        names, scores, best = candidates(folder), pinned(folder), best_of(folder)
        flaws = {name: flaw(folder / name) for name in names}
        good = [name for name in names if flaws[name] is None]
        found = []
        for name in names:
            event, there = saved.get(position_of(name), {}), folder / name
            score, mark = scores.get(name), PIN in there.names()
            pin = f"{score.name} {score.value:.4g}" if score else "by hand" if mark else ""
            end = name in good[:1], name == best
            when, seconds = event.get("time") or _written(there), event.get("seconds")
            found.append(Kept(name, position_of(name), _bytes(there), when, seconds, pin, flaws[name] or "", *end))
    except Failure as error:
        return Checkpoints(str(folder), [], len(saved), f"cannot be listed: {said(error)}")
    return Checkpoints(str(folder), found, len(saved.keys() - {each.position for each in found}), "")


def _bytes(path: Place) -> int:
    """By the manifest, or of what is there."""
    with suppress(*Failure, ValueError, LookupError, TypeError, AttributeError):
        return sum(int(file["bytes"]) for file in manifest(path)["files"].values())
    return sum(path.sizes().values())


def _written(path: Place) -> float | None:
    """When a checkpoint of a folder was committed."""
    with suppress(OSError):
        return (path.path / "COMMIT").stat().st_mtime if isinstance(path, Folder) else None
    return None
