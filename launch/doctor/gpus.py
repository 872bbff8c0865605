"""What nvidia-smi says of the GPUs of a node: who uses them, clocks, errors, temperature."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from launch.doctor.rows import Frozen, Place, Row, Status, equal, some, span, where

GPU_FIELDS = (
    "index,uuid,name,memory.total,memory.used,temperature.gpu,clocks.sm,clocks.max.sm,"
    "ecc.errors.uncorrected.volatile.total,driver_version"
)
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # newer and older name of one field
TENANT_FIELDS = "gpu_uuid,pid,process_name,used_memory"
SLOWED = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Bits of the active clock event reasons that mean trouble (NVML, nvmlClocksEventReasons); idle and a cap do not."""
BUSY_MIB = 1024
"""Memory in use from which on a GPU is not idle; less is what drivers and monitors keep."""


class Gpu(Frozen):
    """One GPU; None: the driver does not say."""

    index: int
    uuid: str
    """Without the prefix GPU-, as torch gives it."""
    name: str
    total_mib: int | None
    used_mib: int | None
    temperature: int | None
    clock: int | None
    max_clock: int | None
    ecc: int | None
    """Memory errors since the last reset that could not be corrected."""
    driver: str
    reasons: int | None


class Tenant(Frozen):
    """A process that computes on a GPU."""

    uuid: str
    pid: int
    name: str
    used_mib: int | None


class Smi(Frozen):
    """What nvidia-smi said before this run touched a GPU."""

    gpus: tuple[Gpu, ...] = ()
    tenants: tuple[Tenant, ...] = ()
    error: str = ""


