"""The order in which things are looked at: what needs nothing first, what needs everybody last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from foundation.training.declared import declared
from launch.doctor import devices, disk, facts, gpus, network, operators, software, system
from launch.doctor.meeting import Group, Meeting, Several, Stage, meet
from launch.doctor.rows import Frozen, Place, Row, Status, groups, where

NOT_LOOKED = "not looked at"


class Examination(NamedTuple):
    """What came of it."""

    rows: list[Row]
    record: list[dict[str, Any]]
    """All facts of each process, as JSON takes them."""
    code: int
    """0, or 1 when something failed."""


class Joined(Frozen):
    """This process is in the group."""


def examine(
    folder: Path | None, seconds: float, patience: float, strict: bool, show: Callable[[Examination], None]
) -> int:
    """Look at everything; all processes call it, and get the same exit code. One of them calls `show`, before any ends:
    a launcher kills the others at the first exit code that is not 0. `strict`: a warning counts as a failure.

    Raises LaunchError when the processes cannot even meet.
    """
    launched = declared()
    meeting = meet(launched, patience)
    mine = facts.look(meeting.rank, launched)
    present = [facts.Facts.model_validate_json(text) for text in meeting.arrive(mine.model_dump_json())]
    present.sort(key=lambda fact: (fact.rank, fact.node))  # they came in any order
    rows: list[Row] = []
    record: list[dict[str, Any]] = []
    if meeting.reporter:
        rows += facts.rows(present, meeting.size, patience)
        rows += software.rows(present, [fact.software for fact in present])
    if meeting.complete:
        nodes = meeting.share("nodes", "\n".join(fact.node for fact in present)).split("\n")
        found, record = _together(meeting, nodes, launched.local_rank, present, folder, seconds)
        rows += found
    else:
        rows.append(Row("devices, kernels, network, disk", Status.note, f"{NOT_LOOKED}: not each rank is there once"))
        record = [fact.model_dump(mode="json") for fact in present]
    bad = {Status.failed, Status.warning} if strict else {Status.failed}
    code = int(any(row.status in bad for row in rows))
    if meeting.reporter:
        show(Examination(rows, record, code))
    code = int(meeting.share("verdict", str(code)))
    meeting.leave()
    return code


def _together(
    meeting: Meeting,
    nodes: Sequence[str],
    local_rank: int,
    present: Sequence[facts.Facts],
    folder: Path | None,
    seconds: float,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """What is looked at when each rank is there: rows and record, where the table is made."""
    claimed = meeting.stage("devices", devices.Device, lambda: devices.claim(local_rank))
    tried = meeting.stage("kernels", operators.Outcomes, lambda: operators.look(_device()))
    rows: list[Row] = []
    if meeting.reporter:
        rows += _device_rows(present, claimed)
        rows += _failures("kernels", present, tried.errors)
        if not tried.errors:
            rows += operators.rows(present, _all(tried))
    fit = meeting.agree("fit", claimed.go and not any(r.check == "devices" and r.status is Status.failed for r in rows))
    measured = _measure(meeting, nodes, seconds, fit)
    writes = nodes.index(nodes[meeting.rank]) == meeting.rank
    seen = disk.look(meeting, folder, writes) if folder else None
    if not meeting.reporter:
        return [], []
    rows += _network_rows(meeting, present, measured, fit)
    if folder and seen:
        rows += disk.rows(folder, present, seen)
    else:
        rows.append(Row("shared disk", Status.note, f"{NOT_LOOKED}: give --folder"))
    stages = {"device": claimed, "kernels": tried, "network": measured[1], "disk": seen}
    return rows, list(_record(present, stages))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _measure(
    meeting: Meeting, nodes: Sequence[str], seconds: float, fit: bool
) -> tuple[Stage[Joined] | None, Stage[network.Network] | None]:
    """Form a group and measure it; None: that was not tried."""
    if not isinstance(meeting, Several) or not fit:
        return None, None
    formed: list[Group] = []

    def join() -> Joined:
        formed.append(Group(meeting, cuda=torch.cuda.is_available()))
        return Joined()

    joined = meeting.stage("group", Joined, join)
    if not joined.go:
        return joined, None
    found = meeting.stage("network", network.Network, lambda: network.look(formed[0], nodes, seconds))
    if found.go:  # a group in which something hangs may hang here too
        formed[0].close()
    return joined, found


def _device_rows(present: Sequence[facts.Facts], claimed: Stage[devices.Device]) -> Iterator[Row]:
    """Devices, what nvidia-smi says of them, and what the system grants to the processes."""
    yield from _failures("devices", present, claimed.errors)
    if claimed.go:
        yield from devices.rows(present, _all(claimed))
    used: dict[str, set[str]] = {fact.node: set() for fact in present}
    for fact, device in zip(present, claimed.values, strict=True):
        if device and device.uuid:
            used[fact.node].add(device.uuid)
    first = [fact for fact in present if fact.local_rank == 0]
    yield from gpus.rows(first, [fact.smi for fact in first], used)
    yield from system.rows(present, [fact.system for fact in present], gpus=any(used.values()))


def _network_rows(
    meeting: Meeting,
    present: Sequence[Place],
    measured: tuple[Stage[Joined] | None, Stage[network.Network] | None],
    fit: bool,
) -> Iterator[Row]:
    joined, found = measured
    if meeting.size == 1:
        yield Row("network", Status.note, f"{NOT_LOOKED}: one process")
    elif not fit:
        yield Row("network", Status.note, f"{NOT_LOOKED}: see devices")
    elif joined and joined.errors:
        do = "open the ports between the nodes; name the interface: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
        yield from _failures("network", present, joined.errors, do)
    elif found and found.errors:
        do = "see the messages of that rank; NCCL_DEBUG=INFO says more"
        yield from _failures("network", present, found.errors, do)
    elif found:
        yield from network.rows(present, _all(found))


def _failures(check: str, present: Sequence[Place], errors: dict[int, str], do: str = "") -> Iterator[Row]:
    """A row for each different error."""
    for text, who in groups([present[rank] for rank in errors], errors.values()):
        yield Row(check, Status.failed, f"{text} on {where(who, present)}", do or "see the messages of that rank")


def _all(stage: Stage[Any]) -> list[Any]:
    return [value for value in stage.values if value is not None]


def _record(present: Sequence[facts.Facts], stages: dict[str, Stage[Any] | None]) -> Iterator[dict[str, Any]]:
    for rank, fact in enumerate(present):
        line = fact.model_dump(mode="json")
        for name, stage in stages.items():
            value = stage.values[rank] if stage else None
            line[name] = value.model_dump(mode="json") if value is not None else None
            if stage and rank in stage.errors:
                line[name] = {"error": stage.errors[rank]}
        yield line
