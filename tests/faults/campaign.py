"""The fault campaign: real runs are disturbed as they are on clusters, and have to end as if they were not.

    python tests/faults/campaign.py --kills 200 --out docs/results/faults.md

What a run leaves has to show that the fault struck; one that was too late is tried again. Then the same command is
started again, where it stopped; the record (every loss, bit for bit), the weights and the optimiser must be those of a
run that nobody disturbed. Exit code 1 when one is not, or was never struck. A disk that is full needs root.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1, 2)]
import torch
import torch._dynamo  # the optimiser imports it, which takes longer than a run
from mlflow_server import Server, recorded, stored
from object_store import ObjectServer
from processes import ROOT, TINY, finish, record, same_state, start
from runs import Bench, Child, Fault, Trial, lines, lost

from foundation.config import Config, load
from foundation.training import run as training
from foundation.training.mlflow_store import mlflow_client
from foundation.training.places import place
from foundation.training.standing import Facts, read
from foundation.training.step import train_step
from shards import synthetic
from shards.pack import SourceSpec, pack

SAMPLES, GOAL = 160, 56
TRIES = 5  # how often a fault may come too late
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SPOILT = [32, 104, 112]  # samples before the updates of several_runs.py that have no finite loss


def said(words: str, run: Path, printed: str) -> str:
    """These words, if the last error that a run printed has them: that is what a person sees."""
    *_, error = ("", *(line for line in printed.splitlines() if "Error: " in line))
    return f"ended: «{words}»" if words in error else ""


def standing(run: Path) -> Facts:
    """What MLflow has of a run, by its own account."""
    return read(run) or Facts("")


class Campaign:
    """The faults, each a method that yields its trials."""

    ALL = ("ranks", "disk", "read_only", "storm", "clock", "shard", "cache", "killed", "tracking")

    def __init__(self, root: Path, kills: int, once: bool = False) -> None:
        self.root, self.kills, self.once, self.rng, self.number = root, kills, once, random.Random(0), 0
        self.catalog = root / "catalog"
        kinds = (*synthetic.CLASSES, "background", "clutter")
        chips = synthetic.generate("pretrain", kinds, 16, 40, 0, labelled=False)
        pack(self.catalog, [SourceSpec("chips", records=chips)], shard_bytes=8_000)
        self.yaml = root / "tiny.yaml"
        # Two lanes, each of ten blocks: at any moment most shards have still to be opened.
        self.yaml.write_text(TINY.format(root=root, catalog=self.catalog).replace("lanes: 8", "lanes: 2"))
        self.bench = Bench(self.config("whole"))

    def config(self, name: str, *more: str) -> Config:
        overrides = [f"train.samples={SAMPLES}", f"name={name}", "monitor.images=0", "train.checkpoint_every=32", *more]
        return load(self.yaml, overrides)

    def goal(self) -> int:
        """Some update in the middle of a run."""
        return 8 * self.rng.randrange(1, SAMPLES // 8 - 2)

    def times(self, number: int) -> range:
        """How often a fault is tried."""
        return range(1 if self.once else number)

    def trial(self, fault: Fault, *more: str, goal: int = GOAL) -> Trial:
        """A trial in which the run was struck, or the last of TRIES."""
        for late in range(TRIES):
            self.number += 1
            config = self.config(f"fault-{self.number}", *more)
            trial = self.bench.trial(fault, config, goal)._replace(late=late)
            if not trial.missed:
                break
        return trial

    def killed(self) -> Iterator[Trial]:
        """SIGKILL at random moments: inside an update, a line, a save."""

        def kill(child: Child, _: Path) -> None:
            time.sleep(self.rng.uniform(0, 0.05))
            child.send(signal.SIGKILL)

        def found(run: Path, _: str) -> str:
            return "killed inside a save" if place(run / "checkpoints").interrupted() else "killed"

        for _ in range(self.kills):
            yield self.trial(Fault("SIGKILL", kill, -signal.SIGKILL, found), goal=self.goal())

    def storm(self) -> Iterator[Trial]:
        """A scheduler that asks many times: SIGTERM and SIGUSR2 by turns, until the run has ended."""
        sent = 0

        def inject(child: Child, _: Path) -> None:
            nonlocal sent
            sent = 0
            while not child.over():
                child.send(signal.SIGUSR2 if sent % 2 else signal.SIGTERM)
                sent += 1
                time.sleep(0.001)

        def found(run: Path, _: str) -> str:
            *events, stop = lines(run / "events.jsonl")
            saves = [event["kind"] for event in events if event["position"] == stop["position"]].count("checkpoint")
            told = sent > 2 and stop["reason"] in ("SIGTERM", "SIGUSR2")
            return f"saved once, told {sent} times" if told and saves == 1 else ""

        for _ in self.times(5):
            yield self.trial(Fault("SIGTERM storm", inject, 85, found), goal=self.goal())

    def disk(self) -> Iterator[Trial]:
        """A disk of its own that becomes full."""
        apart = self.root / "disk"
        apart.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "none", str(apart)], check=False).returncode:
            print("NOT RUN  disk full: a disk of its own needs root", flush=True)
            return
        filler = apart / "filler"

        def fill(*_: object) -> None:
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass

        def heal() -> None:
            filler.unlink(missing_ok=True)

        fault = Fault("disk full", fill, 1, partial(said, os.strerror(errno.ENOSPC)), heal=heal)
        try:
            for _ in self.times(3):
                yield self.trial(fault, f"run_root={apart}")
        finally:
            subprocess.run(["umount", "-l", str(apart)], check=False)

    def read_only(self) -> Iterator[Trial]:
        """A disk where nothing can be opened or renamed from a moment on."""
        flag = self.root / "read-only"

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
            if event == "open" and isinstance(arguments[0], str):
                changes = bool(set(arguments[1] or "") & set("wxa+") or (arguments[2] or 0) & WRITING)
            if changes and str(self.root / "runs") in str(arguments[0]) and os.path.exists(flag):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), arguments[0])

        found = partial(said, os.strerror(errno.EROFS))
        more: dict[str, Any] = {"prepare": lambda: sys.addaudithook(hook), "heal": lambda: flag.unlink(missing_ok=True)}
        for _ in self.times(3):
            yield self.trial(Fault("disk read-only", lambda *_: flag.touch(), 1, found, **more))

    def clock(self) -> Iterator[Trial]:
        """The clock jumps by days, forwards and backwards, while the run goes on."""
        real, flag = time.time, self.root / "jump"

        def prepare(days: int) -> None:
            time.time = lambda: real() + 86_400 * days * flag.exists()

        def found(days: int, run: Path, _: str) -> str:
            times = [row["time"] for row in lines(run / "metrics.jsonl")]
            steps = [round((b - a) / 86_400) for a, b in pairwise(times)]
            return f"{days} days between two lines" if days in steps else ""

        for days in (-30, -1, 1, 30)[: len(self.times(4))]:
            more: dict[str, Any] = {"prepare": partial(prepare, days), "heal": lambda: flag.unlink(missing_ok=True)}
            yield self.trial(Fault("clock jump", lambda *_: flag.touch(), 0, partial(found, days), **more))

    def shard(self) -> Iterator[Trial]:
        """Bytes of every shard change under the run, and are restored when it has said so and stopped."""
        good = {file: file.read_bytes() for file in self.catalog.glob("*.tar")}

        def damage(*_: object) -> None:
            for file in good:
                with file.open("r+b") as opened:
                    for at in range(512 * 3, file.stat().st_size, 997):
                        opened.seek(at)
                        opened.write(b"\xff")

        def heal() -> None:
            for file, content in good.items():
                file.write_bytes(content)

        fault = Fault("corrupt shard", damage, 1, partial(said, "is not what was packed"), heal=heal)
        for _ in self.times(3):
            yield self.trial(fault, "data.corrupt=stop", goal=self.goal() // 2)

    def cache(self) -> Iterator[Trial]:
        """The node's cache of a remote catalog is deleted under the run, with shards that it was about to open."""
        files = {f"/small/{file.name}": file.read_bytes() for file in self.catalog.iterdir()}
        cache, gone = self.root / "cache", self.root / "cache-gone"
        with ObjectServer(files) as server:
            deleted = 0

            def delete(*_: object) -> None:
                nonlocal deleted
                cache.rename(gone)  # all at once
                deleted = len(server.gets(".tar"))
                shutil.rmtree(gone)

            def found(*_: object) -> str:
                paths = [request.path for request in server.gets(".tar")]
                again = set(paths[:deleted]) & set(paths[deleted:])
                return f"{len(again)} shards fetched again" if again else ""

            def heal() -> None:
                shutil.rmtree(cache, ignore_errors=True)
                server.requests.clear()

            fault = Fault("cache deleted", delete, 0, found, heal=heal)
            for _ in self.times(3):
                yield self.trial(fault, f"data.catalog={server.url}/small", f"data.cache={cache}")

    def tracking(self) -> Iterator[Trial]:
        """An MLflow server that is not there, and one that dies under the run: it has every line in the end.

        The run waits at its goal, since it is faster than the first answer of a server.
        """
        go, parent = self.root / "go", os.getpid()

        def waiting(learner: Any, batches: Any, position: int, limit: float) -> Any:
            while position >= GOAL and not go.exists() and os.getppid() == parent:
                time.sleep(0.01)
            return train_step(learner, batches, position, limit)

        def prepare() -> None:
            mock.patch.object(training, "train_step", waiting).start()

        def silent(printed: str) -> bool:
            return "MLflow does not answer" in printed

        def absent(child: Child, _: Path) -> None:
            child.until(lambda: silent(child.log.read_text()))
            go.touch()

        def kill(child: Child, run: Path) -> None:
            child.until(lambda: standing(run).sent == (run / "metrics.jsonl").stat().st_size)
            server.kill()
            go.touch()

        def missing(run: Path, printed: str) -> str:
            left = (run / "metrics.jsonl").read_bytes()[standing(run).sent :].count(b"\n")
            return f"{left} of {SAMPLES // 8} lines not sent" if left and silent(printed) else ""

        def heal() -> None:
            go.unlink(missing_ok=True)
            server.start()

        def caught_up(run: Path) -> bool:
            code, _ = finish(start("track", run), 300)
            client, run_id = mlflow_client()[0](tracking_uri=server.uri), standing(run).run_id or ""
            return code == 0 and stored(client, run_id) == recorded(run)

        folder = self.root / "mlflow"
        folder.mkdir()
        server = Server(folder)
        faults = ("MLflow absent", absent, server.kill), ("MLflow killed", kill, server.start)
        try:
            for name, inject, before in faults:
                for _ in self.times(2):
                    before()
                    fault = Fault(name, inject, 0, missing, prepare, heal, caught_up)
                    yield self.trial(fault, "tracking.mlflow=true", f"tracking.uri={server.uri}")
        finally:
            server.kill()

    def ranks(self) -> Iterator[Trial]:
        """One of two processes is slow, or has a loss that is not finite: no rank may go on alone."""
        common = (f"train.samples={SAMPLES}", "monitor.images=0", "train.checkpoint_every=32")
        names = ("pair", "pair-slow", "pair-spoilt")
        runs = [item for name in names for item in ("--", *common, f"name={name}")][1:]
        script = str(ROOT / "tests" / "distributed" / "several_runs.py")
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, str(self.yaml))
        process = start(*runs, program=launcher)
        try:
            code, printed = finish(process, 300)
        finally:
            process.terminate()
        whole, slow, spoilt = (self.root / "runs" / name for name in names)
        if code:
            yield Trial("slow or spoilt rank", code, False, False, 0, 0, None, printed[-300:])
            return
        yield _slow(slow, whole)
        yield _spoilt(spoilt, whole)

    def all(self, only: Sequence[str]) -> Generator[Trial, None, None]:
        for name in only:
            yield from getattr(self, name)()


