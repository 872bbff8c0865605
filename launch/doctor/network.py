"""Clocks against each other, the all-reduce, and the links of the ring."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch

from launch.doctor.meeting import Group
from launch.doctor.rows import Frozen, Place, Row, Status, span, speed

MIB = 2**20
SIZES = (MIB, 16 * MIB, 64 * MIB)
LINK = 8 * MIB
ROUNDS = 20  # of a clock comparison; the fastest one counts
SKEW = 1.0  # seconds
UNEQUAL = 2.0  # factor between ranks or links from which on it is worth a look


class Clock(Frozen):
    """How far the clock of a node is ahead of that of rank 0, in seconds, and how sure that is."""

    node: str
    ahead: float
    uncertain: float
    """Half of the fastest round trip."""


class Timing(Frozen):
    """One size of the all-reduce on one rank."""

    size: int
    """Bytes of the tensor."""
    seconds: float
    """The median."""


class Link(Frozen):
    """A pair of ranks, one of which has measured it: bytes per second of one direction after the other."""

    one: int
    other: int
    rate: float


class Network(Frozen):
    """What one rank has measured."""

    clocks: tuple[Clock, ...] = ()
    all_reduce: tuple[Timing, ...] = ()
    links: tuple[Link, ...] = ()


def look(group: Group, nodes: Sequence[str], seconds: float) -> Network:
    """Measure, together with all other ranks; nodes[r] is the node of rank r."""
    return Network(
        clocks=tuple(compare_clocks(group, nodes)),
        all_reduce=tuple(_all_reduce(group, size, seconds / len(SIZES)) for size in SIZES),
        links=tuple(_links(group)),
    )


def compare_clocks(group: Group, nodes: Sequence[str]) -> Iterator[Clock]:
    """Rank 0 asks the first rank of each other node for the time, again and again (Cristian's algorithm)."""
    stamp = torch.zeros(1, dtype=torch.float64)
    for leader in sorted({nodes.index(node) for node in nodes} - {0}):
        if group.rank == leader:
            for _ in range(ROUNDS):
                group.receive(stamp, 0)
                group.send(torch.tensor([time.time()], dtype=torch.float64), 0)
        elif group.rank == 0:
            rounds = []
            for _ in range(ROUNDS):
                asked, began = time.time(), time.perf_counter()
                group.send(stamp, leader)
                group.receive(stamp, leader)
                trip = time.perf_counter() - began
                rounds.append((trip, float(stamp) - (asked + trip / 2)))
            trip, ahead = min(rounds)
            yield Clock(node=nodes[leader], ahead=ahead, uncertain=trip / 2)


def _all_reduce(group: Group, size: int, budget: float) -> Timing:
    """Median time of an all-reduce of so many bytes; at least three, then as many as the budget allows."""
    tensor = torch.zeros(size // 4, device=group.device)
    group.all_reduce(tensor)  # connections and buffers are made by the first one
    once = group.largest(_timed(group, lambda: group.all_reduce(tensor)))
    times = [_timed(group, lambda: group.all_reduce(tensor)) for _ in range(repetitions(once, budget))]
    return Timing(size=size, seconds=median(times))


def repetitions(once: float, budget: float) -> int:
    """How often something that takes `once` seconds is done: 3 to 50 times."""
    return min(max(int(budget / max(once, 1e-6)), 3), 50)


def _timed(group: Group, action: Callable[[], None]) -> float:
    group.finish()
    began = time.perf_counter()
    action()
    group.finish()
    return time.perf_counter() - began


def ring(size: int) -> list[list[tuple[int, int]]]:
    """The links of a ring in rounds, in which no rank has more than one.

    >>> ring(2), ring(5)
    ([[(0, 1)]], [[(0, 1), (2, 3)], [(1, 2), (3, 4)], [(4, 0)]])
    """
    links = [(rank, (rank + 1) % size) for rank in range(size if size > 2 else size - 1)]
    last = [links.pop()] if size % 2 and size > 2 else []
    return [part for part in (links[0::2], links[1::2], last) if part]


def _links(group: Group) -> Iterator[Link]:
    """Each link of the ring, both directions one after the other, while the other links of its round are busy too."""
    tensor = torch.zeros(LINK // 4, device=group.device)
    for links in ring(group.size):
        group.largest(0.0)
        for one, other in links:
            if group.rank not in (one, other):
                continue

            def there_and_back(first: bool = group.rank == one, peer: int = one + other - group.rank) -> None:
                for sends in (first, not first):
                    group.send(tensor, peer) if sends else group.receive(tensor, peer)

            there_and_back()
            times = [_timed(group, there_and_back) for _ in range(3)]
            if group.rank == one:
                yield Link(one=one, other=other, rate=2 * LINK / median(times))


def rows(places: Sequence[Place], facts: Sequence[Network]) -> Iterator[Row]:
    """Clocks, all-reduce and links; places and facts by rank."""
    clocks = [clock for fact in facts for clock in fact.clocks]
    yield _clock_row(clocks, len({place.node for place in places}))
    yield _all_reduce_row(places, [fact.all_reduce for fact in facts])
    links = [link for fact in facts for link in fact.links]
    for check, crossing in (("links inside nodes", False), ("links between nodes", True)):
        chosen = [link for link in links if (places[link.one].node != places[link.other].node) is crossing]
        if chosen:
            yield _link_row(check, places, chosen)


def _clock_row(clocks: Sequence[Clock], nodes: int) -> Row:
    if not clocks:
        return Row("clock skew", Status.ok, "one node, one clock")
    off = [clock for clock in clocks if abs(clock.ahead) - clock.uncertain > SKEW]
    if not off:
        worst = max(clocks, key=lambda clock: abs(clock.ahead))
        text = f"at most {abs(worst.ahead) * 1e3:.1f} ms over {nodes} nodes (± {worst.uncertain * 1e3:.1f} ms)"
        return Row("clock skew", Status.ok, text)
    sides = [f"{clock.node} is {abs(clock.ahead):.1f} s {'ahead' if clock.ahead > 0 else 'behind'}" for clock in off]
    do = "start chrony or ntpd there: logs, leases and time limits go by these clocks"
    return Row("clock skew", Status.warning, f"against the node of rank 0: {', '.join(sides)}", do)


def _all_reduce_row(places: Sequence[Place], facts: Sequence[Sequence[Timing]]) -> Row:
    """Bus bandwidth: what crosses the slowest link of a ring, 2(n-1)/n times the tensor."""
    share = 2 * (len(places) - 1) / len(places)
    rates = [share * timings[-1].size / timings[-1].seconds for timings in facts]
    small = facts[0][0]
    found = (
        f"{speed(median(rates))} of bus bandwidth at {facts[0][-1].size // MIB} MiB, "
        f"{small.seconds * 1e3:.3g} ms for {small.size // MIB} MiB"
    )
    if max(rates) <= UNEQUAL * min(rates):
        return Row("all-reduce", Status.ok, found)
    slow = places[rates.index(min(rates))]
    do = "see the rows of links; look for other work on that node"
    spread = f"ranks differ: {span(rates, speed)}, least on rank {slow.rank} ({slow.node})"
    return Row("all-reduce", Status.warning, f"{found}; {spread}", do)


def _link_row(check: str, places: Sequence[Place], links: Sequence[Link]) -> Row:
    middle = median(link.rate for link in links)
    slowest = min(links, key=lambda link: link.rate)
    name = f"{speed(slowest.rate)} between ranks {slowest.one} ({places[slowest.one].node}) and {slowest.other} "
    name += f"({places[slowest.other].node})"
    if len(links) == 1:
        return Row(check, Status.ok, name)
    found = f"median {speed(middle)} over {len(links)}, slowest {name}"
    if slowest.rate * UNEQUAL >= middle:
        return Row(check, Status.ok, found)
    do = "look at cables, switch ports and the network interface that is used (NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO)"
    return Row(check, Status.warning, found, do)
