"""A folder that all nodes write to: seen alike, free space, speed, rename and locks."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from launch.doctor.meeting import Meeting, Stage
from launch.doctor.rows import Frozen, Place, Row, Status, each, gib, groups, least, some, span, speed, where

MIB = 2**20
PROBE = MIB
WRITTEN = 64 * MIB
SPACE = 10 * 2**30  # bytes that a run should find free
PATIENCE = 10.0  # seconds until a file that one node has renamed into place is seen by all
SLOW = 2.0


class Disk(Frozen):
    """What one process found in the folder."""

    seen: float | None = None
    """Seconds until the file of rank 0 was there; None: it never came."""
    same: bool = False
    locked: str = ""
    """"yes": the lock of rank 0 is felt here; otherwise what happened."""
    free: int = 0
    rate: float | None = None
    """Bytes per second, fsync included; None: another process of the node has measured it."""


class Probe(Frozen):
    """Where the file of rank 0 is."""

    folder: str = ""
    sha256: str = ""


def look(meeting: Meeting, folder: Path, writes: bool) -> Stage[Disk]:
    """Look at the folder together with all other processes; `writes`: measure the speed of writing here."""
    with ExitStack() as stack:
        said = meeting.stage("probe", Probe, lambda: _prepare(folder, stack) if meeting.reporter else Probe())
        if not said.go:
            return Stage([None] * len(said.values), said.errors, False)
        text = said.values[0].model_dump_json() if said.values and said.values[0] else ""
        probe = Probe.model_validate_json(meeting.share("probe place", text))
        return meeting.stage("disk", Disk, lambda: examine(probe, meeting.rank, writes))


def _prepare(folder: Path, stack: ExitStack) -> Probe:
    """A folder of our own with a file and a lock that is held until `stack` is closed, which removes all."""
    own = Path(tempfile.mkdtemp(prefix=".doctor-", dir=folder.resolve()))
    stack.callback(shutil.rmtree, own, ignore_errors=True)
    content = os.urandom(PROBE)
    _write(own / "new", content)
    os.replace(own / "new", own / "probe")
    lock = stack.enter_context((own / "lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        (own / "lock").write_text(error.strerror or str(error), encoding="utf-8")
    return Probe(folder=str(own), sha256=hashlib.sha256(content).hexdigest())


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def examine(probe: Probe, rank: int, writes: bool) -> Disk:
    """What this process sees of the probe. Raises OSError when it cannot write where it should."""
    own, began = Path(probe.folder), time.monotonic()
    while not (own / "probe").exists():
        if time.monotonic() - began > PATIENCE:
            return Disk()
        time.sleep(0.02)
    seen = time.monotonic() - began
    same = hashlib.sha256((own / "probe").read_bytes()).hexdigest() == probe.sha256
    space = os.statvfs(own)
    rate = _speed(own, rank) if writes else None
    return Disk(seen=seen, same=same, locked=_felt(own / "lock"), free=space.f_bavail * space.f_frsize, rate=rate)


def _speed(own: Path, rank: int) -> float:
    content = os.urandom(MIB) * (WRITTEN // MIB)
    began = time.perf_counter()
    _write(own / f"{rank}.new", content)
    took = time.perf_counter() - began
    os.replace(own / f"{rank}.new", own / f"{rank}")
    (own / f"{rank}").unlink()
    return WRITTEN / took


def _felt(path: Path) -> str:
    """Whether a lock that another open file holds keeps this process out."""
    if refused := path.read_text(encoding="utf-8"):
        return f"locks are refused: {refused}"
    with path.open("r+") as file:  # NFS gives exclusive locks on files open for writing only
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "yes"
        except OSError as error:
            return f"locks are refused: {error.strerror or error}"
    return "the lock of another process is not felt"


def rows(folder: Path, places: Sequence[Place], found: Stage[Disk]) -> Iterator[Row]:
    """What the folder can be trusted with; places and values by rank."""
    if found.errors:
        yield from _errors(folder, places, found.errors)
    known = [(place, disk) for place, disk in zip(places, found.values, strict=True) if disk is not None]
    if not known:
        return
    yield from each("shared disk", [place for place, _ in known], (_view(folder, disk) for _, disk in known))
    seen = [(place, disk) for place, disk in known if disk.seen is not None]
    if not seen:
        return
    there = [place for place, _ in seen]
    do = "make room, or choose another run_root; a run keeps `train.keep` checkpoints"
    yield from least("disk space", there, [disk.free for _, disk in seen], SPACE, gib, do)
    yield from each("disk locks", there, (_locks(disk) for _, disk in seen))
    yield from _rates([(place, disk.rate) for place, disk in seen if disk.rate is not None])


def _errors(folder: Path, places: Sequence[Place], errors: dict[int, str]) -> Iterator[Row]:
    do = "create the folder, correct its permissions, mount it on every node, or give another --folder"
    texts = [f"{folder} cannot be used: {text}" for text in errors.values()]
    for text, who in groups([places[rank] for rank in errors], texts):
        yield Row("shared disk", Status.failed, f"{text} on {where(who, places)}", do)


def _view(folder: Path, disk: Disk) -> tuple[Status, str, str]:
    if disk.seen is None:
        do = "mount the same file system there, under the same path"
        return Status.failed, f"a file of rank 0 in {folder} was not seen within {PATIENCE:g} s", do
    if not disk.same:
        do = "the nodes do not see one file system: mount the same one under the same path"
        return Status.failed, f"a file of rank 0 in {folder} has another content", do
    return Status.ok, f"a file of rank 0 in {folder} reads the same; rename works", ""


def _locks(disk: Disk) -> tuple[Status, str, str]:
    if disk.locked == "yes":
        return Status.ok, "a lock of rank 0 is felt", ""
    do = "mount with locks (Lustre: -o flock); without, two jobs can write to one run folder unnoticed"
    return Status.warning, disk.locked, do


def _rates(rates: Sequence[tuple[Place, float]]) -> Iterator[Row]:
    if not rates:
        return
    values = [rate for _, rate in rates]
    found = f"{span(values, speed)} from each node, {WRITTEN // MIB} MiB with fsync"
    slow = [f"{place.node}: {speed(rate)}" for place, rate in rates if rate * SLOW < median(values)]
    if slow:
        yield Row("disk write", Status.warning, f"{found}; slow: {some(slow)}", "look at that node's mount and network")
    else:
        yield Row("disk write", Status.ok, found)
