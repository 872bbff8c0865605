"""The rows of the table: what was looked at, how it stands, what was found and what to do; and the words for places."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T", bound=Hashable)
ONE_IMAGE = "use one environment, or one image, on all nodes"
NAMED = 6
"""So many nodes or ranks are named; the rest is counted."""


class Status(StrEnum):
    """How a check stands. A `note` says something that is neither good nor bad, such as what was not looked at."""

    ok = "ok"
    note = "note"
    warning = "warning"
    failed = "FAILED"


class Row(NamedTuple):
    """One line for all nodes, or for those that deviate."""

    check: str
    status: Status
    found: str
    do: str = ""


class Frozen(BaseModel):
    """A fact: does not change, travels as JSON, and knows only its own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Place(Frozen):
    """Which process of which node."""

    rank: int
    node: str


def where(chosen: Iterable[Place], every: Sequence[Place]) -> str:
    """Whole nodes by name, single processes by rank and node.

    >>> a, b, c = Place(rank=0, node="n1"), Place(rank=1, node="n1"), Place(rank=2, node="n2")
    >>> where([a, b], [a, b, c]), where([b, c], [a, b, c]), where([a, b, c], [a, b, c])
    ('node n1', 'node n2, rank 1 (n1)', 'all 2 nodes')
    """
    members = list(chosen)
    nodes = list(dict.fromkeys(place.node for place in members))
    whole = [node for node in nodes if _count(node, members) == _count(node, every)]
    if len(whole) == len({place.node for place in every}) > 1:
        return f"all {len(whole)} nodes"
    parts = [f"{'nodes' if len(whole) > 1 else 'node'} {some(whole)}"] if whole else []
    if single := [f"rank {place.rank} ({place.node})" for place in members if place.node not in whole]:
        parts.append(some(single))
    return ", ".join(parts)


def _count(node: str, places: Iterable[Place]) -> int:
    return sum(place.node == node for place in places)


def some(names: Sequence[str]) -> str:
    """The first names and the number of the others."""
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def groups(places: Sequence[Place], values: Iterable[T]) -> list[tuple[T, list[Place]]]:
    """Who has which value, the most frequent one first."""
    found: dict[T, list[Place]] = {}
    for place, value in zip(places, values, strict=True):
        found.setdefault(value, []).append(place)
    return sorted(found.items(), key=lambda item: -len(item[1]))


def equal(check: str, places: Sequence[Place], values: Sequence[str], do: str, wrong: Status = Status.failed) -> Row:
    """One row: ok with the value that all have, or who has which one."""
    found = groups(places, values)
    if len(found) == 1:
        return Row(check, Status.ok, values[0])
    return Row(check, wrong, "differs: " + "; ".join(f"{value} on {where(who, places)}" for value, who in found), do)


def each(check: str, places: Sequence[Place], verdicts: Iterable[tuple[Status, str, str]]) -> Iterator[Row]:
    """One row for each different verdict (status, found, do); it names its places unless all have come to it."""
    for (status, found, do), who in groups(places, verdicts):
        on = "" if len(who) == len(places) else f" on {where(who, places)}"
        yield Row(check, status, found + on, do)


def least(
    check: str,
    places: Sequence[Place],
    values: Sequence[float],
    limit: float,
    show: Callable[[float], str],
    do: str,
) -> Iterator[Row]:
    """Numbers that should reach a limit: a row with the range of those that do, one with the places of the others."""
    good = [(place, value) for place, value in zip(places, values, strict=True) if value >= limit]
    bad = [(place, value) for place, value in zip(places, values, strict=True) if value < limit]
    if good:
        on = f" on {where((place for place, _ in good), places)}" if bad else ""
        yield Row(check, Status.ok, span([value for _, value in good], show) + on)
    if bad:
        found = f"only {span([value for _, value in bad], show)} on {where((place for place, _ in bad), places)}"
        yield Row(check, Status.warning, found, do)


def span(values: Sequence[float], show: Callable[[float], str]) -> str:
    """The smallest and the largest value, or the one that all are."""
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.1f} GiB"


def speed(rate: float) -> str:
    """Bytes per second in GB/s, with the digits that count."""
    return f"{rate / 1e9:.3g} GB/s"
