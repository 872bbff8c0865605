"""The campaign of hostile input: files, archives, shards, indexes, metadata and catalogs, through the whole data path.

`python tests/hostile.py --cases 10000 --seed 0` runs it in a child process with limits of memory and time. Case i of a
seed is always the same: `--only I` runs one. A finding is whatever is neither a valid result nor a DataError with a
reason: another exception, wrong pixels, something lost without a word, a write elsewhere, a hang, a crash.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import hostile_shards
import hostile_sources
import numpy as np

SECONDS = 90  # of one case, on a busy machine
HEADROOM = 3 << 30  # bytes of address space beyond what the imports took
PARTS = ("header",) * 13 + ("shard",) * 6 + ("source",)  # of any twenty numbers; a source holds about 25 cases


@dataclass
class Report:
    """What came of a campaign: cases by part, kind and outcome, what must not be, and the costs."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest: dict[str, float] = field(default_factory=dict)
    peak_megabytes: int = 0
    grown_megabytes: int = 0
    seconds: float = 0.0

    def add(self, part: str, outcomes: Counter[str], seconds: float) -> None:
        self.cases += outcomes.total() - outcomes["sound files packed"]
        self.outcomes.update({f"{part}: {name}": n for name, n in outcomes.items()})
        self.slowest[part] = max(self.slowest.get(part, 0.0), round(seconds, 3))

    def merge(self, other: Report) -> None:
        self.cases, self.seconds = self.cases + other.cases, self.seconds + other.seconds
        self.outcomes.update(other.outcomes)
        self.findings += other.findings
        self.slowest |= {part: max(s, self.slowest.get(part, 0.0)) for part, s in other.slowest.items()}
        self.peak_megabytes = max(self.peak_megabytes, other.peak_megabytes)
        self.grown_megabytes = max(self.grown_megabytes, other.grown_megabytes)


class LateError(BaseException):
    """No Exception, so that nothing on the way can take it for damage of a file."""


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise LateError(f"not done after {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def campaign(cases: int, seed: int, folder: Path, start: int = 0, only: int | None = None, part: str = "") -> Report:
    """At least `cases` cases: with start 0 first every kind made by hand, then random damage from number `start` on.

    `folder/now` holds the name of the case under way, and `folder/next` the number of the next random one.
    """
    report, begun = Report(), time.monotonic()
    packed, decoders = hostile_shards.Packed(folder / "packed"), hostile_sources.Decoders(folder / "decoders")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def run(name: str, part: str, work: Callable[[], Counter[str]]) -> None:
        (folder / "now").write_text(name, errors="backslashreplace")
        at = time.monotonic()
        try:
            with deadline(SECONDS):
                outcomes = work()
        except (Exception, LateError):
            report.findings.append(f"{name}: {traceback.format_exc(limit=-6)}")
            outcomes = Counter({"FINDING": 1})
        report.add(part, outcomes, time.monotonic() - at)

    if start == 0 and only is None:
        rng = np.random.default_rng(seed)
        for made in (decoders.by_hand(rng, folder), packed.by_hand(rng), hostile_sources.by_hand(rng, folder)):
            for name, work in made:
                run(f"by hand {name}", name.partition(":")[0], work)
    number = start if only is None else only
    while report.cases < cases:
        (folder / "next").write_text(str(number + 1))
        rng, chosen = np.random.default_rng([seed, number]), part or PARTS[number % len(PARTS)]
        if chosen == "source":
            work: Callable[[], Counter[str]] = partial(hostile_sources.random, rng, folder)
        else:
            work = partial({"header": decoders.random, "shard": packed.random}[chosen], rng)
        run(f"case {number} of seed {seed}, {chosen}", chosen, work)
        number += 1
        if only is not None:
            break
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report.peak_megabytes, report.grown_megabytes = after >> 10, (after - before) >> 10
    report.seconds = round(time.monotonic() - begun, 1)
    return report


def child(cases: int, seed: int, folder: Path, start: int, only: int | None, part: str) -> None:
    """One process of a campaign, with limits of its own; writes `folder/report`."""
    faulthandler.enable()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, used + HEADROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    report = campaign(cases, seed, folder, start, only, part)
    (folder / "report").write_text(json.dumps(vars(report)))


def supervise(cases: int, seed: int, only: int | None = None, part: str = "", silence: float = 120) -> Report:
    """A campaign in child processes: one that dies, or says nothing for `silence` seconds, is a finding."""
    total, start = Report(), 0
    while total.cases < cases:
        with tempfile.TemporaryDirectory(prefix="hostile-") as name, open(Path(name) / "stderr", "wb") as stderr:
            folder = Path(name)
            arguments = [
                "--child",
                name,
                "--cases",
                cases - total.cases,
                "--seed",
                seed,
                "--start",
                start,
                "--part",
                part,
            ]
            arguments += [] if only is None else ["--only", only]
            command = [sys.executable, __file__, *map(str, arguments)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
            process = subprocess.Popen(command, stderr=stderr, env=environment)
            now = folder / "now"
            while process.poll() is None:
                time.sleep(0.2)
                if now.exists() and time.time() - now.stat().st_mtime > silence:
                    process.kill()
            if (folder / "report").exists():
                value = json.loads((folder / "report").read_text())
                report = Report(**{**value, "outcomes": Counter(value["outcomes"])})
            else:
                report = Report(findings=[f"the process died ({process.returncode}) at {_said(now)}\n"])
                report.findings[0] += (folder / "stderr").read_text(errors="replace")[-2000:]
                report.add("crash", Counter({"FINDING": 1}), 0)
            total.merge(report)
            done, start = start, int(_said(folder / "next") or 0)
            if start <= done or only is not None:  # it died before the first random case
                break
    return total


def _said(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def main() -> int:
    """The command line; exit status 1 when there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case by its number")
    parser.add_argument("--part", default="", choices=["", *sorted(set(PARTS))], help="random cases of this part only")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.cases, given.seed, given.child, given.start, given.only, given.part)
        return 0
    report = supervise(given.cases, given.seed, given.only, given.part)
    for name, count in sorted(report.outcomes.items()):
        print(f"{count:8,}  {name}")
    print(f"{report.cases:8,}  cases in {report.seconds:.0f} s; peak {report.peak_megabytes:,} MiB of memory,")
    print(f"          {report.grown_megabytes:,} MiB more than before the first; slowest case: {report.slowest} s")
    for finding in report.findings:
        print(f"FINDING {finding}")
    return bool(report.findings)


if __name__ == "__main__":
    sys.exit(main())