def _alike(run: Path) -> bool:
    """Whether both ranks ended with the same weights."""
    digests = {(run / f"rank-{rank}.sha256").read_text() for rank in range(2)}
    return len(digests) == 1


def _slow(run: Path, whole: Path) -> Trial:
    """Updates have to have taken as long as the rank slept, and most lines to name it."""
    rows = lines(run / "metrics.jsonl")
    each = (rows[-1]["time"] - rows[0]["time"]) / (len(rows) - 1)
    named = sum(row["slowest_rank"] == 1 for row in rows)
    struck = each > 0.1 and named > len(rows) / 2  # the other one may have to wait for a busy machine
    same = record(run) == record(whole) and same_state(run, whole) and _alike(run)
    note = f"{each:.2f} s an update, rank 1 named in {named} of {len(rows)} lines"
    return Trial("slow rank", 0, struck, same, *lost(run, whole, 8), None, note)


def _spoilt(run: Path, whole: Path) -> Trial:
    """The guard has to say which updates were spoilt; lines before the first are as ever, and all samples."""
    skipped = [row["position"] for row in lines(run / "events.jsonl") if row["kind"] == "skipped"]
    rows, before = record(run), SPOILT[0] // 8
    without = [row["position"] - 8 for row in rows if row["grad_norm"] is None]
    fine = without == SPOILT and rows[:before] == record(whole)[:before] and rows[-1]["position"] == SAMPLES
    note = f"{len(skipped)} updates were not made, on no rank"
    return Trial("NaN on one rank", 0, skipped == SPOILT, fine and _alike(run), *lost(run, whole, 8), None, note)


