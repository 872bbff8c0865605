"""What a process knows of itself before it touches a device, and whether the processes are the ones that were meant."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from foundation.training.declared import Declared
from launch.doctor import gpus, software, system
from launch.doctor.rows import Place, Row, Status, equal, some


class Facts(Place):
    """One process."""

    local_rank: int
    pid: int
    world_size: int
    engine: str
    """What `accelerate launch` declares; empty: nothing."""
    step_tasks: int
    """Tasks of the Slurm step around it; 1 outside of one."""
    software: software.Software
    system: system.System
    smi: gpus.Smi | None
    """Asked by the first process of a node only."""


def look(rank: int, launched: Declared, environment: Mapping[str, str] = os.environ) -> Facts:
    """The facts of this process."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    return Facts(
        rank=rank,
        node=environment.get("SLURMD_NODENAME") or socket.gethostname(),
        local_rank=launched.local_rank,
        pid=os.getpid(),
        world_size=launched.world_size,
        engine=launched.engine or "",
        step_tasks=int(tasks) if tasks.isdecimal() else 1,
        software=software.look(),
        system=system.look(),
        smi=gpus.look() if launched.local_rank == 0 else None,
    )


def rows(facts: Sequence[Facts], size: int, patience: float) -> Iterator[Row]:
    """Whether each rank is there, once, and where they are; `size` processes were waited for so many seconds."""
    check = "processes"
    if size == 1 and facts[0].step_tasks > 1:
        found = f"one of {facts[0].step_tasks} tasks of srun that do not know of each other"
        do = "start the processes with a launcher: srun ... torchrun ... -m foundation doctor"
        yield Row(check, Status.failed, found, do)
    ranks = Counter(fact.rank for fact in facts)
    if missing := [rank for rank in range(size) if rank not in ranks]:
        here = some([f"{node} ({count})" for node, count in Counter(fact.node for fact in facts).items()])
        late = f" after {patience:g} s" if len(facts) < size else ""
        found = f"missing{late}: rank {some([str(rank) for rank in missing])} of {size}; here: {here}"
        yield Row(check, Status.failed, found, "see whether they were started, and with the same MASTER_ADDR and _PORT")
    for rank in (rank for rank, count in ranks.items() if count > 1):
        who = some([f"process {fact.pid} on {fact.node}" for fact in facts if fact.rank == rank])
        do = "give each process a RANK of its own: is --node-rank different on each node?"
        yield Row(check, Status.failed, f"rank {rank} exists {ranks[rank]} times: {who}", do)
    said = [f"world size {fact.world_size}, engine {fact.engine or 'auto'}" for fact in facts]
    yield equal("launcher", facts, said, "start all processes by the same command and accelerate configuration")
    local = Counter((fact.node, fact.local_rank) for fact in facts)
    if twice := [f"{node}: {rank}" for (node, rank), count in local.items() if count > 1]:
        found = f"the same LOCAL_RANK for several processes of a node ({some(twice)})"
        yield Row(check, Status.warning, found, "set LOCAL_RANK to 0, 1, ... on each node: it chooses the GPU")
    if len(ranks) == size == len(facts):
        yield _spread(facts)


def _spread(facts: Sequence[Facts]) -> Row:
    nodes = Counter(fact.node for fact in facts)
    counts = sorted(set(nodes.values()))
    if len(nodes) == 1:
        return Row("processes", Status.ok, f"{len(facts)} on node {facts[0].node}")
    total = f"{len(facts)} on {len(nodes)} nodes"
    if len(counts) == 1:
        return Row("processes", Status.ok, f"{total}, {counts[0]} each: {some(list(nodes))}")
    few = some([f"{node} has {count}" for node, count in nodes.items() if count < counts[-1]])
    return Row("processes", Status.warning, f"{total}; {few}", f"start {counts[-1]} on each node")
