"""The loader beside its peers, on the same chips: a file per chip, plain WebDataset, MosaicML streaming, LitData, ours.

Every loader lives in a child process of its own with one thread. All get the same tasks in turn, so that a slow moment
of the machine hits each of them, and a loader that does not deliver exactly the same chips is not timed.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from foundation.bench_loader_peers import BATCH
from shards.errors import DataError

NAMES = {
    "folder": "a PNG file per chip",
    "webdataset": "WebDataset, PNG",
    "streaming-png": "MosaicML streaming, PNG",
    "streaming-raw": "MosaicML streaming, arrays",
    "litdata-png": "LitData, PNG",
    "litdata-raw": "LitData, arrays",
    "ours": "ours",
}
WORKERS = (0, 1, 2)


class Table(NamedTuple):
    """A table of results."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass
class Measured:
    """What was measured of one loader: samples/s per (output side, workers) as (per core, wall), and single figures."""

    name: str
    skipped: str = ""
    speed: dict[tuple[int, int], list[tuple[float, float]]] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    resume: list[float] = field(default_factory=list)
    how: str = ""
    memory: float = 0.0


class Child:
    """A loader in a process of its own: `ask` sends a task and waits; raises DataError when the answer is an error."""

    def __init__(self, name: str, python: str, root: Path) -> None:
        self.name, self.root = name, root
        script = Path(__file__).with_name("bench_loader_peers.py")
        ours = name == "ours"
        command = [sys.executable, "-m", "foundation.bench_loader_ours"] if ours else [python, str(script), name]
        # A script's folder would come first on the path of modules, and ours holds names like `files`.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | ({} if ours else {"PYTHONSAFEPATH": "1"})
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close
        self.spawned = time.time()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.log.close()

    def ask(self, do: str, **task: Any) -> dict[str, Any]:
        """The answer to a task."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, "root": str(self.root), **task}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.log.seek(0)
            line = json.dumps({"error": (self.log.read().strip().splitlines() or ["it ended without a word"])[-1]})
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise DataError(found["error"], where=f"loader {self.name}, task {do}", do="see --python for peers")
        return found


@dataclass(frozen=True)
class Bench:
    """One comparison: chips [side, side] in `root`, augmented to `sizes`; peers run in the interpreter `python`."""

    root: Path
    chips: int = 4096
    side: int = 128
    sizes: tuple[int, ...] = (96, 224)
    repeats: int = 3
    python: str = sys.executable
    names: tuple[str, ...] = tuple(NAMES)

    def child(self, name: str) -> Child:
        """A fresh process of a loader."""
        return Child(name, self.python, self.root / ("png" if name == "folder" else name))

    def run(self) -> list[Measured]:
        """Write the chips in every format, check what comes back, and measure; raises DataError where ours fails."""
        digest = write_chips(self.root / "png", self.chips, self.side)
        found = [Measured(name) for name in self.names]
        with ExitStack() as stack:
            children = {one.name: stack.enter_context(self.child(one.name)) for one in found}
            for one in found:
                one.skipped = self.why_not(children[one.name], digest)
            used = [one for one in found if not one.skipped]
            for one in self.turns(used):
                with self.child(one.name) as fresh:
                    one.first.append(fresh.ask("first", spawned=fresh.spawned)["seconds"])
            for size in (0, *self.sizes):
                for one in used:
                    children[one.name].ask("pass", size=size)  # warms up
                for workers in WORKERS:
                    for one in self.turns(used):
                        took = children[one.name].ask("pass", workers=workers, size=size)
                        rates = (took["samples"] / took["cpu"], took["samples"] / took["wall"])
                        one.speed.setdefault((size, workers), []).append(rates)
            for one in self.turns(used):
                answer = children[one.name].ask("resume", position=self.chips * 3 // 4 // BATCH * BATCH)
                one.how = answer["how"]
                one.resume.append(answer["seconds"])
            for one in used:
                with self.child(one.name) as fresh:
                    one.memory = fresh.ask("memory", workers=1, skip=self.chips // BATCH // 2)["added"]
        return found

    def turns(self, used: Sequence[Measured]) -> Iterator[Measured]:
        """Every loader once per repetition, each time in the opposite order."""
        for number in range(self.repeats):
            yield from used if number % 2 == 0 else used[::-1]

    def why_not(self, child: Child, digest: str) -> str:
        """Have the chips written in the format of a loader and compare what it reads with them; "" or why it is out."""
        try:
            child.ask("write", source=str(self.root / "png"))
            for workers in WORKERS:
                found = child.ask("content", workers=workers)
                if (found["samples"], found["digest"]) != (self.chips, digest):
                    return f"{workers} workers delivered other chips: {found['samples']} of {self.chips}"
            for size in self.sizes:
                kind = child.ask("kind", size=size)
                if (kind["shape"], kind["dtype"]) != ([BATCH, 1, size, size], "torch.float32"):
                    return f"delivered {kind['dtype']} {kind['shape']}"
        except DataError as error:
            if child.name == "ours":
                raise
            return error.what
        return ""


def write_chips(root: Path, count: int, side: int) -> str:
    """4-look speckle chips, uint8 PNG in four class folders; the hash of the multiset of their pixels."""
    rng = np.random.default_rng(0)
    hashes = []
    for number in range(count):
        chip = (np.sqrt(rng.gamma(4, 1 / 4, (side, side))) * 60).clip(0, 255).astype(np.uint8)
        hashes.append(hashlib.sha256(chip.tobytes()).hexdigest())
        file = root / f"class{number % 4}" / f"{number:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chip).save(file)
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def tables(found: Iterable[Measured]) -> list[Table]:
    """Throughput, then single figures, then what was left out: medians, a row per loader."""
    found = list(found)
    timed = [one for one in found if not one.skipped]
    speeds: list[tuple[str, ...]] = []
    for size, workers in timed[0].speed if timed else []:
        what = f"augmented to {size} px" if size else "chips only"
        for one in timed:
            core, wall = _medians(one, size, workers)
            ratio = core / _medians(timed[0], size, workers)[0]
            speeds.append((what, str(workers), NAMES[one.name], f"{core:,.0f}", f"{wall:,.0f}", f"{ratio:.1f}"))
    single: list[tuple[str, ...]] = [
        (
            NAMES[one.name],
            f"{statistics.median(one.first):.2f}",
            f"{one.how} in {statistics.median(one.resume):.3f}",
            f"{one.memory:.0f}",
        )
        for one in timed
    ]
    skipped: list[tuple[str, ...]] = [(NAMES[one.name], one.skipped) for one in found if one.skipped]
    rate = ("work", "workers", "loader", "samples/s per core", "samples/s", "× the first, per core")
    found_tables = [
        Table("Throughput", rate, speeds),
        Table(
            "First batch, resume, and the memory that reading with one worker adds",
            ("loader", "first batch, s", "resume, s", "added, MB"),
            single,
        ),
    ]
    return found_tables + ([Table("Not measured", ("loader", "reason"), skipped)] if skipped else [])


def _medians(one: Measured, size: int, workers: int) -> tuple[float, float]:
    core, wall = zip(*one.speed[size, workers], strict=True)
    return statistics.median(core), statistics.median(wall)


def memory_table(root: Path, shards: int = 100, per_shard: int = 10_000, passes: int = 10) -> Table:
    """Memory of a process over several passes of a catalog of shards · per_shard tiny (8 x 8) chips."""
    with Child("ours", sys.executable, root / "large") as child:
        child.ask("write-large", shards=shards, per_shard=per_shard)
        answer = child.ask("memory-per-pass", passes=passes)
    base = answer["base"]
    rows: list[tuple[str, ...]] = [
        (str(n), *(f"{m[k]:.1f}" for k in ("uss", "rss")), f"{m['uss'] - base['uss']:.1f}")
        for n, m in enumerate(answer["passes"], start=1)
    ]
    title = (
        f"A process with one reader over {shards * per_shard:,} samples ({answer['samples_per_second']:,.0f} samples/s)"
    )
    return Table(title, ("pass", "private (USS), MB", "resident (RSS), MB", "private beyond its imports, MB"), rows)


def run(
    repeats: int = 3,
    python: str | None = None,
    chips: int = 4096,
    sizes: tuple[int, ...] = (96, 224),
    large: int = 0,
) -> list[Table]:
    """The whole comparison in a temporary folder; `large` > 0: memory over as many passes of a million samples.

    `chips` is a multiple of 2 · BATCH, so that every loader of two processes can deliver whole batches. Raises
    DataError when it is not, or when our own loader fails.
    """
    if chips < 1 or chips % (2 * BATCH):
        raise DataError(f"{chips} chips do not fill whole batches", do=f"use a multiple of {2 * BATCH}")
    with tempfile.TemporaryDirectory(prefix="foundation-bench-") as scratch:
        bench = Bench(Path(scratch), chips, sizes=sizes, repeats=repeats, python=python or sys.executable)
        found = tables(bench.run())
        return [*found, memory_table(Path(scratch), passes=large)] if large else found


def write_markdown(path: Path, intro: str, found: Iterable[Table]) -> None:
    """The tables as a Markdown file: a heading, `intro`, and a table per section."""
    lines = ["# The loader beside its peers", "", intro.strip()]
    for table in found:
        lines += ["", f"## {table.title}", "", _line(table.header), _line(["---"] * len(table.header))]
        lines += [_line(row) for row in table.rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"
