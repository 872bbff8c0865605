"""One page about a profile: the parts of an update, the operators that take longest, peak memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from foundation.bench import Table, markdown

TOP = 15
COLLECTIVE = re.compile(r"nccl|gloo|^c10d::|all_?reduce|all_?gather|reduce_?scatter", re.IGNORECASE)
STRETCHES = re.compile(r"^(## |ProfilerStep|Optimizer\.|DistributedDataParallel\.|FSDP::)")  # no operators


class Operator(NamedTuple):
    """An operator or kernel: calls and seconds of its own in an update, and that share of all of them."""

    name: str
    calls: float
    seconds: float
    share: float


class Profile(NamedTuple):
    """Seconds in one update: the whole, waiting for data, each part, collectives; operators; memory in GB."""

    steps: int
    update: float
    data: float
    parts: Mapping[str, float]
    collective: float
    operators: list[Operator]
    memory: Mapping[str, float]
    facts: Mapping[str, Any]
    files: tuple[Path, ...] = ()


def ranked(averages: Iterable[Any], steps: int, cuda: bool) -> tuple[list[Operator], float]:
    """Operators of torch's `key_averages` by their own time on the device, longest first; seconds of collectives.

    A collective is counted once: as what the backend did, where the trace has that.
    """
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = [(str(each.key), int(each.count), float(getattr(each, key)) / 1e6) for each in averages]
    rows = [row for row in rows if row[2] > 0 and not STRETCHES.match(row[0])]
    total = sum(seconds for *_, seconds in rows) or 1.0
    found = [Operator(name, calls / steps, seconds / steps, seconds / total) for name, calls, seconds in rows]
    found.sort(key=lambda operator: -operator.seconds)
    return found[:TOP], sum(each.seconds for each in found if COLLECTIVE.search(each.name))


def tables(found: Profile) -> Iterator[Table]:
    """Parts, operators, memory."""
    measured = sum(found.parts.values()) + found.data
    rows: list[tuple[str, ...]] = [("waiting for data", _ms(found.data), _share(found.data / measured))]
    rows += [(name, _ms(seconds), _share(seconds / measured)) for name, seconds in found.parts.items()]
    rows += [("of these: collectives", _ms(found.collective) if found.collective else "-", "")]
    rows += [
        ("an update, undisturbed", _ms(found.update), f"{found.facts['global_batch'] / found.update:,.1f} images/s")
    ]
    yield Table("Parts of an update", ("part", "ms", "share"), rows)
    lines: list[tuple[str, ...]] = [
        (o.name[:80], f"{o.calls:,.1f}", _ms(o.seconds), _share(o.share)) for o in found.operators
    ]
    yield Table(f"Operators, the {TOP} longest", ("operator", "calls", "ms, its own", "share"), lines)
    memory: list[tuple[str, ...]] = [(name.replace("_", " "), f"{value:.3f}") for name, value in found.memory.items()]
    yield Table("Memory", ("peak", "GB"), memory)


def page(found: Profile) -> str:
    """The summary as Markdown."""
    f = found.facts
    where = f"{f['device']}, torch {f['torch']}, engine {f['engine']}, {f['world_size']} process(es)"
    intro = (
        f"{f['name']} ({f['model']}, global batch {f['global_batch']}) on {where}. Means of {found.steps} updates. "
        "An update and its waiting for data are measured undisturbed; the parts in updates of their own, in which the "
        "device is waited for after each part, so that they may add up to more than an update that overlaps them; "
        "operators and collectives in further ones under the profiler, which costs time itself. Collectives run beside "
        "the backward pass, in times that stand above. All of rank 0."
    )
    return markdown("Profile", intro, tables(found))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def _share(value: float) -> str:
    return f"{value:.1%}"