def look() -> Smi | None:
    """Ask nvidia-smi; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        try:
            gpus = _ask("gpu", f"{GPU_FIELDS},{REASONS[0]}")
        except subprocess.CalledProcessError:  # an older driver refuses the newer name
            gpus = _ask("gpu", f"{GPU_FIELDS},{REASONS[1]}")
        return Smi(gpus=parse_gpus(gpus), tenants=parse_tenants(_ask("compute-apps", TENANT_FIELDS)))
    except subprocess.CalledProcessError as error:
        return Smi(error=(error.stdout + error.stderr).strip() or f"exit status {error.returncode}")
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return Smi(error=str(error))


def _ask(what: str, fields: str) -> str:
    command = ["nvidia-smi", f"--query-{what}={fields}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """The answer to GPU_FIELDS and a field of REASONS. Raises ValueError for other columns."""
    return tuple(
        Gpu(
            index=int(index),
            uuid=plain(uuid),
            name=name,
            total_mib=_whole(total),
            used_mib=_whole(used),
            temperature=_whole(temperature),
            clock=_whole(clock),
            max_clock=_whole(highest),
            ecc=_whole(ecc),
            driver=driver,
            reasons=_whole(reasons),
        )
        for index, uuid, name, total, used, temperature, clock, highest, ecc, driver, reasons in _cells(text, 11)
    )


def parse_tenants(text: str) -> tuple[Tenant, ...]:
    """The answer to TENANT_FIELDS. Raises ValueError for other columns."""
    return tuple(
        Tenant(uuid=plain(uuid), pid=int(pid), name=name, used_mib=_whole(used))
        for uuid, pid, name, used in _cells(text, 4)
    )


def plain(uuid: str) -> str:
    """A UUID as torch and nvidia-smi both know it."""
    return uuid.removeprefix("GPU-")


def _cells(text: str, columns: int) -> Iterator[list[str]]:
    for cells in csv.reader(text.splitlines(), skipinitialspace=True):
        if cells and len(cells) != columns:
            raise ValueError(f"nvidia-smi printed {len(cells)} columns, not {columns}: {', '.join(cells)}")
        if cells:
            yield [cell.strip() for cell in cells]


def _whole(text: str) -> int | None:
    """A number, also in hexadecimal; None for [N/A], [Not Supported] and their like."""
    return None if text.startswith("[") or text in ("", "N/A") else int(text, 0)


def rows(nodes: Sequence[Place], facts: Sequence[Smi | None], used: dict[str, set[str]]) -> Iterator[Row]:
    """Rows of the GPUs this run uses.

    nodes, facts: one place a node and what nvidia-smi said there. used: the UUIDs of the run's devices on each node;
    where nvidia-smi knows none of them (a part of a GPU has a name of its own), all GPUs of the node are looked at.
    """
    there = [(place, smi) for place, smi in zip(nodes, facts, strict=True) if smi is not None]
    silent = [place for place, smi in zip(nodes, facts, strict=True) if smi is None and used.get(place.node)]
    if silent:
        found = f"no nvidia-smi on {where(silent, nodes)}: users, clocks, errors and temperature were not looked at"
        yield Row("GPUs idle", Status.warning, found, "add nvidia-smi to the PATH or to the image")
    if broken := [(place, smi) for place, smi in there if smi.error]:
        do = "run nvidia-smi on that node; reload the driver or drain the node"
        names = some([f"{place.node}: {smi.error}" for place, smi in broken])
        yield Row("GPUs idle", Status.failed, f"nvidia-smi fails on {names}", do)
    looked = [(place, gpu) for place, smi in there for gpu in _mine(smi, used.get(place.node, set()))]
    if not looked:
        return
    yield from _idle(looked, [(place, tenant) for place, smi in there for tenant in smi.tenants])
    places, gpus = [place for place, _ in looked], [gpu for _, gpu in looked]
    kinds = [f"{gpu.name}, {gpu.total_mib} MiB, at most {gpu.max_clock} MHz" for gpu in gpus]
    yield equal("GPU kind", places, kinds, "mixed GPUs run at the pace of the slowest", Status.warning)
    yield equal("GPU driver", places, [gpu.driver for gpu in gpus], "install one driver on all nodes", Status.warning)
    yield _slowed(looked)
    yield _memory_errors(looked)
    known = [gpu.temperature for gpu in gpus if gpu.temperature is not None]
    if known:
        yield Row("GPU temperature", Status.note, span(known, lambda value: f"{value:.0f} °C"))


def _mine(smi: Smi, uuids: set[str]) -> Sequence[Gpu]:
    return [gpu for gpu in smi.gpus if gpu.uuid in uuids] or smi.gpus


def _name(place: Place, gpu: Gpu) -> str:
    return f"GPU {gpu.index} ({place.node})"


def _idle(looked: Sequence[tuple[Place, Gpu]], tenants: Sequence[tuple[Place, Tenant]]) -> Iterator[Row]:
    """Nobody else computes there, and nothing holds memory that no process owns up to (another container's)."""
    busy: dict[Status, list[str]] = {Status.failed: [], Status.warning: []}
    for place, gpu in looked:
        who = [tenant for node, tenant in tenants if node.node == place.node and tenant.uuid == gpu.uuid]
        held = gpu.used_mib or 0
        if who or held >= BUSY_MIB:
            names = some([f"{t.name} (process {t.pid})" for t in who]) or "a process that is not seen from here"
            # A display holds memory too, and is not in the list of those that compute.
            taken = held >= BUSY_MIB if who else held * 5 >= (gpu.total_mib or 0)
            status = Status.failed if taken else Status.warning
            busy[status].append(f"{_name(place, gpu)}: {names}, {held} MiB in use")
    do = "end it (left over from another job?), or have the node drained; then start again"
    yield from (Row("GPUs idle", status, some(names), do) for status, names in busy.items() if names)
    if not any(busy.values()):
        highest = max(gpu.used_mib or 0 for _, gpu in looked)
        yield Row("GPUs idle", Status.ok, f"{len(looked)} GPU(s), at most {highest} MiB in use")


def _slowed(looked: Sequence[tuple[Place, Gpu]]) -> Row:
    slowed = []
    for place, gpu in looked:
        reasons = [text for bit, text in SLOWED.items() if (gpu.reasons or 0) & bit]
        if reasons:
            slowed.append(f"{_name(place, gpu)}: {', '.join(reasons)}, {gpu.clock} of {gpu.max_clock} MHz")
    if slowed:
        do = "look at cooling and power of the node (nvidia-smi -q -d PERFORMANCE), or leave it out"
        return Row("GPU clocks", Status.warning, some(slowed), do)
    silent = sum(gpu.reasons is None for _, gpu in looked)
    if silent:
        return Row("GPU clocks", Status.note, f"{silent} GPU(s) do not say whether they are slowed down")
    return Row("GPU clocks", Status.ok, "none is slowed down")


def _memory_errors(looked: Sequence[tuple[Place, Gpu]]) -> Row:
    broken = [f"{_name(place, gpu)}: {gpu.ecc}" for place, gpu in looked if gpu.ecc]
    if broken:
        do = "have the GPU reset or the node drained (nvidia-smi -q -d ECC,ROW_REMAPPER)"
        return Row("GPU memory errors", Status.warning, f"not correctable: {some(broken)}", do)
    silent = sum(gpu.ecc is None for _, gpu in looked)
    if silent:
        return Row("GPU memory errors", Status.note, f"not counted on {silent} GPU(s)")
    return Row("GPU memory errors", Status.ok, "none that could not be corrected")
