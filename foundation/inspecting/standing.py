"""Where the processes of a run stood when it stood still, and which of them the others waited for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from foundation.errors import ExplainedError
from foundation.files import read_json
from foundation.training.standstill import FOLDER

OURS = ("/foundation/", "/shards/", "/kernels/")


class Stood(NamedTuple):
    """A process at the newest standstill: `seconds` without an update, and where its main thread was."""

    rank: int
    host: str
    position: int
    seconds: float
    time: float
    where: str
    collectives: dict[str, dict[str, Any]]


class Standstill(NamedTuple):
    """The newest one; `verdict` says in words whom the others waited for."""

    processes: list[Stood]
    verdict: str


def standstill(run: Path, world_size: int | None) -> Standstill | None:
    """Read what the processes wrote; None where the run never stood still. A file that is damaged counts as missing."""
    found = []
    for path in (run / FOLDER).glob("rank-*.json"):
        try:
            facts = read_json(path)
            where = _where(facts.pop("stack"))
            found.append(Stood(where=where, **{name: facts[name] for name in Stood._fields if name != "where"}))
        except (ExplainedError, KeyError, TypeError, AttributeError):
            continue
    if not found:
        return None
    newest = max(found, key=lambda each: each.time)
    at_once = [each for each in found if newest.time - each.time <= 2 * newest.seconds]
    processes = sorted(at_once, key=lambda each: each.rank)
    return Standstill(processes, verdict(processes, world_size))


def verdict(processes: Sequence[Stood], world_size: int | None) -> str:
    """Who has not come: processes that wrote nothing, else those behind in a group's collectives."""
    ranks = {each.rank for each in processes}
    if silent := [str(rank) for rank in range(world_size or 0) if rank not in ranks]:
        return f"no word from rank {', '.join(silent)}: dead, stopped, cut off, or its file is damaged"
    for group in dict.fromkeys(name for each in processes for name in each.collectives):
        begun = {each.rank: each.collectives.get(group, {}).get("begun", 0) for each in processes}
        most = max(begun.values())
        late = [each for each in processes if begun[each.rank] < most]
        if late:
            ahead = next(each.collectives[group] for each in processes if begun[each.rank] == most)
            names = ", ".join(str(each.rank) for each in late)
            what = f"{ahead['what']} of {' '.join(map(str, ahead['sizes']))}, number {most} of group {group}"
            return f"all wait for rank {names}: not in {what}, but at {late[0].where}"
    return "all processes are in the same collective: look at the network" if len(ranks) > 1 else ""


def _where(stack: Sequence[str]) -> str:
    """The innermost call in this project's code, shortened, and the innermost of all where that is another."""
    if not stack:
        return "unknown"
    ours = [call for call in stack if any(part in call for part in OURS)]
    short = [call[max(call.rfind(part) for part in OURS) + 1 :] for call in ours[-1:]]
    return " > ".join([*short, *([stack[-1].rpartition("/")[2]] if stack[-1] not in ours[-1:] else [])])
