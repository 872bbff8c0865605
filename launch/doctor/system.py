"""What the operating system grants a process: cores, memory, shared memory, limits."""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.doctor.rows import Frozen, Place, Row, Status, each, gib, least, span

MEMORY = 2**30  # bytes that a process should find free
SHM = 512 * 2**20  # containers get 64 MiB unless told otherwise, too little for the buffers NCCL shares inside a node
FILES = 4096
UNLIMITED = -1


class System(Frozen):
    """Limits and free memory, in bytes."""

    cores: int
    """Cores this process may run on."""
    memory_total: int | None
    memory_free: int | None
    """What can be had without swapping, within the limits of the control groups; None: this system does not say."""
    shm: int | None
    """Size of /dev/shm; None: there is none."""
    open_files: int
    """Hard limit of open files: a reader raises the soft one itself. UNLIMITED: none."""
    locked: int
    """Limit of locked memory. UNLIMITED: none."""


def look() -> System:
    """The facts of this process."""
    total, free = memory()
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return System(
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        memory_total=total,
        memory_free=free,
        shm=_size("/dev/shm"),
        open_files=_limit(resource.RLIMIT_NOFILE)[1],
        locked=_limit(resource.RLIMIT_MEMLOCK)[0],
    )


def memory(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """Total and free bytes of the machine under `root`, or of the tightest control group (version 2) around us."""
    try:
        lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines())
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None, None
    for group in _control_groups(root):
        try:
            limit = int((group / "memory.max").read_text(encoding="ascii"))  # or "max": none
            used = int((group / "memory.current").read_text(encoding="ascii"))
            stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            cached = int(stat["file"])  # counted as used, and given back when it is needed
        except (OSError, KeyError, ValueError):
            continue
        total, free = min(total, limit), max(min(free, limit - used + cached), 0)
    return total, free


def _control_groups(root: Path) -> Iterator[Path]:
    """The group of this process and those around it: a job's limit may stand on any of them."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    base = root / "sys/fs/cgroup"
    for line in lines:
        if line.startswith("0::/"):
            group = base / line.removeprefix("0::/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(base))


def _size(folder: str) -> int | None:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


def _limit(which: int) -> tuple[int, int]:
    soft, hard = (UNLIMITED if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(which))
    return soft, hard


def rows(places: Sequence[Place], facts: Sequence[System], *, gpus: bool) -> Iterator[Row]:
    """Cores, memory and limits; `gpus`: whether the run uses any."""
    processes = Counter(place.node for place in places)
    yield from each("cores", places, (_cores(f.cores, processes[p.node]) for p, f in zip(places, facts, strict=True)))
    yield from _memory(places, facts, processes)
    shm = [(place, f.shm) for place, f in zip(places, facts, strict=True) if f.shm is not None]
    do = "start the container with --shm-size=8g or --ipc=host"
    yield from least("/dev/shm", [p for p, _ in shm], [size for _, size in shm], SHM, gib, do)
    files = [float("inf") if f.open_files == UNLIMITED else f.open_files for f in facts]
    yield from least("open files", places, files, FILES, _number, "raise the hard limit of open files (ulimit -Hn)")
    several = len(processes) > 1
    yield from each("locked memory", places, (_locked(f.locked, gpus and several) for f in facts))


def _number(value: float) -> str:
    return "unlimited" if value == float("inf") else f"{value:,.0f}"


def _cores(cores: int, processes: int) -> tuple[Status, str, str]:
    found = f"{cores} for {processes} process{'es' * (processes > 1)} of a node"
    if cores >= processes:
        return Status.ok, found, ""
    do = "ask for more cores (Slurm: --cpus-per-task, for all processes of a node), or bind them less tightly"
    return Status.warning, found, do


def _memory(places: Sequence[Place], facts: Sequence[System], processes: Counter[str]) -> Iterator[Row]:
    known = [(p, f) for p, f in zip(places, facts, strict=True) if f.memory_free is not None]
    free = [(f.memory_free or 0) / processes[p.node] for p, f in known]
    do = "end what else runs there, or ask for more memory (Slurm: --mem)"
    for row in least("host memory", [p for p, _ in known], free, MEMORY, gib, do):
        total = span([f.memory_total or 0 for _, f in known], gib)
        yield row._replace(found=f"free for a process: {row.found}; a node has {total}")
    if not known:
        yield Row("host memory", Status.note, "this system does not say how much is free")


def _locked(locked: int, matters: bool) -> tuple[Status, str, str]:
    if locked == UNLIMITED:
        return Status.ok, "unlimited", ""
    found = f"at most {locked / 2**20:,.0f} MiB"
    do = "InfiniBand locks memory: `ulimit -l unlimited` (Slurm: PropagateResourceLimitsExcept=MEMLOCK)"
    return (Status.warning, found, do) if matters else (Status.note, found, "")