def table(trials: list[Trial]) -> str:
    """One row per kind of fault, as Markdown; a run that was not struck counts as none."""
    counted = ("injected", "survived", "samples lost", "checkpoints lost")
    names = ("fault", *counted, "s to recover: median, most", "too late, tried again", "note")
    out = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    for fault in dict.fromkeys(trial.fault for trial in trials):
        rows = [trial for trial in trials if trial.fault == fault]
        again = [r.seconds for r in rows if r.seconds is not None]
        time_text = f"{statistics.median(again):.2f}, {max(again):.2f}" if again else "never stopped"
        notes = Counter(r.note for r in rows)
        note = ", ".join(f"{n} x {text}" for text, n in notes.most_common()) if len(notes) == 2 else rows[-1].note
        counts = (sum(r.struck for r in rows), sum(r.struck and r.survived for r in rows))
        gone = (sum(r.lost_samples for r in rows), sum(r.lost_checkpoints for r in rows))
        row = (fault, *counts, *gone, time_text, sum(r.late for r in rows), note)
        out.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(out) + "\n"


def _ended(*_: object) -> None:
    """An end on request is one by an exception, so that no server, disk or run stays behind."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


def main() -> int:
    """Run the campaign and print or write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--once", action="store_true", help="all but kills once, in a third of the time")
    parser.add_argument("--only", nargs="+", choices=Campaign.ALL, default=Campaign.ALL, help="kinds of faults")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _ended)
    torch.set_num_threads(1)
    training.publish = lambda *_: None  # the report is the same with and without a fault
    trials = []
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Campaign(Path(folder), options.kills, options.once).all(options.only)) as made,
    ):
        for trial in made:
            trials.append(trial)
            seconds = "" if trial.seconds is None else f"{trial.seconds:.2f} s"
            print(f"{'ok' if trial.good else 'BAD':<4}{trial.fault:<18}{seconds:>7}  {trial.note}", flush=True)
    text = table(trials)
    print(text)
    if options.out:
        options.out.write_text(text)
    return int(not all(trial.good for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
